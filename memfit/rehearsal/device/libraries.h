/* What the stand-ins of NVIDIA's libraries share. */
#ifndef MEMFIT_LIBRARIES_H
#define MEMFIT_LIBRARIES_H

#include "device.h"

/* A handle of any of the libraries. Theirs are never reached with one: whatever takes a handle is
   defined here, and what takes none (descriptors, versions, texts of errors) stays theirs. */
typedef struct {
    void *stream;
    int pointer_mode, math_mode, atomics_mode, sm_count, emulation[5];
    int *mantissa_bits;
    void *held; /* addresses of cuBLAS's own */
} Handle;

/* libraries.c */
Status create_handle(Handle **handle);
Status destroy_handle(Handle *handle);
Status library_call(const Handle *handle); /* one launch on the handle's stream, which does nothing */
Status set_stream(Handle *handle, void *stream);
Status get_stream(const Handle *handle, void **stream);
/* A function of the library that torch brought, or NULL where there is none. */
void *real_function(const char *soname, const char *name);
/* A matrix of columns, or a vector, between the host and a device. */
void copy_columns(void *to, size_t to_stride, const void *from, size_t from_stride, size_t width,
                  size_t count);

/* What is not counted, because cuDNN says its size to a handle of a real device only. The watch asks
   which of it was used. */
enum { PLAIN_RECURRENCE = 1, DROPOUT_STATES = 2, CTC_WORKSPACE = 4, BATCH_NORM_WORKSPACE = 8 };
void leave_out(unsigned what);

/* Work on a device. The handle comes first in all of these libraries. */
#define COMPUTES(name) \
    API Status name(const Handle *handle) { return library_call(handle); }

/* What answers always the same: mostly the status of a library that does not do it. */
#define RETURNS(name, status) \
    API Status name(void) { return status; }

/* A function of the four BLAS types: single, double, complex, double complex. */
#define FOUR(macro, before, after) \
    macro(before##S##after) macro(before##D##after) macro(before##C##after) macro(before##Z##after)

/* A function whose result goes to its k-th argument (from 0). All arguments before it are integers
   or pointers: each takes a register or eight bytes of the stack, on x86-64 as on aarch64. */
#define ARGUMENTS \
    UNUSED uintptr_t a0, UNUSED uintptr_t a1, UNUSED uintptr_t a2, UNUSED uintptr_t a3, \
        UNUSED uintptr_t a4, UNUSED uintptr_t a5, UNUSED uintptr_t a6, UNUSED uintptr_t a7, \
        UNUSED uintptr_t a8, UNUSED uintptr_t a9, UNUSED uintptr_t a10, UNUSED uintptr_t a11, \
        UNUSED uintptr_t a12, UNUSED uintptr_t a13, UNUSED uintptr_t a14, UNUSED uintptr_t a15, \
        UNUSED uintptr_t a16, UNUSED uintptr_t a17, UNUSED uintptr_t a18, UNUSED uintptr_t a19
#define ANSWERS_INT(name, k) \
    API Status name(ARGUMENTS) { *(int *)a##k = 0; return OK; }
#define ANSWERS_SIZE(name, k) \
    API Status name(ARGUMENTS) { *(size_t *)a##k = 0; return OK; }
#define LEAVES_OUT_SIZE(name, k, what) \
    API Status name(ARGUMENTS) { leave_out(what); *(size_t *)a##k = 0; return OK; }
#define ANSWERS_SIZES(name, k, l) \
    API Status name(ARGUMENTS) { *(size_t *)a##k = 0; *(size_t *)a##l = 0; return OK; }

#endif
