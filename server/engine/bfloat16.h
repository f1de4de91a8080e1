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
