/* Addresses and contents of device memory: what addresses.c, memory.c, contents.c, virtual_memory.c
   and pools.c share. Call everything here with the lock held, unless its comment says otherwise. */
#ifndef MEMFIT_MEMORY_H
#define MEMFIT_MEMORY_H

#include "device.h"

#define CELL_BYTES 512 /* what is known of the contents is known by the cell */
#define CELLS_PER_PAGE (PAGE_BYTES / CELL_BYTES)
#define WORDS_PER_PAGE (CELLS_PER_PAGE / 64)

/* One page of device memory. A page without `known` reads as zeros and takes none of the host's
   memory. */
typedef struct {
    uint64_t *known;  /* a bit a cell: set where the host's copies wrote it */
    uint8_t owner;    /* the device's number and one; 0: of nobody */
    uint8_t is_kept;  /* its contents are in the host's memory */
} Page;

/* addresses.c */
extern char *space; /* the first address; null until the first allocation */
extern size_t space_bytes;
extern Page *pages; /* of the whole space */

size_t whole_pages(size_t num_bytes);                    /* rounded up */
char *take_addresses(size_t num_bytes, int device);      /* whole pages; -1: of no device yet */
size_t addresses_at(const void *pointer, char **base);   /* the range around it; 0: none */
int give_addresses(void *base);                          /* 0: nothing begins there */
void set_owner(const void *pointer, size_t num_bytes, int device);
void *grown(void *table, size_t *room, size_t used, size_t entry); /* with room for one more; null: as it was */

/* memory.c */
Status charge(int device, size_t num_bytes);             /* of the budget; OUT_OF_MEMORY */
void refund(int device, size_t num_bytes);
size_t small_room(const void *pointer, char **base);     /* the small allocation around it; 0: none */

/* contents.c */
void forget_contents(const void *pointer, size_t num_bytes); /* reads as zeros from now on */
size_t kept_bytes(void); /* of the host's memory, for contents */

#endif
