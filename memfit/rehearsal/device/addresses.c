/* Where device memory lies. Addresses are reserved without access, so a card of any size costs
   nothing.

   Up to torch 2.11 the caching allocator takes, of free blocks of the same size, the one at the lowest
   address. So there the order of the driver's addresses decides how much it reserves. The driver keeps regions for each
   device. The first has 512 MiB. Parts of it are the driver's own: most of them until the first
   kernel runs. A request takes the smallest hole that is large enough in the newest region that has
   one. If there is none, it gets a new region below the others, of a multiple of 32 MiB. A region that
   is empty again is given up, except the first.

   Measured on an H100 80GB with driver 580.159.04 and torch 2.11.0+cu130 on 2026-11-27; see
   memfit/simulation/allocator/addresses.py, which does the same. Other cards were not measured. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LARGEST_SPACE ((size_t)16 << 40)
#define SMALLEST_SPACE ((size_t)64 << 30)
#define STEP_BYTES (32 * MIB)

/* In pages: */
#define STEP (STEP_BYTES / PAGE_BYTES)
#define FIRST_REGION 256
#define UNTIL_KERNELS 207     /* from the first region's start; a hole of one page follows */
#define FOR_GOOD_FROM 208
#define FOR_GOOD 36
#define BELOW_FIRST_REGION 128 /* the later ones never touch it */

char *space;
size_t space_bytes;
Page *pages;

typedef struct {
    uint32_t first, count; /* pages */
} Range;
static Range *ranges; /* what is taken, in the order of addresses */
static size_t num_ranges, room_ranges;

typedef struct {
    uint32_t first, count, below, num_free; /* pages; `below` it are kept empty */
    int device;                             /* -1: taken by one request, for itself */
    int is_first;
} Region;
static Region **by_age, **by_address;
static size_t num_regions, room_by_age, room_by_address;

static struct {
    Region *first;
    int runs_kernels;
} devices[MAX_DEVICES];

size_t whole_pages(size_t num_bytes) { return (num_bytes + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1); }

static int reserve_space(void) {
    for (size_t size = LARGEST_SPACE; size >= SMALLEST_SPACE; size /= 2) {
        char *at = mmap(0, size + STEP_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) continue;
        size_t table = size / PAGE_BYTES * sizeof(Page);
        void *entries = mmap(0, table, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (entries == MAP_FAILED) {
            munmap(at, size + STEP_BYTES);
            continue;
        }
        pages = entries;
        space_bytes = size;
        __atomic_store_n(&space, (char *)(((uintptr_t)at + STEP_BYTES - 1) & ~(STEP_BYTES - 1)), __ATOMIC_RELEASE);
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

void *grown(void *table, size_t *room, size_t used, size_t entry) {
    if (used < *room) return table;
    size_t wanted = *room ? 2 * *room : 256;
    void *larger = realloc(table, wanted * entry);
    if (larger) *room = wanted;
    return larger;
}

/* ---- what is taken */

/* The first range that ends behind a page. */
static size_t range_from(size_t page) {
    size_t low = 0, high = num_ranges;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].first + ranges[middle].count <= page) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Range *range_at(const void *pointer) {
    if (!is_device_pointer(pointer)) return 0;
    size_t page = (size_t)((const char *)pointer - space) / PAGE_BYTES, i = range_from(page);
    return i < num_ranges && ranges[i].first <= page ? &ranges[i] : 0;
}

static int take_range(Region *region, uint32_t first, uint32_t count) {
    Range *larger = grown(ranges, &room_ranges, num_ranges, sizeof *ranges);
    if (!larger) return 0;
    ranges = larger;
    size_t i = range_from(first);
    memmove(ranges + i + 1, ranges + i, (num_ranges++ - i) * sizeof *ranges);
    ranges[i] = (Range){first, count};
    region->num_free -= count;
    return 1;
}

size_t addresses_at(const void *pointer, char **base) {
    Range *range = range_at(pointer);
    if (!range) return 0;
    if (base) *base = space + range->first * PAGE_BYTES;
    return range->count * PAGE_BYTES;
}

/* ---- regions */

/* The position of the first region that begins behind a page, in the order of addresses. */
static size_t region_after(size_t page) {
    size_t low = 0, high = num_regions;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (by_address[middle]->first <= page) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* At the highest addresses that have room. */
static Region *new_region(size_t count, size_t below, int device) {
    size_t end = space_bytes / PAGE_BYTES, i = num_regions;
    for (; i > 0; end = by_address[i]->first - by_address[i]->below) {
        Region *next = by_address[i - 1];
        if (end - (next->first + next->count) >= count + below) break;
        i--;
    }
    if (end <= count + below) return 0;
    Region **aged = grown(by_age, &room_by_age, num_regions, sizeof *aged);
    if (aged) by_age = aged;
    Region **addressed = grown(by_address, &room_by_address, num_regions, sizeof *addressed);
    if (addressed) by_address = addressed;
    Region *region = aged && addressed ? malloc(sizeof *region) : 0;
    if (!region) return 0;
    *region = (Region){(uint32_t)(end - count), (uint32_t)count, (uint32_t)below, (uint32_t)count, device, 0};
    memmove(by_address + i + 1, by_address + i, (num_regions - i) * sizeof *by_address);
    by_address[i] = by_age[num_regions++] = region;
    return region;
}

static void drop_region(Region *region) {
    size_t at = region_after(region->first) - 1, age = 0;
    while (by_age[age] != region) age++;
    num_regions--;
    memmove(by_address + at, by_address + at + 1, (num_regions - at) * sizeof *by_address);
    memmove(by_age + age, by_age + age + 1, (num_regions - age) * sizeof *by_age);
    free(region);
}

/* The start of the region's smallest hole of at least so many pages; 0: none. */
static uint32_t best_hole(const Region *region, uint32_t count) {
    uint32_t at = region->first, end = region->first + region->count, best = 0, best_count = UINT32_MAX;
    for (size_t i = range_from(at); at < end; i++) {
        int is_last = i == num_ranges || ranges[i].first >= end;
        uint32_t room = (is_last ? end : ranges[i].first) - at;
        if (room >= count && room < best_count) best = at, best_count = room;
        at = is_last ? end : ranges[i].first + ranges[i].count;
    }
    return best;
}

static int has_first_region(int device) {
    if (devices[device].first) return 1;
    Region *region = new_region(FIRST_REGION, BELOW_FIRST_REGION, device);
    if (!region) return 0;
    region->is_first = 1;
    devices[device].first = region;
    return take_range(region, region->first + FOR_GOOD_FROM, FOR_GOOD) &&
           (devices[device].runs_kernels || take_range(region, region->first, UNTIL_KERNELS));
}

/* ---- what the other parts call */

char *take_addresses(size_t num_bytes, int device) {
    uint32_t count = (uint32_t)(whole_pages(num_bytes) / PAGE_BYTES), at = 0;
    if (!count || (!space && !reserve_space()) || (device >= 0 && !has_first_region(device))) return 0;
    Region *region = 0;
    for (size_t i = num_regions; device >= 0 && i > 0 && !at; i--) {
        region = by_age[i - 1];
        if (region->device == device && region->num_free >= count) at = best_hole(region, count);
    }
    if (!at) {
        region = new_region(device < 0 ? count : (count + STEP - 1) / STEP * STEP, 0, device);
        if (!region) return 0;
        at = region->first;
    }
    if (!take_range(region, at, count)) return 0;
    char *base = space + at * PAGE_BYTES;
    set_owner(base, count * PAGE_BYTES, device);
    return base;
}

int give_addresses(void *base) {
    Range *range = range_at(base);
    if (!range || space + range->first * PAGE_BYTES != (char *)base) return 0;
    forget_contents(base, range->count * PAGE_BYTES);
    set_owner(base, range->count * PAGE_BYTES, -1);
    Region *region = by_address[region_after(range->first) - 1];
    region->num_free += range->count;
    memmove(range, range + 1, (size_t)(ranges + --num_ranges - range) * sizeof *range);
    if (region->num_free == region->count && !region->is_first) drop_region(region);
    return 1;
}

char *context_addresses(size_t num_bytes) {
    char *base = take_addresses(num_bytes, -1);
    if (base) set_owner(base, whole_pages(num_bytes), current_device());
    return base;
}

void run_kernels(int device) {
    if (__atomic_load_n(&devices[device].runs_kernels, __ATOMIC_RELAXED)) return;
    device_lock();
    if (!devices[device].runs_kernels && devices[device].first)
        give_addresses(space + devices[device].first->first * PAGE_BYTES);
    __atomic_store_n(&devices[device].runs_kernels, 1, __ATOMIC_RELAXED);
    device_unlock();
}
