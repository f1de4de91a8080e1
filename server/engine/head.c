/* The token head at few positions: what `model/safety_head.py` does, in one pass over its weights.
 *
 * All arguments are integers or pointers.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

/* What the head reads of one more token of each of some passages.
 *
 *   state    by layer, the states (all rows, width)
 *   row      the row of each passage's new token
 *   before   by passage, the sum (layers * width) of its states before, or 0
 *   length   by passage, its tokens, the new one counted
 *   total    the sums with the new token, (passages, layers * width)
 *   feature  the states and their means, (passages, 2 * layers * width)
 */
#define EXTEND(NAME, TYPE, FROM)                                                                                       \
    void NAME(const int64_t *state, const int64_t *row, const int64_t *before, const int64_t *length, float *total,    \
              float *feature, int64_t num_passages, int64_t num_layers, int64_t width) {                               \
        const int64_t size = num_layers * width;                                                                       \
        for (int64_t n = 0; n < num_passages; n++) {                                                                   \
            const float *earlier = (const float *)(intptr_t)before[n], share = 1.0f / (float)length[n];                \
            for (int64_t l = 0; l < num_layers; l++) {                                                                 \
                const TYPE *from = (const TYPE *)(intptr_t)state[l] + row[n] * width;                                  \
                float *read = feature + n * 2 * size + l * width, *sum = total + n * size + l * width;                 \
                for (int64_t d = 0; d < width; d++) {                                                                  \
                    read[d] = FROM(from[d]);                                                                           \
                    sum[d] = read[d] + (earlier == NULL ? 0.0f : earlier[l * width + d]);                              \
                    read[size + d] = sum[d] * share;                                                                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

EXTEND(extend_bfloat16, bfloat16, from_bfloat16)
EXTEND(extend_float32, float, same)

typedef float vector __attribute__((vector_size(64)));

#define LANES 16
#define TILE 4

/* Products of some hidden units with some rows, both known when it is compiled: sums stay in registers. */
static inline __attribute__((always_inline)) void products(const int units, const int rows, const float *weight,
                                                           const float *feature, int64_t size, float *dot) {
    vector sum[TILE][TILE];
    memset(sum, 0, sizeof sum);
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        vector x[TILE];
        for (int n = 0; n < rows; n++) memcpy(&x[n], feature + n * size + d, sizeof x[n]);
        for (int h = 0; h < units; h++) {
            vector w;
            memcpy(&w, weight + h * size + d, sizeof w);
            for (int n = 0; n < rows; n++) sum[h][n] += w * x[n];
        }
    }
    for (int h = 0; h < units; h++) {
        for (int n = 0; n < rows; n++) {
            float total = 0;
            for (int lane = 0; lane < LANES; lane++) total += sum[h][n][lane];
            for (int64_t i = d; i < size; i++) total += weight[h * size + i] * feature[n * size + i];
            dot[h * TILE + n] = total;
        }
    }
}

/* Logits (rows) of features (rows, size) by a linear layer (hidden, size), GELU, and a linear layer (1, hidden);
 * `found` is room for (rows, hidden). */
void risk_logits(const float *feature, const float *weight, const float *bias, const float *out, const float *out_bias,
          float *found, float *logit, int64_t num_rows, int64_t size, int64_t hidden) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < (hidden + TILE - 1) / TILE; tile++) {
        const int64_t first = tile * TILE, units = hidden - first < TILE ? hidden - first : TILE;
        for (int64_t n = 0; n < num_rows; n += TILE) {
            const int64_t rows = num_rows - n < TILE ? num_rows - n : TILE;
            const float *w = weight + first * size, *x = feature + n * size;
            float dot[TILE * TILE];
            if (units == TILE && rows == TILE) {
                products(TILE, TILE, w, x, size, dot);
            } else if (units == TILE && rows == 1) {
                products(TILE, 1, w, x, size, dot);
            } else {
                for (int64_t h = 0; h < units; h++)
                    for (int64_t r = 0; r < rows; r++)
                        products(1, 1, w + h * size, x + r * size, size, dot + h * TILE + r);
            }
            for (int64_t h = 0; h < units; h++) {
                for (int64_t r = 0; r < rows; r++) {
                    const float z = dot[h * TILE + r] + bias[first + h];
                    found[(n + r) * hidden + first + h] = 0.5f * z * (1.0f + erff(z * 0.70710678f));
                }
            }
        }
    }
    for (int64_t n = 0; n < num_rows; n++) {
        float sum = *out_bias;
        for (int64_t h = 0; h < hidden; h++) sum += out[h] * found[n * hidden + h];
        logit[n] = sum;
    }
}
