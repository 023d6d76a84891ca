/* NCCL, whose ranks do not meet. Every process rehearses its own rank: one of a `torchrun`, or one
   alone of many. Each collective acts as if every rank held what this one holds. So the checks of
   DDP and FSDP pass, sums are as many times the value as there are ranks, and what another rank
   would send (ncclRecv) stays unknown.

   Contents of more than SMALL_BYTES are not computed: the destination is unknown, and reads as
   zeros. Functions that take no communicator (versions, texts of errors) are the real library's.

   A new name of a later NCCL that torch does not need is refused, or missing. */
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "collectives.h"
#include "libraries.h"
#include "memory.h"

enum { NCCL_SYSTEM_ERROR = 2, NCCL_INVALID_ARGUMENT = 4, NCCL_INVALID_USAGE = 5 };
enum { NO_COLOR = -1 };

typedef struct {
    int rank, num_ranks, device;
    int num_known; /* ranks whose place is known to be in a destination: all, or up to this one */
} Communicator;
typedef struct {
    char bytes[128];
} UniqueId;

/* ---- communicators ---- */

static Status new_communicator(Communicator **out, int rank, int num_ranks, int num_known) {
    *out = NULL;
    if (num_ranks < 1 || rank < 0 || rank >= num_ranks) return NCCL_INVALID_ARGUMENT;
    Communicator *made = calloc(1, sizeof *made);
    if (!made) return NCCL_SYSTEM_ERROR;
    *made = (Communicator){rank, num_ranks, current_device(), num_known};
    device_lock();
    touch_device(made->device);
    device_unlock();
    *out = made;
    return OK;
}

API Status ncclGetUniqueId(UniqueId *id) {
    static unsigned count;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    int64_t parts[] = {getpid(), now.tv_sec, now.tv_nsec, __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED)};
    memcpy(id->bytes, parts, sizeof parts);
    return OK;
}
API Status ncclCommGetUniqueId(const Communicator *comm UNUSED, UniqueId *id) { return ncclGetUniqueId(id); }

API Status ncclCommInitRankConfig(Communicator **out, int num_ranks, UniqueId id UNUSED, int rank, void *config UNUSED) {
    return new_communicator(out, rank, num_ranks, num_ranks);
}
API Status ncclCommInitRank(Communicator **out, int num_ranks, UniqueId id UNUSED, int rank) {
    return new_communicator(out, rank, num_ranks, num_ranks);
}
API Status ncclCommInitRankScalable(Communicator **out, int num_ranks, int rank, int num_ids UNUSED,
                                    const UniqueId *ids UNUSED, void *config UNUSED) {
    return new_communicator(out, rank, num_ranks, num_ranks);
}
API Status ncclCommInitAll(Communicator **out, int num_devices, const int *devices) {
    for (int i = 0; i < num_devices; i++) {
        Status status = new_communicator(&out[i], i, num_devices, num_devices);
        if (status) return status;
        out[i]->device = devices ? devices[i] : i;
    }
    return OK;
}

API Status ncclCommSplit(const Communicator *parent, int color, int key, Communicator **out, void *config UNUSED) {
    *out = NULL;
    if (color == NO_COLOR) return OK;
    int size = split_size(parent->rank, parent->num_ranks, color, key);
    if (size) return new_communicator(out, key, size, size);
    int rank = key < 0 || key >= parent->num_ranks ? parent->rank : key;
    return new_communicator(out, rank, parent->num_ranks, rank + 1);
}
API Status ncclCommShrink(const Communicator *parent, const int *excluded, int num_excluded, Communicator **out,
                          void *config UNUSED, int flags UNUSED) {
    int rank = parent->rank;
    for (int i = 0; i < num_excluded; i++) rank -= excluded[i] < parent->rank;
    return new_communicator(out, rank, parent->num_ranks - num_excluded, parent->num_ranks - num_excluded);
}
API Status ncclCommGrow(const Communicator *parent, int num_ranks, const UniqueId *id UNUSED, int rank, Communicator **out,
                        void *config UNUSED) {
    return new_communicator(out, parent && rank < 0 ? parent->rank : rank, num_ranks, num_ranks);
}

API Status ncclCommDestroy(Communicator *comm) {
    free(comm);
    return OK;
}
API Status ncclCommAbort(Communicator *comm) { return ncclCommDestroy(comm); }
RETURNS(ncclCommFinalize, OK)
RETURNS(ncclCommRevoke, OK)
RETURNS(ncclCommSuspend, OK)
RETURNS(ncclCommResume, OK)
API Status ncclCommGetAsyncError(const Communicator *comm UNUSED, Status *status) {
    *status = OK;
    return OK;
}
API Status ncclCommCount(const Communicator *comm, int *count) {
    *count = comm->num_ranks;
    return OK;
}
API Status ncclCommUserRank(const Communicator *comm, int *rank) {
    *rank = comm->rank;
    return OK;
}
API Status ncclCommCuDevice(const Communicator *comm, int *device) {
    *device = comm->device;
    return OK;
}
API const char *ncclGetLastError(const Communicator *comm UNUSED) { return ""; }
API Status ncclCommMemStats(const Communicator *comm UNUSED, int kind UNUSED, uint64_t *value) {
    *value = 0;
    return OK;
}

/* ---- memory ---- */

API Status ncclMemAlloc(void **pointer, size_t num_bytes) {
    device_lock();
    Status status = allocate(pointer, num_bytes, current_device());
    device_unlock();
    return status ? NCCL_SYSTEM_ERROR : OK;
}
API Status ncclMemFree(void *pointer) {
    device_lock();
    Status status = pointer ? release(pointer) : OK;
    device_unlock();
    return status ? NCCL_INVALID_ARGUMENT : OK;
}
API Status ncclCommRegister(const Communicator *comm UNUSED, void *buffer, size_t num_bytes UNUSED, void **handle) {
    *handle = buffer;
    return OK;
}
RETURNS(ncclCommDeregister, OK)
API Status ncclCommWindowRegister(const Communicator *comm UNUSED, void *buffer, size_t num_bytes UNUSED, void **window,
                                  int flags UNUSED) {
    *window = buffer;
    return OK;
}
RETURNS(ncclCommWindowDeregister, OK)
API Status ncclWinGetUserPtr(const Communicator *comm UNUSED, void *window, void **buffer) {
    *buffer = window;
    return OK;
}

/* Kernels that talk to other devices by themselves: there are no other devices. */
RETURNS(ncclDevCommCreate, NCCL_INVALID_USAGE)
RETURNS(ncclDevCommDestroy, OK)
RETURNS(ncclCommQueryProperties, NCCL_INVALID_USAGE)
RETURNS(ncclGetLsaDevicePointer, NCCL_INVALID_USAGE)
RETURNS(ncclGetLsaMultimemDevicePointer, NCCL_INVALID_USAGE)
RETURNS(ncclGetMultimemDevicePointer, NCCL_INVALID_USAGE)
RETURNS(ncclGetPeerDevicePointer, NCCL_INVALID_USAGE)

/* ---- groups and operations ---- */

/* What a group has put together so far. Some all-gathers are a group of broadcasts, one from each
   rank, and some all-to-alls a group of messages. So what a rank gets from another in a group is what
   it sends itself, if that is as long. */
typedef struct {
    void *to;
    const void *from;
    size_t num_bytes;
    int peer;
    const Communicator *comm;
} Message;
static __thread Message *messages;
static __thread int num_messages, room, depth;

static int is_remembered(Message message) {
    if (!depth) return 0;
    if (num_messages == room) {
        Message *grown = realloc(messages, (size_t)(room * 2 + 16) * sizeof *messages);
        if (!grown) return 0;
        messages = grown;
        room = room * 2 + 16;
    }
    messages[num_messages++] = message;
    return 1;
}

static void deliver(const Message *to) {
    int is_own_broadcast = to->from && to->peer == to->comm->rank;
    if (!to->to || is_own_broadcast) return;
    for (int i = 0; i < num_messages; i++) {
        const Message *own = &messages[i];
        if (!own->from || own->peer != own->comm->rank || own->comm != to->comm || own->num_bytes != to->num_bytes) continue;
        collective_copy(to->to, own->from, to->num_bytes, 1);
        return;
    }
    if (!to->from) collective_forget(to->to, to->num_bytes);
}

API Status ncclGroupStart(void) {
    depth++;
    return OK;
}
API Status ncclGroupEnd(void) {
    if (!depth) return NCCL_INVALID_USAGE;
    if (--depth) return OK;
    for (int i = 0; i < num_messages; i++) deliver(&messages[i]);
    num_messages = 0;
    free(messages);
    messages = NULL;
    room = 0;
    return OK;
}
RETURNS(ncclGroupSimulateEnd, OK)
API Status ncclRedOpCreatePreMulSum(int *operation, const void *scalar UNUSED, int type UNUSED, int residence UNUSED,
                                    const Communicator *comm UNUSED) {
    *operation = REDUCE_AVERAGE; /* the scalar is one over the number of ranks, or near it */
    return OK;
}
RETURNS(ncclRedOpDestroy, OK)

/* ---- collectives ---- */

/* torch's watchdog keeps what a collective wrote until it next looks, which it does ten times a second.
   A first step on a card takes longer than that, so the gradients' first buckets are gone when DDP
   makes new ones. Here a step takes a few hundredths of a second. So the first broadcast after a
   reduction, which is that of the new buckets, waits for the watchdog. Seen on an H100 with torch
   2.11.0+cu130 on 2026-11-27. */
static int has_reduced, has_waited;
static void wait_for_watchdog(void) {
    if (!__atomic_load_n(&has_reduced, __ATOMIC_RELAXED) || __atomic_exchange_n(&has_waited, 1, __ATOMIC_RELAXED)) return;
    nanosleep(&(struct timespec){.tv_nsec = 250000000}, NULL);
}

API Status ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, const Communicator *comm, void *stream) {
    collective_reduce(to, from, count, type, operation, comm->num_ranks);
    __atomic_store_n(&has_reduced, 1, __ATOMIC_RELAXED);
    count_launch(stream);
    return OK;
}
API Status ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root, const Communicator *comm, void *stream) {
    if (root == comm->rank) collective_reduce(to, from, count, type, operation, comm->num_ranks);
    count_launch(stream);
    return OK;
}
API Status ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, const Communicator *comm, void *stream) {
    size_t bytes = count * collective_type_bytes(type);
    collective_reduce(to, (const char *)from + bytes * (size_t)comm->rank, count, type, operation, comm->num_ranks);
    count_launch(stream);
    return OK;
}
API Status ncclBroadcast(const void *from, void *to, size_t count, int type, int root, const Communicator *comm, void *stream) {
    size_t bytes = count * collective_type_bytes(type);
    wait_for_watchdog();
    if (root == comm->rank || from != to) collective_copy(to, from, bytes, 1);
    is_remembered((Message){to, from, bytes, root, comm});
    count_launch(stream);
    return OK;
}
API Status ncclBcast(void *buffer, size_t count, int type, int root, const Communicator *comm, void *stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}
API Status ncclAllGather(const void *from, void *to, size_t count, int type, const Communicator *comm, void *stream) {
    collective_copy(to, from, count * collective_type_bytes(type), (size_t)comm->num_known);
    count_launch(stream);
    return OK;
}
API Status ncclGather(const void *from, void *to, size_t count, int type, int root, const Communicator *comm, void *stream) {
    if (root == comm->rank) collective_copy(to, from, count * collective_type_bytes(type), (size_t)comm->num_known);
    count_launch(stream);
    return OK;
}
API Status ncclScatter(const void *from, void *to, size_t count, int type, int root, const Communicator *comm, void *stream) {
    size_t bytes = count * collective_type_bytes(type);
    if (root == comm->rank) collective_copy(to, (const char *)from + bytes * (size_t)comm->rank, bytes, 1);
    else collective_forget(to, bytes);
    count_launch(stream);
    return OK;
}
API Status ncclAlltoAll(const void *from, void *to, size_t count, int type, const Communicator *comm, void *stream) {
    size_t bytes = count * collective_type_bytes(type);
    collective_copy(to, (const char *)from + bytes * (size_t)comm->rank, bytes, (size_t)comm->num_known);
    count_launch(stream);
    return OK;
}
API Status ncclSend(const void *from, size_t count, int type, int peer, const Communicator *comm, void *stream) {
    is_remembered((Message){NULL, from, count * collective_type_bytes(type), peer, comm});
    count_launch(stream);
    return OK;
}
API Status ncclRecv(void *to, size_t count, int type, int peer, const Communicator *comm, void *stream) {
    size_t bytes = count * collective_type_bytes(type);
    if (!is_remembered((Message){to, NULL, bytes, peer, comm})) collective_forget(to, bytes);
    count_launch(stream);
    return OK;
}
RETURNS(ncclPutSignal, OK)
RETURNS(ncclSignal, OK)
RETURNS(ncclWaitSignal, OK)
