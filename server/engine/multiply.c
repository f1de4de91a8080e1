/* Products of few rows with weights in bfloat16, on processors that multiply pairs of them (AVX-512 BF16).
 *
 *   x      (rows, in)   in is even
 *   weight as `server/engine/packed.py` lays it out: for each 32 outputs, for each two inputs, 32 pairs
 *   bias   (out) or NULL
 *   y      (rows, out)  out is a multiple of 32
 *
 * Each weight is read from memory once, in order, whatever the number of rows. A row is summed in the same order beside
 * any others, so it has the same product alone.
 */
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AHEAD 1024 /* weights: what is read soon */

typedef uint16_t bfloat16;

/* Some rows with one block of 32 outputs. The number of rows is known when it is compiled: sums stay in registers. */
static inline __attribute__((always_inline)) void some(const int rows, const bfloat16 *x, const bfloat16 *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t in, int64_t out) {
    __m512 sum[12][2];
    for (int half = 0; half < 2; half++) {
        __m512i start = _mm512_setzero_si512();
        if (bias != NULL) start = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bias + half * 16)));
        for (int r = 0; r < rows; r++) sum[r][half] = _mm512_castsi512_ps(_mm512_slli_epi32(start, 16));
    }
    for (int64_t i = 0; i < in; i += 2, weight += 64) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(weight), second = (__m512bh)_mm512_loadu_si512(weight + 32);
        __builtin_prefetch(weight + AHEAD);
        __builtin_prefetch(weight + AHEAD + 32);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * in + i, sizeof pair);
            const __m512bh read = (__m512bh)_mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, read);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, read);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            _mm256_storeu_si256((__m256i *)(y + r * out + half * 16), (__m256i)_mm512_cvtneps_pbh(sum[r][half]));
}

void multiply(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, int64_t rows, int64_t in,
              int64_t out) {
    const int64_t num_blocks = out / 32;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t b = num_blocks * thread / threads; b < num_blocks * (thread + 1) / threads; b++) {
            const bfloat16 *w = weight + b * 32 * in, *start = bias == NULL ? NULL : bias + b * 32;
            int64_t r = 0;
            for (; rows - r >= 12; r += 12) some(12, x + r * in, w, start, y + r * out + b * 32, in, out);
            const bfloat16 *from = x + r * in;
            bfloat16 *to = y + r * out + b * 32;
            switch (rows - r) {
            case 1: some(1, from, w, start, to, in, out); break;
            case 2: some(2, from, w, start, to, in, out); break;
            case 3: some(3, from, w, start, to, in, out); break;
            case 4: some(4, from, w, start, to, in, out); break;
            case 5: some(5, from, w, start, to, in, out); break;
            case 6: some(6, from, w, start, to, in, out); break;
            case 7: some(7, from, w, start, to, in, out); break;
            case 8: some(8, from, w, start, to, in, out); break;
            case 9: some(9, from, w, start, to, in, out); break;
            case 10: some(10, from, w, start, to, in, out); break;
            case 11: some(11, from, w, start, to, in, out); break;
            }
        }
    }
}
