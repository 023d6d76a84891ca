/* Memory of the host that the device can reach: pinned, registered, managed; and what a pointer is.

   Pinned memory is ordinary memory. Managed memory is too, and is not taken off the device's budget:
   the real driver moves it in and out as there is room. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>

#include "streams.h"

enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2, MANAGED = 3 };

typedef struct {
    char *base;
    size_t num_bytes;
    int kind, device, is_registered;
    unsigned flags;
} Pinned;
static Pinned *pinned;
static size_t num_pinned, room_pinned;

static Status remember(Pinned what) {
    Status status = OK;
    device_lock();
    if (num_pinned == room_pinned) {
        size_t wanted = room_pinned ? 2 * room_pinned : 64;
        Pinned *larger = realloc(pinned, wanted * sizeof *pinned);
        if (larger) {
            pinned = larger;
            room_pinned = wanted;
        } else status = OUT_OF_MEMORY;
    }
    if (!status) pinned[num_pinned++] = what;
    touch_device(what.device);
    device_unlock();
    return status;
}

static Pinned *pinned_at(const void *pointer) {
    for (size_t i = 0; i < num_pinned; i++)
        if ((const char *)pointer >= pinned[i].base && (const char *)pointer < pinned[i].base + pinned[i].num_bytes)
            return &pinned[i];
    return 0;
}

static Status forget(void *pointer, int is_registered) {
    Status status = INVALID_VALUE;
    device_lock();
    Pinned *at = pinned_at(pointer);
    if (at && at->base == (char *)pointer && at->is_registered == is_registered) {
        *at = pinned[--num_pinned];
        status = OK;
    }
    device_unlock();
    return status;
}

static Status host_allocate(void **pointer, size_t num_bytes, int kind, unsigned flags) {
    *pointer = 0;
    Status status = forbid_while_capturing();
    if (status || !num_bytes) return fail(status);
    if (posix_memalign(pointer, 4096, num_bytes)) return fail(OUT_OF_MEMORY);
    status = remember((Pinned){*pointer, num_bytes, kind, current_device(), 0, flags});
    if (status) free(*pointer);
    return fail(status);
}

API Status cudaHostAlloc(void **pointer, size_t num_bytes, unsigned flags) { return host_allocate(pointer, num_bytes, HOST, flags); }
API Status cudaMallocHost(void **pointer, size_t num_bytes) { return host_allocate(pointer, num_bytes, HOST, 0); }
API Status cudaMallocManaged(void **pointer, size_t num_bytes, unsigned flags) {
    return num_bytes ? host_allocate(pointer, num_bytes, MANAGED, flags) : fail(INVALID_VALUE);
}
API Status cudaFreeHost(void *pointer) {
    if (!pointer) return OK;
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (forget(pointer, 0)) return fail(INVALID_VALUE);
    free(pointer);
    return OK;
}
API Status cudaHostRegister(void *pointer, size_t num_bytes, unsigned flags) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (!pointer || !num_bytes) return fail(INVALID_VALUE);
    device_lock();
    int is_known = pinned_at(pointer) != 0;
    device_unlock();
    if (is_known) return fail(712); /* cudaErrorHostMemoryAlreadyRegistered */
    return fail(remember((Pinned){pointer, num_bytes, HOST, current_device(), 1, flags}));
}
API Status cudaHostUnregister(void *pointer) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    return fail(forget(pointer, 1) ? 713 : OK); /* cudaErrorHostMemoryNotRegistered */
}
API Status cudaHostGetDevicePointer(void **device, void *host, unsigned flags UNUSED) { return *device = host, OK; }
API Status cudaHostGetFlags(unsigned *flags, void *host) {
    device_lock();
    Pinned *at = pinned_at(host);
    *flags = at ? at->flags : 0;
    device_unlock();
    return fail(at ? OK : INVALID_VALUE);
}
API Status cudaMemAdvise(void) { return OK; }
API Status cudaMemAdvise_v2(void) { return OK; }
API Status cudaMemPrefetchAsync(void) { return OK; }
API Status cudaMemPrefetchAsync_v2(void) { return OK; }
API Status cudaStreamAttachMemAsync(void) { return OK; }

/* ---- device memory, as the runtime's calls */

API Status cudaFree(void *pointer) {
    Status status = forbid_while_capturing();
    if (status) return fail(status);
    device_lock();
    touch_device(current_device());
    Pinned *managed = pointer ? pinned_at(pointer) : 0;
    int is_managed = managed && managed->kind == MANAGED && managed->base == (char *)pointer;
    if (is_managed) *managed = pinned[--num_pinned];
    else status = pool_release(pointer) ? OK : release(pointer);
    device_unlock();
    if (is_managed) free(pointer);
    return fail(status);
}
API Status cudaMalloc(void **pointer, size_t num_bytes) {
    *pointer = 0;
    Status status = forbid_while_capturing();
    if (status) return fail(status);
    device_lock();
    status = allocate(pointer, num_bytes, current_device());
    device_unlock();
    return fail(status);
}
API Status cudaMallocPitch(void **pointer, size_t *pitch, size_t width, size_t height) {
    *pitch = (width + 511) / 512 * 512;
    return cudaMalloc(pointer, *pitch * height);
}
API Status cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    device_lock();
    touch_device(current_device());
    DeviceMemory memory = device_memory(current_device());
    device_unlock();
    if (free_bytes) *free_bytes = memory.free_bytes;
    if (total_bytes) *total_bytes = memory.total_bytes;
    return OK;
}

/* ---- what a pointer is */

typedef struct {
    int type, device;
    void *device_pointer, *host_pointer;
} Attributes; /* CUDA 13 has eight reserved numbers after these */

API Status cudaPointerGetAttributes(Attributes *a, const void *pointer) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    void *at = (void *)(uintptr_t)pointer;
    if (is_device_pointer(pointer)) {
        *a = (Attributes){DEVICE, device_of(pointer), at, 0};
        return OK;
    }
    *a = (Attributes){UNREGISTERED, -2, 0, at};
    device_lock();
    Pinned *found = pinned_at(pointer);
    if (found) *a = (Attributes){found->kind, found->device, at, at};
    device_unlock();
    return OK;
}

/* Source: the enumeration CUpointer_attribute. */
Status pointer_attribute(void *value, int attribute, const void *pointer) {
    Attributes a;
    Status status = cudaPointerGetAttributes(&a, pointer);
    if (status) return status;
    if (a.type == UNREGISTERED) return INVALID_VALUE;
    char *base = (char *)(uintptr_t)pointer;
    size_t num_bytes = 0;
    device_lock();
    if (a.type != DEVICE) {
        Pinned *found = pinned_at(pointer);
        base = found ? found->base : base;
        num_bytes = found ? found->num_bytes : 0;
    } else if (!(num_bytes = small_room(pointer, &base))) num_bytes = addresses_at(pointer, &base);
    device_unlock();
    switch (attribute) {
    case 1: *(void **)value = context_of(a.device); break;
    case 2: *(unsigned *)value = a.type == HOST ? 1 : 2; break; /* CU_MEMORYTYPE_HOST, _DEVICE */
    case 3: case 4: case 11: *(void **)value = attribute == 11 ? base : (char *)(uintptr_t)pointer; break;
    case 7: *(uint64_t *)value = (uint64_t)(uintptr_t)base; break; /* an identity */
    case 8: *(unsigned *)value = a.type == MANAGED; break;
    case 9: *(int *)value = a.device; break;
    case 12: *(size_t *)value = num_bytes; break;
    case 13: *(unsigned *)value = 1; break; /* it is mapped */
    case 6: case 10: case 14: case 15: *(unsigned *)value = 0; break; /* nothing that processes share */
    case 16: *(unsigned *)value = 3; break;                          /* may be read and written */
    case 17: *(void **)value = 0; break;
    default: return NOT_SUPPORTED;
    }
    return OK;
}
