/* What device memory contains: what the host copied there, and zeros everywhere else.

   Kernels do nothing, so a byte is known only where the host wrote it. Contents are kept by the page
   of 2 MiB, up to `kept_bytes` of the card's description for all devices together. Beyond that a copy
   to a device is not made, and reads as zeros; copies of up to 64 KiB (sizes, lengths, masks) have a
   reserve of their own. So a model larger than the host's memory can be moved to a device.

   torch takes memory for tensors from blocks that it keeps. It reports each block that it hands out
   or takes back to `c10::reportMemoryUsageToProfiler`, a public function of libc10 that is
   overridden here: a tensor that is new reads as zeros, not as what the last one there held. */
#include "memory.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SMALL_COPY ((size_t)64 << 10)
#define SMALL_RESERVE (64 * MIB)

static size_t kept; /* bytes of the host's memory that hold contents */

static Page *page_of(const char *at) { return &pages[(size_t)(at - space) / PAGE_BYTES]; }
static char *page_base(const char *at) { return space + (size_t)(at - space) / PAGE_BYTES * PAGE_BYTES; }
static size_t to_page_end(const char *at) { return PAGE_BYTES - (size_t)(at - space) % PAGE_BYTES; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static void drop_page(char *base) {
    Page *page = page_of(base);
    free(page->known);
    page->known = 0;
    if (!page->is_kept) return;
    madvise(base, PAGE_BYTES, MADV_DONTNEED);
    mprotect(base, PAGE_BYTES, PROT_NONE);
    page->is_kept = 0;
    kept -= PAGE_BYTES;
}

/* The cells of a page that [at, at + n) touches. */
static void mark(const char *at, size_t n, int is_known) {
    uint64_t *known = page_of(at)->known;
    size_t first = (size_t)(at - page_base(at)) / CELL_BYTES;
    size_t end = ((size_t)(at - page_base(at)) + n + CELL_BYTES - 1) / CELL_BYTES;
    for (size_t i = first; i < end;) {
        if (i % 64 == 0 && end - i >= 64) {
            known[i / 64] = is_known ? UINT64_MAX : 0;
            i += 64;
            continue;
        }
        uint64_t mask = (uint64_t)1 << (i % 64);
        known[i / 64] = is_known ? known[i / 64] | mask : known[i / 64] & ~mask;
        i++;
    }
}

static int all_known(const char *at, size_t n) {
    const uint64_t *known = page_of(at)->known;
    if (!known) return 0;
    size_t first = (size_t)(at - page_base(at)) / CELL_BYTES;
    size_t end = ((size_t)(at - page_base(at)) + n + CELL_BYTES - 1) / CELL_BYTES;
    for (size_t i = first; i < end; i++)
        if (!(known[i / 64] >> (i % 64) & 1)) return 0;
    return 1;
}

void forget_contents(const void *pointer, size_t num_bytes) {
    char *at = (char *)(uintptr_t)pointer;
    for (size_t n; num_bytes; at += n, num_bytes -= n) {
        n = least(num_bytes, to_page_end(at));
        Page *page = page_of(at);
        if (!page->known) continue;
        if (n == PAGE_BYTES) drop_page(at);
        else {
            mark(at, n, 0);
            if (page->is_kept) memset(at, 0, n);
        }
    }
}

/* Make a page writable, if the budget for contents allows. */
static int keep_page(char *at, size_t n, int is_small) {
    Page *page = page_of(at);
    if (!page->known && !(page->known = calloc(WORDS_PER_PAGE, sizeof *page->known))) return 0;
    if (page->is_kept) return 1;
    size_t budget = card()->kept_bytes + (is_small ? SMALL_RESERVE : 0);
    if (kept + PAGE_BYTES > budget) return 0;
    char *base = page_base(at);
    if (mprotect(base, PAGE_BYTES, PROT_READ | PROT_WRITE)) return 0;
    madvise(base, PAGE_BYTES, n == PAGE_BYTES ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    page->is_kept = 1;
    kept += PAGE_BYTES;
    return 1;
}

/* A device's part of a copy: at most to the end of its page. */
static void write_piece(char *to, const char *from, size_t n, int is_small) {
    if (!keep_page(to, n, is_small)) {
        forget_contents(to, n);
        return;
    }
    memcpy(to, from, n);
    mark(to, n, 1);
}

static int read_piece(char *to, const char *from, size_t n) {
    Page *page = page_of(from);
    if (page->is_kept) memcpy(to, from, n);
    else memset(to, 0, n);
    return all_known(from, n);
}

static int between_devices(char *to, const char *from, size_t n, int is_small) {
    Page *source = page_of(from);
    int is_known = all_known(from, n);
    if (!source->known || !keep_page(to, n, is_small)) {
        forget_contents(to, n);
        return is_known;
    }
    if (source->is_kept) memmove(to, from, n);
    else memset(to, 0, n);
    if (is_known) {
        mark(to, n, 1);
        return 1;
    }
    for (size_t done = 0, piece; done < n; done += piece) {
        piece = least(n - done, CELL_BYTES - (size_t)(to + done - space) % CELL_BYTES);
        piece = least(piece, CELL_BYTES - (size_t)(from + done - space) % CELL_BYTES);
        mark(to + done, piece, all_known(from + done, piece));
    }
    return 0;
}

static int copy_locked(char *to, const char *from, size_t num_bytes) {
    int is_known = 1, is_small = num_bytes <= SMALL_COPY;
    int to_device = is_device_pointer(to), from_device = is_device_pointer(from);
    for (size_t n; num_bytes; to += n, from += n, num_bytes -= n) {
        n = num_bytes;
        if (to_device) n = least(n, to_page_end(to));
        if (from_device) n = least(n, to_page_end(from));
        if (to_device && from_device) is_known &= between_devices(to, from, n, is_small);
        else if (to_device) write_piece(to, from, n, is_small);
        else is_known &= read_piece(to, from, n);
    }
    return is_known;
}

int device_copy(void *to, const void *from, size_t num_bytes) {
    if (!is_device_pointer(to) && !is_device_pointer(from)) {
        memmove(to, from, num_bytes);
        return 1;
    }
    device_lock();
    int is_known = copy_locked(to, from, num_bytes);
    device_unlock();
    return is_known;
}

void device_fill(void *pointer, int byte, size_t num_bytes) {
    char *at = pointer;
    if (!is_device_pointer(at)) {
        memset(at, byte, num_bytes);
        return;
    }
    device_lock();
    int is_small = num_bytes <= SMALL_COPY;
    for (size_t n; num_bytes; at += n, num_bytes -= n) {
        n = least(num_bytes, to_page_end(at));
        forget_contents(at, n);
        Page *page = page_of(at);
        if (byte) {
            if (!keep_page(at, n, is_small)) continue;
            memset(at, byte, n);
        } else if (!page->known && !(page->known = calloc(WORDS_PER_PAGE, sizeof *page->known))) continue;
        mark(at, n, 1);
    }
    device_unlock();
}

size_t kept_bytes(void) { return kept; }

/* void c10::reportMemoryUsageToProfiler(void *, int64_t, size_t, size_t, c10::Device), where Device is
   two bytes.
   Source: c10/core/Allocator.h */
typedef void (*Report)(void *, int64_t, size_t, size_t, uint16_t);

API void _ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE(
    void *pointer, int64_t num_bytes, size_t allocated, size_t reserved, uint16_t device) {
    static Report next;
    if (num_bytes && is_device_pointer(pointer)) {
        device_lock();
        forget_contents(pointer, (size_t)(num_bytes < 0 ? -num_bytes : num_bytes));
        device_unlock();
    }
    if (!next) {
        union {
            void *object;
            Report function;
        } found = {dlsym(RTLD_NEXT, "_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE")};
        void *library = found.object ? 0 : dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
        if (library) found.object = dlsym(library, "_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE");
        __atomic_store_n(&next, found.function, __ATOMIC_RELAXED);
    }
    if (next) next(pointer, num_bytes, allocated, reserved, device);
}
