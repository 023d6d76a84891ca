/* Uses a rehearsed device without torch, so that sanitizers can watch it. Ends with 0 if all is right.
   Everything it takes it gives back, but for what belongs to the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            printf("line %d: %s\n", __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

static void *library;
static void *find(const char *name) {
    void *function = dlsym(library, name);
    if (!function) printf("no %s\n", name);
    if (!function) exit(1);
    return function;
}
/* Of what these functions take, all is a pointer or an integer: one prototype does. */
#define CALL(name, ...) ((int (*)())find(#name))(__VA_ARGS__)
static uint64_t used(void) { return ((uint64_t(*)(int))find("memfit_rehearsal_used_bytes"))(0); }
static uint64_t kept(void) { return ((uint64_t(*)(void))find("memfit_rehearsal_kept_bytes"))(); }

static void memory(void) {
    void *large, *small[3000], *none, *managed, *pinned;
    CHECK(CALL(cudaMalloc, &large, 100 * MIB) == 0 && used() == 100 * MIB);
    CHECK(CALL(cudaMalloc, &none, 5000 * MIB) == 2 && !none && CALL(cudaGetLastError) == 2);
    for (size_t i = 0; i < 3000; i++) CHECK(CALL(cudaMalloc, &small[i], 1 + i * 7) == 0);
    for (size_t i = 0; i < 3000; i += 2) CHECK(CALL(cudaFree, small[i]) == 0);
    for (size_t i = 0; i < 3000; i += 2) CHECK(CALL(cudaMalloc, &small[i], 1 + i * 5) == 0);
    for (size_t i = 0; i < 3000; i++) CHECK(CALL(cudaFree, small[i]) == 0);
    CHECK(CALL(cudaFree, (char *)large + 512) == 1);

    char *host = malloc(12 * MIB), *back = malloc(12 * MIB);
    for (size_t i = 0; i < 12 * MIB; i++) host[i] = (char)(i * 31 + i / 4099);
    for (size_t at = 0; at < 5 * MIB; at += 777777) { /* at no boundary in particular */
        CHECK(CALL(cudaMemcpy, (char *)large + at, host + at / 2, 3 * MIB + at, 1) == 0);
        CHECK(CALL(cudaMemcpy, (char *)large + 50 * MIB + at / 3, (char *)large + at, 3 * MIB + at, 3) == 0);
        CHECK(CALL(cudaMemcpy, back, (char *)large + 50 * MIB + at / 3, 3 * MIB + at, 2) == 0);
        CHECK(!memcmp(back, host + at / 2, 3 * MIB + at));
    }
    CHECK(CALL(cudaMemset, large, 0, 100 * MIB) == 0);
    CHECK(CALL(cudaMemset, (char *)large + 10, 7, 1000) == 0);
    CHECK(CALL(cudaMemcpy, back, large, 2000, 2) == 0);
    CHECK(back[9] == 0 && back[10] == 7 && back[1009] == 7 && back[1010] == 0);
    CHECK(CALL(cuMemsetD32_v2, large, 0x01020304, 3 * MIB / 4) == 0);
    CHECK(CALL(cudaMemcpy, back, large, 3 * MIB, 2) == 0 && back[0] == 4 && back[3 * MIB - 1] == 1);
    CHECK(CALL(cudaFree, large) == 0 && used() == 0 && kept() == 0);
    free(host);
    free(back);

    CHECK(CALL(cudaMallocManaged, &managed, MIB, 1) == 0 && CALL(cudaFree, managed) == 0);
    CHECK(CALL(cudaHostAlloc, &pinned, MIB, 0) == 0);
    struct {
        int type, device;
        void *on_device, *on_host;
    } attributes;
    CHECK(CALL(cudaPointerGetAttributes, &attributes, (char *)pinned + 5) == 0 && attributes.type == 1);
    CHECK(CALL(cudaFreeHost, pinned) == 0 && CALL(cudaFreeHost, pinned) == 1);
}

static void virtual_memory(void) {
    struct {
        int type, handle_types, location, device;
        char rest[16];
    } properties = {1, 0, 1, 0, {0}};
    void *at, *handle[4];
    CHECK(CALL(cuMemAddressReserve, &at, 1000 * MIB, (size_t)0, (void *)0, (size_t)0) == 0);
    for (size_t i = 0; i < 4; i++) {
        CHECK(CALL(cuMemCreate, &handle[i], 20 * MIB, &properties, (size_t)0) == 0);
        CHECK(CALL(cuMemMap, (char *)at + i * 20 * MIB, 20 * MIB, (size_t)0, handle[i], (size_t)0) == 0);
        CHECK(CALL(cuMemRelease, handle[i]) == 0);
    }
    CHECK(used() == 80 * MIB);
    int value = 9, read = 0;
    CHECK(CALL(cudaMemcpy, (char *)at + 40 * MIB - 2, &value, sizeof value, 1) == 0);
    CHECK(CALL(cudaMemcpy, &read, (char *)at + 40 * MIB - 2, sizeof read, 2) == 0 && read == 9);
    CHECK(CALL(cuMemUnmap, (char *)at + 20 * MIB, 40 * MIB) == 0 && used() == 40 * MIB);
    CHECK(CALL(cuMemUnmap, at, 80 * MIB) == 0 && used() == 0 && kept() == 0);
    CHECK(CALL(cuMemAddressFree, at, 1000 * MIB) == 0);
}

static int num_called;
static void called(void *data) { num_called += *(int *)data; }

static void streams(void) {
    void *stream, *other, *event, *graph, *executable, *object;
    int one = 1, state;
    CHECK(CALL(cudaStreamCreate, &stream) == 0 && CALL(cudaStreamCreate, &other) == 0);
    CHECK(CALL(cudaEventCreate, &event) == 0);
    CHECK(CALL(cudaLaunchHostFunc, stream, called, &one) == 0 && num_called == 1);
    CHECK(CALL(cudaStreamBeginCapture, stream, 0) == 0);
    CHECK(CALL(cudaEventRecord, event, stream) == 0 && CALL(cudaStreamWaitEvent, other, event, 0) == 0);
    CHECK(CALL(cudaStreamIsCapturing, other, &state) == 0 && state == 1);
    CHECK(CALL(cudaLaunchHostFunc, other, called, &one) == 0 && num_called == 1);
    CHECK(CALL(cudaStreamEndCapture, stream, &graph) == 0);
    CHECK(CALL(cudaUserObjectCreate, &object, &one, called, 1, 1) == 0);
    CHECK(CALL(cudaGraphRetainUserObject, graph, object, 1, 1) == 0);
    CHECK(CALL(cudaGraphInstantiate, &executable, graph, (size_t)0) == 0);
    CHECK(CALL(cudaGraphLaunch, executable, stream) == 0 && num_called == 2);
    CHECK(CALL(cudaGraphDestroy, graph) == 0 && num_called == 2);
    CHECK(CALL(cudaGraphExecDestroy, executable) == 0 && num_called == 3);
    CHECK(CALL(cudaStreamBeginCapture, stream, 0) == 0);
    CHECK(CALL(cudaStreamSynchronize, stream) == 900);
    CHECK(CALL(cudaStreamEndCapture, stream, &graph) == 901 && !graph);
    CHECK(CALL(cudaStreamDestroy, stream) == 0 && CALL(cudaStreamDestroy, other) == 0);
    CHECK(CALL(cudaEventDestroy, event) == 0);
}

static void *work(void *unused) {
    (void)unused;
    for (size_t i = 1; i < 300; i++) {
        void *one, *two;
        uint64_t value = i, read = 0;
        CHECK(CALL(cudaMalloc, &one, i * 1000) == 0 && CALL(cudaMallocAsync, &two, i * 5000, (void *)0) == 0);
        CHECK(CALL(cudaMemcpy, (char *)one + i * 900, &value, sizeof value, 1) == 0);
        CHECK(CALL(cudaMemcpyAsync, two, (char *)one + i * 900, sizeof value, 3, (void *)0) == 0);
        CHECK(CALL(cudaMemcpy, &read, two, sizeof read, 2) == 0 && read == i);
        CHECK(CALL(cudaFree, one) == 0 && CALL(cudaFreeAsync, two, (void *)0) == 0);
    }
    return 0;
}

static void threads_and_forks(void) {
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], 0, work, 0) == 0);
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            int count = -1;
            _exit(CALL(cudaGetDeviceCount, &count) != 3);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
    CHECK(used() == 0 && kept() == 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 2 && (library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)));
    memory();
    virtual_memory();
    streams();
    threads_and_forks();
    return 0;
}
