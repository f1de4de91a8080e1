/* Makes calls that were noted: each has the address of a function, then its arguments, all of them integers or
 * pointers. A function that takes fewer than MOST leaves the rest alone: callers clean up after themselves in the calling
 * conventions of x86-64 and of 64-bit Arm, outside of Windows.
 */
#include <stdint.h>

#define MOST 32

typedef void (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t);

void play(const int64_t *calls, int64_t num_calls) {
    for (int64_t i = 0; i < num_calls; i++) {
        const int64_t *a = calls + i * (MOST + 1) + 1;
        ((function)(intptr_t)a[-1])(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                    a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24],
                                    a[25], a[26], a[27], a[28], a[29], a[30], a[31]);
    }
}
