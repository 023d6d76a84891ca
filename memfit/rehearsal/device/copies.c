/* Copies and fills, and the count of what the host reads of the device.

   A copy is made at once, whatever its stream. While a stream is captured nothing is copied, as with
   the real runtime; the copy is a node of the graph. */
#include "streams.h"

#include <stdlib.h>
#include <string.h>

static struct {
    uint64_t num, bytes;
} reads[2], unknown;
static void (*on_read)(size_t num_bytes, int is_known);

/* Of the device by the host, and by whom: whether a kernel would have had to compute it. */
static void count_read(size_t num_bytes, int is_asynchronous, int is_known) {
    __atomic_add_fetch(&reads[is_asynchronous].num, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&reads[is_asynchronous].bytes, num_bytes, __ATOMIC_RELAXED);
    if (!is_known) {
        __atomic_add_fetch(&unknown.num, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&unknown.bytes, num_bytes, __ATOMIC_RELAXED);
    }
    void (*callback)(size_t, int) = __atomic_load_n(&on_read, __ATOMIC_ACQUIRE);
    if (callback) callback(num_bytes, is_known);
}

API void memfit_rehearsal_on_read(void (*callback)(size_t num_bytes, int is_known)) {
    __atomic_store_n(&on_read, callback, __ATOMIC_RELEASE);
}
API uint64_t memfit_rehearsal_num_reads(int is_asynchronous) { return reads[!!is_asynchronous].num; }
API uint64_t memfit_rehearsal_read_bytes(int is_asynchronous) { return reads[!!is_asynchronous].bytes; }
API uint64_t memfit_rehearsal_num_unknown_reads(void) { return unknown.num; }
API uint64_t memfit_rehearsal_unknown_read_bytes(void) { return unknown.bytes; }

Status copy_now(void *to, const void *from, size_t num_bytes) {
    Status status = forbid_while_capturing();
    if (status || !num_bytes) return status;
    int is_known = device_copy(to, from, num_bytes);
    if (is_device_pointer(from) && !is_device_pointer(to)) count_read(num_bytes, 0, is_known);
    return OK;
}

Status copy_later(void *to, const void *from, size_t num_bytes, void *stream) {
    if (is_forked()) return NOT_INITIALIZED;
    if (add_node(stream, 0, 0) || !num_bytes) return OK;
    int is_known = device_copy(to, from, num_bytes);
    if (is_device_pointer(from) && !is_device_pointer(to)) count_read(num_bytes, 1, is_known);
    return OK;
}

static Status fill_later(void *to, int byte, size_t num_bytes, void *stream) {
    if (is_forked()) return NOT_INITIALIZED;
    if (!add_node(stream, 0, 0)) device_fill(to, byte, num_bytes);
    return OK;
}

/* ---- the runtime's */

#define ROWS(call) \
    for (size_t row = 0; row < height; row++) { \
        Status status = call; \
        if (status) return fail(status); \
    } \
    return OK

API Status cudaMemcpy(void *to, const void *from, size_t n, int kind UNUSED) { return fail(copy_now(to, from, n)); }
API Status cudaMemcpyAsync(void *to, const void *from, size_t n, int kind UNUSED, void *stream) {
    return fail(copy_later(to, from, n, stream));
}
API Status cudaMemcpyPeer(void *to, int b UNUSED, const void *from, int a UNUSED, size_t n) {
    return fail(copy_now(to, from, n));
}
API Status cudaMemcpyPeerAsync(void *to, int b UNUSED, const void *from, int a UNUSED, size_t n, void *stream) {
    return fail(copy_later(to, from, n, stream));
}
API Status cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                        int kind UNUSED) {
    ROWS(copy_now((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width));
}
API Status cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                             size_t height, int kind UNUSED, void *stream) {
    ROWS(copy_later((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, stream));
}
API Status cudaMemset(void *to, int byte, size_t n) { return fail(fill_later(to, byte, n, 0)); }
API Status cudaMemsetAsync(void *to, int byte, size_t n, void *stream) { return fail(fill_later(to, byte, n, stream)); }
API Status cudaMemset2D(void *to, size_t pitch, int byte, size_t width, size_t height) {
    ROWS(fill_later((char *)to + row * pitch, byte, width, 0));
}
API Status cudaMemset2DAsync(void *to, size_t pitch, int byte, size_t width, size_t height, void *stream) {
    ROWS(fill_later((char *)to + row * pitch, byte, width, stream));
}

/* ---- variables of kernels: each has addresses of its own, which are the context's */

typedef struct {
    const void *symbol;
    char *at;
    size_t num_bytes;
} Symbol;
static Symbol *symbols;
static size_t num_symbols, room_symbols;

void register_symbol(const void *symbol, size_t num_bytes) {
    device_lock();
    if (num_symbols == room_symbols) {
        size_t wanted = room_symbols ? 2 * room_symbols : 1024;
        Symbol *larger = realloc(symbols, wanted * sizeof *symbols);
        if (larger) {
            symbols = larger;
            room_symbols = wanted;
        }
    }
    if (num_symbols < room_symbols) symbols[num_symbols++] = (Symbol){symbol, 0, num_bytes};
    device_unlock();
}

static Status symbol_at(const void *symbol, char **at, size_t *num_bytes) {
    Status status = INVALID_VALUE;
    device_lock();
    for (size_t i = 0; i < num_symbols; i++) {
        if (symbols[i].symbol != symbol) continue;
        if (!symbols[i].at) symbols[i].at = context_addresses(symbols[i].num_bytes ? symbols[i].num_bytes : 1);
        *at = symbols[i].at;
        *num_bytes = symbols[i].num_bytes;
        status = *at ? OK : OUT_OF_MEMORY;
        break;
    }
    device_unlock();
    return status;
}

API Status cudaGetSymbolAddress(void **address, const void *symbol) {
    char *at = 0;
    size_t room = 0;
    Status status = symbol_at(symbol, &at, &room);
    *address = at;
    return fail(status);
}
API Status cudaGetSymbolSize(size_t *num_bytes, const void *symbol) {
    char *at = 0;
    return fail(symbol_at(symbol, &at, num_bytes));
}
static Status symbol_copy(const void *symbol, void *host, size_t n, size_t offset, int is_read, void *stream) {
    char *at = 0;
    size_t room = 0;
    Status status = symbol_at(symbol, &at, &room);
    if (!status && offset + n > room) status = INVALID_VALUE;
    if (status) return fail(status);
    return fail(is_read ? copy_later(host, at + offset, n, stream) : copy_later(at + offset, host, n, stream));
}
API Status cudaMemcpyToSymbol(const void *symbol, void *from, size_t n, size_t offset, int kind UNUSED) {
    return symbol_copy(symbol, from, n, offset, 0, 0);
}
API Status cudaMemcpyToSymbolAsync(const void *symbol, void *from, size_t n, size_t offset, int kind UNUSED, void *stream) {
    return symbol_copy(symbol, from, n, offset, 0, stream);
}
API Status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t n, size_t offset, int kind UNUSED) {
    return symbol_copy(symbol, to, n, offset, 1, 0);
}
API Status cudaMemcpyFromSymbolAsync(void *to, const void *symbol, size_t n, size_t offset, int kind UNUSED, void *stream) {
    return symbol_copy(symbol, to, n, offset, 1, stream);
}

/* ---- the driver's; its device pointers are integers of a pointer's size */

API Status cuMemcpyHtoD_v2(void *to, const void *from, size_t n) { return copy_now(to, from, n); }
API Status cuMemcpyDtoH_v2(void *to, const void *from, size_t n) { return copy_now(to, from, n); }
API Status cuMemcpyDtoD_v2(void *to, const void *from, size_t n) { return copy_now(to, from, n); }
API Status cuMemcpy(void *to, const void *from, size_t n) { return copy_now(to, from, n); }
API Status cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t n, void *stream) { return copy_later(to, from, n, stream); }
API Status cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t n, void *stream) { return copy_later(to, from, n, stream); }
API Status cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t n, void *stream) { return copy_later(to, from, n, stream); }
API Status cuMemcpyAsync(void *to, const void *from, size_t n, void *stream) { return copy_later(to, from, n, stream); }
API Status cuMemsetD8_v2(void *to, unsigned char byte, size_t n) { return fill_later(to, byte, n, 0); }
API Status cuMemsetD8Async(void *to, unsigned char byte, size_t n, void *stream) { return fill_later(to, byte, n, stream); }

static Status fill_words(void *to, unsigned value, size_t width, size_t n, void *stream) {
    unsigned char bytes[4], pattern[4096];
    memcpy(bytes, &value, 4); /* the lowest byte is the first */
    int is_alike = 1;
    for (size_t i = 1; i < width; i++) is_alike &= bytes[i] == bytes[0];
    if (is_alike) return fill_later(to, bytes[0], width * n, stream);
    if (is_forked()) return NOT_INITIALIZED;
    if (add_node(stream, 0, 0)) return OK;
    for (size_t i = 0; i < sizeof pattern; i++) pattern[i] = bytes[i % width];
    for (size_t done = 0, piece; done < width * n; done += piece) {
        piece = width * n - done < sizeof pattern ? width * n - done : sizeof pattern;
        device_copy((char *)to + done, pattern, piece);
    }
    return OK;
}
API Status cuMemsetD16_v2(void *to, unsigned short value, size_t n) { return fill_words(to, value, 2, n, 0); }
API Status cuMemsetD16Async(void *to, unsigned short value, size_t n, void *stream) { return fill_words(to, value, 2, n, stream); }
API Status cuMemsetD32_v2(void *to, unsigned value, size_t n) { return fill_words(to, value, 4, n, 0); }
API Status cuMemsetD32Async(void *to, unsigned value, size_t n, void *stream) { return fill_words(to, value, 4, n, stream); }

ALSO(cudaMemcpyAsync_ptsz, cudaMemcpyAsync);
ALSO(cudaMemcpy_ptds, cudaMemcpy);
ALSO(cudaMemcpy2DAsync_ptsz, cudaMemcpy2DAsync);
ALSO(cudaMemcpy2D_ptds, cudaMemcpy2D);
ALSO(cudaMemsetAsync_ptsz, cudaMemsetAsync);
ALSO(cudaMemset_ptds, cudaMemset);
ALSO(cuMemcpyHtoD, cuMemcpyHtoD_v2);
ALSO(cuMemcpyDtoH, cuMemcpyDtoH_v2);
ALSO(cuMemcpyDtoD, cuMemcpyDtoD_v2);
ALSO(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2);
ALSO(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2);
ALSO(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2);
