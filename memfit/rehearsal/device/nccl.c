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

/* How many ranks a split has, if it is torch's: NCCL is told a colour only, and torch's colour is
   Python's hash of the tuple of the group's ranks. Tried are the groups at equal distances (all
   that a mesh of devices makes) with this rank in its place; 0 when none has the colour.
   Source: torch/distributed/distributed_c10d.py, _process_group_color; Objects/tupleobject.c. */
static int split_size(const Communicator *parent, int color, int place) {
    const uint64_t prime1 = 11400714785074694791u, prime2 = 14029467366897019727u, prime5 = 2870177450012600261u;
    for (int stride = 1; stride < parent->num_ranks || stride == 1; stride++) {
        int first = parent->rank - place * stride;
        if (first < 0) break;
        uint64_t sum = prime5;
        for (int count = 1, rank = first; rank < parent->num_ranks; rank += stride, count++) {
            sum += (uint64_t)rank * prime2;
            sum = (sum << 31 | sum >> 33) * prime1;
            int64_t hash = (int64_t)(sum + ((uint64_t)count ^ prime5 ^ 3527539));
            if (hash == -1) hash = 1546275796;
            if (count > place && (uint64_t)(hash < 0 ? -hash : hash) % (1u << 31) == (uint64_t)color) return count;
        }
    }
    return 0;
}

API Status ncclCommSplit(const Communicator *parent, int color, int key, Communicator **out, void *config UNUSED) {
    *out = NULL;
    if (color == NO_COLOR) return OK;
    int size = split_size(parent, color, key);
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

RETURNS(ncclGroupStart, OK)
RETURNS(ncclGroupEnd, OK)
RETURNS(ncclGroupSimulateEnd, OK)
API Status ncclRedOpCreatePreMulSum(int *operation, const void *scalar UNUSED, int type UNUSED, int residence UNUSED,
                                    const Communicator *comm UNUSED) {
    *operation = REDUCE_AVERAGE; /* the scalar is one over the number of ranks, or near it */
    return OK;
}
RETURNS(ncclRedOpDestroy, OK)

/* ---- collectives ---- */

API Status ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, const Communicator *comm, void *stream) {
    collective_reduce(to, from, count, type, operation, comm->num_ranks);
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
API Status ncclBroadcast(const void *from, void *to, size_t count, int type, int root UNUSED, const Communicator *comm UNUSED, void *stream) {
    collective_copy(to, from, count * collective_type_bytes(type), 1);
    count_launch(stream);
    return OK;
}
API Status ncclBcast(void *buffer UNUSED, size_t count UNUSED, int type UNUSED, int root UNUSED, const Communicator *comm UNUSED, void *stream) {
    count_launch(stream);
    return OK;
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
API Status ncclSend(const void *from UNUSED, size_t count UNUSED, int type UNUSED, int peer UNUSED, const Communicator *comm UNUSED, void *stream) {
    count_launch(stream);
    return OK;
}
API Status ncclRecv(void *to, size_t count, int type, int peer UNUSED, const Communicator *comm UNUSED, void *stream) {
    collective_forget(to, count * collective_type_bytes(type));
    count_launch(stream);
    return OK;
}
RETURNS(ncclPutSignal, OK)
RETURNS(ncclSignal, OK)
RETURNS(ncclWaitSignal, OK)
