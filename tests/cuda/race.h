/* The events that tests/cuda/shim.h reports to the race detector, tests/cuda/race.cc: threads,
 * barriers, memory. Without RKV_CUDA_RACE all of these functions are empty. */
#ifndef RKV_TESTS_CUDA_RACE_H
#define RKV_TESTS_CUDA_RACE_H
#include <stddef.h>

enum race_kind { RACE_READ, RACE_WRITE, RACE_ATOMIC, RACE_LDG, RACE_KINDS };

#ifdef RKV_CUDA_RACE
void race_memory(void *base, size_t bytes); /* allocated, not yet written */
void race_forget(void *base);
void race_copy_in(const void *dst, size_t bytes); /* by the host, between launches */
void race_copy_out(const void *src, size_t bytes);
void race_launch(size_t shared_bytes, const void *parameters, size_t parameter_bytes);
void race_block(); /* begins */
void race_block_end();
void race_block_barrier();
void race_warp_barrier(); /* once for each thread of the warp */

/* While it exists every access is of this kind. */
struct race_as {
    explicit race_as(race_kind kind);
    ~race_as();
};
#else
inline void race_memory(void *, size_t)
{
}
inline void race_forget(void *)
{
}
inline void race_copy_in(const void *, size_t)
{
}
inline void race_copy_out(const void *, size_t)
{
}
inline void race_launch(size_t, const void *, size_t)
{
}
inline void race_block()
{
}
inline void race_block_end()
{
}
inline void race_block_barrier()
{
}
inline void race_warp_barrier()
{
}
struct race_as {
    explicit race_as(race_kind)
    {
    }
};
#endif
#endif
