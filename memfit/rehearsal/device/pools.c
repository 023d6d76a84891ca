/* Memory pools: cudaMallocAsync and what torch's backend of that name is made of.

   A pool takes memory of the device in steps of 32 MiB and keeps it up to its release threshold. The
   real driver remaps pages, so that a pool hardly fragments; here it does not at all. An allocation
   is handed out and taken back at once, whatever its stream. */
#include "memory.h"

#include <stdlib.h>

#include "streams.h"

#define STEP_BYTES (32 * MIB)

typedef struct Pool {
    int device, reuse[3];
    uint64_t threshold, used, used_high, reserved, reserved_high, most;
    struct Pool *next;
} Pool;

typedef struct {
    char *base;
    size_t num_bytes;
    Pool *pool;
} Piece;

static Pool defaults[MAX_DEVICES], *chosen[MAX_DEVICES], *pools;
static Piece *pieces;
static size_t num_pieces, room_pieces;

static Pool *default_pool(int device) {
    Pool *pool = &defaults[device];
    if (!chosen[device]) {
        *pool = (Pool){.device = device, .reuse = {1, 1, 1}, .next = pools};
        pools = chosen[device] = pool;
    }
    return pool;
}

static uint64_t stepped(uint64_t num_bytes, uint64_t step) { return (num_bytes + step - 1) / step * step; }

static void trim(Pool *pool, uint64_t keep) {
    uint64_t least = stepped(pool->used, PAGE_BYTES);
    if (keep < least) keep = least;
    if (keep >= pool->reserved) return;
    refund(pool->device, pool->reserved - keep);
    pool->reserved = keep;
}

static Status grow(Pool *pool, uint64_t num_bytes) {
    uint64_t needed = pool->used + num_bytes;
    if (pool->most && needed > pool->most) return OUT_OF_MEMORY;
    if (needed <= pool->reserved) return OK;
    uint64_t wanted = stepped(needed, STEP_BYTES);
    if (charge(pool->device, wanted - pool->reserved)) {
        for (Pool *other = pools; other; other = other->next)
            if (other != pool && other->device == pool->device) trim(other, 0);
        wanted = stepped(needed, PAGE_BYTES);
        if (charge(pool->device, wanted - pool->reserved)) return OUT_OF_MEMORY;
    }
    pool->reserved = wanted;
    if (pool->reserved > pool->reserved_high) pool->reserved_high = pool->reserved;
    return OK;
}

static Status pool_allocate(void **pointer, size_t num_bytes, Pool *pool) {
    *pointer = 0;
    if (!num_bytes) return OK;
    num_bytes = stepped(num_bytes, CELL_BYTES);
    if (num_pieces == room_pieces) {
        size_t wanted = room_pieces ? 2 * room_pieces : 1024;
        Piece *larger = realloc(pieces, wanted * sizeof *pieces);
        if (!larger) return OUT_OF_MEMORY;
        pieces = larger;
        room_pieces = wanted;
    }
    if (grow(pool, num_bytes) || !(*pointer = take_addresses(num_bytes, pool->device))) return OUT_OF_MEMORY;
    pieces[num_pieces++] = (Piece){*pointer, num_bytes, pool};
    pool->used += num_bytes;
    if (pool->used > pool->used_high) pool->used_high = pool->used;
    return OK;
}

int pool_release(void *pointer) {
    for (size_t i = num_pieces; i-- > 0;) {
        if (pieces[i].base != (char *)pointer) continue;
        Pool *pool = pieces[i].pool;
        pool->used -= pieces[i].num_bytes;
        give_addresses(pointer);
        pieces[i] = pieces[--num_pieces];
        if (pool->reserved > pool->threshold) trim(pool, pool->threshold);
        return 1;
    }
    return 0;
}

API Status cudaMallocFromPoolAsync(void **pointer, size_t num_bytes, Pool *pool, void *stream UNUSED) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    device_lock();
    int device = current_device();
    touch_device(device);
    default_pool(device);
    Status status = pool_allocate(pointer, num_bytes, pool ? pool : chosen[device]);
    device_unlock();
    return fail(status);
}
API Status cudaMallocAsync(void **pointer, size_t num_bytes, void *stream) {
    return cudaMallocFromPoolAsync(pointer, num_bytes, 0, stream);
}
API Status cudaFreeAsync(void *pointer, void *stream UNUSED) {
    if (!pointer) return OK;
    if (is_forked()) return fail(NOT_INITIALIZED);
    device_lock();
    Status status = pool_release(pointer) ? OK : release(pointer);
    device_unlock();
    return fail(status);
}

static Status pool_of(Pool **pool, int device, int is_default) {
    if (device < 0 || device >= card()->num_gpus) return fail(INVALID_DEVICE);
    device_lock();
    *pool = default_pool(device);
    if (!is_default) *pool = chosen[device];
    device_unlock();
    return OK;
}
API Status cudaDeviceGetDefaultMemPool(Pool **pool, int device) { return pool_of(pool, device, 1); }
API Status cudaDeviceGetMemPool(Pool **pool, int device) { return pool_of(pool, device, 0); }
API Status cudaDeviceSetMemPool(int device, Pool *pool) {
    Pool *before;
    Status status = pool_of(&before, device, 1);
    if (!status) chosen[device] = pool;
    return status;
}
typedef struct {
    int type, id;
} Location; /* 1: a device, by number */
API Status cudaMemGetDefaultMemPool(Pool **pool, const Location *location, int type UNUSED) {
    return location->type == 1 ? pool_of(pool, location->id, 1) : fail(NOT_SUPPORTED);
}
API Status cudaMemGetMemPool(Pool **pool, const Location *location, int type UNUSED) {
    return location->type == 1 ? pool_of(pool, location->id, 0) : fail(NOT_SUPPORTED);
}

/* The beginning of cudaMemPoolProps and CUmemPoolProps. */
typedef struct {
    int type, handle_types;
    Location location;
    void *attributes;
    size_t most;
} Properties;

API Status cudaMemPoolCreate(Pool **pool, const Properties *properties) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (properties->location.type != 1) return fail(NOT_SUPPORTED);
    if (properties->location.id < 0 || properties->location.id >= card()->num_gpus) return fail(INVALID_DEVICE);
    if (!(*pool = calloc(1, sizeof **pool))) return fail(OUT_OF_MEMORY);
    device_lock();
    **pool = (Pool){.device = properties->location.id, .reuse = {1, 1, 1}, .most = properties->most, .next = pools};
    pools = *pool;
    device_unlock();
    return OK;
}
API Status cudaMemPoolDestroy(Pool *pool) {
    if (!pool) return fail(INVALID_VALUE);
    device_lock();
    for (size_t i = num_pieces; i-- > 0;) /* gone with the pool */
        if (pieces[i].pool == pool) pool_release(pieces[i].base);
    trim(pool, 0);
    for (int device = 0; device < MAX_DEVICES; device++)
        if (chosen[device] == pool) chosen[device] = &defaults[device];
    for (Pool **at = &pools; *at; at = &(*at)->next)
        if (*at == pool) {
            *at = pool->next;
            break;
        }
    device_unlock();
    if (pool < defaults || pool >= defaults + MAX_DEVICES) free(pool);
    return OK;
}
API Status cudaMemPoolTrimTo(Pool *pool, size_t keep) {
    device_lock();
    trim(pool, keep);
    device_unlock();
    return OK;
}

/* Source: the enumeration cudaMemPoolAttr. The first three are int, the others 64 bits. */
API Status cudaMemPoolGetAttribute(Pool *pool, int attribute, void *value) {
    Status status = OK;
    device_lock();
    switch (attribute) {
    case 1: case 2: case 3: *(int *)value = pool->reuse[attribute - 1]; break;
    case 4: *(uint64_t *)value = pool->threshold; break;
    case 5: *(uint64_t *)value = pool->reserved; break;
    case 6: *(uint64_t *)value = pool->reserved_high; break;
    case 7: *(uint64_t *)value = pool->used; break;
    case 8: *(uint64_t *)value = pool->used_high; break;
    case 11: *(int *)value = pool->device; break;
    case 12: *(int *)value = 1; break;
    case 13: *(uint64_t *)value = pool->most; break;
    default: status = NOT_SUPPORTED;
    }
    device_unlock();
    return fail(status);
}
API Status cudaMemPoolSetAttribute(Pool *pool, int attribute, const void *value) {
    Status status = OK;
    device_lock();
    switch (attribute) {
    case 1: case 2: case 3: pool->reuse[attribute - 1] = *(const int *)value; break;
    case 4: pool->threshold = *(const uint64_t *)value; break;
    case 6: pool->reserved_high = pool->reserved; break;
    case 8: pool->used_high = pool->used; break;
    default: status = INVALID_VALUE;
    }
    device_unlock();
    return fail(status);
}
API Status cudaMemPoolSetAccess(Pool *pool UNUSED, const void *access UNUSED, size_t n UNUSED) { return OK; }
API Status cudaMemPoolGetAccess(int *access, Pool *pool UNUSED, const void *location UNUSED) { return *access = 3, OK; }

/* The pool of graphs. What a captured graph allocates comes from the ordinary pool. */
API Status cudaDeviceGetGraphMemAttribute(int device UNUSED, int attribute UNUSED, uint64_t *value) { return *value = 0, OK; }
API Status cudaDeviceSetGraphMemAttribute(int device UNUSED, int attribute UNUSED, uint64_t *value UNUSED) { return OK; }
API Status cudaDeviceGraphMemTrim(int device UNUSED) { return OK; }

ALSO(cuMemAllocAsync, cudaMallocAsync);
ALSO(cuMemAllocFromPoolAsync, cudaMallocFromPoolAsync);
ALSO(cuMemFreeAsync, cudaFreeAsync);
ALSO(cuDeviceGetDefaultMemPool, cudaDeviceGetDefaultMemPool);
ALSO(cuDeviceGetMemPool, cudaDeviceGetMemPool);
ALSO(cuDeviceSetMemPool, cudaDeviceSetMemPool);
ALSO(cuMemPoolCreate, cudaMemPoolCreate);
ALSO(cuMemPoolDestroy, cudaMemPoolDestroy);
ALSO(cuMemPoolTrimTo, cudaMemPoolTrimTo);
ALSO(cuMemPoolGetAttribute, cudaMemPoolGetAttribute);
ALSO(cuMemPoolSetAttribute, cudaMemPoolSetAttribute);
ALSO(cuMemPoolSetAccess, cudaMemPoolSetAccess);
ALSO(cuMemPoolGetAccess, cudaMemPoolGetAccess);
ALSO(cuDeviceGetGraphMemAttribute, cudaDeviceGetGraphMemAttribute);
ALSO(cuDeviceSetGraphMemAttribute, cudaDeviceSetGraphMemAttribute);
ALSO(cuDeviceGraphMemTrim, cudaDeviceGraphMemTrim);
