/* What the two files of cuDNN share: its backend's descriptors, and the real library's functions. */
#ifndef MEMFIT_CUDNN_H
#define MEMFIT_CUDNN_H

#include "libraries.h"

enum { TYPE_DATA_TYPE = 1, TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15 }; /* cudnnBackendAttributeType_t */
enum { HEURISTICS_OPERATION_GRAPH = 201, HEURISTICS_RESULTS = 202 }; /* cudnnBackendAttributeName_t */

typedef void *Descriptor;

typedef struct {
    Status (*create)(int, Descriptor *);
    Status (*set)(Descriptor, int, int, int64_t, const void *);
    Status (*get)(Descriptor, int, int, int64_t, int64_t *, void *);
    Status (*finalize)(Descriptor);
    Status (*destroy)(Descriptor);
} Backend;
extern Backend cudnn;

/* cudnn_products.c: convolutions that cuDNN gives to cuBLASLt. */
void product_set(Descriptor descriptor, int name, int64_t count, const void *elements);
void product_finalized(Descriptor descriptor);
void product_forget(Descriptor descriptor);
int64_t product_bytes(Descriptor descriptor); /* -1: this is no such convolution */
/* The configurations of a list, with one more in front; the status of the real library's answer. */
Status product_results(Descriptor heuristics, int type, int64_t asked, int64_t *count, void *elements);

#endif
