/* The first of the highest logits of each row, which torch looks for one by one in bfloat16.
 *
 * All arguments are integers or pointers.
 */
#include <stdint.h>

#define BLOCK 1024

/* A bfloat16 as an integer in the same order; both zeros are one. What is no number is the highest or the lowest. */
static inline int16_t in_order(uint16_t bits) {
    const uint16_t value = bits == 0x8000 ? 0 : bits;
    return (int16_t)(value ^ ((uint16_t)((int16_t)value >> 15) & 0x7fff));
}

/* logits (rows, size) in bfloat16; found (rows). */
void likeliest(const uint16_t *logits, int64_t *found, int64_t num_rows, int64_t size) {
#pragma omp parallel for schedule(static) if (num_rows > 1)
    for (int64_t n = 0; n < num_rows; n++) {
        const uint16_t *row = logits + n * size;
        int16_t best = INT16_MIN;
        int64_t first = 0;
        for (int64_t block = 0; block < size; block += BLOCK) {
            const int64_t stop = block + BLOCK < size ? block + BLOCK : size;
            int16_t most = INT16_MIN;
            for (int64_t i = block; i < stop; i++) {
                const int16_t value = in_order(row[i]);
                most = value > most ? value : most;
            }
            if (most > best) {
                best = most;
                first = block;
            }
        }
        while (in_order(row[first]) != best) first++;
        found[n] = first;
    }
}
