/* How many ranks a split communicator has. NCCL would count the ranks that come with the same colour,
   but here no other rank comes. torch knows the ranks, and tells them in two ways. */
#include <stdint.h>
#include <stdlib.h>

#include "collectives.h"
#include "libraries.h"

/* torch 2.15: `c10d::nccl2::ProcessGroupNCCL::split(store, ranks, options)`, a public function of
   libtorch_cuda that is overridden here. The call is passed on unchanged. Only the number of ranks, which
   are a std::vector of int, is kept for the call of ncclCommSplit inside it.

   Only on x86-64, where the place for the result is the first argument. On aarch64 it is in a register
   of its own that C cannot pass on, and the group's size stays unknown. */
static __thread int next_size;

#ifdef __x86_64__
typedef struct {
    const int *begin, *end;
} Ranks;
typedef void *(*Split)(void *result, void *self, const void *store, const Ranks *ranks, const void *options);
#define SPLIT \
    _ZN4c10d5nccl216ProcessGroupNCCL5splitERKN3c1013intrusive_ptrINS_5StoreENS2_6detail34intrusive_target_default_null_typeIS4_EEEERKSt6vectorIiSaIiEERKNS3_INS_7Backend7OptionsENS6_ISH_EEEE
#define QUOTED(name) #name
#define TEXT(name) QUOTED(name)

API void *SPLIT(void *result, void *self, const void *store, const Ranks *ranks, const void *options) {
    union {
        void *object;
        Split function;
    } next = {real_function("libtorch_cuda.so", TEXT(SPLIT))};
    if (!next.object) abort(); /* torch calls it: it is there */
    next_size = (int)(ranks->end - ranks->begin);
    return next.function(result, self, store, ranks, options);
}
#endif

/* Before: the colour is Python's hash of the tuple of the group's ranks. Tried are the groups at equal
   distances (all that a mesh of devices makes) with this rank in its place.
   Source: torch/distributed/distributed_c10d.py, _process_group_color; Objects/tupleobject.c. */
static int size_of_color(int rank, int num_ranks, int color, int key) {
    const uint64_t prime1 = 11400714785074694791u, prime2 = 14029467366897019727u, prime5 = 2870177450012600261u;
    for (int stride = 1; stride < num_ranks || stride == 1; stride++) {
        int first = rank - key * stride;
        if (first < 0) break;
        uint64_t sum = prime5;
        for (int count = 1, member = first; member < num_ranks; member += stride, count++) {
            sum += (uint64_t)member * prime2;
            sum = (sum << 31 | sum >> 33) * prime1;
            int64_t hash = (int64_t)(sum + ((uint64_t)count ^ prime5 ^ 3527539));
            if (hash == -1) hash = 1546275796;
            if (count > key && (uint64_t)(hash < 0 ? -hash : hash) % (1u << 31) == (uint64_t)color) return count;
        }
    }
    return 0;
}

int split_size(int rank, int num_ranks, int color, int key) {
    int size = next_size;
    next_size = 0;
    return size ? size : size_of_color(rank, num_ranks, color, key);
}
