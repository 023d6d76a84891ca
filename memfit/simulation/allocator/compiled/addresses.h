/* Where the driver places segments, as `addresses.py` has it, which says how it is known. */
#ifndef MEMFIT_ADDRESSES_H
#define MEMFIT_ADDRESSES_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((int64_t)1 << 20)
#define STEP_BYTES (32 * MIB)
#define FIRST_REGION_BYTES (512 * MIB)
#define BASE ((int64_t)1 << 47)
#define UNTIL_KERNELS_BYTES (414 * MIB)
#define GAP_BYTES (256 * MIB)
#define HANDLE_BYTES (64 * MIB)
#define NOWHERE INT64_MIN /* There is no memory on the host. */

typedef struct {
    int64_t start, size;
} Hole;

/* A range of addresses with its holes, in the order of addresses. */
typedef struct {
    int64_t start, end;
    Hole *holes;
    int64_t num_holes, room;
} Region;

typedef struct {
    int64_t start, end;
} Span;

typedef struct {
    Region *regions; /* The newest last. */
    int64_t count, room;
    Span *spans; /* Of all regions but the first, the highest first. */
    int64_t num_spans, room_for_spans;
    bool has_run_kernels;
} Addresses;

static bool more_room(void **elements, int64_t *room, int64_t count, size_t bytes)
{
    if (count < *room)
        return true;
    int64_t more = *room ? 2 * *room : 16;
    void *grown = realloc(*elements, (size_t)more * bytes);
    if (!grown)
        return false;
    *elements = grown;
    *room = more;
    return true;
}

static void delete_hole(Region *region, int64_t index)
{
    region->num_holes--;
    memmove(&region->holes[index], &region->holes[index + 1],
            (size_t)(region->num_holes - index) * sizeof(Hole));
}

/* Makes a hole, and joins it to the holes beside it. False if there is no memory on the host. */
static bool make_hole(Region *region, int64_t address, int64_t size)
{
    int64_t index = 0;
    while (index < region->num_holes && region->holes[index].start < address)
        index++;
    Hole *holes = region->holes;
    if (index < region->num_holes && holes[index].start == address + size) {
        size += holes[index].size;
        delete_hole(region, index);
    }
    if (index && holes[index - 1].start + holes[index - 1].size == address) {
        holes[index - 1].size += size;
        return true;
    }
    if (!more_room((void **)&region->holes, &region->room, region->num_holes, sizeof(Hole)))
        return false;
    holes = region->holes;
    memmove(&holes[index + 1], &holes[index], (size_t)(region->num_holes - index) * sizeof(Hole));
    holes[index] = (Hole){address, size};
    region->num_holes++;
    return true;
}

/* Takes the start of the smallest hole that is large enough. NOWHERE if there is none. */
static int64_t take_hole(Region *region, int64_t size)
{
    int64_t best = -1;
    for (int64_t index = 0; index < region->num_holes; index++) {
        int64_t room = region->holes[index].size;
        if (room >= size && (best < 0 || room < region->holes[best].size))
            best = index;
    }
    if (best < 0)
        return NOWHERE;
    Hole *hole = &region->holes[best];
    int64_t start = hole->start;
    if (hole->size == size) {
        delete_hole(region, best);
    } else {
        hole->start += size;
        hole->size -= size;
    }
    return start;
}

static bool add_region(Addresses *self, int64_t start, int64_t end)
{
    if (!more_room((void **)&self->regions, &self->room, self->count, sizeof(Region)))
        return false;
    self->regions[self->count++] = (Region){.start = start, .end = end};
    return true;
}

/* The index of the first span that begins at an address or below it. */
static int64_t span_at(const Addresses *self, int64_t start)
{
    int64_t low = 0, high = self->num_spans;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (self->spans[middle].start > start)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool add_span(Addresses *self, int64_t start, int64_t end)
{
    int64_t index = span_at(self, start);
    if (!more_room((void **)&self->spans, &self->room_for_spans, self->num_spans, sizeof(Span)))
        return false;
    memmove(&self->spans[index + 1], &self->spans[index],
            (size_t)(self->num_spans - index) * sizeof(Span));
    self->spans[index] = (Span){start, end};
    self->num_spans++;
    return true;
}

static void delete_span(Addresses *self, int64_t start)
{
    int64_t index = span_at(self, start);
    self->num_spans--;
    memmove(&self->spans[index], &self->spans[index + 1],
            (size_t)(self->num_spans - index) * sizeof(Span));
}

static bool addresses_begin(Addresses *self)
{
    return add_region(self, BASE, BASE + FIRST_REGION_BYTES) &&
           make_hole(&self->regions[0], BASE + 414 * MIB, 2 * MIB) &&
           make_hole(&self->regions[0], BASE + 488 * MIB, 24 * MIB);
}

static void addresses_end(Addresses *self)
{
    for (int64_t index = 0; index < self->count; index++)
        free(self->regions[index].holes);
    free(self->regions);
    free(self->spans);
}

/* The end of the highest gap below the first region that has room for a new region. */
static int64_t end_of_gap(const Addresses *self, int64_t size)
{
    int64_t end = BASE - GAP_BYTES;
    for (int64_t index = 0; index < self->num_spans; index++) {
        if (end - self->spans[index].end >= size)
            return end;
        end = self->spans[index].start;
    }
    return end;
}

static int64_t place(Addresses *self, int64_t size)
{
    for (int64_t index = self->count - 1; index >= 0; index--) {
        int64_t address = take_hole(&self->regions[index], size);
        if (address != NOWHERE)
            return address;
    }
    int64_t whole = (size + STEP_BYTES - 1) / STEP_BYTES * STEP_BYTES;
    int64_t end = end_of_gap(self, whole);
    if (!add_region(self, end - whole, end) || !add_span(self, end - whole, end))
        return NOWHERE;
    Region *region = &self->regions[self->count - 1];
    return make_hole(region, end - whole, whole) ? take_hole(region, size) : NOWHERE;
}

/* Gives addresses back. A region that is empty again is given up, except the first. */
static bool vacate(Addresses *self, int64_t address, int64_t size)
{
    for (int64_t index = 0; index < self->count; index++) {
        Region *region = &self->regions[index];
        if (address < region->start || address >= region->end)
            continue;
        if (!make_hole(region, address, size))
            return false;
        if (index && region->holes[0].size == region->end - region->start) {
            free(region->holes);
            delete_span(self, region->start);
            self->count--;
            memmove(region, region + 1, (size_t)(self->count - index) * sizeof(Region));
        }
        return true;
    }
    return true;
}

/* At the first kernel, the driver gives up most of its own part, and cuBLAS makes a handle. */
static bool run_kernels(Addresses *self)
{
    if (self->has_run_kernels)
        return true;
    self->has_run_kernels = true;
    return make_hole(&self->regions[0], BASE, UNTIL_KERNELS_BYTES) &&
           place(self, HANDLE_BYTES) != NOWHERE;
}

#endif
