/* The runtime's devices, errors and allocation calls. */
#include "device.h"

#include <stdio.h>
#include <string.h>

#include "streams.h"

static __thread int current;
static __thread Status last_error;

int current_device(void) { return current; }

Status fail(Status error) {
    if (error) last_error = error;
    return error;
}

Status set_current_device(int device) {
    if (is_forked()) return NOT_INITIALIZED;
    if (device < 0 || device >= card()->num_gpus) return INVALID_DEVICE;
    current = device;
    return OK;
}

/* Source: the enumerations cudaError and CUresult of the documented API. */
static const struct {
    Status error;
    const char *runtime, *driver, *text;
} ERRORS[] = {
    {0, "cudaSuccess", "CUDA_SUCCESS", "no error"},
    {1, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "cudaErrorInitializationError", "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "cudaErrorCudartUnloading", "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {9, "cudaErrorInvalidConfiguration", "CUDA_ERROR_UNKNOWN", "invalid configuration argument"},
    {35, "cudaErrorInsufficientDriver", "CUDA_ERROR_UNKNOWN", "CUDA driver version is insufficient for CUDA runtime version"},
    {98, "cudaErrorInvalidDeviceFunction", "CUDA_ERROR_UNKNOWN", "invalid device function"},
    {100, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "cudaErrorInvalidKernelImage", "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "cudaErrorDeviceUninitialized", "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {217, "cudaErrorPeerAccessUnsupported", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"},
    {301, "cudaErrorFileNotFound", "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {400, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "cudaErrorNotReady", "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {704, "cudaErrorPeerAccessAlreadyEnabled", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {705, "cudaErrorPeerAccessNotEnabled", "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"},
    {712, "cudaErrorHostMemoryAlreadyRegistered", "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "cudaErrorHostMemoryNotRegistered", "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED", "operation not supported: memfit's rehearsal does not have it"},
    {900, "cudaErrorStreamCaptureUnsupported", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "cudaErrorStreamCaptureUnmatched", "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {907, "cudaErrorCapturedEvent", "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "cudaErrorStreamCaptureWrongThread", "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
};
#define NUM_ERRORS (sizeof ERRORS / sizeof *ERRORS)

const char *error_name(int error, int is_driver) {
    for (size_t i = 0; i < NUM_ERRORS; i++)
        if (ERRORS[i].error == error) return is_driver ? ERRORS[i].driver : ERRORS[i].runtime;
    return is_driver ? "CUDA_ERROR_UNKNOWN" : "cudaErrorUnknown";
}
const char *error_text(int error) {
    for (size_t i = 0; i < NUM_ERRORS; i++)
        if (ERRORS[i].error == error) return ERRORS[i].text;
    return "unknown error";
}

API const char *cudaGetErrorString(Status error) { return error_text(error); }
API const char *cudaGetErrorName(Status error) { return error_name(error, 0); }
API Status cudaPeekAtLastError(void) { return last_error; }
API Status cudaGetLastError(void) {
    Status error = last_error;
    last_error = OK;
    return error;
}

/* ---- devices */

API Status cudaGetDeviceCount(int *num) {
    *num = is_forked() ? 0 : card()->num_gpus;
    return fail(is_forked() ? NOT_INITIALIZED : *num ? OK : NO_DEVICE);
}
API Status cudaGetDevice(int *device) {
    *device = current;
    return fail(is_forked() ? NOT_INITIALIZED : OK);
}
API Status cudaSetDevice(int device) {
    Status status = set_current_device(device);
    if (status) return fail(status);
    device_lock();
    touch_device(device);
    device_unlock();
    return OK;
}
API Status cudaInitDevice(int device, unsigned device_flags UNUSED, unsigned flags UNUSED) {
    int before = current;
    Status status = cudaSetDevice(device);
    current = before;
    return status;
}
API Status cudaSetValidDevices(int *devices UNUSED, int num UNUSED) { return OK; }
API Status cudaChooseDevice(int *device, const void *properties UNUSED) { return *device = 0, OK; }
API Status cudaDeviceReset(void) { return OK; }
API Status cudaGetDeviceFlags(unsigned *flags) { return *flags = 0, OK; }
API Status cudaSetDeviceFlags(unsigned flags UNUSED) { return OK; }
API Status cudaDeviceGetLimit(size_t *value, int limit) { return *value = limit == 0 ? 1024 : 8 * MIB, OK; }
API Status cudaDeviceSetLimit(int limit UNUSED, size_t value UNUSED) { return OK; }
API Status cudaDeviceGetCacheConfig(int *config) { return *config = 0, OK; }
API Status cudaDeviceSetCacheConfig(int config UNUSED) { return OK; }
API Status cudaDeviceGetSharedMemConfig(int *config) { return *config = 1, OK; }
API Status cudaDeviceSetSharedMemConfig(int config UNUSED) { return OK; }
API Status cudaCtxResetPersistingL2Cache(void) { return OK; }
API Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
API Status cudaDeviceGetPCIBusId(char *text, int room, int device) {
    if (device < 0 || device >= card()->num_gpus) return fail(INVALID_DEVICE);
    device_pci_bus_id(device, text, (size_t)room);
    return OK;
}
API Status cudaDeviceGetByPCIBusId(int *device, const char *text) {
    for (int i = 0; i < card()->num_gpus; i++) {
        char known[32];
        device_pci_bus_id(i, known, sizeof known);
        size_t n = strlen(text), m = strlen(known); /* the domain may have four digits or eight */
        if (n >= m && !strcasecmp(text + n - m, known)) return *device = i, OK;
    }
    return fail(INVALID_DEVICE);
}
API Status cudaDriverGetVersion(int *version) { return *version = cuda_version(), OK; }
API Status cudaRuntimeGetVersion(int *version) { return *version = cuda_version(), OK; }
API Status cudaProfilerStart(void) { return OK; }
API Status cudaProfilerStop(void) { return OK; }

/* ---- peer access: every device of a process reaches every other */

static uint16_t peers[MAX_DEVICES];
API Status cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    int num = card()->num_gpus;
    if (device < 0 || device >= num || peer < 0 || peer >= num) return fail(INVALID_DEVICE);
    return *can = device != peer, OK;
}
static Status change_peer(int peer, int is_on) {
    if (peer < 0 || peer >= card()->num_gpus || peer == current) return fail(INVALID_DEVICE);
    device_lock();
    int was_on = peers[current] >> peer & 1;
    peers[current] = (uint16_t)((peers[current] & ~(1u << peer)) | (unsigned)is_on << peer);
    device_unlock();
    if (was_on == is_on) return fail(is_on ? PEER_ACCESS_ALREADY_ENABLED : PEER_ACCESS_NOT_ENABLED);
    return OK;
}
API Status cudaDeviceEnablePeerAccess(int peer, unsigned flags UNUSED) { return change_peer(peer, 1); }
API Status cudaDeviceDisablePeerAccess(int peer) { return change_peer(peer, 0); }
API Status cudaDeviceGetP2PAttribute(int *value, int attribute, int from, int to) {
    /* 1: performance rank, 2: access, 3: native atomics, 4: arrays */
    return *value = from != to && attribute != 1, OK;
}

/* ---- sharing between processes has no meaning without a device that both see */

API Status cudaIpcGetMemHandle(void *handle UNUSED, void *pointer UNUSED) { return fail(NOT_SUPPORTED); }
API Status cudaIpcOpenMemHandle(void **pointer) { return *pointer = 0, fail(NOT_SUPPORTED); }
API Status cudaIpcCloseMemHandle(void *pointer UNUSED) { return fail(NOT_SUPPORTED); }
API Status cudaIpcGetEventHandle(void *handle UNUSED, void *event UNUSED) { return fail(NOT_SUPPORTED); }
API Status cudaIpcOpenEventHandle(void **event) { return *event = 0, fail(NOT_SUPPORTED); }
