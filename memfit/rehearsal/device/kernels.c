/* Kernels, which do nothing: how they are registered, asked about and launched, by the runtime's and
   by the driver's calls. A launch that the real device would refuse is refused. */
#include "streams.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    unsigned x, y, z;
} Dim3;

enum { INVALID_CONFIGURATION = 9 };

static Status launch(Dim3 grid, Dim3 block, size_t shared_bytes, void *stream) {
    if (is_forked()) return NOT_INITIALIZED;
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z) return INVALID_CONFIGURATION;
    if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return INVALID_CONFIGURATION;
    if (shared_bytes > card()->shared_optin_bytes) return INVALID_VALUE;
    count_launch(stream);
    return OK;
}

/* ---- the runtime's */

API Status cudaLaunchKernel(const void *kernel UNUSED, Dim3 grid, Dim3 block, void **arguments UNUSED, size_t shared_bytes, void *stream) {
    return fail(launch(grid, block, shared_bytes, stream));
}
ALSO(cudaLaunchCooperativeKernel, cudaLaunchKernel);
ALSO(__cudaLaunchKernel, cudaLaunchKernel);
ALSO(cudaLaunchKernel_ptsz, cudaLaunchKernel);
ALSO(__cudaLaunchKernel_ptsz, cudaLaunchKernel);
ALSO(cudaLaunchCooperativeKernel_ptsz, cudaLaunchKernel);

typedef struct { /* the beginning of cudaLaunchConfig_t */
    Dim3 grid, block;
    size_t shared_bytes;
    void *stream;
} LaunchConfig;
API Status cudaLaunchKernelExC(const LaunchConfig *config, const void *kernel UNUSED, void **arguments UNUSED) {
    return fail(launch(config->grid, config->block, config->shared_bytes, config->stream));
}
ALSO(cudaLaunchKernelExC_ptsz, cudaLaunchKernelExC);

/* Compilers put the configuration here between `<<<` and the call. */
static __thread LaunchConfig pushed[8];
static __thread int num_pushed;
API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void *stream) {
    if (num_pushed < 8) pushed[num_pushed++] = (LaunchConfig){grid, block, shared_bytes, stream};
    return 0;
}
API Status __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared_bytes, void **stream) {
    if (!num_pushed) return INVALID_CONFIGURATION;
    LaunchConfig *config = &pushed[--num_pushed];
    *grid = config->grid;
    *block = config->block;
    *shared_bytes = config->shared_bytes;
    *stream = config->stream;
    return OK;
}

API void **__cudaRegisterFatBinary(void *binary UNUSED) {
    static void *handle[1];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void **handle UNUSED) {}
API void __cudaUnregisterFatBinary(void **handle UNUSED) {}
API char __cudaInitModule(void **handle UNUSED) { return 1; }
API void __cudaRegisterFunction(void) {}
API void __cudaRegisterUnifiedTable(void) {}
API void __cudaRegisterHostVar(void) {}
API void __cudaRegisterVar(void **handle UNUSED, char *variable, char *address UNUSED, const char *name UNUSED,
                           int is_external UNUSED, size_t num_bytes, int is_constant UNUSED, int is_global UNUSED) {
    register_symbol(variable, num_bytes);
}
API void __cudaRegisterManagedVar(void **handle UNUSED, void **variable, char *address UNUSED, const char *name UNUSED,
                                  int is_external UNUSED, size_t num_bytes, int is_constant UNUSED, int is_global UNUSED) {
    *variable = calloc(1, num_bytes ? num_bytes : 1); /* the host's program reads it directly */
}
API Status __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)(uintptr_t)function, OK; }
API Status cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)(uintptr_t)function, OK; }
API Status cudaGetFuncBySymbol(void **function, const void *symbol) { return *function = (void *)(uintptr_t)symbol, OK; }

typedef struct { /* the beginning of cudaFuncAttributes */
    size_t shared_bytes, const_bytes, local_bytes;
    int max_threads, num_registers, ptx_version, binary_version, cache_mode, max_dynamic_shared_bytes, carveout;
} FunctionAttributes;
API Status cudaFuncGetAttributes(FunctionAttributes *attributes, const void *function UNUSED) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    int version = card()->binary_version;
    *attributes = (FunctionAttributes){0, 0, 0, 1024, 32, version, version, 0, 49152, -1};
    return OK;
}
API Status cudaFuncSetAttribute(const void *function UNUSED, int attribute, int value) {
    int is_shared = attribute == 8; /* cudaFuncAttributeMaxDynamicSharedMemorySize */
    return fail(is_shared && (value < 0 || (size_t)value > card()->shared_optin_bytes) ? INVALID_VALUE : OK);
}
API Status cudaFuncSetCacheConfig(const void *function UNUSED, int config UNUSED) { return OK; }
API Status cudaFuncSetSharedMemConfig(const void *function UNUSED, int config UNUSED) { return OK; }
API Status cudaFuncGetName(const char **name, const void *function UNUSED) { return *name = "kernel", OK; }
API Status cudaKernelSetAttributeForDevice(void *kernel UNUSED, int attribute, int value, int device UNUSED) {
    return cudaFuncSetAttribute(0, attribute, value);
}

/* As many blocks as their threads, their registers (32 a thread) and their shared memory allow. */
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *num, const void *function UNUSED, int threads, size_t shared_bytes, unsigned flags UNUSED) {
    if (threads <= 0 || threads > 1024) return fail(INVALID_VALUE);
    const Card *c = card();
    int warped = (threads + 31) / 32 * 32, most = c->blocks_per_sm;
    if (c->threads_per_sm / warped < most) most = c->threads_per_sm / warped;
    if (65536 / (32 * warped) < most) most = 65536 / (32 * warped);
    size_t by_shared = c->shared_sm_bytes / (shared_bytes + 1024);
    if ((size_t)most > by_shared) most = (int)by_shared;
    return *num = most, OK;
}
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *num, const void *function, int threads, size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(num, function, threads, shared_bytes, 0);
}
API Status cudaOccupancyAvailableDynamicSMemPerBlock(size_t *num_bytes, const void *function UNUSED, int blocks, int threads UNUSED) {
    size_t room = card()->shared_sm_bytes / (size_t)(blocks > 0 ? blocks : 1) - 1024;
    return *num_bytes = room < card()->shared_optin_bytes ? room : card()->shared_optin_bytes, OK;
}
API Status cudaOccupancyMaxPotentialClusterSize(int *size) { return *size = 8, OK; }
API Status cudaOccupancyMaxActiveClusters(int *num) { return *num = card()->multiprocessors / 8, OK; }
ALSO(cuOccupancyMaxActiveBlocksPerMultiprocessor, cudaOccupancyMaxActiveBlocksPerMultiprocessor);
ALSO(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags);
ALSO(cuOccupancyAvailableDynamicSMemPerBlock, cudaOccupancyAvailableDynamicSMemPerBlock);
ALSO(cuOccupancyMaxPotentialClusterSize, cudaOccupancyMaxPotentialClusterSize);
ALSO(cuOccupancyMaxActiveClusters, cudaOccupancyMaxActiveClusters);
API Status cuOccupancyMaxPotentialBlockSize(int *grid, int *block) { return *grid = card()->multiprocessors, *block = 1024, OK; }

/* ---- modules, libraries and functions that are loaded at run time */

static Status loaded(void **handle) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    *handle = calloc(1, 16);
    return *handle ? OK : fail(OUT_OF_MEMORY);
}
static Status unloaded(void *handle) { return free(handle), OK; }
static Status found(void **function, void *owner) { return *function = owner, OK; } /* a function is its module */

API Status cuModuleLoad(void **module, const char *path UNUSED) { return loaded(module); }
API Status cuModuleLoadData(void **module, const void *image UNUSED) { return loaded(module); }
API Status cuModuleLoadDataEx(void **module, const void *image UNUSED) { return loaded(module); }
API Status cuModuleLoadFatBinary(void **module, const void *image UNUSED) { return loaded(module); }
API Status cuModuleUnload(void *module) { return unloaded(module); }
API Status cuModuleGetFunction(void **function, void *module, const char *name UNUSED) { return found(function, module); }
API Status cuModuleGetGlobal_v2(void **at, size_t *num_bytes) {
    if (at) *at = 0;
    if (num_bytes) *num_bytes = 0;
    return NOT_FOUND;
}
API Status cuModuleGetLoadingMode(int *mode) { return *mode = 2, OK; } /* lazy */
API Status cuLibraryLoadData(void **library, const void *image UNUSED) { return loaded(library); }
API Status cuLibraryLoadFromFile(void **library, const char *path UNUSED) { return loaded(library); }
API Status cuLibraryUnload(void *library) { return unloaded(library); }
API Status cuLibraryGetKernel(void **kernel, void *library, const char *name UNUSED) { return found(kernel, library); }
API Status cuLibraryGetModule(void **module, void *library) { return found(module, library); }
API Status cuLibraryGetKernelCount(unsigned *num, void *library UNUSED) { return *num = 1, OK; }
API Status cuLibraryEnumerateKernels(void **kernels, unsigned num, void *library) {
    for (unsigned i = 0; i < num; i++) kernels[i] = library;
    return OK;
}
API Status cuKernelGetFunction(void **function, void *kernel) { return found(function, kernel); }
API Status cuKernelGetLibrary(void **library, void *kernel) { return found(library, kernel); }
API Status cuLibraryGetGlobal(void **at, size_t *num_bytes) { return cuModuleGetGlobal_v2(at, num_bytes); }
ALSO(cudaLibraryLoadData, cuLibraryLoadData);
ALSO(cudaLibraryLoadFromFile, cuLibraryLoadFromFile);
ALSO(cudaLibraryUnload, cuLibraryUnload);
ALSO(cudaLibraryGetKernel, cuLibraryGetKernel);
ALSO(cudaLibraryGetKernelCount, cuLibraryGetKernelCount);
ALSO(cudaLibraryEnumerateKernels, cuLibraryEnumerateKernels);
ALSO(cudaLibraryGetGlobal, cuLibraryGetGlobal);
ALSO(cudaLibraryGetManaged, cuLibraryGetGlobal);

/* Linking at run time: what comes out is an image that a module is loaded from, and never looked at. */
API Status cuLinkCreate_v2(unsigned n UNUSED, void *options UNUSED, void *values UNUSED, void **link) { return loaded(link); }
API Status cuLinkAddData_v2(void) { return OK; }
API Status cuLinkAddFile_v2(void) { return OK; }
API Status cuLinkComplete(void *link, void **image, size_t *num_bytes) { return *image = link, *num_bytes = 16, OK; }
API Status cuLinkDestroy(void *link) { return unloaded(link); }
ALSO(cuLinkCreate, cuLinkCreate_v2);
ALSO(cuLinkAddData, cuLinkAddData_v2);
ALSO(cuLinkAddFile, cuLinkAddFile_v2);

/* Source: the enumeration CUfunction_attribute. */
API Status cuFuncGetAttribute(int *value, int attribute, void *function UNUSED) {
    switch (attribute) {
    case 0: *value = 1024; break;                            /* threads of a block */
    case 4: *value = 32; break;                              /* registers */
    case 5: case 6: *value = card()->binary_version; break;  /* PTX; binary */
    case 8: *value = 49152; break;                           /* dynamic shared memory */
    default: *value = 0;
    }
    return OK;
}
API Status cuKernelGetAttribute(int *value, int attribute, void *kernel, int device UNUSED) {
    return cuFuncGetAttribute(value, attribute, kernel);
}
API Status cuFuncSetAttribute(void *function, int attribute, int value) { return cudaFuncSetAttribute(function, attribute, value); }
API Status cuKernelSetAttribute(int attribute, int value, void *kernel, int device UNUSED) {
    return cudaFuncSetAttribute(kernel, attribute, value);
}
API Status cuFuncSetCacheConfig(void *function UNUSED, int config UNUSED) { return OK; }
API Status cuKernelSetCacheConfig(void) { return OK; }
API Status cuFuncGetModule(void **module, void *function) { return found(module, function); }
API Status cuFuncLoad(void *function UNUSED) { return OK; }
API Status cuFuncIsLoaded(int *is_loaded, void *function UNUSED) { return *is_loaded = 1, OK; }

API Status cuLaunchKernel(void *function UNUSED, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared_bytes, void *stream) {
    return launch((Dim3){gx, gy, gz}, (Dim3){bx, by, bz}, shared_bytes, stream);
}
ALSO(cuLaunchCooperativeKernel, cuLaunchKernel);
typedef struct { /* the beginning of CUlaunchConfig */
    Dim3 grid, block;
    unsigned shared_bytes;
    void *stream;
} DriverLaunchConfig;
API Status cuLaunchKernelEx(const DriverLaunchConfig *config, void *function UNUSED) {
    return launch(config->grid, config->block, config->shared_bytes, config->stream);
}
API Status cuTensorMapEncodeTiled(void *map) { return memset(map, 0, 128), OK; }
API Status cuTensorMapEncodeIm2col(void *map) { return memset(map, 0, 128), OK; }
API Status cuTensorMapEncodeIm2colWide(void *map) { return memset(map, 0, 128), OK; }
API Status cuTensorMapReplaceAddress(void *map UNUSED, void *address UNUSED) { return OK; }
