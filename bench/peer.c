/* What bench/peer_torch.py calls: the bench's own data, and one layer compressed and timed.
 * Built into build/bench/libpeer.so by: make bench */
#include "bench/job.h"
#include "tests/golden_file.h"
#include <string.h>

int peer_read_real(const char *name, bench_shape *shape);
void peer_fill(const bench_shape *shape, float *keys, float *queries);
double peer_compress(const bench_shape *shape, double seconds, int32_t *kept);

/* The numbers of BENCH_GIVEN. */
static golden real;

static size_t count_keys(const bench_shape *s)
{
    return (size_t)s->kv_heads * (size_t)s->n_tokens * (size_t)s->head_dim;
}

static size_t count_queries(const bench_shape *s)
{
    const int window = rkv_config_default(s->budget).window;
    return (size_t)s->kv_heads * (size_t)s->group * (size_t)window * (size_t)s->head_dim;
}

/* Reads tests/golden/name.rkvg, whose window must be the default one, and describes it. Returns its
 * pooling, or 0 if that cannot be done. */
int peer_read_real(const char *name, bench_shape *shape)
{
    golden_free(&real);
    if (!golden_read(&real, "tests/golden", name)) return 0;
    shape->keys = BENCH_GIVEN;
    shape->dtype = RKV_F32;
    shape->n_tokens = real.n_tokens;
    shape->budget = real.budget;
    shape->kv_heads = real.kv_heads;
    shape->group = real.group;
    shape->head_dim = real.dim;
    return real.window == rkv_config_default(real.budget).window ? real.pool : 0;
}

/* keys [kv_heads][n_tokens][head_dim], queries [kv_heads * group][window 8][head_dim] */
void peer_fill(const bench_shape *shape, float *keys, float *queries)
{
    if (shape->keys == BENCH_GIVEN) {
        memcpy(keys, real.round[0].keys, count_keys(shape) * sizeof *keys);
        memcpy(queries, real.round[0].queries, count_queries(shape) * sizeof *queries);
        return;
    }
    bench_fill_keys(keys, shape);
    bench_fill_queries(queries, shape, rkv_config_default(shape->budget).window);
}

/* Least microseconds of one rkv_compress on one thread; kept [kv_heads][budget] ascending. */
double peer_compress(const bench_shape *shape, double seconds, int32_t *kept)
{
    rkv_config config = rkv_config_default(shape->budget);
    bench_job job;
    double us;
    config.pool = real.pool;
    if (shape->keys == BENCH_GIVEN)
        bench_job_make_from(&job, shape, &config, "real", real.round[0].keys, real.round[0].queries,
                            real.window);
    else
        bench_job_make(&job, shape);
    us = bench_job_time(&job, NULL, BENCH_COMPRESS, seconds);
    memcpy(kept, job.layers[0].kept,
           (size_t)shape->kv_heads * (size_t)shape->budget * sizeof *kept);
    bench_job_free(&job);
    return us;
}
