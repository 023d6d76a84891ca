/* The blocks in use by their ids: open addressing, at most half full. */
#ifndef MEMFIT_LIVE_H
#define MEMFIT_LIVE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    int64_t id;
    void *block;
} Slot;

typedef struct {
    Slot *slots;
    int64_t count, room;
} Live;

static int64_t home_of(const Live *self, int64_t id)
{
    uint64_t mixed = (uint64_t)id * 0x9E3779B97F4A7C15u;
    return (int64_t)((mixed ^ (mixed >> 32)) & (uint64_t)(self->room - 1));
}

/* The slot of an id, or the empty slot where it would be. */
static Slot *slot_of(Live *self, int64_t id)
{
    int64_t index = home_of(self, id);
    while (self->slots[index].block && self->slots[index].id != id)
        index = (index + 1) & (self->room - 1);
    return &self->slots[index];
}

/* False if there is no memory on the host. */
static bool remember(Live *self, int64_t id, void *block)
{
    if (2 * (self->count + 1) > self->room) {
        Slot *old = self->slots;
        int64_t old_room = self->room;
        int64_t more = old_room ? 2 * old_room : 256;
        Slot *grown = calloc((size_t)more, sizeof(Slot));
        if (!grown)
            return false;
        self->slots = grown;
        self->room = more;
        for (int64_t index = 0; index < old_room; index++)
            if (old[index].block)
                *slot_of(self, old[index].id) = old[index];
        free(old);
    }
    Slot *slot = slot_of(self, id);
    self->count += !slot->block;
    *slot = (Slot){id, block};
    return true;
}

/* Takes an id out. The ids behind it move up, so that none is cut off from its home. */
static void *forget(Live *self, int64_t id)
{
    if (!self->room)
        return NULL;
    Slot *slot = slot_of(self, id);
    void *block = slot->block;
    if (!block)
        return NULL;
    self->count--;
    int64_t mask = self->room - 1, hole = slot - self->slots;
    for (int64_t index = (hole + 1) & mask; self->slots[index].block; index = (index + 1) & mask) {
        int64_t home = home_of(self, self->slots[index].id);
        if (((index - home) & mask) >= ((index - hole) & mask)) {
            self->slots[hole] = self->slots[index];
            hole = index;
        }
    }
    self->slots[hole].block = NULL;
    return block;
}

#endif
