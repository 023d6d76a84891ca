/* cuDNN, asked without a device. Heuristics, engines, plans and workspaces are the real library's,
   for the card: where torch sets a handle, a descriptor of the card's properties is set instead.

   Source: NVIDIA, cuDNN backend API (CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, since 9.8) and the
   frontend's «deviceless ahead-of-time compilation»; the fields of the JSON as in OpenXLA's
   cudnn_device_props.cc.

   A plan whose engine is compiled at run time is not compiled: that takes seconds, and nothing would
   run it. Its workspace is what its configuration says (CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE), which
   is the plan's. That its compilation would have succeeded is assumed.

   `cudnn.benchmark`: torch runs each plan, asks events for the time, and takes the least; of plans
   with equal times the first of the heuristics. Events of a rehearsal count launches (streams.c),
   and a plan is one launch, so the times are equal and the choice is the same every time. The
   workspace of the search is torch's own: the largest of the plans. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cudnn.h"

enum { /* cudnnStatus_t */
    CUDNN_NOT_INITIALIZED = 1001,
    CUDNN_BAD_PARAM = 2000,
    CUDNN_NO_CUDA_GRAPHS = 3013,
};
enum { /* cudnnBackendDescriptorType_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t */
    DEVICEPROP_DESCRIPTOR = 38,
    HEURISTICS_DEVICEPROP = 204,
    CONFIG_WORKSPACE_BYTES = 303,
    PLAN_HANDLE = 400,
    ENGINE_BEHAVIOR_NOTE = 1305,
    DEVICEPROP_HANDLE = 2701,
    DEVICEPROP_JSON = 2702,
    TYPE_HANDLE = 0,
    TYPE_BEHAVIOR_NOTE = 19,
    TYPE_CHAR = 24,
    COMPILED_AT_RUN_TIME = 0, /* a behavior note */
};

Backend cudnn;
static Descriptor properties;
static char properties_text[2048];
static Status properties_status = CUDNN_NOT_INITIALIZED;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int describe(char *text, size_t num_bytes) {
    const Card *c = card();
    char name[sizeof c->name];
    size_t kept = 0;
    for (const char *p = c->name; *p; p++)
        if (*p != '"' && *p != '\\')
            name[kept++] = *p;
    name[kept] = 0;
    return snprintf(
        text, num_bytes,
        "{\"deviceVer\":%d,\"multiProcessorCount\":%d,\"warpSize\":32,"
        "\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":%zu,"
        "\"reservedSharedMemoryPerBlock\":1024,\"maxRegistersPerSM\":65536,\"maxCtasPerSM\":%d,"
        "\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":%d,\"regsPerBlock\":65536,"
        "\"totalGlobalMem\":%zu,\"smClockRateKHz\":%d,\"l2CacheSize\":%zu,"
        "\"maxBlockSize\":[1024,1024,64],\"memClockRateKHz\":%d,"
        "\"maxGridSize\":[2147483647,65535,65535],\"supportCoopLaunch\":1,\"pciDeviceId\":0,"
        "\"isTccDriver\":0,\"cudaDeviceId\":0,\"driverVer\":%d,\"deviceName\":\"%s\"}",
        c->major * 100 + c->minor * 10, c->multiprocessors, c->shared_optin_bytes, c->blocks_per_sm,
        c->threads_per_sm, c->total_bytes, c->clock_khz, c->l2_bytes, c->memory_clock_khz,
        cuda_version(), name);
}

static void load(void) {
    *(void **)&cudnn.create = real_function("libcudnn.so.9", "cudnnBackendCreateDescriptor");
    *(void **)&cudnn.set = real_function("libcudnn.so.9", "cudnnBackendSetAttribute");
    *(void **)&cudnn.get = real_function("libcudnn.so.9", "cudnnBackendGetAttribute");
    *(void **)&cudnn.finalize = real_function("libcudnn.so.9", "cudnnBackendFinalize");
    *(void **)&cudnn.destroy = real_function("libcudnn.so.9", "cudnnBackendDestroyDescriptor");
    if (!cudnn.create || !cudnn.set || !cudnn.get || !cudnn.finalize || !cudnn.destroy)
        return;
    int length = describe(properties_text, sizeof properties_text);
    Status status = cudnn.create(DEVICEPROP_DESCRIPTOR, &properties);
    if (!status)
        status = cudnn.set(properties, DEVICEPROP_JSON, TYPE_CHAR, length, properties_text);
    if (!status)
        status = cudnn.finalize(properties);
    properties_status = status;
}

static Status ready(void) {
    pthread_once(&once, load);
    return properties_status;
}

Descriptor card_description(void) { return properties; }

API Status cudnnCreate(Handle **handle) {
    *handle = NULL;
    Status status = ready();
    return status ? status : create_handle(handle);
}

API Status cudnnDestroy(Handle *handle) { return destroy_handle(handle); }

API Status cudnnSetStream(Handle *handle, void *stream) { return set_stream(handle, stream); }

API Status cudnnGetStream(const Handle *handle, void **stream) { return get_stream(handle, stream); }

static int is_compiled_at_run_time(Descriptor config) {
    Descriptor engine = NULL;
    int64_t count = 0;
    int notes[16], is_compiled = 0;
    if (cudnn.create(ENGINE_DESCRIPTOR, &engine)) return 0;
    if (!cudnn.get(config, CONFIG_ENGINE, TYPE_DESCRIPTOR, 1, &count, &engine) && count == 1 &&
        !cudnn.get(engine, ENGINE_BEHAVIOR_NOTE, TYPE_BEHAVIOR_NOTE, 16, &count, notes))
        for (int64_t i = 0; i < count && i < 16; i++) is_compiled |= notes[i] == COMPILED_AT_RUN_TIME;
    cudnn.destroy(engine);
    return is_compiled;
}

API Status cudnnBackendFinalize(Descriptor descriptor) {
    Status status = ready();
    if (status) return status;
    Descriptor config = known_config(descriptor); /* only a plan has one */
    if (config && known_bytes(descriptor) >= 0) return OK;
    int64_t count = 0, workspace = 0;
    if (config && is_compiled_at_run_time(config) &&
        !cudnn.get(config, CONFIG_WORKSPACE_BYTES, TYPE_INT64, 1, &count, &workspace) && count == 1) {
        know_bytes(descriptor, workspace);
        return OK;
    }
    status = cudnn.finalize(descriptor);
    if (status) return status;
    finalized(descriptor);
    Problem problem = known_problem(descriptor);
    if (config && problem.first &&
        !cudnn.get(descriptor, PLAN_WORKSPACE_BYTES, TYPE_INT64, 1, &count, &workspace) && count == 1)
        know_bytes(descriptor, whole_card_bytes(config, &problem, workspace));
    return OK;
}

API Status cudnnBackendGetAttribute(Descriptor descriptor, int name, int type, int64_t asked, int64_t *count, void *elements) {
    Status status = ready();
    if (status) return status;
    if (name == PLAN_WORKSPACE_BYTES && type == TYPE_INT64 && asked > 0 && known_bytes(descriptor) >= 0) {
        if (count) *count = 1;
        *(int64_t *)elements = known_bytes(descriptor);
        return OK;
    }
    if (name == HEURISTICS_RESULTS) return product_results(descriptor, type, asked, count, elements);
    return cudnn.get(descriptor, name, type, asked, count, elements);
}

API Status cudnnBackendDestroyDescriptor(Descriptor descriptor) {
    Status status = ready();
    if (status) return status;
    forget(descriptor);
    return cudnn.destroy(descriptor);
}

API Status cudnnBackendSetAttribute(Descriptor descriptor, int name, int type, int64_t count,
                                    const void *elements) {
    Status status = ready();
    if (status)
        return status;
    if (type == TYPE_HANDLE) {
        if (name == PLAN_HANDLE)
            return cudnn.set(descriptor, PLAN_DEVICEPROP, TYPE_DESCRIPTOR, 1, &properties);
        if (name == DEVICEPROP_HANDLE)
            return cudnn.set(descriptor, DEVICEPROP_JSON, TYPE_CHAR,
                            (int64_t)strlen(properties_text), properties_text);
        return OK; /* a graph of operations needs no device */
    }
    status = cudnn.set(descriptor, name, type, count, elements);
    if (!status && type == TYPE_DESCRIPTOR)
        remember(descriptor, name, count, elements);
    if (!status && name == HEURISTICS_OPERATION_GRAPH)
        status = cudnn.set(descriptor, HEURISTICS_DEVICEPROP, TYPE_DESCRIPTOR, 1, &properties);
    if (!status && name == ENGINE_OPERATION_GRAPH)
        status = cudnn.set(descriptor, ENGINE_DEVICEPROP, TYPE_DESCRIPTOR, 1, &properties);
    return status;
}

API Status cudnnBackendExecute(const Handle *handle, UNUSED Descriptor plan, UNUSED Descriptor pack) {
    return library_call(handle);
}

API Status cudnnGetExecutionPlanWorkspaceSize(UNUSED const Handle *handle, Descriptor plan,
                                              UNUSED Descriptor pack, size_t *num_bytes) {
    int64_t found = 0, count = 0;
    Status status = cudnnBackendGetAttribute(plan, PLAN_WORKSPACE_BYTES, TYPE_INT64, 1, &count, &found);
    *num_bytes = (size_t)found;
    return status;
}

/* A graph of the rehearsal has no nodes to fill in. torch does not ask for these. */
RETURNS(cudnnBackendPopulateCudaGraph, CUDNN_NO_CUDA_GRAPHS)
RETURNS(cudnnBackendUpdateCudaGraph, CUDNN_NO_CUDA_GRAPHS)

API Status cudnnQueryRuntimeError(UNUSED const Handle *handle, int *status, UNUSED int mode,
                                  UNUSED void *tag) {
    *status = OK;
    return OK;
}
