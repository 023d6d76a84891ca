/* 1x1 convolutions as products of matrices. On a real device, cuDNN's heuristics put its engines that
   call cuBLASLt before all others for most of them, if their tensors are NCHW: each image is a
   matrix then, and nothing has to be turned around. The engines need cuBLASLt's own handle, so cuDNN
   does not list them for a card that is only described. Here a plan that stands for them goes to the
   front of the list. The rule and its figures: memfit/simulation/cudnn/questions.py. */
#include <stdlib.h>

#include "cudnn.h"

enum { /* cudnnBackendAttributeName_t */
    CONVOLUTION_STRIDES = 103,
    CONVOLUTION_POST_PADDINGS = 104,
    CONVOLUTION_PRE_PADDINGS = 105,
    CONVOLUTION_PART = 0, WEIGHT_PART, INPUT_PART, OUTPUT_PART, /* after the first attribute of a kind */
    FLOAT32 = 0, FLOAT16 = 2, BFLOAT16 = 9, /* cudnnDataType_t */
    FEW_CHANNELS = 32,
    MOST_PRODUCTS = 3, /* times the bytes of input and output */
};

/* What is known of a descriptor: an operation's parts, a plan's configuration, and a workspace. That of
   an operation as a product goes on to its graph, the list of heuristics, the first configuration of the
   list and the plan. So does the problem, to all configurations. */
typedef struct Known {
    Descriptor of, parts[OUTPUT_PART + 1], config;
    int first; /* the first attribute of the operation's kind */
    Problem problem;
    int64_t num_bytes;
    struct Known *next;
} Known;
static Known *known[4096];

static Known **place_of(Descriptor descriptor) {
    Known **at = &known[(uintptr_t)descriptor / 16 % 4096];
    while (*at && (*at)->of != descriptor) at = &(*at)->next;
    return at;
}

static Known *entry_of(Descriptor descriptor) {
    Known **at = place_of(descriptor);
    if (!*at && (*at = calloc(1, sizeof **at))) (*at)->of = descriptor, (*at)->num_bytes = -1;
    return *at;
}

int64_t known_bytes(Descriptor descriptor) {
    device_lock();
    Known *found = *place_of(descriptor);
    int64_t num_bytes = found ? found->num_bytes : -1;
    device_unlock();
    return num_bytes;
}

Problem known_problem(Descriptor descriptor) {
    device_lock();
    Known *found = *place_of(descriptor);
    Problem problem = found ? found->problem : (Problem){0};
    device_unlock();
    return problem;
}

static void know_problem(Descriptor descriptor, const Problem *problem) {
    if (!problem->first) return;
    device_lock();
    Known *entry = entry_of(descriptor);
    if (entry) entry->problem = *problem;
    device_unlock();
}

Descriptor known_config(Descriptor plan) {
    device_lock();
    Known *found = *place_of(plan);
    Descriptor config = found ? found->config : NULL;
    device_unlock();
    return config;
}

void know_bytes(Descriptor descriptor, int64_t num_bytes) {
    if (num_bytes < 0) return;
    device_lock();
    Known *entry = entry_of(descriptor);
    if (entry) entry->num_bytes = num_bytes;
    device_unlock();
}

void forget(Descriptor descriptor) {
    device_lock();
    Known **at = place_of(descriptor), *found = *at;
    if (found) *at = found->next;
    device_unlock();
    free(found);
}

void remember(Descriptor descriptor, int name, int64_t count, const void *elements) {
    if (count != 1) return;
    Descriptor given = *(const Descriptor *)elements;
    if (name == GRAPH_OPERATIONS || name == HEURISTICS_OPERATION_GRAPH || name == PLAN_CONFIG) {
        Problem problem = known_problem(given);
        know_problem(descriptor, &problem);
        know_bytes(descriptor, known_bytes(given));
    }
    int part = (name - FORWARD_CONVOLUTION) % (DATA_CONVOLUTION - FORWARD_CONVOLUTION);
    int is_part = name >= FORWARD_CONVOLUTION && name <= FILTER_CONVOLUTION + OUTPUT_PART && part <= OUTPUT_PART;
    if (!is_part && name != PLAN_CONFIG) return;
    device_lock();
    Known *entry = entry_of(descriptor);
    if (entry && !is_part) entry->config = given;
    else if (entry) entry->first = name - part, entry->parts[part] = given;
    device_unlock();
}

/* Numbers of a descriptor; 0 unless there are `count` of them. */
static int numbers(Descriptor descriptor, int name, int64_t count, int64_t *into) {
    int64_t found = 0;
    return descriptor && !cudnn.get(descriptor, name, TYPE_INT64, count, &found, into) && found == count;
}

static Problem problem_of(const Known *operation) {
    Problem problem = {.first = operation->first};
    int64_t count = 0;
    if (!numbers(operation->parts[INPUT_PART], TENSOR_DIMENSIONS, NUM_DIMENSIONS, problem.x) ||
        !numbers(operation->parts[WEIGHT_PART], TENSOR_DIMENSIONS, NUM_DIMENSIONS, problem.w) ||
        !numbers(operation->parts[OUTPUT_PART], TENSOR_DIMENSIONS, NUM_DIMENSIONS, problem.y) ||
        cudnn.get(operation->parts[INPUT_PART], TENSOR_DATA_TYPE, TYPE_DATA_TYPE, 1, &count, &problem.dtype))
        problem.first = 0;
    return problem;
}

static int64_t bytes_of(const Known *operation, const Problem *problem) {
    const int64_t *x = problem->x, *w = problem->w;
    int64_t strides[NUM_DIMENSIONS], steps[2], before[2], after[2];
    Descriptor convolution = operation->parts[CONVOLUTION_PART];
    int dtype = problem->dtype;
    if (!problem->first ||
        !numbers(operation->parts[INPUT_PART], TENSOR_STRIDES, NUM_DIMENSIONS, strides) ||
        !numbers(convolution, CONVOLUTION_STRIDES, 2, steps) ||
        !numbers(convolution, CONVOLUTION_PRE_PADDINGS, 2, before) ||
        !numbers(convolution, CONVOLUTION_POST_PADDINGS, 2, after))
        return -1;
    int64_t pixels = x[2] * x[3];
    int is_plain = w[2] == 1 && w[3] == 1 && w[1] == x[1] && steps[0] == 1 && steps[1] == 1 && !before[0] &&
                   !before[1] && !after[0] && !after[1];
    int is_nchw = strides[3] == 1 && strides[2] == x[3] && strides[1] == pixels;
    int is_half = dtype == FLOAT16 || dtype == BFLOAT16;
    if (!is_plain || !is_nchw || pixels == 1 || (!is_half && dtype != FLOAT32)) return -1;
    if (operation->first == FILTER_CONVOLUTION) {
        int64_t num_bytes = x[0] * w[0] * w[1] * (int64_t)sizeof(float);
        int64_t tensors = x[0] * pixels * (x[1] + w[0]) * (is_half ? 2 : 4);
        int is_wide = is_half || x[1] > FEW_CHANNELS;
        return is_wide && num_bytes <= MOST_PRODUCTS * tensors ? num_bytes : -1;
    }
    return operation->first == FORWARD_CONVOLUTION && is_half && pixels % 2 ? -1 : 0;
}

void finalized(Descriptor descriptor) {
    device_lock();
    Known *found = *place_of(descriptor), copy = found ? *found : (Known){0};
    device_unlock();
    if (!copy.first) return;
    Problem problem = problem_of(&copy);
    know_problem(descriptor, &problem);
    know_bytes(descriptor, bytes_of(&copy, &problem));
}

static Status listed(Descriptor heuristics, int type, int64_t asked, int64_t *count, Descriptor *configs) {
    int64_t filled = 0;
    Status status = cudnn.get(heuristics, HEURISTICS_RESULTS, type, asked, &filled, configs);
    Problem problem = known_problem(heuristics);
    for (int64_t i = 0; !status && configs && i < filled && i < asked; i++) know_problem(configs[i], &problem);
    if (count) *count = filled;
    return status;
}

Status product_results(Descriptor heuristics, int type, int64_t asked, int64_t *count, void *elements) {
    int64_t num_bytes = known_bytes(heuristics), filled = 0;
    Descriptor *configs = elements;
    if (num_bytes < 0) return listed(heuristics, type, asked, count, configs);
    if (asked < 1 || !configs) {
        Status status = cudnn.get(heuristics, HEURISTICS_RESULTS, type, asked, count, elements);
        if (!status && count && *count) ++*count;
        return status;
    }
    /* The one in front is a copy of the real first one: torch reads its notes, and nothing else. */
    Status status = cudnn.get(heuristics, HEURISTICS_RESULTS, type, 1, &filled, configs);
    if (!status && filled && asked > 1) status = listed(heuristics, type, asked - 1, &filled, configs + 1);
    else filled = 0;
    if (status) return status;
    if (count) *count = filled + 1;
    know_bytes(configs[0], num_bytes);
    return OK;
}
