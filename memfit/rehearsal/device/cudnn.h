/* What the files of cuDNN share: its backend's descriptors, and the real library's functions. */
#ifndef MEMFIT_CUDNN_H
#define MEMFIT_CUDNN_H

#include "libraries.h"

enum { TYPE_DATA_TYPE = 1, TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15 }; /* cudnnBackendAttributeType_t */
enum { ENGINE_DESCRIPTOR = 2 }; /* cudnnBackendDescriptorType_t */
enum { /* cudnnBackendAttributeName_t */
    HEURISTICS_OPERATION_GRAPH = 201, HEURISTICS_RESULTS,
    CONFIG_ENGINE = 300,
    PLAN_CONFIG = 401,
    PLAN_WORKSPACE_BYTES = 402,
    PLAN_DEVICEPROP = 407,
    GRAPH_OPERATIONS = 801,
    TENSOR_DATA_TYPE = 901, TENSOR_DIMENSIONS, TENSOR_STRIDES,
    ENGINE_OPERATION_GRAPH = 1300,
    ENGINE_DEVICEPROP = 1307,
};

typedef void *Descriptor;

typedef struct {
    Status (*create)(int, Descriptor *);
    Status (*set)(Descriptor, int, int, int64_t, const void *);
    Status (*get)(Descriptor, int, int, int64_t, int64_t *, void *);
    Status (*finalize)(Descriptor);
    Status (*destroy)(Descriptor);
} Backend;
extern Backend cudnn;
Descriptor card_description(void); /* cuDNN's, of the card */

enum { FORWARD_CONVOLUTION = 702, DATA_CONVOLUTION = 708, FILTER_CONVOLUTION = 714 };
enum { NUM_DIMENSIONS = 4 };

/* A convolution of images. */
typedef struct {
    int first; /* the first attribute of its kind: FORWARD_CONVOLUTION, DATA_..., FILTER_...; 0: not known */
    int dtype; /* cudnnDataType_t */
    int64_t x[NUM_DIMENSIONS], w[NUM_DIMENSIONS], y[NUM_DIMENSIONS];
} Problem;

/* cudnn_products.c: what is known of descriptors. A plan with known bytes is not built: it is a
   convolution that cuDNN gives to cuBLASLt, or it would be compiled at run time. */
void remember(Descriptor descriptor, int name, int64_t count, const void *elements);
void finalized(Descriptor descriptor);
void forget(Descriptor descriptor);
void know_bytes(Descriptor descriptor, int64_t num_bytes);
int64_t known_bytes(Descriptor descriptor); /* of a workspace; -1: not known */
Descriptor known_config(Descriptor plan);   /* NULL: it has none */
Problem known_problem(Descriptor descriptor); /* of an operation, its graph, its list, a plan of it */
/* The configurations of a list, with one more in front for a product; the real library's status. */
Status product_results(Descriptor heuristics, int type, int64_t asked, int64_t *count, void *elements);

/* cudnn_splits.c: a plan's workspace on the whole card, from what cuDNN states for some of it. */
int64_t whole_card_bytes(Descriptor config, const Problem *problem, int64_t stated);

#endif
