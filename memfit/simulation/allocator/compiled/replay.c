/* PyTorch's CUDA caching allocator on integers, as `caching.py` has it, for its default settings.

   A search replays hundreds of thousands of requests. This does what the Python code does, block by
   block, and `tests/simulation/allocator/test_compiled.py` holds the two against each other. It
   does not handle expandable segments, `max_split_size_mb`, garbage collection or rounding to
   divisions of powers of two; the Python code does.

   Source: c10/cuda/CUDACachingAllocator.cpp. */

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "addresses.h"
#include "live.h"

#define EXPORTED __attribute__((visibility("default")))

enum {
    MIN_BLOCK_BYTES = 512,
    FIRST_ROOM = 256,
    BLOCKS_AT_ONCE = 1024,
};
static const int64_t SMALL_REQUEST_BYTES = MIB;
static const int64_t SMALL_SEGMENT_BYTES = 2 * MIB;
static const int64_t MIN_OWN_SEGMENT_BYTES = 10 * MIB;
static const int64_t SEGMENT_ROUNDING_BYTES = 2 * MIB;

/* What an event does, as `_CODES` in __init__.py numbers it. */
enum { ALLOC, FREE_COMPLETED, TRY_ALLOC, ALLOC_IF_ROOM, EMPTY_CACHE, CHANGEABLE_PLAN, RUN_KERNELS };
/* What a block's rank is, as `BlockOrder` in blocks.py numbers it. */
enum { BY_ADDRESS, BY_BLOCK, BY_SEGMENT };
/* How a stretch of events ended, as `_Ending` in __init__.py numbers it. */
enum { ENDED, OUT_OF_MEMORY, PLAN_FINDS_NO_ROOM, NO_HOST_MEMORY };

typedef struct Block Block;
typedef struct Pool Pool;

struct Block {
    int64_t address, size, requested, rank;
    Block *previous, *next; /* Neighbours in the segment. An unused block: `next` is a list. */
    Pool *pool;
    bool is_free;
};

typedef struct {
    int64_t size, rank, address;
    Block *block;
} Entry;

/* The free blocks for small or for large requests, by size, then by rank, then by address. */
struct Pool {
    Entry *entries;
    int64_t count, room, newest_rank;
    bool is_small;
};

typedef struct Chunk Chunk;
struct Chunk {
    Chunk *next;
    Block blocks[BLOCKS_AT_ONCE];
};

typedef struct {
    int64_t capacity, large_segment;
    int order;
    int64_t taken, peak_taken, device_calls;
    int64_t requested, allocated, peak_requested, peak_allocated, retries;
    Pool small, large;
    Addresses addresses;
    Live live;
    Chunk *chunks;
    Block *unused;
    bool has_no_host_memory;
} Allocator;

/* Room for one more element; the elements are where they were if there is no memory. */
static bool reserve(Allocator *self, void **elements, int64_t *room, int64_t count, size_t bytes)
{
    if (count < *room)
        return true;
    int64_t more = *room ? 2 * *room : FIRST_ROOM;
    void *grown = realloc(*elements, (size_t)more * bytes);
    if (!grown) {
        self->has_no_host_memory = true;
        return false;
    }
    *elements = grown;
    *room = more;
    return true;
}

static Block *new_block(Allocator *self, int64_t address, int64_t size, Pool *pool, int64_t rank)
{
    if (!self->unused) {
        Chunk *chunk = malloc(sizeof *chunk);
        if (!chunk) {
            self->has_no_host_memory = true;
            return NULL;
        }
        chunk->next = self->chunks;
        self->chunks = chunk;
        for (int index = 0; index < BLOCKS_AT_ONCE; index++) {
            chunk->blocks[index].next = self->unused;
            self->unused = &chunk->blocks[index];
        }
    }
    Block *block = self->unused;
    self->unused = block->next;
    *block = (Block){.address = address, .size = size, .pool = pool, .rank = rank};
    return block;
}

static void drop(Allocator *self, Block *block)
{
    block->next = self->unused;
    self->unused = block;
}

/* --- pools: what is free ---------------------------------------------------------------------- */

/* The rank of a new segment, or of a new block where blocks have their own. */
static int64_t new_rank(const Allocator *self, Pool *pool)
{
    return self->order == BY_ADDRESS ? 0 : ++pool->newest_rank;
}

static bool is_before(const Entry *entry, int64_t size, int64_t rank, int64_t address)
{
    if (entry->size != size)
        return entry->size < size;
    return entry->rank != rank ? entry->rank < rank : entry->address < address;
}

/* The index of the first entry that is not before (size, rank, address). */
static int64_t lower_bound(const Pool *pool, int64_t size, int64_t rank, int64_t address)
{
    int64_t low = 0, high = pool->count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (is_before(&pool->entries[middle], size, rank, address))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void remove_at(Pool *pool, int64_t index)
{
    pool->entries[index].block->is_free = false;
    pool->count--;
    memmove(&pool->entries[index], &pool->entries[index + 1],
            (size_t)(pool->count - index) * sizeof(Entry));
}

static void take_out(Block *block)
{
    remove_at(block->pool, lower_bound(block->pool, block->size, block->rank, block->address));
}

static void put_in(Allocator *self, Block *block)
{
    Pool *pool = block->pool;
    if (!reserve(self, (void **)&pool->entries, &pool->room, pool->count, sizeof(Entry)))
        return;
    int64_t index = lower_bound(pool, block->size, block->rank, block->address);
    memmove(&pool->entries[index + 1], &pool->entries[index],
            (size_t)(pool->count - index) * sizeof(Entry));
    pool->entries[index] = (Entry){block->size, block->rank, block->address, block};
    pool->count++;
    block->is_free = true;
}

/* --- the device's bytes ----------------------------------------------------------------------- */

static bool take(Allocator *self, int64_t size)
{
    if (self->capacity >= 0 && size > self->capacity - self->taken)
        return false;
    self->device_calls++;
    self->taken += size;
    if (self->taken > self->peak_taken)
        self->peak_taken = self->taken;
    return true;
}

/* --- the allocator ---------------------------------------------------------------------------- */

static int64_t segment_bytes(const Allocator *self, int64_t size)
{
    if (size <= SMALL_REQUEST_BYTES)
        return SMALL_SEGMENT_BYTES;
    if (size < MIN_OWN_SEGMENT_BYTES)
        return self->large_segment;
    return (size + SEGMENT_ROUNDING_BYTES - 1) / SEGMENT_ROUNDING_BYTES * SEGMENT_ROUNDING_BYTES;
}

static Block *from_device(Allocator *self, Pool *pool, int64_t size)
{
    int64_t segment = segment_bytes(self, size);
    if (!take(self, segment))
        return NULL;
    int64_t address = place(&self->addresses, segment);
    if (address == NOWHERE) {
        self->has_no_host_memory = true;
        return NULL;
    }
    return new_block(self, address, segment, pool, new_rank(self, pool));
}

/* Gives back all segments without blocks in use. */
static void empty_cache(Allocator *self)
{
    Pool *pools[] = {&self->small, &self->large};
    for (int number = 0; number < 2; number++) {
        Pool *pool = pools[number];
        int64_t kept = 0;
        for (int64_t index = 0; index < pool->count; index++) {
            Block *block = pool->entries[index].block;
            if (block->previous || block->next) {
                pool->entries[kept++] = pool->entries[index];
                continue;
            }
            self->device_calls++;
            self->taken -= block->size;
            if (!vacate(&self->addresses, block->address, block->size))
                self->has_no_host_memory = true;
            drop(self, block);
        }
        pool->count = kept;
    }
}

/* Serves a request. An optional one (`gives_back` is false) gives no cached memory back. */
static bool allocate(Allocator *self, int64_t id, int64_t bytes, bool gives_back)
{
    int64_t size = (bytes + MIN_BLOCK_BYTES - 1) / MIN_BLOCK_BYTES * MIN_BLOCK_BYTES;
    Pool *pool = size <= SMALL_REQUEST_BYTES ? &self->small : &self->large;
    Block *block = NULL;
    int64_t index = lower_bound(pool, size, INT64_MIN, INT64_MIN);
    if (index < pool->count) {
        block = pool->entries[index].block;
        remove_at(pool, index);
    } else {
        block = from_device(self, pool, size);
        if (!block && gives_back) {
            empty_cache(self);
            self->retries++;
            block = from_device(self, pool, size);
        }
        if (!block)
            return false;
    }
    int64_t rest = block->size - size;
    if (rest && (pool->is_small ? rest >= MIN_BLOCK_BYTES : rest > SMALL_REQUEST_BYTES)) {
        Block *following = new_block(self, block->address + size, rest, pool, block->rank);
        if (!following)
            return false;
        following->previous = block;
        following->next = block->next;
        if (block->next)
            block->next->previous = following;
        block->next = following;
        block->size = size;
        if (self->order == BY_BLOCK)
            block->rank = new_rank(self, pool);
        put_in(self, following);
    }
    block->requested = bytes;
    if (!remember(&self->live, id, block))
        self->has_no_host_memory = true;
    self->requested += bytes;
    if (self->requested > self->peak_requested)
        self->peak_requested = self->requested;
    self->allocated += block->size;
    if (self->allocated > self->peak_allocated)
        self->peak_allocated = self->allocated;
    return true;
}

/* Frees a block, and joins it with its free neighbours. */
static void release(Allocator *self, int64_t id)
{
    Block *block = forget(&self->live, id);
    if (!block)
        return;
    self->requested -= block->requested;
    self->allocated -= block->size;
    Block *before = block->previous, *after = block->next;
    if (before && before->is_free) {
        take_out(before);
        block->address = before->address;
        block->size += before->size;
        block->previous = before->previous;
        if (block->previous)
            block->previous->next = block;
        drop(self, before);
    }
    if (after && after->is_free) {
        take_out(after);
        block->size += after->size;
        block->next = after->next;
        if (block->next)
            block->next->previous = block;
        drop(self, after);
    }
    put_in(self, block);
}

EXPORTED Allocator *memfit_allocator_new(int64_t capacity, int64_t large_segment, int order)
{
    Allocator *self = calloc(1, sizeof *self);
    if (self && !addresses_begin(&self->addresses)) {
        addresses_end(&self->addresses);
        free(self);
        return NULL;
    }
    if (self) {
        self->capacity = capacity; /* Negative for no limit. */
        self->large_segment = large_segment;
        self->order = order;
        self->small.is_small = true;
    }
    return self;
}

EXPORTED void memfit_allocator_delete(Allocator *self)
{
    while (self->chunks) {
        Chunk *chunk = self->chunks;
        self->chunks = chunk->next;
        free(chunk);
    }
    free(self->small.entries);
    free(self->large.entries);
    addresses_end(&self->addresses);
    free(self->live.slots);
    free(self);
}

/* The figures in the order of `AllocatorStats`, and the calls of the device. */
EXPORTED void memfit_allocator_stats(const Allocator *self, int64_t *figures)
{
    const int64_t found[] = {
        self->requested,      self->allocated,  self->taken,   self->peak_requested,
        self->peak_allocated, self->peak_taken, self->retries, self->device_calls,
    };
    memcpy(figures, found, sizeof found);
}

/* Serves one request, and gives cached memory back for it if need be. */
EXPORTED int memfit_allocator_request(Allocator *self, int64_t id, int64_t bytes)
{
    return allocate(self, id, bytes, true);
}

/* A stretch of events, one element of each list for an event. */
typedef struct {
    int64_t count;
    const int8_t *codes;
    const int64_t *ids;
    const int64_t *bytes;
    const double *growth; /* What each further sample adds to the bytes. */
    const int32_t *needs; /* The number of the need that says the bytes, or -1. */
} Program;

/* Carries out the events from `at` on, with so many samples more than in the recording.

   `sizes` has the bytes of each need, and `plans` those of the plan that torch took in place of one
   that found no room before, or -1. Returns how it ended. `at` is then the event that was not
   served, and `asked` its bytes. */
EXPORTED int memfit_allocator_play(Allocator *self, const Program *program, int64_t samples,
                                   const int64_t *sizes, const int64_t *plans, int64_t *at,
                                   int64_t *asked)
{
    for (; *at < program->count; ++*at) {
        int code = program->codes[*at];
        int64_t id = program->ids[*at];
        if (code == FREE_COMPLETED) {
            release(self, id);
            continue;
        }
        if (code == EMPTY_CACHE) {
            empty_cache(self);
            continue;
        }
        if (code == RUN_KERNELS) {
            if (!run_kernels(&self->addresses))
                return NO_HOST_MEMORY;
            continue;
        }
        int32_t need = program->needs[*at];
        int64_t bytes = program->bytes[*at];
        double growth = program->growth[*at];
        if (need >= 0) {
            bytes = sizes[need];
            /* What needs nothing has no event. Its plan is not changed either. */
            if (bytes > 0 && code == CHANGEABLE_PLAN && plans[need] >= 0)
                bytes = plans[need];
        } else if (growth != 0) {
            bytes = (int64_t)((double)bytes + growth * (double)samples);
        }
        if (bytes <= 0)
            continue;
        bool is_served = allocate(self, id, bytes, code != TRY_ALLOC);
        if (self->has_no_host_memory)
            return NO_HOST_MEMORY;
        if (is_served || code == TRY_ALLOC || code == ALLOC_IF_ROOM)
            continue;
        *asked = bytes;
        return code == CHANGEABLE_PLAN ? PLAN_FINDS_NO_ROOM : OUT_OF_MEMORY;
    }
    return self->has_no_host_memory ? NO_HOST_MEMORY : ENDED;
}
