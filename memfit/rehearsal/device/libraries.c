/* Handles of libraries, and the way to the library that torch brought. */
#include <dlfcn.h>
#include <stdlib.h>

#include "libraries.h"

enum { ALLOCATION_FAILED = 3 }; /* cuBLAS's; the others' differ, and a host is not out of 40 bytes */

Status create_handle(Handle **handle) {
    *handle = calloc(1, sizeof **handle);
    if (!*handle)
        return ALLOCATION_FAILED;
    device_lock();
    touch_device(current_device());
    device_unlock();
    return OK;
}

Status destroy_handle(Handle *handle) {
    free(handle);
    return OK;
}

static unsigned left_out;

void leave_out(unsigned what) { __atomic_or_fetch(&left_out, what, __ATOMIC_RELAXED); }
API unsigned memfit_rehearsal_left_out(void) { return __atomic_load_n(&left_out, __ATOMIC_RELAXED); }

Status library_call(const Handle *handle) {
    count_launch(handle ? handle->stream : NULL);
    return OK;
}

Status set_stream(Handle *handle, void *stream) {
    handle->stream = stream;
    return OK;
}

Status get_stream(const Handle *handle, void **stream) {
    *stream = handle->stream;
    return OK;
}

/* By its soname: torch has loaded it already. Not by RTLD_NEXT, which sees only what was loaded
   for all to see, and not by RTLD_DEFAULT, which would find the stand-in. */
void *real_function(const char *soname, const char *name) {
    void *library = dlopen(soname, RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
    if (!library)
        library = dlopen(soname, RTLD_LAZY | RTLD_LOCAL);
    return library ? dlsym(library, name) : NULL;
}

void copy_columns(void *to, size_t to_stride, const void *from, size_t from_stride, size_t width,
                  size_t count) {
    for (size_t i = 0; i < count; i++)
        device_copy((char *)to + i * to_stride, (const char *)from + i * from_stride, width);
}
