/* Numbers in bfloat16, and numbers that need no conversion, for code that is written once for both. */
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float from_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bfloat16 to_bfloat16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    if (value != value) return 0x7fc0;
    memcpy(&bits, &value, sizeof bits);
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float same(float x) { return x; }

#ifdef __AVX2__
#include <immintrin.h>

static inline __m256 eight_from_bfloat16(const bfloat16 *x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

static inline void eight_to_bfloat16(__m256 value, bfloat16 *x) {
    float found[8];
    _mm256_storeu_ps(found, value);
    for (int n = 0; n < 8; n++) x[n] = to_bfloat16(found[n]);
}
#endif
