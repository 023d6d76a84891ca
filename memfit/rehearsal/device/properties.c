/* What a device says of itself: cudaDeviceProp, whose layout changed with CUDA 13, and the attributes,
   whose numbers the runtime and the driver share. */
#include "device.h"

#include <stdio.h>
#include <string.h>

/* Source: cudaDeviceProp in the reference of the runtime API, 12.8 and 13.2. BOTH have a field; OLD is
   of CUDA 12, NEW of CUDA 13. */
#define PROPERTIES(BOTH, OLD, NEW) \
    BOTH(char, name, [256]) BOTH(unsigned char, uuid, [16]) BOTH(char, luid, [8]) BOTH(unsigned, luidDeviceNodeMask, ) \
    BOTH(size_t, totalGlobalMem, ) BOTH(size_t, sharedMemPerBlock, ) BOTH(int, regsPerBlock, ) BOTH(int, warpSize, ) \
    BOTH(size_t, memPitch, ) BOTH(int, maxThreadsPerBlock, ) BOTH(int, maxThreadsDim, [3]) BOTH(int, maxGridSize, [3]) \
    OLD(int, clockRate, ) BOTH(size_t, totalConstMem, ) BOTH(int, major, ) BOTH(int, minor, ) \
    BOTH(size_t, textureAlignment, ) BOTH(size_t, texturePitchAlignment, ) OLD(int, deviceOverlap, ) \
    BOTH(int, multiProcessorCount, ) OLD(int, kernelExecTimeoutEnabled, ) BOTH(int, integrated, ) \
    BOTH(int, canMapHostMemory, ) OLD(int, computeMode, ) BOTH(int, maxTexture1D, ) BOTH(int, maxTexture1DMipmap, ) \
    OLD(int, maxTexture1DLinear, ) BOTH(int, maxTexture2D, [2]) BOTH(int, maxTexture2DMipmap, [2]) \
    BOTH(int, maxTexture2DLinear, [3]) BOTH(int, maxTexture2DGather, [2]) BOTH(int, maxTexture3D, [3]) \
    BOTH(int, maxTexture3DAlt, [3]) BOTH(int, maxTextureCubemap, ) BOTH(int, maxTexture1DLayered, [2]) \
    BOTH(int, maxTexture2DLayered, [3]) BOTH(int, maxTextureCubemapLayered, [2]) BOTH(int, maxSurface1D, ) \
    BOTH(int, maxSurface2D, [2]) BOTH(int, maxSurface3D, [3]) BOTH(int, maxSurface1DLayered, [2]) \
    BOTH(int, maxSurface2DLayered, [3]) BOTH(int, maxSurfaceCubemap, ) BOTH(int, maxSurfaceCubemapLayered, [2]) \
    BOTH(size_t, surfaceAlignment, ) BOTH(int, concurrentKernels, ) BOTH(int, ECCEnabled, ) BOTH(int, pciBusID, ) \
    BOTH(int, pciDeviceID, ) BOTH(int, pciDomainID, ) BOTH(int, tccDriver, ) BOTH(int, asyncEngineCount, ) \
    BOTH(int, unifiedAddressing, ) OLD(int, memoryClockRate, ) BOTH(int, memoryBusWidth, ) BOTH(int, l2CacheSize, ) \
    BOTH(int, persistingL2CacheMaxSize, ) BOTH(int, maxThreadsPerMultiProcessor, ) \
    BOTH(int, streamPrioritiesSupported, ) BOTH(int, globalL1CacheSupported, ) BOTH(int, localL1CacheSupported, ) \
    BOTH(size_t, sharedMemPerMultiprocessor, ) BOTH(int, regsPerMultiprocessor, ) BOTH(int, managedMemory, ) \
    BOTH(int, isMultiGpuBoard, ) BOTH(int, multiGpuBoardGroupID, ) BOTH(int, hostNativeAtomicSupported, ) \
    OLD(int, singleToDoublePrecisionPerfRatio, ) BOTH(int, pageableMemoryAccess, ) \
    BOTH(int, concurrentManagedAccess, ) BOTH(int, computePreemptionSupported, ) \
    BOTH(int, canUseHostPointerForRegisteredMem, ) BOTH(int, cooperativeLaunch, ) \
    OLD(int, cooperativeMultiDeviceLaunch, ) BOTH(size_t, sharedMemPerBlockOptin, ) \
    BOTH(int, pageableMemoryAccessUsesHostPageTables, ) BOTH(int, directManagedMemAccessFromHost, ) \
    BOTH(int, maxBlocksPerMultiProcessor, ) BOTH(int, accessPolicyMaxWindowSize, ) \
    BOTH(size_t, reservedSharedMemPerBlock, ) BOTH(int, hostRegisterSupported, ) \
    BOTH(int, sparseCudaArraySupported, ) BOTH(int, hostRegisterReadOnlySupported, ) \
    BOTH(int, timelineSemaphoreInteropSupported, ) BOTH(int, memoryPoolsSupported, ) \
    BOTH(int, gpuDirectRDMASupported, ) BOTH(unsigned, gpuDirectRDMAFlushWritesOptions, ) \
    BOTH(int, gpuDirectRDMAWritesOrdering, ) BOTH(unsigned, memoryPoolSupportedHandleTypes, ) \
    BOTH(int, deferredMappingCudaArraySupported, ) BOTH(int, ipcEventSupported, ) BOTH(int, clusterLaunch, ) \
    BOTH(int, unifiedFunctionPointers, ) NEW(int, deviceNumaConfig, ) NEW(int, deviceNumaId, ) NEW(int, mpsEnabled, ) \
    NEW(int, hostNumaId, ) NEW(unsigned, gpuPciDeviceID, ) NEW(unsigned, gpuPciSubsystemID, ) \
    NEW(int, hostNumaMultinodeIpcSupported, ) NEW(int, reserved, [56]) OLD(int, reserved, [63])

#define FIELD(type, name, size) type name size;
#define NOTHING(type, name, size)
typedef struct {
    PROPERTIES(FIELD, NOTHING, FIELD)
} Properties13;
typedef struct {
    PROPERTIES(FIELD, FIELD, NOTHING)
} Properties12;

static Status fill_properties(Properties13 *p, int device) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    const Card *c = card();
    if (device < 0 || device >= c->num_gpus) return fail(INVALID_DEVICE);
    *p = (Properties13){
        .totalGlobalMem = c->total_bytes, .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
        .memPitch = INT32_MAX, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {INT32_MAX, 65535, 65535}, .totalConstMem = 65536, .major = c->major, .minor = c->minor,
        .textureAlignment = 512, .texturePitchAlignment = 32, .multiProcessorCount = c->multiprocessors,
        .canMapHostMemory = 1, .concurrentKernels = 1, .pciBusID = 1 + c->installed[device], .asyncEngineCount = 2,
        .unifiedAddressing = 1, .memoryBusWidth = c->bus_bits, .l2CacheSize = (int)c->l2_bytes,
        .maxThreadsPerMultiProcessor = c->threads_per_sm, .streamPrioritiesSupported = 1,
        .globalL1CacheSupported = 1, .localL1CacheSupported = 1, .sharedMemPerMultiprocessor = c->shared_sm_bytes,
        .regsPerMultiprocessor = 65536, .managedMemory = 1, .multiGpuBoardGroupID = device,
        .concurrentManagedAccess = 1, .computePreemptionSupported = 1, .canUseHostPointerForRegisteredMem = 1,
        .cooperativeLaunch = 1, .sharedMemPerBlockOptin = c->shared_optin_bytes,
        .maxBlocksPerMultiProcessor = c->blocks_per_sm, .reservedSharedMemPerBlock = 1024,
        .hostRegisterSupported = 1, .memoryPoolsSupported = 1, .clusterLaunch = c->major >= 9,
        .unifiedFunctionPointers = 1,
    };
    snprintf(p->name, sizeof p->name, "%s", c->name);
    installed_uuid(c->installed[device], p->uuid);
    return OK;
}

API Status cudaGetDeviceProperties(Properties13 *p, int device) { return fill_properties(p, device); }

/* The name that programs made for CUDA 12 call. */
API Status cudaGetDeviceProperties_v2(Properties12 *old, int device) {
    Properties13 p;
    Status status = fill_properties(&p, device);
    if (status) return status;
    memset(old, 0, sizeof *old);
#define COPY(type, name, size) memcpy(&old->name, &p.name, sizeof old->name);
    PROPERTIES(COPY, NOTHING, NOTHING)
    old->clockRate = card()->clock_khz;
    old->memoryClockRate = card()->memory_clock_khz;
    old->deviceOverlap = 1;
    old->singleToDoublePrecisionPerfRatio = 32;
    old->cooperativeMultiDeviceLaunch = 1;
    return OK;
}

API size_t memfit_rehearsal_properties_bytes(int major) { return major < 13 ? sizeof(Properties12) : sizeof(Properties13); }

/* Source: the enumerations cudaDeviceAttr and CUdevice_attribute. */
API Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    Properties13 p;
    Status status = fill_properties(&p, device);
    if (status) return status;
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;  /* threads of a block; x; y */
    case 4: *value = 64; break;                    /* z */
    case 5: *value = INT32_MAX; break;             /* blocks of a grid: x */
    case 6: case 7: *value = 65535; break;         /* y; z */
    case 8: *value = 49152; break;                 /* shared memory of a block */
    case 9: case 12: case 82: *value = 65536; break; /* constant memory; registers */
    case 10: *value = 32; break;                   /* warp */
    case 11: *value = INT32_MAX; break;            /* pitch */
    case 13: *value = card()->clock_khz; break;
    case 14: *value = 512; break;                  /* alignment of textures */
    case 16: *value = p.multiProcessorCount; break;
    case 33: *value = p.pciBusID; break;
    case 36: *value = card()->memory_clock_khz; break;
    case 37: *value = p.memoryBusWidth; break;
    case 38: *value = p.l2CacheSize; break;
    case 39: *value = p.maxThreadsPerMultiProcessor; break;
    case 40: *value = p.asyncEngineCount; break;
    case 51: *value = 32; break;                   /* alignment of a texture's pitch */
    case 75: *value = p.major; break;
    case 76: *value = p.minor; break;
    case 81: *value = (int)p.sharedMemPerMultiprocessor; break;
    case 85: *value = device; break;               /* group of a board */
    case 87: *value = 32; break;                   /* single to double precision */
    case 97: *value = (int)p.sharedMemPerBlockOptin; break;
    case 106: *value = p.maxBlocksPerMultiProcessor; break;
    case 111: *value = 1024; break;                /* reserved shared memory of a block */
    case 120: *value = p.clusterLaunch; break;
    case 126: *value = p.major >= 9 ? 4 : 1; break; /* domains of memory synchronization */
    case 130: case 131: case 134: *value = attribute == 130 ? 0 : -1; break; /* NUMA: none */
    case 15: case 19: case 31: case 41: case 78: case 79: case 80: case 83: case 89: case 90: case 91: case 95:
    case 99: case 102: case 115: case 129: /* 102: virtual memory; 115: pools; 129: function pointers */
        *value = 1;
        break;
    default: *value = 0;
    }
    return OK;
}
