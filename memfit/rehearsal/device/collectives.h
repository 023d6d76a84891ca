/* What the collectives of a rehearsed NCCL do with contents. */
#ifndef MEMFIT_COLLECTIVES_H
#define MEMFIT_COLLECTIVES_H

#include <stddef.h>

enum { REDUCE_SUM = 0, REDUCE_PRODUCT = 1, REDUCE_MAXIMUM = 2, REDUCE_MINIMUM = 3, REDUCE_AVERAGE = 4 }; /* ncclRedOp_t */

size_t collective_type_bytes(int type); /* of an ncclDataType_t */
/* As many copies of the source as ranks, one after the other. */
void collective_copy(void *to, const void *from, size_t num_bytes, size_t num_copies);
/* The reduction of equal values of all ranks. */
void collective_reduce(void *to, const void *from, size_t count, int type, int operation, int num_ranks);
void collective_forget(void *to, size_t num_bytes);

/* splits.c: how many ranks a part of a communicator has; 0: not known. */
int split_size(int rank, int num_ranks, int color, int key);

#endif
