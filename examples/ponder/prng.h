/* prng.h - a small reproducible random number generator (splitmix64), the same on every machine. */
#ifndef PRNG_H
#define PRNG_H

#include <stdint.h>

typedef struct prng {
    uint64_t state;
} prng;

static inline uint64_t prng_next(prng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline int prng_below(prng *r, int n) /* 0 .. n-1; the bias is below n / 2^32 */
{
    return (int)(((prng_next(r) >> 32) * (uint64_t)n) >> 32);
}

static inline float prng_uniform(prng *r) /* [0, 1) */
{
    return (float)(prng_next(r) >> 40) * (1.0f / 16777216.0f);
}

#endif
