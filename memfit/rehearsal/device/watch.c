/* What memfit reads of a rehearsal: a small C interface, for ctypes. Reads of the device by the host
   are counted in copies.c, launches in streams.c. */
#include "memory.h"

API int memfit_rehearsal_version(void) { return 1; }

static DeviceMemory locked_memory(int device) {
    device_lock();
    DeviceMemory memory = device_memory(device);
    device_unlock();
    return memory;
}
API uint64_t memfit_rehearsal_used_bytes(int device) { return locked_memory(device).used_bytes; }
API uint64_t memfit_rehearsal_peak_bytes(int device) { return locked_memory(device).peak_bytes; }
API uint64_t memfit_rehearsal_free_bytes(int device) { return locked_memory(device).free_bytes; }
API uint64_t memfit_rehearsal_missing_bytes(int device) { return locked_memory(device).missing_bytes; }
API uint64_t memfit_rehearsal_num_failures(int device) { return locked_memory(device).num_failures; }
API void memfit_rehearsal_reset_peak(int device) {
    device_lock();
    if (device >= 0 && device < card()->num_gpus) reset_peak(device);
    device_unlock();
}
API uint64_t memfit_rehearsal_kept_bytes(void) {
    device_lock();
    size_t kept = kept_bytes();
    device_unlock();
    return kept;
}
/* What it knows of a tensor's values, and what it has computed in a kernel's place. */
API int memfit_rehearsal_copy(void *to, const void *from, size_t num_bytes) {
    return device_copy(to, from, num_bytes);
}
API void memfit_rehearsal_forget(const void *pointer, size_t num_bytes) {
    if (!is_device_pointer(pointer)) return;
    device_lock();
    forget_contents(pointer, num_bytes);
    device_unlock();
}
