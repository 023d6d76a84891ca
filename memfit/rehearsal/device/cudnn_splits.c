/* Kernels of cuDNN for Hopper that share a sum between all multiprocessors. For a card that is only
   described, cuDNN counts 18 of them, so the workspaces that it states hold too few parts of sums, or
   too many. What the whole card needs is worked out from workspaces that cuDNN states for one cluster,
   and for a small problem of the same depth. The rule, its source and its figures:
   memfit/simulation/cudnn/splits.py. */
#include <stdlib.h>

#include "cudnn.h"

enum { /* cudnnBackendDescriptorType_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t */
    CONVOLUTION_DESCRIPTOR = 1,
    CONFIG_DESCRIPTOR = 3,
    PLAN_DESCRIPTOR = 5,
    KNOB_CHOICE_DESCRIPTOR = 7,
    FORWARD_DESCRIPTOR = 10,
    FILTER_DESCRIPTOR = 11,
    DATA_DESCRIPTOR = 12,
    GRAPH_DESCRIPTOR = 15,
    TENSOR_DESCRIPTOR = 17,
    COMPUTE_TYPE = 100, CONVOLUTION_MODE, DILATIONS, STRIDES, POST_PADDINGS, PRE_PADDINGS, SPATIAL_DIMENSIONS,
    CONFIG_KNOBS = 302,
    KNOB_KIND = 600,
    KNOB_VALUE = 601,
    TENSOR_ALIGNMENT = 900,
    TENSOR_NUMBER = 906,
    ENGINE_NUMBER = 1301,
    ENGINE_MULTIPROCESSORS = 1306,
    TYPE_FLOAT = 4, TYPE_MODE = 7, TYPE_KNOB = 9, TYPE_INT32 = 23,
    FLOAT_DATA = 0, CROSS_CORRELATION = 1,
    TILE_KNOB = 2, WORKSPACE_KNOB = 25, CLUSTER_M_KNOB = 27, CLUSTER_N_KNOB = 28,
    MOST_KNOBS = 40,
    DESCRIBED = 18, /* the multiprocessors of a card that is only described */
    FLOAT_BYTES = 4, ALIGNED_BYTES = 128, MANY_WAVES = 3,
};

/* Rows and columns of a tile, by the value of its knob. Others were not seen to be split. */
static const int TILES[][2] = {
    [0] = {128, 128}, [1] = {128, 64}, [3] = {256, 128}, [4] = {256, 64}, [5] = {64, 64}, [7] = {64, 128}, [9] = {64, 256},
};

typedef struct {
    int64_t engine;
    int num_knobs, kinds[MOST_KNOBS];
    int64_t values[MOST_KNOBS], rows, columns, cluster_m, cluster_n;
} Kernel;

/* Descriptors that are made for one question. */
typedef struct {
    Descriptor all[256];
    int count, has_failed;
} Made;

typedef struct {
    int name, type;
    int64_t count;
    const void *elements;
} Attribute;

static Descriptor add(Made *made, int kind) {
    Descriptor descriptor = NULL;
    if (made->count == (int)(sizeof made->all / sizeof *made->all) || cudnn.create(kind, &descriptor)) {
        made->has_failed = 1;
        return NULL;
    }
    return made->all[made->count++] = descriptor;
}

static Descriptor make(Made *made, int kind, int count, const Attribute *attributes) {
    Descriptor descriptor = add(made, kind);
    for (int i = 0; i < count && !made->has_failed; i++)
        made->has_failed |= cudnn.set(descriptor, attributes[i].name, attributes[i].type, attributes[i].count,
                                      attributes[i].elements) != OK;
    made->has_failed = made->has_failed || cudnn.finalize(descriptor);
    return made->has_failed ? NULL : descriptor;
}
#define MAKE(made, kind, ...) \
    make(made, kind, (int)(sizeof(Attribute[]){__VA_ARGS__} / sizeof(Attribute)), (Attribute[]){__VA_ARGS__})

static void destroy(Made *made) {
    while (made->count) cudnn.destroy(made->all[--made->count]);
}

static int read_one(Descriptor descriptor, int name, int type, void *into) {
    int64_t count = 0;
    return !cudnn.get(descriptor, name, type, 1, &count, into) && count == 1;
}

static int64_t ceil_of(int64_t amount, int64_t unit) { return (amount + unit - 1) / unit; }

/* The kernel of a configuration and its graph; 0 if it is not one of these kernels. */
static int read_kernel(Made *made, Descriptor config, Kernel *kernel, Descriptor *graph) {
    int64_t tile = -1, has_workspace = 0, count = 0;
    Descriptor engine = add(made, ENGINE_DESCRIPTOR), choices[MOST_KNOBS];
    *kernel = (Kernel){0};
    *graph = add(made, GRAPH_DESCRIPTOR);
    for (int i = 0; i < MOST_KNOBS; i++) choices[i] = add(made, KNOB_CHOICE_DESCRIPTOR);
    if (made->has_failed || !read_one(config, CONFIG_ENGINE, TYPE_DESCRIPTOR, &engine) ||
        !read_one(engine, ENGINE_NUMBER, TYPE_INT64, &kernel->engine) ||
        !read_one(engine, ENGINE_OPERATION_GRAPH, TYPE_DESCRIPTOR, graph) ||
        cudnn.get(config, CONFIG_KNOBS, TYPE_DESCRIPTOR, MOST_KNOBS, &count, choices) || count > MOST_KNOBS)
        return 0;
    for (; kernel->num_knobs < count; kernel->num_knobs++) {
        int *kind = &kernel->kinds[kernel->num_knobs];
        int64_t *value = &kernel->values[kernel->num_knobs];
        if (!read_one(choices[kernel->num_knobs], KNOB_KIND, TYPE_KNOB, kind) ||
            !read_one(choices[kernel->num_knobs], KNOB_VALUE, TYPE_INT64, value))
            return 0;
        if (*kind == TILE_KNOB) tile = *value;
        else if (*kind == WORKSPACE_KNOB) has_workspace = 1;
        else if (*kind == CLUSTER_M_KNOB) kernel->cluster_m = *value;
        else if (*kind == CLUSTER_N_KNOB) kernel->cluster_n = *value;
    }
    if (tile < 0 || tile >= (int64_t)(sizeof TILES / sizeof *TILES)) return 0;
    kernel->rows = TILES[tile][0], kernel->columns = TILES[tile][1];
    return kernel->rows && has_workspace && kernel->cluster_m > 0 && kernel->cluster_n > 0;
}

/* The kernel's workspace on some multiprocessors, in clusters of one block or its own; -1: no such plan. */
static int64_t bytes_on(const Kernel *kernel, Descriptor graph, int multiprocessors, int is_alone) {
    Made made = {.count = 0};
    Descriptor choices[MOST_KNOBS], card = card_description();
    int64_t num_bytes = -1;
    for (int i = 0; i < kernel->num_knobs; i++) {
        int is_cluster = kernel->kinds[i] == CLUSTER_M_KNOB || kernel->kinds[i] == CLUSTER_N_KNOB;
        int64_t value = is_alone && is_cluster ? 1 : kernel->values[i];
        choices[i] = MAKE(&made, KNOB_CHOICE_DESCRIPTOR, {KNOB_KIND, TYPE_KNOB, 1, &kernel->kinds[i]},
                          {KNOB_VALUE, TYPE_INT64, 1, &value});
    }
    Descriptor engine = MAKE(&made, ENGINE_DESCRIPTOR, {ENGINE_OPERATION_GRAPH, TYPE_DESCRIPTOR, 1, &graph},
                             {ENGINE_NUMBER, TYPE_INT64, 1, &kernel->engine},
                             {ENGINE_MULTIPROCESSORS, TYPE_INT32, 1, &multiprocessors},
                             {ENGINE_DEVICEPROP, TYPE_DESCRIPTOR, 1, &card});
    Descriptor config = MAKE(&made, CONFIG_DESCRIPTOR, {CONFIG_ENGINE, TYPE_DESCRIPTOR, 1, &engine},
                             {CONFIG_KNOBS, TYPE_DESCRIPTOR, kernel->num_knobs, choices});
    Descriptor plan = MAKE(&made, PLAN_DESCRIPTOR, {PLAN_DEVICEPROP, TYPE_DESCRIPTOR, 1, &card},
                           {PLAN_CONFIG, TYPE_DESCRIPTOR, 1, &config});
    if (made.has_failed || !read_one(plan, PLAN_WORKSPACE_BYTES, TYPE_INT64, &num_bytes)) num_bytes = -1;
    destroy(&made);
    return num_bytes;
}

/* How many clusters of blocks run at once. Those of three and more fit into groups of multiprocessors. */
static int64_t most_clusters(int64_t size) {
    static const int GROUPS[] = {18, 18, 16, 16, 16, 16, 16, 8}; /* of an H100 with 132 of them */
    int64_t multiprocessors = card()->multiprocessors, clusters = 0;
    if (size <= 2) return multiprocessors / size;
    for (size_t i = 0; i < sizeof GROUPS / sizeof *GROUPS; i++) clusters += GROUPS[i] / size;
    clusters = clusters * multiprocessors / 132;
    return clusters ? clusters : 1;
}

static int64_t cluster_tiles(const Kernel *kernel, const Problem *problem) {
    const int64_t *x = problem->x, *w = problem->w, *y = problem->y;
    int64_t groups = x[1] / w[1], filters = w[0] / groups; /* of a group, as w[1] are its channels */
    int64_t down = ceil_of(filters, kernel->rows), across = ceil_of(w[1], kernel->columns);
    if (problem->first == FILTER_CONVOLUTION) { /* several small groups share a tile */
        int64_t high = kernel->rows / filters, wide = kernel->columns / w[1], together = high < wide ? high : wide;
        across *= w[2] * w[3];
        if (together > 1) groups = ceil_of(groups, together);
    } else if (problem->first == DATA_CONVOLUTION) down = ceil_of(x[0] * x[2] * x[3], kernel->rows);
    else down = ceil_of(x[0] * y[2] * y[3], kernel->rows), across = ceil_of(filters, kernel->columns);
    return groups * ceil_of(down, kernel->cluster_m) * ceil_of(across, kernel->cluster_n);
}

static int64_t most_parts(int64_t num_tiles, int64_t clusters) {
    int64_t last = num_tiles % clusters;
    return last ? clusters / last : 1;
}

/* What parts of sums and their counters take. Pairs of parts are added up, then pairs of these sums. */
static int64_t added_bytes(const Kernel *kernel, int64_t num_tiles, int64_t clusters, int64_t parts) {
    int64_t blocks = num_tiles % clusters * kernel->cluster_m * kernel->cluster_n, held = 0;
    int64_t counters = ceil_of(num_tiles, clusters) >= MANY_WAVES;
    if (parts > 1) {
        int64_t sums = 1;
        for (int64_t left = ceil_of(parts, 2); left > 1; left = ceil_of(left, 2)) sums += left;
        counters += 8 + blocks * sums;
        held = blocks * parts * kernel->rows * kernel->columns * FLOAT_BYTES;
    }
    return counters ? held + counters * FLOAT_BYTES + ALIGNED_BYTES - 1 : 0;
}

static Descriptor tensor(Made *made, int64_t number, int dtype, const int64_t *shape) {
    int64_t alignment = 16;
    int64_t strides[] = {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
    return MAKE(made, TENSOR_DESCRIPTOR, {TENSOR_ALIGNMENT, TYPE_INT64, 1, &alignment},
                {TENSOR_DATA_TYPE, TYPE_DATA_TYPE, 1, &dtype},
                {TENSOR_DIMENSIONS, TYPE_INT64, NUM_DIMENSIONS, shape},
                {TENSOR_STRIDES, TYPE_INT64, NUM_DIMENSIONS, strides}, {TENSOR_NUMBER, TYPE_INT64, 1, &number});
}

/* The graph of a problem with as long sums, and so many tiles. */
static Descriptor small_graph(Made *made, const Kernel *kernel, const Problem *problem, int64_t num_tiles) {
    const int64_t *w = problem->w;
    int64_t m = kernel->rows, n = kernel->columns, window = w[2] * w[3], samples = problem->x[0];
    int64_t filters = w[0] / (problem->x[1] / w[1]);
    Problem small;
    if (problem->first == FILTER_CONVOLUTION) {
        int64_t height = problem->y[2], width = problem->y[3];
        small = (Problem){.x = {samples, n * num_tiles, height, width}, .w = {m, n * num_tiles, 1, 1},
                          .y = {samples, m, height, width}};
    } else if (problem->first == FORWARD_CONVOLUTION) {
        samples = m * num_tiles;
        small = (Problem){.x = {samples, w[1], w[2], w[3]}, .w = {n, w[1], w[2], w[3]}, .y = {samples, n, 1, 1}};
    } else {
        samples = m * num_tiles / window;
        small = (Problem){.x = {samples, n, w[2], w[3]}, .w = {filters, n, w[2], w[3]}, .y = {samples, filters, 1, 1}};
    }
    const int64_t ones[] = {1, 1}, zeros[] = {0, 0}, two = 2;
    const int compute = FLOAT_DATA, mode = CROSS_CORRELATION;
    const float alpha = 1, beta = 0;
    Descriptor x = tensor(made, 1, problem->dtype, small.x), weight = tensor(made, 2, problem->dtype, small.w);
    Descriptor y = tensor(made, 3, problem->dtype, small.y);
    Descriptor convolution = MAKE(made, CONVOLUTION_DESCRIPTOR, {COMPUTE_TYPE, TYPE_DATA_TYPE, 1, &compute},
                                  {CONVOLUTION_MODE, TYPE_MODE, 1, &mode}, {DILATIONS, TYPE_INT64, 2, ones},
                                  {STRIDES, TYPE_INT64, 2, ones}, {POST_PADDINGS, TYPE_INT64, 2, zeros},
                                  {PRE_PADDINGS, TYPE_INT64, 2, zeros}, {SPATIAL_DIMENSIONS, TYPE_INT64, 1, &two});
    /* Of each kind: alpha and beta, then the convolution, weight, input and output. */
    int first = problem->first, kind = FILTER_DESCRIPTOR;
    if (first != FILTER_CONVOLUTION) kind = first == DATA_CONVOLUTION ? DATA_DESCRIPTOR : FORWARD_DESCRIPTOR;
    Descriptor operation = MAKE(made, kind, {first, TYPE_DESCRIPTOR, 1, &convolution},
                                {first + 1, TYPE_DESCRIPTOR, 1, &weight}, {first + 2, TYPE_DESCRIPTOR, 1, &x},
                                {first + 3, TYPE_DESCRIPTOR, 1, &y}, {first - 2, TYPE_FLOAT, 1, &alpha},
                                {first - 1, TYPE_FLOAT, 1, &beta});
    return MAKE(made, GRAPH_DESCRIPTOR, {GRAPH_OPERATIONS, TYPE_DESCRIPTOR, 1, &operation});
}

/* Into how many parts cuDNN splits a tile, of those that are possible; 0: it does not say. */
static int64_t parts_of(const Kernel *kernel, const Problem *problem, int64_t most, int is_first) {
    Made made = {.count = 0};
    int64_t parts = 0, asked = most < DESCRIBED ? most : DESCRIBED;
    Descriptor graph = small_graph(&made, kernel, problem, is_first ? 1 : asked + 1);
    if (graph) {
        int64_t unsplit = bytes_on(kernel, graph, 1, 1), split = bytes_on(kernel, graph, (int)asked, 1);
        if (unsplit >= 0 && split >= 0) {
            parts = (split - unsplit) / (kernel->rows * kernel->columns * FLOAT_BYTES);
            if (parts < 1) parts = 1;
            else if (parts == asked) parts = most; /* as many as can be asked for */
        }
    }
    destroy(&made);
    return parts;
}

static int64_t whole_card_bytes_of(const Kernel *kernel, Descriptor graph, const Problem *problem, int64_t stated) {
    int64_t size = kernel->cluster_m * kernel->cluster_n, described = DESCRIBED / size;
    int64_t num_tiles = cluster_tiles(kernel, problem), parts = 1, is_known = 0;
    if (!described) return stated;
    /* On one cluster the tiles follow one another, and none is split. */
    int64_t unsplit = bytes_on(kernel, graph, (int)size, 0);
    if (unsplit < 0) return stated;
    unsplit -= added_bytes(kernel, num_tiles, 1, 1);
    for (int64_t i = most_parts(num_tiles, described); i > 0; i--)
        is_known |= stated - unsplit == added_bytes(kernel, num_tiles, described, i);
    if (!is_known) return stated; /* another rule */
    int64_t clusters = most_clusters(size), most = most_parts(num_tiles, clusters);
    if (most > 1) parts = parts_of(kernel, problem, most, num_tiles < clusters);
    return parts ? unsplit + added_bytes(kernel, num_tiles, clusters, parts) : stated;
}

int64_t whole_card_bytes(Descriptor config, const Problem *problem, int64_t stated) {
    if (card()->major != 9 || card()->minor != 0) return stated;
    Made made = {.count = 0};
    Kernel kernel;
    Descriptor graph;
    if (read_kernel(&made, config, &kernel, &graph)) stated = whole_card_bytes_of(&kernel, graph, problem, stated);
    destroy(&made);
    return stated;
}
