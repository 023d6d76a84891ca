/* Device memory: addresses, the budget, cudaMalloc and cudaFree.

   Addresses are reserved without access, so a card of any size costs nothing. The budget is the
   card's total, less the context and what other processes hold. Allocations of 1 MiB and more take
   whole pages of 2 MiB; smaller ones share pages, as they do with the real driver. */
#include "memory.h"
#include "streams.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SMALL_BYTES (1 * MIB)
#define LARGEST_SPACE ((size_t)16 << 40)
#define SMALLEST_SPACE ((size_t)64 << 30)

char *space;
size_t space_bytes;
Page *pages;

typedef struct {
    uint32_t first, count; /* pages */
} Range;
static Range *ranges; /* in the order of their addresses */
static size_t num_ranges, room_ranges;

typedef struct {
    char *base;
    int device, num_free;
    uint64_t taken[WORDS_PER_PAGE], last[WORDS_PER_PAGE]; /* `last` ends an allocation */
} SharedPage;
static SharedPage **shared;
static size_t num_shared, room_shared;

static struct {
    size_t used, peak, missing, num_failures;
    int is_touched;
} devices[MAX_DEVICES];

size_t whole_pages(size_t num_bytes) { return (num_bytes + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1); }

static int reserve_space(void) {
    for (size_t size = LARGEST_SPACE; size >= SMALLEST_SPACE; size /= 2) {
        char *at = mmap(0, size + PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) continue;
        size_t table = size / PAGE_BYTES * sizeof(Page);
        void *entries = mmap(0, table, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (entries == MAP_FAILED) {
            munmap(at, size + PAGE_BYTES);
            continue;
        }
        pages = entries;
        space_bytes = size;
        __atomic_store_n(&space, (char *)(((uintptr_t)at + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1)), __ATOMIC_RELEASE);
        return 1;
    }
    return 0;
}

int is_device_pointer(const void *pointer) {
    const char *base = __atomic_load_n(&space, __ATOMIC_ACQUIRE);
    return base && (const char *)pointer >= base && (const char *)pointer < base + space_bytes;
}

int device_of(const void *pointer) {
    if (!is_device_pointer(pointer)) return -1;
    int owner = pages[(size_t)((const char *)pointer - space) / PAGE_BYTES].owner;
    return owner ? owner - 1 : 0;
}

void set_owner(const void *pointer, size_t num_bytes, int device) {
    size_t first = (size_t)((const char *)pointer - space) / PAGE_BYTES;
    for (size_t i = 0; i < num_bytes / PAGE_BYTES; i++) pages[first + i].owner = (uint8_t)(device + 1);
}

static void *grown(void *table, size_t *room, size_t used, size_t entry) {
    if (used < *room) return table;
    size_t wanted = *room ? 2 * *room : 256;
    void *larger = realloc(table, wanted * entry);
    if (larger) *room = wanted;
    return larger;
}

char *take_addresses(size_t num_bytes, int device) {
    if (!space && !reserve_space()) return 0;
    size_t count = whole_pages(num_bytes) / PAGE_BYTES, at = 0, i = 0;
    for (; i < num_ranges; at = ranges[i].first + ranges[i].count, i++)
        if (ranges[i].first - at >= count) break;
    if (count == 0 || at + count > space_bytes / PAGE_BYTES) return 0;
    Range *larger = grown(ranges, &room_ranges, num_ranges, sizeof *ranges);
    if (!larger) return 0;
    ranges = larger;
    memmove(ranges + i + 1, ranges + i, (num_ranges++ - i) * sizeof *ranges);
    ranges[i] = (Range){(uint32_t)at, (uint32_t)count};
    char *base = space + at * PAGE_BYTES;
    set_owner(base, count * PAGE_BYTES, device);
    return base;
}

static Range *range_at(const void *pointer) {
    if (!is_device_pointer(pointer)) return 0;
    size_t page = (size_t)((const char *)pointer - space) / PAGE_BYTES, low = 0, high = num_ranges;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].first + ranges[middle].count <= page) low = middle + 1;
        else high = middle;
    }
    return low < num_ranges && ranges[low].first <= page ? &ranges[low] : 0;
}

size_t addresses_at(const void *pointer, char **base) {
    Range *range = range_at(pointer);
    if (!range) return 0;
    if (base) *base = space + range->first * PAGE_BYTES;
    return range->count * PAGE_BYTES;
}

int give_addresses(void *base) {
    Range *range = range_at(base);
    if (!range || space + range->first * PAGE_BYTES != (char *)base) return 0;
    forget_contents(base, range->count * PAGE_BYTES);
    set_owner(base, range->count * PAGE_BYTES, -1);
    memmove(range, range + 1, (size_t)(ranges + --num_ranges - range) * sizeof *range);
    return 1;
}

static size_t taken_by_process(int device) {
    return devices[device].used + (devices[device].is_touched ? card()->context_bytes : 0);
}

static size_t free_bytes(int device) {
    size_t taken = taken_by_process(device) + card()->others_bytes;
    return taken > card()->total_bytes ? 0 : card()->total_bytes - taken;
}

Status charge(int device, size_t num_bytes) {
    size_t room = free_bytes(device);
    if (num_bytes > room) {
        devices[device].missing = num_bytes - room;
        devices[device].num_failures++;
        return OUT_OF_MEMORY;
    }
    devices[device].used += num_bytes;
    if (devices[device].used > devices[device].peak) devices[device].peak = devices[device].used;
    return OK;
}

void refund(int device, size_t num_bytes) { devices[device].used -= num_bytes; }

DeviceMemory device_memory(int device) {
    if (device < 0 || device >= card()->num_gpus) return (DeviceMemory){0};
    return (DeviceMemory){
        .total_bytes = card()->total_bytes,
        .used_bytes = devices[device].used,
        .peak_bytes = devices[device].peak,
        .free_bytes = free_bytes(device),
        .held_bytes = taken_by_process(device),
        .missing_bytes = devices[device].missing,
        .num_failures = devices[device].num_failures,
        .is_touched = devices[device].is_touched,
    };
}

void reset_peak(int device) { devices[device].peak = devices[device].used; }

void touch_device(int device) {
    if (device >= 0 && device < card()->num_gpus) devices[device].is_touched = 1;
}

/* ---- small allocations, which share pages */

static int bit(const uint64_t *bits, int i) { return bits[i / 64] >> (i % 64) & 1; }
static void flip(uint64_t *bits, int i) { bits[i / 64] ^= (uint64_t)1 << (i % 64); }

static int free_run(const SharedPage *page, int cells) {
    for (int i = 0, run = 0; i < (int)CELLS_PER_PAGE; i++) {
        if (i % 64 == 0 && page->taken[i / 64] == UINT64_MAX) {
            run = 0;
            i += 63;
            continue;
        }
        run = bit(page->taken, i) ? 0 : run + 1;
        if (run == cells) return i - cells + 1;
    }
    return -1;
}

static SharedPage *new_shared(int device) {
    SharedPage **larger = grown(shared, &room_shared, num_shared, sizeof *shared);
    if (!larger) return 0;
    shared = larger;
    SharedPage *page = calloc(1, sizeof *page);
    if (!page) return 0;
    if (charge(device, PAGE_BYTES) || !(page->base = take_addresses(PAGE_BYTES, device))) {
        free(page);
        return 0;
    }
    page->device = device;
    page->num_free = CELLS_PER_PAGE;
    return shared[num_shared++] = page;
}

static void *take_small(int device, size_t num_bytes) {
    int cells = (int)((num_bytes + CELL_BYTES - 1) / CELL_BYTES), at = -1;
    SharedPage *page = 0;
    for (size_t i = 0; i < num_shared && at < 0; i++) {
        page = shared[i];
        if (page->device == device && page->num_free >= cells) at = free_run(page, cells);
    }
    if (at < 0) {
        if (!(page = new_shared(device))) return 0;
        at = 0;
    }
    for (int i = at; i < at + cells; i++) flip(page->taken, i);
    flip(page->last, at + cells - 1);
    page->num_free -= cells;
    return page->base + (size_t)at * CELL_BYTES;
}

static size_t shared_at(const void *pointer) {
    size_t i = 0;
    while (i < num_shared && ((const char *)pointer < shared[i]->base || (const char *)pointer >= shared[i]->base + PAGE_BYTES)) i++;
    return i;
}

size_t small_room(const void *pointer, char **base) {
    size_t i = shared_at(pointer);
    if (i == num_shared) return 0;
    SharedPage *page = shared[i];
    int from = (int)((const char *)pointer - page->base) / CELL_BYTES, to = from;
    if (!bit(page->taken, from)) return 0;
    while (from > 0 && bit(page->taken, from - 1) && !bit(page->last, from - 1)) from--;
    while (!bit(page->last, to)) to++;
    if (base) *base = page->base + (size_t)from * CELL_BYTES;
    return (size_t)(to - from + 1) * CELL_BYTES;
}

static int give_small(void *pointer) {
    char *base;
    size_t num_bytes = small_room(pointer, &base), i = shared_at(pointer);
    if (!num_bytes || base != (char *)pointer) return 0;
    SharedPage *page = shared[i];
    int from = (int)(base - page->base) / CELL_BYTES, cells = (int)(num_bytes / CELL_BYTES);
    for (int cell = from; cell < from + cells; cell++) flip(page->taken, cell);
    flip(page->last, from + cells - 1);
    page->num_free += cells;
    forget_contents(base, num_bytes);
    if (page->num_free == (int)CELLS_PER_PAGE) {
        give_addresses(page->base);
        refund(page->device, PAGE_BYTES);
        free(page);
        shared[i] = shared[--num_shared];
    }
    return 1;
}

char *context_addresses(size_t num_bytes) { return take_addresses(num_bytes, current_device()); }

/* ---- what programs call */

Status allocate(void **pointer, size_t num_bytes, int device) {
    *pointer = 0;
    if (!num_bytes) return OK;
    touch_device(device);
    if (num_bytes < SMALL_BYTES) *pointer = take_small(device, num_bytes);
    else if (!charge(device, whole_pages(num_bytes)) && !(*pointer = take_addresses(num_bytes, device)))
        refund(device, whole_pages(num_bytes));
    return *pointer ? OK : OUT_OF_MEMORY;
}

Status release(void *pointer) {
    if (!pointer || give_small(pointer)) return OK;
    char *base;
    size_t num_bytes = addresses_at(pointer, &base);
    if (!num_bytes || base != (char *)pointer) return INVALID_VALUE;
    int device = device_of(pointer);
    give_addresses(pointer);
    refund(device, num_bytes);
    return OK;
}
