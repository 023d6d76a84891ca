/* What the card is, the one lock, and what happens to a process that forks.

   Everything is read at the first call, never when the library is loaded: a preloaded library is
   loaded into every shell and compiler that the command starts. */
#include "device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a capability has of its own.
   Source: the table «Technical Specifications per Compute Capability» of NVIDIA's CUDA C++
   Programming Guide. The last column is the newest architecture that PyTorch's wheels carry kernels
   for and that runs on it. */
static const struct {
    int capability, shared_optin_kib, shared_sm_kib, threads_per_sm, blocks_per_sm, binary;
} CAPABILITIES[] = {
    {50, 48, 64, 2048, 32, 50},   {52, 48, 96, 2048, 32, 50},   {60, 48, 64, 2048, 32, 60},
    {61, 48, 96, 2048, 32, 60},   {70, 96, 96, 2048, 32, 70},   {75, 64, 64, 1024, 16, 75},
    {80, 163, 164, 2048, 32, 80}, {86, 99, 100, 1536, 16, 86},  {87, 163, 164, 1536, 16, 86},
    {89, 99, 100, 1536, 24, 86},  {90, 227, 228, 2048, 32, 90}, {100, 227, 228, 2048, 32, 100},
    {103, 227, 228, 2048, 32, 100}, {110, 227, 228, 1536, 24, 110}, {120, 99, 100, 1536, 24, 120},
    {121, 99, 100, 1536, 24, 120},
};

static Card the_card;
static pthread_once_t card_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int forked;

static int value_of(const char *settings, const char *key, char *value, size_t room) {
    size_t length = strlen(key);
    for (const char *at = settings; at && *at; at = strchr(at, ';')) {
        if (*at == ';') at++;
        if (!strncmp(at, key, length) && at[length] == '=') {
            size_t n = strcspn(at + length + 1, ";");
            if (n >= room) n = room - 1;
            memcpy(value, at + length + 1, n);
            value[n] = 0;
            return n > 0;
        }
    }
    return 0;
}

static size_t number_of(const char *settings, const char *key, size_t otherwise) {
    char value[64];
    return value_of(settings, key, value, sizeof value) ? strtoull(value, 0, 0) : otherwise;
}

static void before_fork(void) { device_lock(); }
static void after_fork(void) { device_unlock(); }

static void in_child(void) {
    /* As with the real driver: a child of a process that used a device cannot use one. */
    for (int device = 0; device < the_card.num_gpus; device++)
        if (device_memory(device).is_touched) forked = 1;
    device_unlock();
}

static int named_device(const char *name, size_t length) {
    char text[48], *end;
    long number = strtol(name, &end, 10);
    if (length && end == name + length && number >= 0 && number < MAX_INSTALLED) return (int)number;
    for (int i = 0; i < the_card.num_installed && length > 4; i++) { /* GPU-, and as much as tells it */
        unsigned char u[16];
        installed_uuid(i, u);
        snprintf(text, sizeof text, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
                 u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
        if (!strncmp(text, name, length)) return i;
    }
    return -1;
}

/* As the real driver reads CUDA_VISIBLE_DEVICES: up to the first name that is no device's. Not more of
   them than were asked for; and a number that is larger has its device too, so that a script that takes
   «its» GPU 3 rehearses on the one there is. */
static void choose_devices(const char *names) {
    Card *c = &the_card;
    int most = c->num_installed;
    c->num_gpus = 0;
    for (int i = 0; !names && i < c->num_installed; i++) c->installed[c->num_gpus++] = i;
    for (size_t length; names && *names; names += length + (names[length] == ',')) {
        names += strspn(names, " ");
        length = strcspn(names, ",");
        size_t word = strcspn(names, ", ");
        int device = named_device(names, word);
        if (device < 0 || c->num_gpus == most) break;
        if (device >= c->num_installed) c->num_installed = device + 1;
        for (int i = 0; i < c->num_gpus; i++)
            if (c->installed[i] == device) {
                c->num_gpus = 0; /* a card is named twice, so no card is seen */
                return;
            }
        c->installed[c->num_gpus++] = device;
    }
}

static void read_card(void) {
    const char *named = getenv("MEMFIT_REHEARSED_CARD"), *settings = named ? named : "";
    Card *c = &the_card;
    char value[64];
    if (!value_of(settings, "name", c->name, sizeof c->name))
        snprintf(c->name, sizeof c->name, "NVIDIA GeForce RTX 3090");
    if (!value_of(settings, "capability", value, sizeof value) ||
        sscanf(value, "%d.%d", &c->major, &c->minor) != 2) {
        c->major = 8;
        c->minor = 6;
    }
    c->total_bytes = number_of(settings, "total_bytes", 25294143488);
    c->context_bytes = number_of(settings, "context_bytes", 0);
    c->others_bytes = number_of(settings, "others_bytes", 0);
    c->kept_bytes = number_of(settings, "kept_bytes", 512 * MIB);
    c->multiprocessors = (int)number_of(settings, "multiprocessors", 82);
    c->num_installed = (int)number_of(settings, "num_gpus", named ? 1 : 0); /* loaded with no card: none */
    if (c->num_installed > MAX_DEVICES) c->num_installed = MAX_DEVICES;
    choose_devices(getenv("CUDA_VISIBLE_DEVICES"));
    int capability = 10 * c->major + c->minor, at = 0, last = sizeof CAPABILITIES / sizeof *CAPABILITIES;
    for (int i = 0; i < last; i++)
        if (CAPABILITIES[i].capability <= capability) at = i;
    size_t kib = 1024;
    c->shared_optin_bytes =
        number_of(settings, "shared_optin_bytes", kib * (size_t)CAPABILITIES[at].shared_optin_kib);
    c->shared_sm_bytes =
        number_of(settings, "shared_sm_bytes", kib * (size_t)CAPABILITIES[at].shared_sm_kib);
    c->threads_per_sm = (int)number_of(settings, "threads_per_sm", (size_t)CAPABILITIES[at].threads_per_sm);
    c->blocks_per_sm = (int)number_of(settings, "blocks_per_sm", (size_t)CAPABILITIES[at].blocks_per_sm);
    c->binary_version = (int)number_of(settings, "binary_version", (size_t)CAPABILITIES[at].binary);
    c->l2_bytes = number_of(settings, "l2_bytes", (c->major >= 9 ? 50 : c->major == 8 && !c->minor ? 40 : 6) * MIB);
    /* cuDNN's plans for Hopper depend on these two: those of an H100 there. */
    c->clock_khz = (int)number_of(settings, "clock_khz", c->major == 9 ? 1980000 : 1695000);
    c->memory_clock_khz = (int)number_of(settings, "memory_clock_khz", c->major == 9 ? 2619000 : 9751000);
    c->bus_bits = (int)number_of(settings, "bus_bits", 384);
    pthread_atfork(before_fork, after_fork, in_child);
    end_quietly();
}

const Card *card(void) {
    pthread_once(&card_once, read_card);
    return &the_card;
}

void device_lock(void) { pthread_mutex_lock(&lock); }
void device_unlock(void) { pthread_mutex_unlock(&lock); }
int is_forked(void) { return forked; }

static int the_cuda_version;
static pthread_once_t version_once = PTHREAD_ONCE_INIT;

/* The real runtime is loaded beside this library, though nothing of it is used. Its version is a
   constant in it: asking reaches no driver. */
static void find_version(void) {
    static const char *const names[] = {"libcudart.so.13", "libcudart.so.12"};
    the_cuda_version = 13000;
    for (int i = 0; i < 2; i++) {
        void *library = dlopen(names[i], RTLD_LAZY | RTLD_NOLOAD);
        if (!library) continue;
        the_cuda_version = i ? 12080 : 13000;
        union {
            void *object;
            Status (*function)(int *);
        } version = {dlsym(library, "cudaRuntimeGetVersion")};
        int found = 0;
        if (version.object && !version.function(&found) && found >= 12000) the_cuda_version = found;
        dlclose(library);
        return;
    }
}

int cuda_version(void) {
    pthread_once(&version_once, find_version);
    return the_cuda_version;
}

void installed_uuid(int installed, unsigned char uuid[16]) {
    memcpy(uuid, "memfit-rehearsed", 16);
    uuid[15] = (unsigned char)installed;
}

void installed_pci_bus_id(int installed, char *text, size_t num_bytes) {
    snprintf(text, num_bytes, "0000:%02X:00.0", (1 + installed) & 255);
}

int device_uuid(int device, unsigned char uuid[16]) {
    if (device < 0 || device >= card()->num_gpus) return INVALID_DEVICE;
    installed_uuid(the_card.installed[device], uuid);
    return OK;
}

void device_pci_bus_id(int device, char *text, size_t num_bytes) {
    installed_pci_bus_id(card()->installed[device], text, num_bytes);
}

int visible_device(int installed) {
    for (int device = 0; device < card()->num_gpus; device++)
        if (the_card.installed[device] == installed) return device;
    return -1;
}
