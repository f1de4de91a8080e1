/* Attention of single rows over keys and values in slots, on the CPU: what `server/engine/attention.py` does by
 * gathering and padding, without moving a key. A row is one query position; it reads the slots of its list.
 *
 *   query  (rows, heads, size)       of all rows; those of `row` are read, whatever the strides of rows and heads
 *   keys   (key heads, slots, size)  values likewise, of size `value_size`
 *   output (rows, heads, value_size) those of `row` are written
 *   slot   what row number i reads: slot[offset[i]] to slot[offset[i + 1]]; a row that reads nothing gets zeros
 *
 * `failed` becomes 1 where there is no memory. All arguments are integers or pointers, as `play.c` hands them over.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#define AHEAD 16 /* slots */

/* e to the power of x <= 0, to a few units in the last place: a polynomial of degree 6 between powers of two, in a form
 * that compilers turn into vector instructions. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float whole = floorf(x * 1.44269504f + 0.5f);
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2 in two parts */
    float value = 1.0f / 720.0f;
    value = value * rest + 1.0f / 120.0f;
    value = value * rest + 1.0f / 24.0f;
    value = value * rest + 1.0f / 6.0f;
    value = value * rest + 0.5f;
    value = value * rest + 1.0f;
    value = value * rest + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return value * power;
}

/* What is read soon: slots may lie anywhere, so the processor does not see it coming. */
#define FETCH(OF, SIZE)                                                                                                \
    for (int64_t d = 0; d < SIZE; d += 64 / (int64_t)sizeof *OF) __builtin_prefetch(OF + d)

/* One row and one key head. With `size` and `value_size` known when it is compiled, the inner loops are vectors. */
#define HEAD(NAME, TYPE, FROM, TO)                                                                                     \
    static inline __attribute__((always_inline)) void NAME(                                                            \
        const TYPE *query, const TYPE *keys, const TYPE *values, TYPE *output, const int64_t *slot, int64_t length,    \
        int64_t num_groups, const int64_t stride, const int64_t size, const int64_t value_size, float scaling,         \
        float *restrict q, float *restrict score, float *restrict sum, float *restrict v) {                            \
        for (int64_t g = 0; g < num_groups; g++)                                                                       \
            for (int64_t d = 0; d < size; d++) q[g * size + d] = FROM(query[g * stride + d]) * scaling;                \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const TYPE *key = keys + slot[t] * size, *far = keys + slot[t + AHEAD < length ? t + AHEAD : t] * size;    \
            FETCH(far, size);                                                                                          \
            for (int64_t g = 0; g < num_groups; g++) {                                                                 \
                float dot = 0;                                                                                         \
                for (int64_t d = 0; d < size; d++) dot += q[g * size + d] * FROM(key[d]);                              \
                score[g * length + t] = dot;                                                                           \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t g = 0; g < num_groups; g++) {                                                                     \
            float *of = score + g * length, most = -INFINITY, total = 0;                                               \
            for (int64_t t = 0; t < length; t++) most = of[t] > most ? of[t] : most;                                   \
            for (int64_t t = 0; t < length; t++) total += of[t] = exponential(of[t] - most);                           \
            for (int64_t t = 0; t < length; t++) of[t] /= total;                                                       \
        }                                                                                                              \
        memset(sum, 0, sizeof(float) * num_groups * value_size);                                                       \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const TYPE *value = values + slot[t] * value_size;                                                         \
            const TYPE *far = values + slot[t + AHEAD < length ? t + AHEAD : t] * value_size;                          \
            FETCH(far, value_size);                                                                                    \
            for (int64_t d = 0; d < value_size; d++) v[d] = FROM(value[d]);                                            \
            for (int64_t g = 0; g < num_groups; g++)                                                                   \
                for (int64_t d = 0; d < value_size; d++) sum[g * value_size + d] += score[g * length + t] * v[d];      \
        }                                                                                                              \
        for (int64_t d = 0; d < num_groups * value_size; d++) output[d] = TO(sum[d]);                                  \
    }

HEAD(head_bfloat16, bfloat16, from_bfloat16, to_bfloat16)
HEAD(head_float32, float, same, same)

#define ATTEND(NAME, HEAD_OF, TYPE)                                                                                    \
    void NAME(const TYPE *query, const TYPE *keys, const TYPE *values, TYPE *output, const int64_t *row,                \
             const int64_t *slot, const int64_t *offset, const float *scaling, int64_t *failed, int64_t num_rows,      \
             int64_t row_stride, int64_t stride, int64_t num_heads, int64_t num_key_heads, int64_t num_slots,          \
             int64_t size, int64_t value_size) {                                                                       \
        const int64_t num_groups = num_heads / num_key_heads;                                                          \
        int64_t longest = 0;                                                                                           \
        for (int64_t i = 0; i < num_rows; i++)                                                                         \
            if (offset[i + 1] - offset[i] > longest) longest = offset[i + 1] - offset[i];                              \
        _Pragma("omp parallel if (offset[num_rows] * num_heads > 2048)") {                                             \
            float *q = malloc(sizeof(float) * (num_groups * (size + longest + value_size) + value_size));              \
            if (q == NULL) {                                                                                           \
                _Pragma("omp atomic write") *failed = 1;                                                               \
            }                                                                                                          \
            float *score = q + num_groups * size, *sum = score + num_groups * longest;                                 \
            float *v = sum + num_groups * value_size;                                                                  \
            _Pragma("omp for collapse(2) schedule(dynamic)") for (int64_t i = 0; i < num_rows; i++) {                  \
                for (int64_t head = 0; head < num_key_heads; head++) {                                                 \
                    TYPE *to = output + (row[i] * num_heads + head * num_groups) * value_size;                         \
                    if (q == NULL) continue;                                                                           \
                    const int64_t *read = slot + offset[i], length = offset[i + 1] - offset[i];                        \
                    const TYPE *from = query + row[i] * row_stride + head * num_groups * stride;                       \
                    const TYPE *k = keys + head * num_slots * size, *of = values + head * num_slots * value_size;      \
                    if (size == 64 && value_size == 64)                                                                \
                        HEAD_OF(from, k, of, to, read, length, num_groups, stride, 64, 64, *scaling, q, score, sum,    \
                                v);                                                                                    \
                    else if (size == 128 && value_size == 128)                                                         \
                        HEAD_OF(from, k, of, to, read, length, num_groups, stride, 128, 128, *scaling, q, score, sum,  \
                                v);                                                                                    \
                    else                                                                                               \
                        HEAD_OF(from, k, of, to, read, length, num_groups, stride, size, value_size, *scaling, q,      \
                                score, sum, v);                                                                        \
                }                                                                                                      \
            }                                                                                                          \
            free(q);                                                                                                   \
        }                                                                                                              \
    }

ATTEND(attend_bfloat16, head_bfloat16, bfloat16)
ATTEND(attend_float32, head_float32, float)

/* Keep new keys and values, (rows, key heads, size) of any strides, in the slots of the stores. Sizes are in bytes. */
void keep(const char *key, const char *value, char *keys, char *values, const int64_t *slot, int64_t num_rows,
          int64_t num_key_heads, int64_t num_slots, int64_t size, int64_t value_size, int64_t row_stride,
          int64_t head_stride, int64_t value_row_stride, int64_t value_head_stride) {
    for (int64_t head = 0; head < num_key_heads; head++) {
        for (int64_t row = 0; row < num_rows; row++) {
            const int64_t to = head * num_slots + slot[row];
            memcpy(keys + to * size, key + row * row_stride + head * head_stride, size);
            memcpy(values + to * value_size, value + row * value_row_stride + head * value_head_stride, value_size);
        }
    }
}
