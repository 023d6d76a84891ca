/* Device memory: the budget, cudaMalloc and cudaFree. addresses.c says where it lies.

   The budget is the card's total, less the context and what other processes hold. Allocations of 1
   MiB and more take whole pages of 2 MiB; smaller ones share pages, as they do with the real
   driver. */
#include "memory.h"
#include "streams.h"

#include <stdlib.h>
#include <string.h>

#define SMALL_BYTES (1 * MIB)

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
