/* The rehearsed device: what its parts share. A CUDA device whose kernels do nothing.

   No NVIDIA header is used. What is implemented is declared here and in the parts, from the
   documented API. CUDA 12 and 13 are served by one build: where a name has two layouts, the part
   that implements it asks `cuda_version`.

   Rules for the parts:
   - Device memory cannot be touched directly: its pages have no access. Use `device_copy` and
     `device_fill`.
   - Every exported name is marked API. Everything else is hidden by the compiler's flag.
   - One lock guards all state (`device_lock`). Never call a user's function with it held.
     The fork handlers in card.c hold it across a fork.
   - Nothing is written to standard output or error, and no thread is started. */
#ifndef MEMFIT_DEVICE_H
#define MEMFIT_DEVICE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define ALSO(name, original) extern API __typeof__(original) name __attribute__((alias(#original)))
#define MIB ((size_t)1 << 20)
#define PAGE_BYTES (2 * MIB) /* the granularity of device memory */
#define MAX_DEVICES 16
#define MAX_INSTALLED 255

/* Error codes. The runtime's and the driver's numbers agree for all of these. */
typedef int Status;
enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3, /* also what a forked child gets */
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    PEER_ACCESS_NOT_ENABLED = 705,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    UNKNOWN_ERROR = 999,
};

/* The card, as MEMFIT_REHEARSED_CARD describes it: `key=value` pairs between semicolons, the keys
   spelled as the fields here (`capability=8.6` gives major and minor). What is not given follows
   from the capability. All devices of a process are alike. */
typedef struct {
    char name[256];
    size_t total_bytes;   /* what the card has */
    size_t context_bytes; /* what a process takes beside its allocations */
    size_t others_bytes;  /* what other processes hold on the card */
    size_t kept_bytes;    /* how much of what is copied to devices is kept in the host's memory */
    int major, minor;
    int multiprocessors;
    int num_gpus;      /* that this process sees: CUDA_VISIBLE_DEVICES chooses among the installed */
    int num_installed; /* that the machine has, which is what NVML lists */
    int installed[MAX_DEVICES]; /* the installed number of each that is seen */
    size_t l2_bytes;
    size_t shared_optin_bytes; /* a block's most, when it opts in */
    size_t shared_sm_bytes;    /* a multiprocessor's */
    int threads_per_sm;
    int blocks_per_sm;
    int binary_version; /* of the kernels that a build of torch has for it: 8.9 runs 86 */
    int clock_khz, memory_clock_khz, bus_bits;
} Card;

/* card.c */
const Card *card(void);  /* read once, at the first call */
int cuda_version(void);  /* 13020 for CUDA 13.2: that of the libcudart that torch brought */
/* Of ending.c: have the process end without a word. */
void end_quietly(void);
void device_lock(void);  /* not recursive */
void device_unlock(void);
int is_forked(void);     /* true in a child of a process that used a device: nothing works there */
void installed_uuid(int installed, unsigned char uuid[16]);
void installed_pci_bus_id(int installed, char *text, size_t num_bytes); /* 0000:01:00.0 for the first */
int device_uuid(int device, unsigned char uuid[16]);                 /* of one that is seen */
void device_pci_bus_id(int device, char *text, size_t num_bytes);
int visible_device(int installed); /* its number in this process; -1: hidden */

/* runtime.c */
int current_device(void); /* of the calling thread; 0 at first */
Status set_current_device(int device);
Status fail(Status error); /* remembers it for cudaGetLastError, and returns it */
const char *error_name(int error, int is_driver);
const char *error_text(int error);

/* memory.c, addresses.c: to be called with the lock held, save `is_device_pointer` and `device_of`. */
typedef struct {
    size_t total_bytes, used_bytes, peak_bytes; /* used: without the context and the others */
    size_t free_bytes;                          /* as cudaMemGetInfo says */
    size_t held_bytes;                          /* this process: used and, once touched, context */
    size_t missing_bytes, num_failures;         /* of what did not fit: by how much, the last time */
    int is_touched;                             /* a context was made */
} DeviceMemory;
DeviceMemory device_memory(int device);
void touch_device(int device);
void reset_peak(int device);
Status allocate(void **pointer, size_t num_bytes, int device); /* as cudaMalloc */
Status release(void *pointer);                                 /* as cudaFree */
int is_device_pointer(const void *pointer);
int device_of(const void *pointer); /* -1 for the host's */

/* contents.c: any pointers, of the host or of devices. These take the lock themselves.
   `device_copy` is true when all that was read is known: the host wrote it, no kernel had to. It
   does not count as a read of the device: a library's functions call it. */
int device_copy(void *to, const void *from, size_t num_bytes);
void device_fill(void *to, int byte, size_t num_bytes);

/* addresses.c */
void run_kernels(int device); /* the driver gives up addresses at the first kernel; takes the lock */

/* kernels.c, streams.c */
void count_launch(void *stream); /* a kernel, or a library's call, was put on a stream */

#endif
