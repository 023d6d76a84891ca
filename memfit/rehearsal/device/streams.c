/* Streams, events, callbacks and the capture of streams.

   Everything that is put on a stream is done at once, so a stream is always ready and a wait never
   waits. A callback is called by the thread that puts it there. Time is not rehearsed:
   between two events, each launch counts as a millisecond and each event as a microsecond. So what is
   chosen by time (cuDNN's plans, Triton's configurations) is chosen the same way every time. */
#include "streams.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_IS_INVALID = 2 };
enum { MODE_GLOBAL = 0, MODE_THREAD = 1, MODE_RELAXED = 2 };
enum { EVENT_NO_TIMING = 2, EVENT_EXTERNAL = 1, NODE_KERNEL = 0, NODE_HOST = 3 };
enum { ILLEGAL_STATE = 401, CAPTURE_UNMATCHED = 903, CAPTURED_EVENT = 907, CAPTURE_WRONG_THREAD = 908 };

static Stream defaults[2][MAX_DEVICES], *streams;
static Capture *captures;
static int num_captures; /* read without the lock: most programs never capture */
static uint64_t next_stream_id = 3, next_capture_id = 1, num_launches;
static int64_t num_recorded;
static __thread int thread_mode = MODE_GLOBAL;

typedef struct {
    int64_t nanoseconds;
    int is_recorded;
    unsigned flags;
    uint64_t capture_id; /* of the capture it was recorded in; 0: none */
} Event;

Stream *stream_of(void *handle) {
    uintptr_t value = (uintptr_t)handle;
    if (value > 2) return handle;
    int device = current_device();
    Stream *stream = &defaults[value == 2][device];
    stream->device = device;
    stream->id = value == 2 ? 2 : 1;
    return stream;
}

static int is_capturing(void) { return __atomic_load_n(&num_captures, __ATOMIC_RELAXED) > 0; }

int add_node(void *handle, HostFunction function, void *data) {
    if (!is_capturing()) return 0;
    device_lock();
    Capture *capture = stream_of(handle)->capture;
    if (capture) append_node(capture->graph, function ? NODE_HOST : NODE_KERNEL, function, data);
    device_unlock();
    return capture != 0;
}

/* Source: the description of cudaThreadExchangeStreamCaptureMode. */
Status forbid_while_capturing(void) {
    if (is_forked()) return NOT_INITIALIZED;
    if (!is_capturing() || thread_mode == MODE_RELAXED) return OK;
    Status status = OK;
    device_lock();
    for (Capture *c = captures; c; c = c->next) {
        int is_own = c->thread == (uintptr_t)pthread_self();
        if (is_own ? c->mode == MODE_RELAXED : c->mode != MODE_GLOBAL || thread_mode != MODE_GLOBAL) continue;
        c->is_invalid = 1;
        status = CAPTURE_UNSUPPORTED;
    }
    device_unlock();
    return status;
}

static Status wait_for(void *handle) {
    if (is_forked()) return NOT_INITIALIZED;
    if (!is_capturing()) return OK;
    device_lock();
    Capture *capture = stream_of(handle)->capture;
    if (capture) capture->is_invalid = 1;
    device_unlock();
    return capture ? CAPTURE_UNSUPPORTED : forbid_while_capturing();
}

void count_launch(void *stream) {
    __atomic_add_fetch(&num_launches, 1, __ATOMIC_RELAXED);
    run_kernels(current_device());
    add_node(stream, 0, 0);
}
API uint64_t memfit_rehearsal_num_launches(void) { return num_launches; }

/* ---- streams */

API Status cudaStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    Stream *stream = calloc(1, sizeof *stream);
    if (!stream) return fail(OUT_OF_MEMORY);
    device_lock();
    touch_device(current_device());
    *stream = (Stream){.device = current_device(), .priority = priority, .flags = flags, .id = next_stream_id++, .next = streams};
    streams = stream;
    device_unlock();
    *handle = stream;
    return OK;
}
API Status cudaStreamCreateWithFlags(void **handle, unsigned flags) { return cudaStreamCreateWithPriority(handle, flags, 0); }
API Status cudaStreamCreate(void **handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
API Status cudaStreamDestroy(void *handle) {
    if ((uintptr_t)handle <= 2) return fail(INVALID_HANDLE);
    device_lock();
    for (Stream **at = &streams; *at; at = &(*at)->next)
        if (*at == handle) {
            *at = (*at)->next;
            free(handle);
            break;
        }
    device_unlock();
    return OK;
}
API Status cudaStreamQuery(void *handle) { return fail(wait_for(handle)); }
API Status cudaStreamSynchronize(void *handle) { return fail(wait_for(handle)); }
API Status cudaDeviceSynchronize(void) { return fail(forbid_while_capturing()); }
API Status cudaStreamGetPriority(void *handle, int *priority) { return *priority = stream_of(handle)->priority, OK; }
API Status cudaStreamGetFlags(void *handle, unsigned *flags) { return *flags = stream_of(handle)->flags, OK; }
API Status cudaStreamGetId(void *handle, uint64_t *id) { return *id = stream_of(handle)->id, OK; }
API Status cudaStreamGetDevice(void *handle, int *device) { return *device = stream_of(handle)->device, OK; }

API Status cudaLaunchHostFunc(void *handle, HostFunction function, void *data) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (!add_node(handle, function, data)) function(data);
    return OK;
}
API Status cudaLaunchHostFunc_v2(void *handle, HostFunction function, void *data, unsigned mode UNUSED) {
    return cudaLaunchHostFunc(handle, function, data);
}
API Status cudaStreamAddCallback(void *handle, void (*function)(void *, Status, void *), void *data, unsigned flags UNUSED) {
    Status status = wait_for(handle);
    if (!status) function(handle, OK, data);
    return fail(status);
}

/* ---- events */

static int64_t now(void) {
    int64_t num_events = __atomic_add_fetch(&num_recorded, 1, __ATOMIC_RELAXED);
    return 1000000 * (int64_t)__atomic_load_n(&num_launches, __ATOMIC_RELAXED) + 1000 * num_events;
}

API Status cudaEventCreateWithFlags(void **handle, unsigned flags) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    Event *event = calloc(1, sizeof *event);
    if (!event) return fail(OUT_OF_MEMORY);
    event->flags = flags;
    *handle = event;
    device_lock();
    touch_device(current_device());
    device_unlock();
    return OK;
}
API Status cudaEventCreate(void **handle) { return cudaEventCreateWithFlags(handle, 0); }
API Status cudaEventDestroy(void *handle) { return free(handle), OK; }

API Status cudaEventRecordWithFlags(void *handle, void *stream, unsigned flags) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    Event *event = handle;
    event->capture_id = 0;
    if (is_capturing() && !(flags & EVENT_EXTERNAL)) {
        device_lock();
        Capture *capture = stream_of(stream)->capture;
        if (capture) event->capture_id = capture->id;
        device_unlock();
        if (capture) return OK;
    }
    event->nanoseconds = now();
    event->is_recorded = 1;
    return OK;
}
API Status cudaEventRecord(void *handle, void *stream) { return cudaEventRecordWithFlags(handle, stream, 0); }

static Status event_ready(const Event *event) {
    if (!event) return INVALID_HANDLE;
    return event->capture_id && is_capturing() ? CAPTURED_EVENT : forbid_while_capturing();
}
API Status cudaEventQuery(void *handle) { return fail(event_ready(handle)); }
API Status cudaEventSynchronize(void *handle) { return fail(event_ready(handle)); }
API Status cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
    const Event *a = from, *b = to;
    if (!a || !b || !a->is_recorded || !b->is_recorded || (a->flags | b->flags) & EVENT_NO_TIMING) return fail(INVALID_HANDLE);
    *milliseconds = 1e-6f * (float)(b->nanoseconds - a->nanoseconds);
    return OK;
}
API Status cudaEventElapsedTime_v2(float *milliseconds, void *from, void *to) { return cudaEventElapsedTime(milliseconds, from, to); }

/* A stream that waits for an event of a capture joins the capture. */
API Status cudaStreamWaitEvent(void *handle, void *awaited, unsigned flags UNUSED) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    const Event *event = awaited;
    if (!event || !event->capture_id || !is_capturing()) return OK;
    device_lock();
    Stream *stream = stream_of(handle);
    for (Capture *c = captures; c && !stream->capture; c = c->next)
        if (c->id == event->capture_id) stream->capture = c;
    device_unlock();
    return OK;
}

/* ---- capture */

static Status begin_capture(void *handle, Graph *graph, int mode) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    Capture *capture = calloc(1, sizeof *capture);
    if (!capture) return fail(OUT_OF_MEMORY);
    device_lock();
    Stream *stream = stream_of(handle);
    Status status = (uintptr_t)handle <= 1 ? CAPTURE_UNSUPPORTED : stream->capture ? ILLEGAL_STATE : OK;
    if (status) free(capture);
    else {
        *capture = (Capture){.graph = graph ? graph : new_graph(), .id = next_capture_id++, .origin = stream, .mode = mode, .next = captures};
        capture->thread = (uintptr_t)pthread_self();
        captures = stream->capture = capture;
        __atomic_add_fetch(&num_captures, 1, __ATOMIC_RELAXED);
    }
    device_unlock();
    return fail(status);
}
API Status cudaStreamBeginCapture(void *handle, int mode) { return begin_capture(handle, 0, mode); }
/* CUDA 12.3 on: (stream, graph, dependencies, edges, their number, mode) */
API Status cudaStreamBeginCaptureToGraph(void *handle, void *graph, void *nodes UNUSED, void *edges UNUSED, size_t n UNUSED, int mode) {
    return begin_capture(handle, graph, mode);
}

API Status cudaStreamEndCapture(void *handle, void **graph) {
    *graph = 0;
    device_lock();
    Capture *capture = stream_of(handle)->capture;
    Status status = OK;
    if (!capture) status = ILLEGAL_STATE;
    else if (capture->origin != stream_of(handle)) status = CAPTURE_UNMATCHED;
    else if (capture->mode != MODE_RELAXED && capture->thread != (uintptr_t)pthread_self()) status = CAPTURE_WRONG_THREAD;
    if (!status) {
        for (Stream *s = streams; s; s = s->next)
            if (s->capture == capture) s->capture = 0;
        for (int i = 0; i < 2 * MAX_DEVICES; i++)
            if (defaults[i % 2][i / 2].capture == capture) defaults[i % 2][i / 2].capture = 0;
        for (Capture **at = &captures; *at; at = &(*at)->next)
            if (*at == capture) {
                *at = capture->next;
                break;
            }
        __atomic_sub_fetch(&num_captures, 1, __ATOMIC_RELAXED);
        if (capture->is_invalid) {
            free_graph(capture->graph);
            status = CAPTURE_INVALIDATED;
        } else *graph = capture->graph;
        free(capture);
    }
    device_unlock();
    bury();
    return fail(status);
}

static int capture_state(void *handle, uint64_t *id, void **graph, void ***nodes, size_t *num_nodes) {
    int state = CAPTURE_NONE;
    device_lock();
    Capture *capture = is_capturing() ? stream_of(handle)->capture : 0;
    if (capture) state = capture->is_invalid ? CAPTURE_IS_INVALID : CAPTURE_ACTIVE;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : 0;
    if (nodes) *nodes = capture ? last_node_slot(capture->graph) : 0;
    if (num_nodes) *num_nodes = capture && last_node(capture->graph) ? 1 : 0;
    device_unlock();
    return state;
}
API Status cudaStreamIsCapturing(void *handle, int *state) { return *state = capture_state(handle, 0, 0, 0, 0), OK; }
/* CUDA 13's; what programs made for CUDA 12 call is the `_v2`, or with edges the `_v3`. */
API Status cudaStreamGetCaptureInfo(void *handle, int *state, uint64_t *id, void **graph, void ***nodes, void **edges, size_t *n) {
    if (edges) *edges = 0;
    return *state = capture_state(handle, id, graph, nodes, n), OK;
}
API Status cudaStreamGetCaptureInfo_v3(void *handle, int *state, uint64_t *id, void **graph, void ***nodes, void **edges, size_t *n) {
    return cudaStreamGetCaptureInfo(handle, state, id, graph, nodes, edges, n);
}
API Status cudaStreamGetCaptureInfo_v2(void *handle, int *state, uint64_t *id, void **graph, void ***nodes, size_t *n) {
    return *state = capture_state(handle, id, graph, nodes, n), OK;
}
API Status cudaThreadExchangeStreamCaptureMode(int *mode) {
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return OK;
}
/* The nodes of a rehearsed graph stand in one row, so there is nothing to change. */
API Status cudaStreamUpdateCaptureDependencies(void) { return OK; }
API Status cudaStreamUpdateCaptureDependencies_v2(void) { return OK; }

/* ---- the driver's names, and those of programs whose default stream is the thread's */

ALSO(cuStreamCreate, cudaStreamCreateWithFlags);
ALSO(cuStreamCreateWithPriority, cudaStreamCreateWithPriority);
ALSO(cuStreamDestroy_v2, cudaStreamDestroy);
ALSO(cuStreamDestroy, cudaStreamDestroy);
ALSO(cuStreamQuery, cudaStreamQuery);
ALSO(cuStreamSynchronize, cudaStreamSynchronize);
ALSO(cuStreamGetPriority, cudaStreamGetPriority);
ALSO(cuStreamGetFlags, cudaStreamGetFlags);
ALSO(cuStreamGetId, cudaStreamGetId);
ALSO(cuStreamGetDevice, cudaStreamGetDevice);
ALSO(cuStreamWaitEvent, cudaStreamWaitEvent);
ALSO(cuStreamAddCallback, cudaStreamAddCallback);
ALSO(cuLaunchHostFunc, cudaLaunchHostFunc);
ALSO(cuStreamBeginCapture_v2, cudaStreamBeginCapture);
ALSO(cuStreamBeginCapture, cudaStreamBeginCapture);
ALSO(cuStreamBeginCaptureToGraph, cudaStreamBeginCaptureToGraph);
ALSO(cuStreamEndCapture, cudaStreamEndCapture);
ALSO(cuStreamIsCapturing, cudaStreamIsCapturing);
ALSO(cuStreamGetCaptureInfo_v2, cudaStreamGetCaptureInfo_v2);
ALSO(cuStreamGetCaptureInfo_v3, cudaStreamGetCaptureInfo_v3);
ALSO(cuStreamUpdateCaptureDependencies, cudaStreamUpdateCaptureDependencies);
ALSO(cuStreamUpdateCaptureDependencies_v2, cudaStreamUpdateCaptureDependencies);
ALSO(cuThreadExchangeStreamCaptureMode, cudaThreadExchangeStreamCaptureMode);
ALSO(cuEventCreate, cudaEventCreateWithFlags);
ALSO(cuEventDestroy_v2, cudaEventDestroy);
ALSO(cuEventDestroy, cudaEventDestroy);
ALSO(cuEventRecord, cudaEventRecord);
ALSO(cuEventRecordWithFlags, cudaEventRecordWithFlags);
ALSO(cuEventQuery, cudaEventQuery);
ALSO(cuEventSynchronize, cudaEventSynchronize);
ALSO(cuEventElapsedTime, cudaEventElapsedTime);
ALSO(cuEventElapsedTime_v2, cudaEventElapsedTime);
ALSO(cudaStreamQuery_ptsz, cudaStreamQuery);
ALSO(cudaStreamSynchronize_ptsz, cudaStreamSynchronize);
ALSO(cudaStreamWaitEvent_ptsz, cudaStreamWaitEvent);
ALSO(cudaEventRecord_ptsz, cudaEventRecord);
ALSO(cudaEventRecordWithFlags_ptsz, cudaEventRecordWithFlags);
ALSO(cudaLaunchHostFunc_ptsz, cudaLaunchHostFunc);
ALSO(cudaStreamIsCapturing_ptsz, cudaStreamIsCapturing);
ALSO(cudaStreamBeginCapture_ptsz, cudaStreamBeginCapture);
ALSO(cudaStreamEndCapture_ptsz, cudaStreamEndCapture);
API Status cudaStreamSetAttribute(void) { return OK; }
API Status cudaStreamCopyAttributes(void) { return OK; }
API Status cudaStreamGetAttribute(void *handle UNUSED, int attribute UNUSED, void *value) {
    memset(value, 0, 64); /* cudaLaunchAttributeValue */
    return OK;
}
ALSO(cuStreamSetAttribute, cudaStreamSetAttribute);
ALSO(cuStreamCopyAttributes, cudaStreamCopyAttributes);
ALSO(cuStreamGetAttribute, cudaStreamGetAttribute);
