/* Streams and graphs: what streams.c, graphs.c, copies.c and driver.c share. */
#ifndef MEMFIT_STREAMS_H
#define MEMFIT_STREAMS_H

#include "device.h"

typedef void (*HostFunction)(void *data);
typedef struct Graph Graph;

typedef struct Capture {
    Graph *graph;
    uint64_t id;
    struct Stream *origin;
    int mode, is_invalid;
    uintptr_t thread;
    struct Capture *next;
} Capture;

typedef struct Stream {
    int device, priority;
    unsigned flags;
    uint64_t id;
    Capture *capture; /* null unless it is being captured */
    struct Stream *next;
} Stream;

Stream *stream_of(void *handle); /* of the two default streams too */

/* A node of the graph, if the stream is being captured: true then, and nothing may be done now.
   With a function: it is called each time the graph is launched. */
int add_node(void *stream, HostFunction function, void *data);
Status forbid_while_capturing(void); /* for calls that the real runtime refuses then */

/* graphs.c; with the lock held */
Graph *new_graph(void);
void append_node(Graph *graph, int type, HostFunction function, void *data);
void *last_node(Graph *graph); /* null for an empty graph */
void **last_node_slot(Graph *graph);
void free_graph(Graph *graph);
void bury(void); /* without the lock, after free_graph: destroys what was kept for the graph alone */

/* copies.c and addresses.c */
Status copy_now(void *to, const void *from, size_t num_bytes);
Status copy_later(void *to, const void *from, size_t num_bytes, void *stream);
char *context_addresses(size_t num_bytes); /* outside the budget: with the lock held */
void register_symbol(const void *symbol, size_t num_bytes);

/* pools.c, host_memory.c, driver.c */
int pool_release(void *pointer); /* with the lock held; 0: it is of no pool */
Status pointer_attribute(void *value, int attribute, const void *pointer);
void *context_of(int device);

#endif
