/* NVML, for torch and pynvml: the card, its memory, and this process as the only one on it.

   Both open `libnvidia-ml.so.1` by name. A second, empty library with this soname, which needs this
   one (libcuda.so.1, already loaded), answers: a look-up in it finds what is defined here.

   NVML numbers all devices of a machine, CUDA those of CUDA_VISIBLE_DEVICES. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

enum { /* nvmlReturn_t */
    NVML_INVALID_ARGUMENT = 2,
    NVML_NOT_SUPPORTED = 3,
    NVML_NOT_FOUND = 6,
    NVML_INSUFFICIENT_SIZE = 7,
};

/* A device of NVML: its index plus one. */
typedef void *NvmlDevice;

/* The numbers in CUDA_VISIBLE_DEVICES, up to the number of devices; -1 where it is not set, or
   names devices otherwise. */
static int visible(int numbers[MAX_DEVICES]) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    int found = 0;
    if (!text) return -1;
    while (*text && found < card()->num_gpus) {
        char *end;
        long number = strtol(text, &end, 10);
        if (end == text) return found ? found : -1;
        numbers[found++] = (int)number;
        text = *end == ',' ? end + 1 : end + strlen(end);
    }
    return found;
}

/* As many as the card's description says, and enough that CUDA_VISIBLE_DEVICES names none that is
   missing: a script that asks for «its» GPU 3 rehearses on the one there is. */
static int num_devices(void) {
    int numbers[MAX_DEVICES], count = card()->num_gpus;
    int num_visible = visible(numbers);
    for (int i = 0; i < num_visible; i++)
        if (numbers[i] >= count && numbers[i] < 1024) count = numbers[i] + 1;
    return count;
}

/* CUDA's number of an NVML device. */
static int runtime_device(NvmlDevice device) {
    int numbers[MAX_DEVICES], index = (int)(intptr_t)device - 1;
    int num_visible = visible(numbers);
    for (int i = 0; i < num_visible; i++)
        if (numbers[i] == index) return i;
    return index < card()->num_gpus ? index : 0;
}

static DeviceMemory memory_of(NvmlDevice device) {
    device_lock();
    DeviceMemory memory = device_memory(runtime_device(device));
    device_unlock();
    return memory;
}

#define ALWAYS(name, status) API Status name(void) { return status; }
#define ALIAS(name, of, parameters, arguments) API Status name parameters { return of arguments; }

/* ---- the library, the machine ---- */

ALWAYS(nvmlInit, OK)
ALWAYS(nvmlInit_v2, OK)
ALWAYS(nvmlInitWithFlags, OK)
ALWAYS(nvmlShutdown, OK)
API const char *nvmlErrorString(Status status) {
    switch (status) {
    case OK: return "Success";
    case NVML_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_NOT_SUPPORTED: return "Not Supported";
    case NVML_NOT_FOUND: return "Not Found";
    case NVML_INSUFFICIENT_SIZE: return "Insufficient Size";
    default: return "Unknown Error";
    }
}
/* The drivers that came with CUDA 12.8 and 13.0. */
API Status nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "%d.00", cuda_version() >= 13000 ? 580 : 570);
    return OK;
}
API Status nvmlSystemGetNVMLVersion(char *text, unsigned size) {
    snprintf(text, size, "%d.%d.00", cuda_version() / 1000, cuda_version() >= 13000 ? 580 : 570);
    return OK;
}
API Status nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = cuda_version();
    return OK;
}
ALIAS(nvmlSystemGetCudaDriverVersion, nvmlSystemGetCudaDriverVersion_v2, (int *version), (version))
API Status nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    FILE *file = fopen(path, "r");
    if (!file) return NVML_NOT_FOUND;
    int has_read = fgets(text, (int)size, file) != NULL;
    fclose(file);
    if (!has_read) return NVML_NOT_FOUND;
    text[strcspn(text, "\n")] = 0;
    return OK;
}

/* ---- devices ---- */

API Status nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)num_devices();
    return OK;
}
ALIAS(nvmlDeviceGetCount, nvmlDeviceGetCount_v2, (unsigned *count), (count))
API Status nvmlDeviceGetHandleByIndex_v2(unsigned index, NvmlDevice *device) {
    *device = (NvmlDevice)((uintptr_t)index + 1);
    return index < (unsigned)num_devices() ? OK : NVML_INVALID_ARGUMENT;
}
ALIAS(nvmlDeviceGetHandleByIndex, nvmlDeviceGetHandleByIndex_v2, (unsigned index, NvmlDevice *device), (index, device))
API Status nvmlDeviceGetIndex(NvmlDevice device, unsigned *index) {
    *index = (unsigned)(uintptr_t)device - 1;
    return OK;
}
ALIAS(nvmlDeviceGetMinorNumber, nvmlDeviceGetIndex, (NvmlDevice device, unsigned *index), (device, index))
API Status nvmlDeviceGetName(NvmlDevice device UNUSED, char *text, unsigned size) {
    snprintf(text, size, "%s", card()->name);
    return OK;
}
API Status nvmlDeviceGetUUID(NvmlDevice device, char *text, unsigned size) {
    unsigned char uuid[16];
    char all[48] = "GPU-", *at = all + 4;
    if (device_uuid(runtime_device(device), uuid)) return NVML_INVALID_ARGUMENT;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *at++ = '-';
        at += snprintf(at, 3, "%02x", uuid[i]);
    }
    return (unsigned)snprintf(text, size, "%s", all) < size ? OK : NVML_INSUFFICIENT_SIZE;
}
API Status nvmlDeviceGetHandleByUUID(const char *wanted, NvmlDevice *device) {
    for (int i = 0; i < num_devices(); i++) {
        char uuid[48];
        *device = (NvmlDevice)(intptr_t)(i + 1);
        if (!nvmlDeviceGetUUID(*device, uuid, sizeof uuid) && !strcmp(uuid, wanted)) return OK;
    }
    return NVML_NOT_FOUND;
}
static unsigned bus_of(NvmlDevice device) {
    char text[32];
    unsigned domain = 0, bus = 0;
    device_pci_bus_id(runtime_device(device), text, sizeof text);
    sscanf(text, "%x:%x", &domain, &bus);
    return bus;
}
API Status nvmlDeviceGetHandleByPciBusId_v2(const char *text, NvmlDevice *device) {
    unsigned domain, bus;
    if (sscanf(text, "%x:%x", &domain, &bus) != 2) return NVML_INVALID_ARGUMENT;
    for (int i = 0; i < num_devices(); i++) {
        *device = (NvmlDevice)(intptr_t)(i + 1);
        if (bus_of(*device) == bus) return OK;
    }
    return NVML_NOT_FOUND;
}
ALIAS(nvmlDeviceGetHandleByPciBusId, nvmlDeviceGetHandleByPciBusId_v2, (const char *text, NvmlDevice *device), (text, device))

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} Pci;
API Status nvmlDeviceGetPciInfo_v3(NvmlDevice device, Pci *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = bus_of(device);
    pci->pci_device_id = 0x10de; /* NVIDIA */
    snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus & 255);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus & 255);
    return OK;
}
ALIAS(nvmlDeviceGetPciInfo_v2, nvmlDeviceGetPciInfo_v3, (NvmlDevice device, Pci *pci), (device, pci))
ALIAS(nvmlDeviceGetPciInfo, nvmlDeviceGetPciInfo_v3, (NvmlDevice device, Pci *pci), (device, pci))
API Status nvmlDeviceGetCudaComputeCapability(NvmlDevice device UNUSED, int *major, int *minor) {
    *major = card()->major;
    *minor = card()->minor;
    return OK;
}
API Status nvmlDeviceGetP2PStatus(NvmlDevice a UNUSED, NvmlDevice b UNUSED, int kind UNUSED, int *status) {
    *status = OK; /* NVML_P2P_STATUS_OK */
    return OK;
}

/* ---- memory and processes ---- */

typedef struct {
    unsigned long long total, free, used;
} Memory;
typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} MemoryV2;
API Status nvmlDeviceGetMemoryInfo(NvmlDevice device, Memory *memory) {
    DeviceMemory m = memory_of(device);
    *memory = (Memory){m.total_bytes, m.free_bytes, m.total_bytes - m.free_bytes};
    return OK;
}
API Status nvmlDeviceGetMemoryInfo_v2(NvmlDevice device, MemoryV2 *memory) {
    DeviceMemory m = memory_of(device);
    *memory = (MemoryV2){memory->version, m.total_bytes, 0, m.free_bytes, m.total_bytes - m.free_bytes};
    return OK;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
} ProcessV1;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} Process;
static Status processes(NvmlDevice device, unsigned *count, size_t stride, void *list) {
    DeviceMemory m = memory_of(device);
    unsigned room = *count;
    *count = m.is_touched ? 1 : 0;
    if (!m.is_touched) return OK;
    if (!room || !list) return NVML_INSUFFICIENT_SIZE;
    Process own = {(unsigned)getpid(), m.held_bytes, UINT32_MAX, UINT32_MAX};
    memcpy(list, &own, stride);
    return OK;
}
API Status nvmlDeviceGetComputeRunningProcesses_v3(NvmlDevice device, unsigned *count, Process *list) {
    return processes(device, count, sizeof *list, list);
}
ALIAS(nvmlDeviceGetComputeRunningProcesses_v2, nvmlDeviceGetComputeRunningProcesses_v3,
      (NvmlDevice device, unsigned *count, Process *list), (device, count, list))
API Status nvmlDeviceGetComputeRunningProcesses(NvmlDevice device, unsigned *count, ProcessV1 *list) {
    return processes(device, count, sizeof *list, list);
}
API Status nvmlDeviceGetGraphicsRunningProcesses_v3(NvmlDevice device UNUSED, unsigned *count) {
    *count = 0;
    return OK;
}
ALIAS(nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlDeviceGetGraphicsRunningProcesses_v3, (NvmlDevice device, unsigned *count), (device, count))
ALIAS(nvmlDeviceGetGraphicsRunningProcesses, nvmlDeviceGetGraphicsRunningProcesses_v3, (NvmlDevice device, unsigned *count), (device, count))
ALIAS(nvmlDeviceGetMPSComputeRunningProcesses_v3, nvmlDeviceGetGraphicsRunningProcesses_v3, (NvmlDevice device, unsigned *count), (device, count))

/* ---- what a card that computes nothing shows ---- */

API Status nvmlDeviceGetUtilizationRates(NvmlDevice device UNUSED, unsigned rates[2]) {
    rates[0] = rates[1] = 0;
    return OK;
}
API Status nvmlDeviceGetClockInfo(NvmlDevice device UNUSED, int kind, unsigned *mhz) {
    *mhz = (unsigned)(kind == 2 ? card()->memory_clock_khz : card()->clock_khz) / 1000;
    return OK;
}
ALIAS(nvmlDeviceGetMaxClockInfo, nvmlDeviceGetClockInfo, (NvmlDevice device, int kind, unsigned *mhz), (device, kind, mhz))
API Status nvmlDeviceGetComputeMode(NvmlDevice device UNUSED, int *mode) {
    *mode = 0;
    return OK;
}
ALIAS(nvmlDeviceGetPersistenceMode, nvmlDeviceGetComputeMode, (NvmlDevice device, int *mode), (device, mode))
API Status nvmlDeviceGetPowerUsage(NvmlDevice device UNUSED, unsigned *milliwatts) {
    *milliwatts = 0;
    return OK;
}
ALIAS(nvmlDeviceGetFanSpeed, nvmlDeviceGetPowerUsage, (NvmlDevice device, unsigned *percent), (device, percent))
API Status nvmlDeviceGetTemperature(NvmlDevice device UNUSED, int sensor UNUSED, unsigned *celsius) {
    *celsius = 20; /* of the room */
    return OK;
}
API Status nvmlDeviceGetTemperatureV(NvmlDevice device UNUSED, int values[3]) { /* version, sensor, temperature */
    values[2] = 20;
    return OK;
}
#define NONE(name) ALWAYS(nvmlDeviceGet##name, NVML_NOT_SUPPORTED)
NONE(BAR1MemoryInfo) NONE(Brand) NONE(CpuAffinity) NONE(CpuAffinityWithinScope) NONE(EccMode) NONE(EnforcedPowerLimit)
NONE(FieldValues) NONE(MemoryAffinity) NONE(MigMode)
NONE(NvLinkCapability) NONE(NvLinkRemoteDeviceType) NONE(NvLinkRemotePciInfo_v2) NONE(NvLinkState) NONE(NvLinkVersion)
NONE(PowerManagementLimit) NONE(Serial) NONE(TotalEnergyConsumption)
NONE(Architecture) NONE(NumGpuCores) NONE(MemoryBusWidth) NONE(TopologyCommonAncestor) NONE(MaxMigDeviceCount)
NONE(CurrPcieLinkGeneration) NONE(CurrPcieLinkWidth) NONE(PcieThroughput) NONE(PerformanceState)

/* Of no fabric: torch warns where this fails. The state comes after the version, an identity of sixteen
   bytes, a status and a number of four each, and 0 is «not supported». */
API Status nvmlDeviceGetGpuFabricInfoV(NvmlDevice device UNUSED, unsigned char *info) {
    info[28] = 0;
    return OK;
}
API Status nvmlDeviceGetGpuFabricInfo(NvmlDevice device UNUSED, unsigned char *info) {
    info[24] = 0; /* without the version */
    return OK;
}
