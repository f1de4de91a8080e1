/* Products with weights in 8 bits, on processors that multiply and add four of them at a time (AVX-512 VNNI), or two and
 * two (AVX2).
 *
 *   x      (rows, in)
 *   weight (out / 32, blocks) of `struct weight`: 32 outputs of 64 inputs; those beyond `in` are zero
 *   bias   (out) or NULL
 *   y      (rows, out)  out is a multiple of 32
 *   read   (rows, blocks) of `struct read`: room for x in 8 bits
 *
 * What is read is rounded to 8 bits too, each block of a row by itself. Products within a block are exact, and their sums
 * over the blocks in float32. Each weight is read from memory once, in order, whatever the number of rows. A row is summed
 * in the same order beside any others, so it has the same product alone. Where x is not finite, neither is y.
 */
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>

#include "bfloat16.h"

#define OUTPUTS 32
#define INPUTS 64
#define FEW 8 /* rows that one thread rounds sooner than several */

struct weight {
    uint8_t level[INPUTS / 4][OUTPUTS][4]; /* 128 more than it is: the processor wants one side without a sign */
    float scale[OUTPUTS];
};

struct read {
    int8_t level[INPUTS];
    float scale;
    int32_t start; /* takes away what the 128 add to a sum, where they are multiplied as they are */
};

/* Return the largest of 16 numbers that were moved up by a bit, which was their sign. */
static float largest_of_16(__m256i x) {
    const __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(of_8, _mm_set1_epi8(-1))); /* there is no such maximum */
    return from_bfloat16((bfloat16)(~_mm_extract_epi16(least, 0) & 0xffff) >> 1);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define MOST 8 /* rows whose sums fit in registers */

/* Return the largest of 32 numbers without their signs. Their bits are ordered as they are, and NaN is above all. */
static float largest_of(__m512i x) {
    const __m512i bits = _mm512_slli_epi16(x, 1);
    return largest_of_16(_mm256_max_epu16(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1)));
}

/* Round one block of a row. */
static void round_block(const bfloat16 *x, int64_t num, struct read *to) {
    bfloat16 padded[INPUTS] = {0};
    if (num < INPUTS) x = memcpy(padded, x, num * sizeof *x);
    const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + INPUTS / 2);
    const __m512i sign = _mm512_set1_epi16((int16_t)0x8000);
    const float largest = largest_of(_mm512_max_epu16(_mm512_andnot_si512(sign, low), _mm512_andnot_si512(sign, high)));
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < INPUTS; i += 16) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + i)));
        const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        const __m512i level = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
        _mm_storeu_si128((__m128i *)(to->level + i), _mm512_cvtepi32_epi8(level));
        sum = _mm512_add_epi32(sum, level);
    }
    to->scale = largest / 127;
    to->start = (int32_t)(-128u * (uint32_t)_mm512_reduce_add_epi32(sum));
}

/* Some rows with 32 outputs. The number of rows is known when it is compiled: exact sums stay in registers. */
static inline __attribute__((always_inline)) void some(const int rows, const struct read *x, const struct weight *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t blocks, int64_t out) {
    __m512 sum[MOST][2];
    for (int half = 0; half < 2; half++) {
        __m512i start = _mm512_setzero_si512();
        if (bias != NULL) start = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bias + half * 16)));
        for (int r = 0; r < rows; r++) sum[r][half] = _mm512_castsi512_ps(_mm512_slli_epi32(start, 16));
    }
    for (int64_t b = 0; b < blocks; b++, weight++) {
        __m512i exact[MOST][2];
        for (int r = 0; r < rows; r++) exact[r][0] = exact[r][1] = _mm512_set1_epi32(x[r * blocks + b].start);
        for (int i = 0; i < INPUTS / 4; i++) {
            const __m512i first = _mm512_loadu_si512(weight->level[i]), second = _mm512_loadu_si512(weight->level[i] + 16);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x[r * blocks + b].level + 4 * i, sizeof four);
                const __m512i read = _mm512_set1_epi32(four);
                exact[r][0] = _mm512_dpbusd_epi32(exact[r][0], first, read);
                exact[r][1] = _mm512_dpbusd_epi32(exact[r][1], second, read);
            }
        }
        for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_loadu_ps(weight->scale + half * 16);
            for (int r = 0; r < rows; r++) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[r * blocks + b].scale));
                sum[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r][half]), both, sum[r][half]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            _mm256_storeu_si256((__m256i *)(y + r * out + half * 16), (__m256i)_mm512_cvtneps_pbh(sum[r][half]));
}

#else
#define MOST 4

/* Return the largest of 64 numbers without their signs, as above. */
static float largest_of(const bfloat16 *x) {
    __m256i of_16 = _mm256_setzero_si256();
    for (int i = 0; i < INPUTS; i += 16)
        of_16 = _mm256_max_epu16(of_16, _mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)(x + i)), 1));
    return largest_of_16(of_16);
}

/* Round one block of a row. */
static void round_block(const bfloat16 *x, int64_t num, struct read *to) {
    bfloat16 padded[INPUTS] = {0};
    if (num < INPUTS) x = memcpy(padded, x, num * sizeof *x);
    const float largest = largest_of(x);
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
    for (int i = 0; i < INPUTS; i += 8) {
        int32_t level[8];
        const __m256 value = eight_from_bfloat16(x + i);
        _mm256_storeu_si256((__m256i *)level, _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse)));
        for (int n = 0; n < 8; n++) to->level[i + n] = (int8_t)level[n];
    }
    to->scale = largest / 127;
}

/* Some rows with 8 * `vectors` of 32 outputs. One side loses its signs to the other: the sum of two products of 127 fits
 * in 16 bits. */
static inline __attribute__((always_inline)) void part(const int rows, const int vectors, const int from,
                                                       const struct read *x, const struct weight *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t blocks, int64_t out) {
    const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8((int8_t)128);
    __m256 sum[MOST][4];
    for (int v = 0; v < vectors; v++) {
        const __m256 start = bias == NULL ? _mm256_setzero_ps() : eight_from_bfloat16(bias + from + v * 8);
        for (int r = 0; r < rows; r++) sum[r][v] = start;
    }
    for (int64_t b = 0; b < blocks; b++, weight++) {
        __m256i exact[MOST][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) exact[r][v] = _mm256_setzero_si256();
        for (int i = 0; i < INPUTS / 4; i++) {
            __m256i level[4], size[4];
            for (int v = 0; v < vectors; v++) {
                const __m256i *at = (const __m256i *)(weight->level[i] + from + v * 8);
                level[v] = _mm256_xor_si256(_mm256_loadu_si256(at), middle);
                size[v] = _mm256_abs_epi8(level[v]);
            }
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x[r * blocks + b].level + 4 * i, sizeof four);
                const __m256i read = _mm256_set1_epi32(four);
                for (int v = 0; v < vectors; v++) {
                    const __m256i twos = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(read, level[v]));
                    exact[r][v] = _mm256_add_epi32(exact[r][v], _mm256_madd_epi16(twos, ones));
                }
            }
        }
        for (int v = 0; v < vectors; v++) {
            const __m256 scale = _mm256_loadu_ps(weight->scale + from + v * 8);
            for (int r = 0; r < rows; r++) {
                const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x[r * blocks + b].scale));
                sum[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[r][v]), both, sum[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) eight_to_bfloat16(sum[r][v], y + r * out + from + v * 8);
}

/* Some rows with 32 outputs, in two parts where sums of all would not fit in registers. */
static inline __attribute__((always_inline)) void some(const int rows, const struct read *x, const struct weight *weight,
                                                       const bfloat16 *bias, bfloat16 *y, int64_t blocks, int64_t out) {
    if (rows <= MOST / 2) return part(rows, 4, 0, x, weight, bias, y, blocks, out);
    part(rows, 2, 0, x, weight, bias, y, blocks, out);
    part(rows, 2, 16, x, weight, bias, y, blocks, out);
}
#endif

void multiply_int8(const bfloat16 *x, const struct weight *weight, const bfloat16 *bias, bfloat16 *y, struct read *read,
                   int64_t rows, int64_t in, int64_t out) {
    const int64_t blocks = (in + INPUTS - 1) / INPUTS, num_outputs = out / OUTPUTS;
#pragma omp parallel for if (rows > FEW)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t left = in - b * INPUTS;
            round_block(x + r * in + b * INPUTS, left < INPUTS ? left : INPUTS, read + r * blocks + b);
        }
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t o = num_outputs * thread / threads; o < num_outputs * (thread + 1) / threads; o++) {
            const struct weight *w = weight + o * blocks;
            const bfloat16 *start = bias == NULL ? NULL : bias + o * OUTPUTS;
            int64_t r = 0;
            for (; rows - r >= MOST; r += MOST) some(MOST, read + r * blocks, w, start, y + r * out + o * OUTPUTS, blocks, out);
            const struct read *from = read + r * blocks;
            bfloat16 *to = y + r * out + o * OUTPUTS;
            switch (rows - r) {
            case 1: some(1, from, w, start, to, blocks, out); break;
            case 2: some(2, from, w, start, to, blocks, out); break;
            case 3: some(3, from, w, start, to, blocks, out); break;
#if MOST > 4
            case 4: some(4, from, w, start, to, blocks, out); break;
            case 5: some(5, from, w, start, to, blocks, out); break;
            case 6: some(6, from, w, start, to, blocks, out); break;
            case 7: some(7, from, w, start, to, blocks, out); break;
#endif
            }
        }
    }
}
