/* cuDNN's recurrent layers: weights in cuDNN's order, and the bytes kept for backward.

   The order of weights is what torch asserts: all matrices, layer by layer, then all biases.

   Both buffers are measured, not documented: PyTorch's issue 2895 prints cuDNN's answers on a P100
   for four layers of 320 units, 123 features, 100 samples of 250 time steps, fp32. Reserve:
   736,000,000 bytes for LSTM and 864,000,000 for GRU. That is, to the byte, 5 values a unit, step
   and sample for LSTM, 6 for GRU, and one more between layers. Workspace: 17,730,560 and 13,169,920.
   That is the matrices, and for each layer 11 states for LSTM, 8 for GRU (three a gate, less one).
   This is taken to hold for later releases, other types, both directions. What is left out, or
   supposed: a plain recurrent layer (1 value a unit is supposed, and the same rule for the
   workspace), and dropout's mask between layers. */
#include <stdlib.h>
#include <string.h>

#include "libraries.h"

enum { CUDNN_BAD_PARAM = 2000, CUDNN_NOT_SUPPORTED = 3000 };
enum { LSTM = 2, GRU = 3 };                        /* cudnnRNNMode_t */
enum { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT16 = 9 }; /* cudnnDataType_t */

typedef struct {
    int mode, has_bias, num_directions, input_units, hidden_units, output_units, num_layers, type;
} Rnn;
typedef struct {
    int max_length, batch_size;
} RnnData;

static size_t type_bytes(int type) { return type == DOUBLE ? 8 : type == FLOAT ? 4 : 2; }
static int num_gates(const Rnn *r) { return r->mode == LSTM ? 4 : r->mode == GRU ? 3 : 1; }
static int is_projected(const Rnn *r) { return r->output_units != r->hidden_units; }

/* The matrix `id` of a layer in one direction. The first half act on the layer's input, the second
   on its last output, and one more projects the output. */
static size_t matrix(const Rnn *r, int layer, int id, int *rows, int *columns) {
    if (id == 2 * num_gates(r)) {
        *rows = is_projected(r) ? r->output_units : 0;
        *columns = r->hidden_units;
    } else {
        int is_first = layer / r->num_directions == 0;
        *rows = r->hidden_units;
        *columns = id >= num_gates(r) ? r->output_units
                   : is_first         ? r->input_units
                                      : r->output_units * r->num_directions;
    }
    return (size_t)*rows * (size_t)*columns;
}

/* Values before a matrix or a bias; layer -1: all of them. */
static size_t values_before(const Rnn *r, int layer, int id, int is_bias) {
    int rows, columns, num_layers = r->num_layers * r->num_directions;
    int num_matrices = 2 * num_gates(r) + is_projected(r);
    size_t values = 0;
    for (int i = 0; i < num_layers; i++)
        for (int k = 0; k < num_matrices; k++) {
            if (!is_bias && i == layer && k == id)
                return values;
            values += matrix(r, i, k, &rows, &columns);
        }
    for (int i = 0; r->has_bias && i < num_layers; i++)
        for (int k = 0; k < 2 * num_gates(r); k++) {
            if (is_bias && i == layer && k == id)
                return values;
            values += (size_t)r->hidden_units;
        }
    return values;
}

#define DESCRIPTOR(kind, type) \
    API Status cudnnCreate##kind(type **descriptor) { \
        *descriptor = calloc(1, sizeof **descriptor); \
        return *descriptor ? OK : CUDNN_NOT_SUPPORTED; \
    } \
    API Status cudnnDestroy##kind(type *descriptor) { free(descriptor); return OK; }

DESCRIPTOR(RNNDescriptor, Rnn)
DESCRIPTOR(RNNDataDescriptor, RnnData)

API Status cudnnSetRNNDescriptor_v8(Rnn *rnn, UNUSED int algorithm, int mode, int bias,
                                    int direction, UNUSED int input_mode, int data_type,
                                    UNUSED int math_precision, UNUSED int math_type,
                                    int32_t input_units, int32_t hidden_units,
                                    int32_t output_units, int32_t num_layers,
                                    UNUSED void *dropout, UNUSED uint32_t flags) {
    *rnn = (Rnn){
        .mode = mode,
        .has_bias = bias != 0,
        .num_directions = direction ? 2 : 1,
        .input_units = input_units,
        .hidden_units = hidden_units,
        .output_units = output_units ? output_units : hidden_units,
        .num_layers = num_layers,
        .type = data_type,
    };
    return OK;
}

API Status cudnnSetRNNDataDescriptor(RnnData *data, UNUSED int type, UNUSED int layout,
                                     int max_length, int batch_size, UNUSED int vector_size,
                                     UNUSED const int lengths[], UNUSED void *padding) {
    *data = (RnnData){.max_length = max_length, .batch_size = batch_size};
    return OK;
}

API Status cudnnGetRNNWeightSpaceSize(UNUSED const Handle *handle, const Rnn *rnn,
                                      size_t *num_bytes) {
    *num_bytes = type_bytes(rnn->type) * values_before(rnn, -1, -1, 1);
    return OK;
}

/* Where a matrix and a bias lie. The descriptors of tensors are the real library's. */
API Status cudnnGetRNNWeightParams(UNUSED const Handle *handle, const Rnn *rnn, int32_t layer,
                                   UNUSED size_t num_bytes, const void *weights, int32_t id,
                                   void *matrix_descriptor, void **matrix_address,
                                   void *bias_descriptor, void **bias_address) {
    Status (*set)(void *, int, int, const int *, const int *);
    *(void **)&set = real_function("libcudnn.so.9", "cudnnSetTensorNdDescriptor");
    if (!set) return CUDNN_BAD_PARAM;
    void *nowhere;
    if (!matrix_address) matrix_address = &nowhere;
    if (!bias_address) bias_address = &nowhere;
    int rows, columns;
    char *start = (char *)(uintptr_t)weights;
    size_t each = type_bytes(rnn->type);
    *matrix_address = *bias_address = NULL;
    if (matrix(rnn, layer, id, &rows, &columns)) {
        int sizes[] = {1, rows, columns}, strides[] = {rows * columns, columns, 1};
        *matrix_address = start + each * values_before(rnn, layer, id, 0);
        if (matrix_descriptor && set(matrix_descriptor, rnn->type, 3, sizes, strides))
            return CUDNN_BAD_PARAM;
    }
    if (rnn->has_bias && id < 2 * num_gates(rnn)) {
        int sizes[] = {1, rnn->hidden_units, 1}, strides[] = {rnn->hidden_units, 1, 1};
        *bias_address = start + each * values_before(rnn, layer, id, 1);
        if (bias_descriptor && set(bias_descriptor, rnn->type, 3, sizes, strides))
            return CUDNN_BAD_PARAM;
    }
    return OK;
}

API Status cudnnGetRNNTempSpaceSizes(UNUSED const Handle *handle, const Rnn *rnn, int is_training,
                                     const RnnData *data, size_t *workspace_bytes,
                                     size_t *reserve_bytes) {
    size_t gates = (size_t)num_gates(rnn), layers = (size_t)rnn->num_layers;
    size_t units = (size_t)rnn->hidden_units * (size_t)rnn->num_directions;
    size_t samples = (size_t)data->batch_size, steps = (size_t)data->max_length * samples;
    size_t kept = rnn->mode == LSTM ? 5 : rnn->mode == GRU ? 6 : 1;
    Rnn unbiased = *rnn;
    unbiased.has_bias = 0;
    if (gates == 1)
        leave_out(PLAIN_RECURRENCE);
    if (workspace_bytes)
        *workspace_bytes = type_bytes(rnn->type) * (values_before(&unbiased, -1, -1, 0) +
                                                    samples * units * layers * (3 * gates - 1));
    if (reserve_bytes)
        *reserve_bytes = is_training ? type_bytes(rnn->type) * steps * units *
                                           (kept * layers + layers - 1)
                                     : 0;
    return OK;
}

COMPUTES(cudnnRNNForward)
COMPUTES(cudnnRNNBackwardData_v8)
COMPUTES(cudnnRNNBackwardWeights_v8)
RETURNS(cudnnBuildRNNDynamic, OK)
RETURNS(cudnnRNNSetClip_v8, OK)
RETURNS(cudnnRNNSetClip_v9, OK)
RETURNS(cudnnRNNGetClip_v8, CUDNN_NOT_SUPPORTED)
RETURNS(cudnnRNNGetClip_v9, CUDNN_NOT_SUPPORTED)
RETURNS(cudnnGetRNNDescriptor_v8, CUDNN_NOT_SUPPORTED)
RETURNS(cudnnGetRNNDataDescriptor, CUDNN_NOT_SUPPORTED)
