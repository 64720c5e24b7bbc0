/* What bench/peer_torch.py calls: the bench's own data, and one layer compressed and timed.
 * Built into build/bench/libpeer.so by: make bench */
#include "bench/job.h"
#include <string.h>

void peer_fill(const bench_shape *shape, float *keys, float *queries);
double peer_compress(const bench_shape *shape, double seconds, int32_t *kept);

/* keys [kv_heads][n_tokens][head_dim], queries [kv_heads * group][window 8][head_dim] */
void peer_fill(const bench_shape *shape, float *keys, float *queries)
{
    bench_fill_keys(keys, shape);
    bench_fill_queries(queries, shape, rkv_config_default(shape->budget).window);
}

/* Least microseconds of one rkv_compress on one thread; kept [kv_heads][budget] ascending. */
double peer_compress(const bench_shape *shape, double seconds, int32_t *kept)
{
    bench_job job;
    double us;
    bench_job_make(&job, shape);
    us = bench_job_time(&job, NULL, BENCH_COMPRESS, seconds);
    memcpy(kept, job.layers[0].kept,
           (size_t)shape->kv_heads * (size_t)shape->budget * sizeof *kept);
    bench_job_free(&job);
    return us;
}
