/* seconds.c - see seconds.h. Build: part of `make demo`, `make train` and `make eval`. */
#define _POSIX_C_SOURCE 199309L
#include "seconds.h"

#include <time.h>

double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
