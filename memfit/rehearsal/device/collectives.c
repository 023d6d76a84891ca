/* The contents of collectives, for data that is small enough to be sizes, counts and checks. */
#include "collectives.h"

#include <stdlib.h>
#include <string.h>

#include "memory.h"

#define SMALL_BYTES MIB

enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 };

size_t collective_type_bytes(int type) {
    static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < (int)sizeof bytes ? bytes[type] : 1;
}

void collective_forget(void *to, size_t num_bytes) {
    if (!is_device_pointer(to)) return;
    device_lock();
    forget_contents(to, num_bytes);
    device_unlock();
}

void collective_copy(void *to, const void *from, size_t num_bytes, size_t num_copies) {
    if (num_bytes * num_copies > SMALL_BYTES) {
        if (to != from || num_copies > 1) collective_forget(to, num_bytes * num_copies);
        return;
    }
    for (size_t i = 0; i < num_copies; i++) {
        char *place = (char *)to + i * num_bytes;
        if (place != from) device_copy(place, from, num_bytes);
    }
}

/* ---- half types, by way of fp32 ---- */

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static float from_bfloat16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }
static uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
/* Numbers below the least normal one become zero: sizes and counts are none of them. */
static float from_float16(uint16_t bits) {
    uint32_t exponent = bits >> 10 & 31, sign = (uint32_t)(bits & 0x8000) << 16;
    if (!exponent) return from_bits(sign);
    uint32_t shifted = exponent == 31 ? 255 : exponent + 112;
    return from_bits(sign | shifted << 23 | (uint32_t)(bits & 1023) << 13);
}
static uint16_t to_float16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    int exponent = (int)(bits >> 23 & 255) - 112;
    if (exponent >= 31) {
        int is_nan = (bits & 0x7fffffff) > 0x7f800000;
        return (uint16_t)(sign | 0x7c00 | (is_nan ? 0x200 : 0));
    }
    if (exponent <= 0) return (uint16_t)sign;
    uint32_t kept = (uint32_t)exponent << 10 | (bits >> 13 & 1023), rest = bits & 8191;
    kept += rest > 4096 || (rest == 4096 && (kept & 1));
    return (uint16_t)(sign | kept);
}

/* ---- reductions ---- */

#define SAME(x) (x)
#define EACH(type, decode, encode) \
    for (size_t i = 0; i < count; i++) { \
        type *at = (type *)values + i; \
        __typeof__(decode(*at)) one = decode(*at), all = one; \
        if (operation == REDUCE_SUM) all = (__typeof__(one))(one * (__typeof__(one))num_ranks); \
        else for (int r = 1; r < num_ranks; r++) all = (__typeof__(one))(all * one); \
        *at = (type)encode(all); \
    } \
    return

static void reduce(void *values, size_t count, int type, int operation, int num_ranks) {
    switch (type) {
    case INT8: EACH(uint8_t, SAME, SAME); /* without a sign, so that it may overflow */
    case UINT8: EACH(uint8_t, SAME, SAME);
    case INT32: EACH(uint32_t, SAME, SAME);
    case UINT32: EACH(uint32_t, SAME, SAME);
    case INT64: EACH(uint64_t, SAME, SAME);
    case UINT64: EACH(uint64_t, SAME, SAME);
    case FLOAT16: EACH(uint16_t, from_float16, to_float16);
    case FLOAT32: EACH(float, SAME, SAME);
    case FLOAT64: EACH(double, SAME, SAME);
    case BFLOAT16: EACH(uint16_t, from_bfloat16, to_bfloat16);
    default: return;
    }
}

void collective_reduce(void *to, const void *from, size_t count, int type, int operation, int num_ranks) {
    size_t num_bytes = count * collective_type_bytes(type);
    int changes = num_ranks > 1 && (operation == REDUCE_SUM || operation == REDUCE_PRODUCT);
    if (!changes) {
        if (to != from) collective_copy(to, from, num_bytes, 1);
        return;
    }
    void *values = num_bytes && num_bytes <= SMALL_BYTES ? malloc(num_bytes) : NULL;
    if (values && device_copy(values, from, num_bytes)) {
        reduce(values, count, type, operation, num_ranks);
        device_copy(to, values, num_bytes);
    } else if (to != from) {
        collective_forget(to, num_bytes);
    }
    free(values);
}
