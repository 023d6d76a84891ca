/* The driver's devices, contexts and memory, and how its functions are looked up.

   A context is a device's primary one; it is made when the device is first used. */
#include "streams.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static char contexts[MAX_DEVICES];
static __thread int stack[64], num_stacked;

void *context_of(int device) { return &contexts[device < 0 ? 0 : device]; }

static int device_of_context(const void *context) {
    ptrdiff_t device = (const char *)context - contexts;
    return device >= 0 && device < card()->num_gpus ? (int)device : -1;
}

static int is_touched(int device) {
    device_lock();
    int touched = device_memory(device).is_touched;
    device_unlock();
    return touched;
}

static Status use(int device) {
    Status status = set_current_device(device);
    if (status) return status;
    device_lock();
    touch_device(device);
    device_unlock();
    return OK;
}

API Status cuInit(unsigned flags UNUSED) { return is_forked() ? NOT_INITIALIZED : card()->num_gpus ? OK : NO_DEVICE; }
API Status cuDriverGetVersion(int *version) { return *version = cuda_version(), OK; }
API Status cuGetErrorString(Status error, const char **text) { return *text = error_text(error), OK; }
API Status cuGetErrorName(Status error, const char **name) { return *name = error_name(error, 1), OK; }

/* ---- devices */

static Status valid(int device) { return is_forked() ? NOT_INITIALIZED : device < 0 || device >= card()->num_gpus ? INVALID_DEVICE : OK; }

API Status cuDeviceGetCount(int *num) { return *num = card()->num_gpus, OK; }
API Status cuDeviceGet(int *device, int ordinal) { return *device = ordinal, valid(ordinal); }
API Status cuDeviceGetName(char *name, int room, int device) {
    if (valid(device)) return valid(device);
    return snprintf(name, (size_t)room, "%s", card()->name), OK;
}
API Status cuDeviceTotalMem_v2(size_t *num_bytes, int device) { return *num_bytes = card()->total_bytes, valid(device); }
ALSO(cuDeviceTotalMem, cuDeviceTotalMem_v2);
API Status cuDeviceGetUuid(unsigned char *uuid, int device) {
    return valid(device) ? valid(device) : device_uuid(device, uuid);
}
ALSO(cuDeviceGetUuid_v2, cuDeviceGetUuid);
extern Status cudaDeviceGetAttribute(int *value, int attribute, int device);
API Status cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
API Status cuDeviceComputeCapability(int *major, int *minor, int device) {
    return *major = card()->major, *minor = card()->minor, valid(device);
}
API Status cuDeviceGetPCIBusId(char *text, int room, int device) {
    if (!valid(device)) device_pci_bus_id(device, text, (size_t)room);
    return valid(device);
}
extern Status cudaDeviceGetByPCIBusId(int *device, const char *text);
API Status cuDeviceGetByPCIBusId(int *device, const char *text) { return cudaDeviceGetByPCIBusId(device, text); }
extern Status cudaDeviceCanAccessPeer(int *can, int device, int peer);
API Status cuDeviceCanAccessPeer(int *can, int device, int peer) { return cudaDeviceCanAccessPeer(can, device, peer); }
API Status cuDeviceGetP2PAttribute(int *value, int attribute, int from, int to) { return *value = from != to && attribute != 1, OK; }
API Status cuCtxEnablePeerAccess(void *context UNUSED, unsigned flags UNUSED) { return OK; }
API Status cuCtxDisablePeerAccess(void *context UNUSED) { return OK; }

/* ---- contexts */

API Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (valid(device)) return valid(device);
    if (flags) *flags = 0;
    return *is_active = is_touched(device), OK;
}
API Status cuDevicePrimaryCtxRetain(void **context, int device) {
    if (valid(device)) return valid(device);
    device_lock();
    touch_device(device);
    device_unlock();
    return *context = context_of(device), OK;
}
API Status cuDevicePrimaryCtxRelease_v2(int device) { return valid(device); }
API Status cuDevicePrimaryCtxReset_v2(int device) { return valid(device); }
API Status cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags UNUSED) { return valid(device); }
ALSO(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2);
ALSO(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset_v2);
ALSO(cuDevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags_v2);

API Status cuCtxGetCurrent(void **context) {
    *context = is_touched(current_device()) ? context_of(current_device()) : 0;
    return is_forked() ? NOT_INITIALIZED : OK;
}
API Status cuCtxSetCurrent(void *context) { return context ? use(device_of_context(context)) : OK; }
API Status cuCtxPushCurrent_v2(void *context) {
    if (num_stacked < 64) stack[num_stacked++] = current_device();
    return use(device_of_context(context));
}
API Status cuCtxPopCurrent_v2(void **context) {
    if (context) *context = context_of(current_device());
    return num_stacked ? use(stack[--num_stacked]) : INVALID_CONTEXT;
}
ALSO(cuCtxPushCurrent, cuCtxPushCurrent_v2);
ALSO(cuCtxPopCurrent, cuCtxPopCurrent_v2);
API Status cuCtxGetDevice(int *device) { return *device = current_device(), OK; }
API Status cuCtxGetDevice_v2(int *device, void *context) {
    return *device = context ? device_of_context(context) : current_device(), OK;
}
API Status cuCtxGetId(void *context, uint64_t *id) {
    return *id = 1 + (uint64_t)(context ? device_of_context(context) : current_device()), OK;
}
API Status cuCtxGetFlags(unsigned *flags) { return *flags = 0, OK; }
API Status cuCtxGetApiVersion(void *context UNUSED, unsigned *version) { return *version = (unsigned)cuda_version(), OK; }
API Status cuCtxCreate_v2(void **context, unsigned flags UNUSED, int device) { return cuDevicePrimaryCtxRetain(context, device); }
API Status cuCtxDestroy_v2(void *context UNUSED) { return OK; }
API Status cuCtxSynchronize(void) { return forbid_while_capturing(); }
ALSO(cuCtxCreate, cuCtxCreate_v2);
ALSO(cuCtxDestroy, cuCtxDestroy_v2);
ALSO(cuCtxSynchronize_v2, cuCtxSynchronize);
API Status cuCtxGetLimit(size_t *value, int limit) { return *value = limit == 0 ? 1024 : 8 * MIB, OK; }
API Status cuCtxSetLimit(int limit UNUSED, size_t value UNUSED) { return OK; }
API Status cuCtxGetCacheConfig(int *config) { return *config = 0, OK; }
API Status cuCtxSetCacheConfig(int config UNUSED) { return OK; }
API Status cuCtxResetPersistingL2Cache(void) { return OK; }
API Status cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
API Status cuStreamGetCtx(void *stream, void **context) { return *context = context_of(stream_of(stream)->device), OK; }
/* A log of errors for which there is nothing to say. */
API Status cuLogsRegisterCallback(void *callback UNUSED, void *data UNUSED, void **handle) {
    if (handle) *handle = context_of(0);
    return OK;
}
API Status cuLogsUnregisterCallback(void *handle UNUSED) { return OK; }
ALSO(cudaLogsRegisterCallback, cuLogsRegisterCallback);
ALSO(cudaLogsUnregisterCallback, cuLogsUnregisterCallback);
API Status cuProfilerStart(void) { return OK; }
API Status cuProfilerStop(void) { return OK; }

/* ---- memory: the runtime's calls */

extern Status cudaMalloc(void **pointer, size_t num_bytes), cudaFree(void *pointer);
extern Status cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
extern Status cudaHostAlloc(void **pointer, size_t num_bytes, unsigned flags), cudaFreeHost(void *pointer);
extern Status cudaMallocManaged(void **pointer, size_t num_bytes, unsigned flags);
extern Status cudaHostRegister(void *pointer, size_t num_bytes, unsigned flags), cudaHostUnregister(void *pointer);

API Status cuMemAlloc_v2(void **pointer, size_t num_bytes) { return cudaMalloc(pointer, num_bytes); }
API Status cuMemFree_v2(void *pointer) { return cudaFree(pointer); }
API Status cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) { return cudaMemGetInfo(free_bytes, total_bytes); }
API Status cuMemAllocHost_v2(void **pointer, size_t num_bytes) { return cudaHostAlloc(pointer, num_bytes, 0); }
API Status cuMemHostAlloc(void **pointer, size_t num_bytes, unsigned flags) { return cudaHostAlloc(pointer, num_bytes, flags); }
API Status cuMemFreeHost(void *pointer) { return cudaFreeHost(pointer); }
API Status cuMemAllocManaged(void **pointer, size_t num_bytes, unsigned flags) { return cudaMallocManaged(pointer, num_bytes, flags); }
API Status cuMemHostRegister_v2(void *pointer, size_t num_bytes, unsigned flags) { return cudaHostRegister(pointer, num_bytes, flags); }
API Status cuMemHostUnregister(void *pointer) { return cudaHostUnregister(pointer); }
API Status cuMemHostGetDevicePointer_v2(void **device, void *host, unsigned flags UNUSED) { return *device = host, OK; }
API Status cuMemAdvise(void) { return OK; }
API Status cuMemAdvise_v2(void) { return OK; }
API Status cuMemPrefetchAsync(void) { return OK; }
API Status cuMemPrefetchAsync_v2(void) { return OK; }
ALSO(cuMemAlloc, cuMemAlloc_v2);
ALSO(cuMemFree, cuMemFree_v2);
ALSO(cuMemGetInfo, cuMemGetInfo_v2);
ALSO(cuMemAllocHost, cuMemAllocHost_v2);
ALSO(cuMemHostRegister, cuMemHostRegister_v2);
ALSO(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2);
API Status cuPointerGetAttribute(void *value, int attribute, const void *pointer) { return pointer_attribute(value, attribute, pointer); }
API Status cuPointerGetAttributes(unsigned num, const int *attributes, void **values, const void *pointer) {
    for (unsigned i = 0; i < num; i++)
        if (pointer_attribute(values[i], attributes[i], pointer)) memset(values[i], 0, sizeof(int));
    return OK;
}
API Status cuPointerSetAttribute(const void *value UNUSED, int attribute UNUSED, const void *pointer UNUSED) { return OK; }
API Status cuStreamWriteValue32_v2(void *stream, void *to, uint32_t value, unsigned flags UNUSED) {
    return copy_later(to, &value, sizeof value, stream);
}
API Status cuStreamWriteValue64_v2(void *stream, void *to, uint64_t value, unsigned flags UNUSED) {
    return copy_later(to, &value, sizeof value, stream);
}
API Status cuStreamWaitValue32_v2(void) { return OK; }
API Status cuStreamWaitValue64_v2(void) { return OK; }
ALSO(cuStreamWriteValue32, cuStreamWriteValue32_v2);
ALSO(cuStreamWriteValue64, cuStreamWriteValue64_v2);
ALSO(cuStreamWaitValue32, cuStreamWaitValue32_v2);
ALSO(cuStreamWaitValue64, cuStreamWaitValue64_v2);

/* ---- functions by name */

static Status unknown_function(void) { return NOT_SUPPORTED; }

/* What a program of that version of CUDA means by a name. The documented API maps a name to its newest
   form: `cuMemAlloc` is `cuMemAlloc_v2`. A name that is not known is a function that says so. */
static void *function_of(const char *name, int version) {
    static void *self;
    if (!self) {
        Dl_info info;
        if (dladdr(contexts, &info)) self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    static const char *const suffixes[] = {"_v3", "_v2", ""};
    char full[128];
    void *function = 0;
    for (int i = version >= 13000 ? 0 : 1; i < 3 && self && !function; i++) {
        snprintf(full, sizeof full, "%s%s", name, suffixes[i]);
        function = dlsym(self, full);
    }
    union {
        Status (*function)(void);
        void *object;
    } otherwise = {unknown_function};
    return function || strncmp(name, "cu", 2) ? function : otherwise.object;
}

static Status look_up(const char *name, void **function, int version, int *result) {
    *function = function_of(name, version);
    if (result) *result = *function ? 0 : 1; /* found; no such symbol */
    return *function || result ? OK : NOT_FOUND;
}
API Status cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, uint64_t flags UNUSED, int *result) {
    return fail(look_up(name, function, (int)version, result));
}
API Status cudaGetDriverEntryPoint(const char *name, void **function, uint64_t flags UNUSED, int *result) {
    return fail(look_up(name, function, cuda_version(), result));
}
API Status cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags UNUSED, int *result) {
    return look_up(name, function, version, result);
}
API Status cuGetProcAddress(const char *name, void **function, int version, uint64_t flags UNUSED) {
    return look_up(name, function, version, 0);
}
