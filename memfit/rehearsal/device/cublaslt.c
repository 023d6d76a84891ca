/* cuBLASLt. Descriptors, layouts and preferences are the real library's: they take no handle and ask
   no device. Here: the choice of an algorithm, which needs a device, and the products.

   The one algorithm that is found takes no workspace. It does not matter for a rehearsal: torch
   takes a workspace of its own size (CUBLASLT_WORKSPACE_SIZE) before it asks, whatever is found. */
#include <string.h>

#include "libraries.h"

enum { CUBLAS_NOT_SUPPORTED = 15 };

typedef struct {
    uint64_t data[8];
} Algorithm;
typedef struct {
    Algorithm algorithm;
    size_t workspace_bytes;
    Status status;
    float waves;
    int reserved[4];
} Found;

API Status cublasLtCreate(Handle **handle) { return create_handle(handle); }
API Status cublasLtDestroy(Handle *handle) { return destroy_handle(handle); }

static Status find(Found *found) {
    *found = (Found){.status = OK, .waves = 1};
    return OK;
}

API Status cublasLtMatmulAlgoGetHeuristic(const Handle *handle UNUSED, void *product UNUSED, void *a UNUSED, void *b UNUSED,
                                          void *c UNUSED, void *d UNUSED, void *preference UNUSED, int num_asked,
                                          Found found[], int *num_found) {
    *num_found = num_asked > 0;
    return num_asked > 0 ? find(found) : OK;
}
API Status cublasLtMatmulAlgoCheck(const Handle *handle UNUSED, void *product UNUSED, void *a UNUSED, void *b UNUSED,
                                   void *c UNUSED, void *d UNUSED, const Algorithm *algorithm, Found *found) {
    find(found);
    found->algorithm = *algorithm;
    return OK;
}
API Status cublasLtMatmulAlgoGetIds(const Handle *handle UNUSED, int compute UNUSED, int scale UNUSED, int a UNUSED, int b UNUSED,
                                    int c UNUSED, int d UNUSED, int num_asked, int ids[], int *num_found) {
    *num_found = num_asked > 0;
    if (num_asked > 0) ids[0] = 0;
    return OK;
}
API Status cublasLtMatmulAlgoInit(const Handle *handle UNUSED, int compute UNUSED, int scale UNUSED, int a UNUSED, int b UNUSED,
                                  int c UNUSED, int d UNUSED, int id UNUSED, Algorithm *algorithm) {
    memset(algorithm, 0, sizeof *algorithm);
    return OK;
}

/* The stream of a product is its last argument: on the stack, after fifteen others. */
API Status cublasLtMatmul(ARGUMENTS) {
    count_launch((void *)a15);
    return OK;
}
API Status cublasLtMatrixTransform(ARGUMENTS) {
    count_launch((void *)a10);
    return OK;
}
RETURNS(cublasLtHeuristicsCacheSetCapacity, OK)
