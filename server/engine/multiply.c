/* Products with weights in bfloat16, on processors that multiply pairs of them (AVX-512 BF16), or that multiply and add
 * floats (AVX2 and FMA), to which both sides are widened in registers.
 *
 *   x      (rows, in)   in is even
 *   weight as `server/engine/packed.py` lays it out: for each 32 outputs, for each two inputs, 32 pairs
 *   bias   (out) or NULL
 *   y      (rows, out)  out is a multiple of 32
 *
 * With few rows each weight is read from memory once, in order, whatever their number. A row is summed in the same order
 * beside any others, so it has the same product alone.
 */
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>

#include "bfloat16.h"

#define AHEAD 1024 /* weights: what is read soon */

#ifdef __AVX512BF16__
#define MOST 12 /* rows whose sums fit in registers */

/* Some rows with one block of 32 outputs. The number of rows is known when it is compiled: sums stay in registers. */
static inline __attribute__((always_inline)) void some(const int rows, const bfloat16 *x, const bfloat16 *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t in, int64_t out) {
    __m512 sum[MOST][2];
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

#else
#define MOST 6

/* Some rows with 8 * `vectors` of a block of 32 outputs, those of a pair two halves of 32 bits. */
static inline __attribute__((always_inline)) void part(const int rows, const int vectors, const bfloat16 *x,
                                                       const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y,
                                                       int64_t in, int64_t out) {
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    __m256 sum[MOST][4];
    for (int v = 0; v < vectors; v++) {
        const __m256 start = bias == NULL ? _mm256_setzero_ps() : eight_from_bfloat16(bias + v * 8);
        for (int r = 0; r < rows; r++) sum[r][v] = start;
    }
    for (int64_t i = 0; i < in; i += 2, weight += 64) {
        __m256 first[4], second[4];
        for (int v = 0; v < vectors; v++) {
            const __m256i pairs = _mm256_loadu_si256((const __m256i *)(weight + v * 16));
            first[v] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            second[v] = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
        }
        __builtin_prefetch(weight + AHEAD);
        __builtin_prefetch(weight + AHEAD + 32);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * in + i, sizeof pair);
            const __m256i both = _mm256_set1_epi32(pair);
            const __m256 read = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            const __m256 next = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
            for (int v = 0; v < vectors; v++) {
                sum[r][v] = _mm256_fmadd_ps(first[v], read, sum[r][v]);
                sum[r][v] = _mm256_fmadd_ps(second[v], next, sum[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) eight_to_bfloat16(sum[r][v], y + r * out + v * 8);
}

/* Some rows with one block of 32 outputs. */
static inline __attribute__((always_inline)) void some(const int rows, const bfloat16 *x, const bfloat16 *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t in, int64_t out) {
    if (rows <= MOST / 2) return part(rows, 4, x, weight, bias, y, in, out);
    part(rows, 2, x, weight, bias, y, in, out);
    part(rows, 2, x, weight + 32, bias == NULL ? NULL : bias + 16, y + 16, in, out);
}
#endif

void multiply(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, int64_t rows, int64_t in,
              int64_t out) {
    const int64_t num_blocks = out / 32;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t b = num_blocks * thread / threads; b < num_blocks * (thread + 1) / threads; b++) {
            const bfloat16 *w = weight + b * 32 * in, *start = bias == NULL ? NULL : bias + b * 32;
            int64_t r = 0;
#ifdef __AVX512BF16__
            for (; rows - r >= MOST; r += MOST) some(MOST, x + r * in, w, start, y + r * out + b * 32, in, out);
#else
            for (int half = 0; half < 2; half++) /* which stays in the nearest cache for all rows */
                for (r = 0; rows - r >= MOST; r += MOST)
                    part(MOST, 2, x + r * in, w + half * 32, start == NULL ? NULL : start + half * 16,
                         y + r * out + b * 32 + half * 16, in, out);
#endif
            const bfloat16 *from = x + r * in;
            bfloat16 *to = y + r * out + b * 32;
            switch (rows - r) {
            case 1: some(1, from, w, start, to, in, out); break;
            case 2: some(2, from, w, start, to, in, out); break;
            case 3: some(3, from, w, start, to, in, out); break;
            case 4: some(4, from, w, start, to, in, out); break;
            case 5: some(5, from, w, start, to, in, out); break;
#ifdef __AVX512BF16__
            case 6: some(6, from, w, start, to, in, out); break;
            case 7: some(7, from, w, start, to, in, out); break;
            case 8: some(8, from, w, start, to, in, out); break;
            case 9: some(9, from, w, start, to, in, out); break;
            case 10: some(10, from, w, start, to, in, out); break;
            case 11: some(11, from, w, start, to, in, out); break;
#endif
            }
        }
    }
}
