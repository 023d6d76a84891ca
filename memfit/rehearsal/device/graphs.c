/* CUDA graphs. A graph is a row of nodes; launching it calls the host functions among them and does
   nothing else. What a graph was promised to keep alive (user objects) lives as long as it does. */
#include "streams.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct Node {
    Graph *graph;
    int type, id;
    HostFunction function;
    void *data;
} Node;

typedef struct Kept {
    HostFunction destroy;
    void *data;
    unsigned references;
    struct Kept *next; /* among the dead */
} Kept;

struct Graph { /* an executable graph is another one of these */
    Node **nodes;
    Kept **kept;
    size_t num_nodes, room_nodes, num_kept, room_kept;
    uint64_t flags;
    unsigned id;
};

enum { NODE_KERNEL, NODE_COPY, NODE_FILL, NODE_HOST, NODE_GRAPH, NODE_EMPTY, NODE_WAIT, NODE_RECORD };

static unsigned next_graph_id = 1;

Graph *new_graph(void) {
    Graph *graph = calloc(1, sizeof *graph);
    if (graph) graph->id = next_graph_id++;
    return graph;
}

static void *larger(void *table, size_t used, size_t *room) {
    if (used < *room) return table;
    size_t wanted = *room ? 2 * *room : 64;
    void *moved = realloc(table, wanted * sizeof(void *));
    if (moved) *room = wanted;
    return moved;
}

void append_node(Graph *graph, int type, HostFunction function, void *data) {
    Node *node = calloc(1, sizeof *node);
    Node **nodes = larger(graph->nodes, graph->num_nodes, &graph->room_nodes);
    if (!node || !nodes) {
        free(node);
        return;
    }
    *node = (Node){graph, type, (int)graph->num_nodes, function, data};
    graph->nodes = nodes;
    nodes[graph->num_nodes++] = node;
}

void *last_node(Graph *graph) { return graph->num_nodes ? graph->nodes[graph->num_nodes - 1] : 0; }
void **last_node_slot(Graph *graph) {
    return graph->num_nodes ? (void **)&graph->nodes[graph->num_nodes - 1] : 0;
}

/* What has lost its last reference is destroyed later, without the lock. */
static Kept *dead;

static void drop(Kept *kept, unsigned count) {
    if (!kept->references) return;
    kept->references = kept->references > count ? kept->references - count : 0;
    if (kept->references) return;
    kept->next = dead;
    dead = kept;
}

void bury(void) {
    for (;;) {
        device_lock();
        Kept *kept = dead;
        if (kept) dead = kept->next;
        device_unlock();
        if (!kept) return;
        if (kept->destroy) kept->destroy(kept->data);
        free(kept);
    }
}

void free_graph(Graph *graph) {
    for (size_t i = 0; i < graph->num_nodes; i++) free(graph->nodes[i]);
    for (size_t i = 0; i < graph->num_kept; i++) drop(graph->kept[i], 1);
    free(graph->nodes);
    free(graph->kept);
    free(graph);
}

static void keep(Graph *graph, Kept *kept, unsigned count) {
    while (count--) {
        Kept **table = larger(graph->kept, graph->num_kept, &graph->room_kept);
        if (!table) return;
        graph->kept = table;
        table[graph->num_kept++] = kept;
    }
}

static Graph *copy_graph(const Graph *from) {
    Graph *to = new_graph();
    if (!to) return 0;
    for (size_t i = 0; i < from->num_nodes; i++)
        append_node(to, from->nodes[i]->type, from->nodes[i]->function, from->nodes[i]->data);
    for (size_t i = 0; i < from->num_kept; i++) {
        from->kept[i]->references++;
        keep(to, from->kept[i], 1);
    }
    return to;
}

static Status copied(void **to, const void *from, uint64_t flags) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (!from) return fail(INVALID_VALUE);
    device_lock();
    Graph *graph = copy_graph(from);
    if (graph) graph->flags = flags;
    device_unlock();
    *to = graph;
    return graph ? OK : fail(OUT_OF_MEMORY);
}

API Status cudaGraphCreate(void **graph, unsigned flags UNUSED) {
    device_lock();
    *graph = new_graph();
    device_unlock();
    return *graph ? OK : fail(OUT_OF_MEMORY);
}
API Status cudaGraphClone(void **to, const void *from) { return copied(to, from, 0); }
API Status cudaGraphInstantiate(void **to, const void *from, uint64_t flags) { return copied(to, from, flags); }
API Status cudaGraphInstantiateWithFlags(void **to, const void *from, uint64_t flags) { return copied(to, from, flags); }
API Status cudaGraphInstantiateWithParams(void **to, const void *from, uint64_t *params) {
    return copied(to, from, params ? *params : 0);
}
API Status cudaGraphExecGetFlags(const Graph *graph, uint64_t *flags) { return *flags = graph->flags, OK; }
API Status cudaGraphExecUpdate(void *to UNUSED, void *from UNUSED, int *info UNUSED) { return OK; }
API Status cudaGraphGetId(const Graph *graph, unsigned *id) { return *id = graph->id, OK; }
API Status cudaGraphExecGetId(const Graph *graph, unsigned *id) { return *id = graph->id, OK; }

API Status cudaGraphDestroy(void *graph) {
    if (!graph) return fail(INVALID_VALUE);
    device_lock();
    free_graph(graph);
    device_unlock();
    bury();
    return OK;
}
API Status cudaGraphExecDestroy(void *graph) { return cudaGraphDestroy(graph); }

API Status cudaGraphUpload(void *graph UNUSED, void *stream UNUSED) { return OK; }
API Status cudaGraphLaunch(const Graph *graph, void *stream) {
    if (is_forked()) return fail(NOT_INITIALIZED);
    if (!graph) return fail(INVALID_VALUE);
    count_launch(stream);
    for (size_t i = 0; i < graph->num_nodes; i++)
        if (graph->nodes[i]->function) graph->nodes[i]->function(graph->nodes[i]->data);
    return OK;
}

/* ---- nodes */

static Status node_list(void **nodes, size_t *num, Node *const *from, size_t available) {
    if (!nodes) return *num = available, OK;
    for (size_t i = 0; i < *num; i++) nodes[i] = i < available ? from[i] : 0;
    if (*num > available) *num = available;
    return OK;
}
API Status cudaGraphGetNodes(const Graph *graph, void **nodes, size_t *num) {
    return node_list(nodes, num, graph->nodes, graph->num_nodes);
}
API Status cudaGraphGetRootNodes(const Graph *graph, void **nodes, size_t *num) {
    return node_list(nodes, num, graph->nodes, graph->num_nodes ? 1 : 0);
}
API Status cudaGraphNodeGetType(const Node *node, int *type) { return *type = node->type, OK; }
API Status cudaGraphNodeGetContainingGraph(const Node *node, void **graph) { return *graph = node->graph, OK; }
API Status cudaGraphNodeGetLocalId(const Node *node, unsigned *id) { return *id = (unsigned)node->id, OK; }

static Status neighbours(const Node *node, int step, void **nodes, size_t *num) {
    size_t at = (size_t)(node->id + step);
    int is_there = at < node->graph->num_nodes;
    return node_list(nodes, num, is_there ? &node->graph->nodes[at] : 0, (size_t)is_there);
}
/* CUDA 12: (node, nodes, number). CUDA 13, and CUDA 12's `_v2`: (node, nodes, edges, number). */
API Status cudaGraphNodeGetDependencies(const Node *node, void **nodes, void *third, size_t *num) {
    return neighbours(node, -1, nodes, cuda_version() < 13000 ? third : num);
}
API Status cudaGraphNodeGetDependencies_v2(const Node *node, void **nodes, void *edges UNUSED, size_t *num) {
    return neighbours(node, -1, nodes, num);
}
API Status cudaGraphNodeGetDependentNodes(const Node *node, void **nodes, void *third, size_t *num) {
    return neighbours(node, 1, nodes, cuda_version() < 13000 ? third : num);
}
API Status cudaGraphNodeGetDependentNodes_v2(const Node *node, void **nodes, void *edges UNUSED, size_t *num) {
    return neighbours(node, 1, nodes, num);
}

static Status added(void **node, Graph *graph, int type, HostFunction function, void *data) {
    device_lock();
    append_node(graph, type, function, data);
    *node = last_node(graph);
    device_unlock();
    return *node ? OK : fail(OUT_OF_MEMORY);
}
#define ADDS(name, type) \
    API Status name(void **node, Graph *graph) { return added(node, graph, type, 0, 0); }
ADDS(cudaGraphAddKernelNode, NODE_KERNEL)
ADDS(cudaGraphAddMemcpyNode, NODE_COPY)
ADDS(cudaGraphAddMemcpyNode1D, NODE_COPY)
ADDS(cudaGraphAddMemsetNode, NODE_FILL)
ADDS(cudaGraphAddEmptyNode, NODE_EMPTY)
ADDS(cudaGraphAddEventRecordNode, NODE_RECORD)
ADDS(cudaGraphAddEventWaitNode, NODE_WAIT)

typedef struct {
    HostFunction function;
    void *data;
} HostParams;
API Status cudaGraphAddHostNode(void **node, Graph *graph, void *nodes UNUSED, size_t n UNUSED, const HostParams *params) {
    return added(node, graph, NODE_HOST, params->function, params->data);
}
API Status cudaGraphAddChildGraphNode(void **node, Graph *graph, void *nodes UNUSED, size_t n UNUSED, const Graph *child) {
    for (size_t i = 0; i < child->num_nodes; i++)
        added(node, graph, child->nodes[i]->type, child->nodes[i]->function, child->nodes[i]->data);
    return added(node, graph, NODE_GRAPH, 0, 0);
}
API Status cudaGraphAddDependencies(void) { return OK; }
API Status cudaGraphAddDependencies_v2(void) { return OK; }
API Status cudaGraphRemoveDependencies(void) { return OK; }
API Status cudaGraphRemoveDependencies_v2(void) { return OK; }

API Status cudaGraphDebugDotPrint(const Graph *graph, const char *path, unsigned flags UNUSED) {
    FILE *file = fopen(path, "w");
    if (!file) return fail(UNKNOWN_ERROR);
    fprintf(file, "digraph rehearsed {\n");
    for (size_t i = 0; i < graph->num_nodes; i++) fprintf(file, i ? " -> node_%zu" : "node_%zu", i);
    fprintf(file, "\n}\n");
    return fclose(file) ? fail(UNKNOWN_ERROR) : OK;
}

/* ---- what a graph keeps alive */

API Status cudaUserObjectCreate(void **object, void *data, HostFunction destroy, unsigned count, unsigned flags UNUSED) {
    Kept *kept = calloc(1, sizeof *kept);
    if (!kept) return fail(OUT_OF_MEMORY);
    *kept = (Kept){destroy, data, count, 0};
    *object = kept;
    return OK;
}
API Status cudaUserObjectRetain(Kept *kept, unsigned count) {
    device_lock();
    kept->references += count;
    device_unlock();
    return OK;
}
API Status cudaUserObjectRelease(Kept *kept, unsigned count) {
    device_lock();
    drop(kept, count);
    device_unlock();
    bury();
    return OK;
}
API Status cudaGraphRetainUserObject(Graph *graph, Kept *kept, unsigned count, unsigned flags) {
    device_lock();
    if (!(flags & 1)) kept->references += count; /* 1: the caller's references move to the graph */
    keep(graph, kept, count);
    device_unlock();
    return OK;
}
API Status cudaGraphReleaseUserObject(Graph *graph, Kept *kept, unsigned count) {
    device_lock();
    for (size_t i = graph->num_kept; i-- && count;)
        if (graph->kept[i] == kept) {
            graph->kept[i] = graph->kept[--graph->num_kept];
            drop(kept, 1);
            count--;
        }
    device_unlock();
    bury();
    return OK;
}

/* ---- the driver's names */

ALSO(cuGraphCreate, cudaGraphCreate);
ALSO(cuGraphClone, cudaGraphClone);
ALSO(cuGraphDestroy, cudaGraphDestroy);
ALSO(cuGraphExecDestroy, cudaGraphExecDestroy);
ALSO(cuGraphInstantiateWithFlags, cudaGraphInstantiate);
ALSO(cuGraphInstantiateWithParams, cudaGraphInstantiateWithParams);
ALSO(cuGraphUpload, cudaGraphUpload);
ALSO(cuGraphLaunch, cudaGraphLaunch);
ALSO(cudaGraphLaunch_ptsz, cudaGraphLaunch);
ALSO(cuGraphGetNodes, cudaGraphGetNodes);
ALSO(cuGraphGetRootNodes, cudaGraphGetRootNodes);
ALSO(cuGraphNodeGetType, cudaGraphNodeGetType);
ALSO(cuGraphNodeGetDependencies, cudaGraphNodeGetDependencies);
ALSO(cuGraphNodeGetDependencies_v2, cudaGraphNodeGetDependencies_v2);
ALSO(cuGraphDebugDotPrint, cudaGraphDebugDotPrint);
ALSO(cuGraphExecUpdate_v2, cudaGraphExecUpdate);
ALSO(cuUserObjectCreate, cudaUserObjectCreate);
ALSO(cuUserObjectRetain, cudaUserObjectRetain);
ALSO(cuUserObjectRelease, cudaUserObjectRelease);
ALSO(cuGraphRetainUserObject, cudaGraphRetainUserObject);
ALSO(cuGraphReleaseUserObject, cudaGraphReleaseUserObject);
