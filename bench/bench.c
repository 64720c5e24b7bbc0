/* Times rkv on this machine, beside what the machine can do at most and the scalar definition.
 * make bench      or:  build/bench/bench [--full | --smoke | --real | --types | --policies |
 *                                               --stages] [--csv FILE] */
#define _POSIX_C_SOURCE 200809L
#include "bench/job.h"
#include "bench/machine.h"
#include "bench/stages.h"
#include "tests/golden_file.h"
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS ""
#endif

enum { GROUP = 4, HEAD_DIM = 128 };
static int n_kv_heads = 8; /* fewer with --smoke */

typedef struct bench {
    const rkv_backend *best, *scalar;
    bench_machine machine; /* of one thread                                                  */
    double seconds;        /* for each timing                                                */
    int smoke, full;
    FILE *csv;
    int failures;
} bench;

/* ==== The roof ==============================================================================
 * The least time the machine needs for what the method has to do: per stage the larger of
 * operations / peak and bytes / bandwidth, and the stages one after another. The bandwidth is the
 * higher of copying between blocks and moving within one, both beyond the caches. */

typedef struct roof {
    double fma_us, copy_us; /* as far as each is what bounds its stage                        */
} roof;

static const char *roof_bound(roof r)
{
    return r.fma_us >= r.copy_us ? "fma" : "copy";
}

static void add_stage(roof *r, const bench_machine *machine, double flops, double bytes)
{
    const double fma_us = 1e6 * flops / machine->flops;
    const double copy_us = 1e6 * bytes / fmax(machine->copy, machine->move);
    if (fma_us >= copy_us)
        r->fma_us += fma_us;
    else
        r->copy_us += copy_us;
}

/* Rows that change their place, of all heads. */
static double rows_moved(const bench_job *job)
{
    const bench_shape *s = &job->shape;
    const rkv_layer *layer = job->layers;
    double moved = 0;
    for (int h = 0; h < s->kv_heads; h++)
        for (int i = 0; i < layer->n_kept; i++)
            moved += layer->kept[(size_t)h * (size_t)s->budget + (size_t)i] != i;
    return moved;
}

/* Importance: a dot product for each query and candidate. Redundancy: norm, sum and the product
 * with the sum, three multiply-adds an element, and a dot product for each pair to look at.
 * Keys are read once. Selection has no roof: it is all decisions. */
static roof roof_of(const bench_machine *machine, const bench_job *job, bench_stage stage)
{
    const bench_shape *s = &job->shape;
    const double n = s->n_tokens, heads = s->kv_heads, dim = s->head_dim;
    const double window = job->config.window;
    const double row_bytes = (double)job->key_bytes / (n * heads);
    const double importance = 2 * window * s->group * (n - window) * dim;
    roof r = { 0, 0 };
    if (stage == BENCH_SCORE || stage == BENCH_COMPRESS)
        add_stage(&r, machine, heads * (importance + 6 * n * dim) + 2 * job->pairs * dim,
                  heads * n * row_bytes);
    if (stage == BENCH_COMPACT || stage == BENCH_COMPRESS)
        add_stage(&r, machine, 0, rows_moved(job) * row_bytes * 2 /* K and V */ * 2 /* r, w */);
    return r;
}

/* ==== Lines ================================================================================= */

static const char *const stage_names[] = { "score", "select", "compact", "compress" };

/* A full scalar run of an all-pairs case takes minutes beyond this. */
static int scalar_is_affordable(const bench_shape *s)
{
    const double n = s->n_tokens;
    return s->keys != BENCH_DISTINCT || n * n * s->kv_heads * s->head_dim < 5e9;
}

static const char *const path_names[] = { "scalar", "neon", "avx2", "avx512" };
enum { N_PATHS = sizeof path_names / sizeof *path_names };

/* The backend that results are compared with: scalar, or, where that takes too long, any other
 * than the one under test. */
static const rkv_backend *reference_for(const bench *b, const rkv_backend *backend,
                                        const bench_shape *shape)
{
    const rkv_backend *other;
    if (scalar_is_affordable(shape)) return b->scalar;
    for (int i = N_PATHS - 1; i > 0; i--) {
        other = rkv_backend_find(path_names[i]);
        if (other && other != backend) return other;
    }
    return NULL;
}

static void print_columns(const char *title)
{
    printf("\n# %s\n# %-12s %-8s %-8s %-5s %6s %4s %12s %10s   %s\n", title, "keys", "stage",
           "backend", "dtype", "n", "d", "us", "x scalar", "% of roof (bound)");
}

static void csv_line(bench *b, const bench_job *job, const char *stage, const char *backend,
                     int threads, double us, double scalar_us, double roof_us)
{
    const bench_shape *s = &job->shape;
    if (!b->csv) return;
    fprintf(b->csv, "%s,%s,%s,%s,%d,%d,%d,%d,%d,%d,%.2f,%.2f,%.2f\n", job->name, stage, backend,
            bench_dtype_name(s->dtype), s->kv_heads, s->group, s->head_dim, s->n_tokens, s->budget,
            threads, us, scalar_us, roof_us);
}

static void print_line(bench *b, const bench_job *job, const rkv_backend *backend,
                       bench_stage stage, double us, double scalar_us)
{
    const bench_shape *s = &job->shape;
    const roof r = roof_of(&b->machine, job, stage);
    const double roof_us = r.fma_us + r.copy_us;
    char speedup[32] = "-", share[32] = "-";
    if (scalar_us > 0) snprintf(speedup, sizeof speedup, "%.1f", scalar_us / us);
    if (roof_us > 0) snprintf(share, sizeof share, "%.0f (%s)", 100 * roof_us / us, roof_bound(r));
    printf("  %-12s %-8s %-8s %-5s %6d %4d %12.1f %10s   %s\n", job->name, stage_names[stage],
           backend->name, bench_dtype_name(s->dtype), s->n_tokens, s->head_dim, us, speedup, share);
    fflush(stdout);
    csv_line(b, job, stage_names[stage], backend->name, 1, us, scalar_us, roof_us);
}

static int check(bench *b, bench_job *job, const rkv_backend *backend)
{
    const bench_shape *s = &job->shape;
    const rkv_backend *reference = reference_for(b, backend, s);
    if (!reference || reference == backend || bench_job_check(job, backend, reference)) return 1;
    printf("FAIL  %s differs from %s: %s, %s, n %d\n", backend->name, reference->name, job->name,
           bench_dtype_name(s->dtype), s->n_tokens);
    b->failures++;
    return 0;
}

static bench_shape shape_of(bench_keys keys, rkv_dtype dtype, int n_tokens)
{
    const bench_shape shape = {
        keys, dtype, n_tokens, n_tokens - 128, n_kv_heads, GROUP, HEAD_DIM
    };
    return shape;
}

/* Times `backend` and, where it is affordable, scalar. */
static void time_stage(bench *b, bench_job *job, const rkv_backend *backend, bench_stage stage)
{
    const double us = bench_job_time(job, backend, stage, b->seconds);
    const double scalar_us = scalar_is_affordable(&job->shape)
                                 ? bench_job_time(job, b->scalar, stage, 0.2 * b->seconds)
                                 : 0;
    print_line(b, job, backend, stage, us, scalar_us);
}

/* Checks, then times the stages [first, last]. */
static void bench_stages(bench *b, bench_keys keys, rkv_dtype dtype, int n_tokens,
                         const rkv_backend *backend, bench_stage first, bench_stage last)
{
    const bench_shape shape = shape_of(keys, dtype, n_tokens);
    bench_job job;
    bench_job_make(&job, &shape);
    if (check(b, &job, backend)) {
        bench_machine_measure(&b->machine, b->best->name, 1);
        for (int stage = (int)first; stage <= (int)last; stage++)
            time_stage(b, &job, backend, (bench_stage)stage);
    }
    bench_job_free(&job);
}

/* ==== Tables ================================================================================ */

static const rkv_dtype dtypes[] = { RKV_F32, RKV_F16, RKV_BF16 };
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

static void table_stages(bench *b)
{
    print_columns("one layer, 1152 -> 1024 tokens, stage by stage and as one call");
    for (int t = 0; t < N_DTYPES; t++)
        bench_stages(b, BENCH_COSINE_07, dtypes[t], 1152, b->best, BENCH_SCORE, BENCH_COMPRESS);
}

static void table_backends(bench *b)
{
    const rkv_backend *backend;
    print_columns("every CPU path");
    for (int i = N_PATHS - 1; i >= 0; i--)
        if ((backend = rkv_backend_find(path_names[i])) != NULL)
            bench_stages(b, BENCH_COSINE_07, RKV_F32, 1152, backend, BENCH_COMPRESS,
                         BENCH_COMPRESS);
}

static void table_keys(bench *b)
{
    print_columns("what the keys are like");
    for (int k = 0; k < BENCH_KEYS_COUNT; k++)
        for (int t = 0; t < N_DTYPES; t++)
            bench_stages(b, (bench_keys)k, dtypes[t], 1152, b->best, BENCH_COMPRESS,
                         BENCH_COMPRESS);
}

/* Quantised keys beside f16, all types in turns, so that all see the same neighbours. */
static void types_of_path(bench *b, const rkv_backend *backend, int n_tokens, bench_stage stage)
{
    static const rkv_dtype types[] = { RKV_F16, RKV_F8_E4M3, RKV_F8_E5M2, RKV_Q8_0, RKV_OPAQUE };
    enum { N_TYPES = sizeof types / sizeof *types, TURNS = 6 };
    bench_job jobs[N_TYPES];
    double us[N_TYPES];
    for (int t = 0; t < N_TYPES; t++) {
        const bench_shape shape = shape_of(BENCH_COSINE_07, types[t], n_tokens);
        bench_job_make(&jobs[t], &shape);
        us[t] = check(b, &jobs[t], backend) ? HUGE_VAL : 0;
    }
    for (int turn = 0; turn < TURNS; turn++)
        for (int t = 0; t < N_TYPES; t++)
            us[t] =
                fmin(us[t], bench_job_time(&jobs[t], backend, stage, b->seconds / (double)TURNS));
    for (int t = 0; t < N_TYPES; t++) {
        printf("  %-8s %-8s %6d %-6s %12.1f %8.2f\n", stage_names[stage], backend->name, n_tokens,
               bench_dtype_name(types[t]), us[t], us[t] / us[0]);
        csv_line(b, &jobs[t], stage_names[stage], backend->name, 1, us[t], 0, 0);
        bench_job_free(&jobs[t]);
    }
    fflush(stdout);
}

static void table_types(bench *b)
{
    static const int lengths[] = { 1152, 4224 };
    const rkv_backend *backend;
    printf("\n# quantised keys and values, f16 queries, cosine 0.7, in turns\n"
           "# loader: q8_0 by a row loader in plain C\n"
           "# %-8s %-8s %6s %-6s %12s %8s\n",
           "stage", "backend", "n", "dtype", "us", "x f16");
    for (int i = N_PATHS - 1; i > 0; i--)
        if ((backend = rkv_backend_find(path_names[i])) != NULL)
            for (int k = 0; k < (b->smoke ? 1 : 2); k++) {
                types_of_path(b, backend, lengths[k], BENCH_SCORE);
                types_of_path(b, backend, lengths[k], BENCH_COMPRESS);
            }
}

/* Keys of a real model, as the golden files have them. */
static const char *const real_files[][2] = {
    { "real_prose_layer00_f16", "real L0" },
    { "real_prose_layer02_f16", "real L2" },
    { "real_prose_layer15_f16", "real L15" },
    { "real_trace_layer22_f16", "real L22" },
};
enum { N_REAL = sizeof real_files / sizeof *real_files };

/* Returns 0 and says so where the file is not there. */
static int read_real(golden *g, int i)
{
    if (golden_read(g, "tests/golden", real_files[i][0])) return 1;
    printf("# %s: not run, tests/golden has no such file\n", real_files[i][1]);
    return 0;
}

/* One golden file in one number format; budget and pooling are the file's. */
static void make_real(bench_job *job, const golden *g, int i, rkv_dtype dtype)
{
    const bench_shape shape = { BENCH_GIVEN, dtype,    g->n_tokens, g->budget,
                                g->kv_heads, g->group, g->dim };
    rkv_config config = rkv_config_default(g->budget);
    config.window = g->window;
    config.pool = g->pool;
    bench_job_make_from(job, &shape, &config, real_files[i][1], g->round[0].keys,
                        g->round[0].queries, g->window);
}

/* Checks, then times score and compress on the best path. Frees the job. */
static void bench_score_and_compress(bench *b, bench_job *job)
{
    if (check(b, job, b->best)) {
        bench_machine_measure(&b->machine, b->best->name, 1);
        time_stage(b, job, b->best, BENCH_SCORE);
        time_stage(b, job, b->best, BENCH_COMPRESS);
    }
    bench_job_free(job);
}

static void table_real(bench *b)
{
    print_columns(
        "real keys: layers 0, 2, 15, 22 of SmolLM2-135M-Instruct, f16 as stored\n"
        "# 3 kv heads, 9 query heads, 640 -> 256, 1152 -> 768, 1152 -> 1024 and 900 -> 512\n"
        "# In the 90 heads of that model the mean cosine is 0.57 (0.30 to 0.75). 95 % of the\n"
        "# rows find their similar key among the newest 32 tokens, 98 % among the newest 128.\n"
        "# 4 heads are hard: up to 164 of 1152 rows look back more than 512 tokens. In 53\n"
        "# heads one row, the first token, resembles none. So isotropic keys are the worst\n"
        "# case, not a typical one, and cosine 0.7 without an outlier is not typical either.");
    for (int i = 0; i < N_REAL; i++) {
        golden g;
        if (!read_real(&g, i)) continue;
        for (int t = 0; t < N_DTYPES; t++) {
            bench_job job;
            make_real(&job, &g, i, dtypes[t]);
            bench_score_and_compress(b, &job);
        }
        golden_free(&g);
    }
}

/* ==== Policies beside R-KV (--policies) ===================================================== */

enum { N_POLICIES = 10 };
static const char *const policy_names[N_POLICIES] = {
    "rkv",         "wide", "snapkv",       "memory_traces", "memory_prose",
    "memory_wide", "h2o",  "triattention", "streaming",     "random"
};

static rkv_config policy_config(int policy, int budget)
{
    switch (policy) {
    case 1: return rkv_config_wide(budget);
    case 2: return rkv_config_snapkv(budget);
    case 3: return rkv_config_memory_traces(budget);
    case 4: return rkv_config_memory_prose(budget);
    case 5: return rkv_config_memory_wide(budget);
    case 6: return rkv_config_h2o(budget);
    case 7: return rkv_config_triattention(budget);
    case 8: return rkv_config_streaming(budget);
    case 9: return rkv_config_random(budget, 1);
    default: return rkv_config_default(budget);
    }
}

/* Checks all, then times them in turns, so that all see the same neighbours. Frees the jobs. */
static void time_policies(bench *b, bench_job jobs[N_POLICIES], const char *keys)
{
    enum { TURNS = 6 };
    double us[N_POLICIES][2];
    for (int p = 0; p < N_POLICIES; p++)
        us[p][0] = us[p][1] = check(b, &jobs[p], b->best) ? HUGE_VAL : 0;
    for (int turn = 0; turn < TURNS; turn++)
        for (int p = 0; p < N_POLICIES; p++) {
            const double seconds = b->seconds / (double)TURNS;
            us[p][0] = fmin(us[p][0], bench_job_time(&jobs[p], b->best, BENCH_SCORE, seconds));
            us[p][1] = fmin(us[p][1], bench_job_time(&jobs[p], b->best, BENCH_COMPRESS, seconds));
        }
    for (int p = 0; p < N_POLICIES; p++) {
        printf("  %-14s %-11s %6d %12.1f %8.2f %12.1f %8.2f\n", policy_names[p], keys,
               jobs[p].shape.n_tokens, us[p][0], us[p][0] / us[0][0], us[p][1],
               us[p][1] / us[0][1]);
        jobs[p].name = policy_names[p];
        csv_line(b, &jobs[p], "score", b->best->name, 1, us[p][0], 0, 0);
        csv_line(b, &jobs[p], "compress", b->best->name, 1, us[p][1], 0, 0);
        bench_job_free(&jobs[p]);
    }
    fflush(stdout);
}

static void table_policies(bench *b)
{
    static const int lengths[] = { 1152, 4224 };
    enum { L15 = 2 };
    bench_job jobs[N_POLICIES];
    golden g;
    printf("\n# policies, presets as they are, f16, 128 new tokens, %s, in turns\n"
           "# cosine 0.7: 8 kv heads, group 4, d 128; real L15: 3 kv heads, group 3, d 64\n"
           "# x: beside R-KV as published\n"
           "# %-14s %-11s %6s %12s %8s %12s %8s\n",
           b->best->name, "policy", "keys", "n", "score us", "x", "compress us", "x");
    for (int k = 0; k < (b->smoke ? 1 : 2); k++) {
        const bench_shape shape = shape_of(BENCH_COSINE_07, RKV_F16, lengths[k]);
        for (int p = 0; p < N_POLICIES; p++) {
            const rkv_config config = policy_config(p, shape.budget);
            bench_job_make_for(&jobs[p], &shape, &config);
        }
        time_policies(b, jobs, bench_keys_name(shape.keys));
    }
    if (!read_real(&g, L15)) return;
    for (int p = 0; p < N_POLICIES; p++) {
        const bench_shape shape = { BENCH_GIVEN, RKV_F16, g.n_tokens, g.budget,
                                    g.kv_heads,  g.group, g.dim };
        const rkv_config config = policy_config(p, g.budget);
        bench_job_make_from(&jobs[p], &shape, &config, real_files[L15][1], g.round[0].keys,
                            g.round[0].queries, g.window);
    }
    time_policies(b, jobs, real_files[L15][1]);
    golden_free(&g);
}

/* kv heads, group, head dim of small models and large */
static const int model_shapes[][3] = { { 3, 3, 64 }, { 2, 6, 128 }, { 1, 2, 256 } };
enum { N_MODEL_SHAPES = sizeof model_shapes / sizeof *model_shapes };

static bench_shape model_shape(int i, rkv_dtype dtype)
{
    bench_shape shape = shape_of(BENCH_COSINE_07, dtype, 1152);
    shape.kv_heads = model_shapes[i][0];
    shape.group = model_shapes[i][1];
    shape.head_dim = model_shapes[i][2];
    return shape;
}

static void table_shapes(bench *b)
{
    print_columns("shapes of models: 3 kv heads, group 3, d 64; 2, 6, 128; 1, 2, 256");
    for (int i = 0; i < N_MODEL_SHAPES; i++)
        for (int t = 0; t < N_DTYPES; t++) {
            const bench_shape shape = model_shape(i, dtypes[t]);
            bench_job job;
            bench_job_make(&job, &shape);
            bench_score_and_compress(b, &job);
        }
}

/* ==== Where the time of the score stage goes (--stages) ===================================== */

static void print_parts(const bench *b, const bench_job *job, const rkv_backend *backend)
{
    bench_machine machine = { 0, 0, 0, 0 }; /* the peak of this path */
    bench_part parts[BENCH_N_PARTS];
    double roof_us = 0;
    bench_machine_measure(&machine, backend->name, 1);
    bench_time_parts(job, backend->name, 4 * b->seconds, parts);
    printf("\n# %s, %s, %s, n %d, %d kv heads, group %d, d %d\n# %-18s %9s %8s %10s\n", job->name,
           bench_dtype_name(job->shape.dtype), backend->name, job->shape.n_tokens,
           job->shape.kv_heads, job->shape.group, job->shape.head_dim, "part", "us", "% whole",
           "us at peak");
    for (int i = 0; i < BENCH_N_PARTS; i++) {
        const double peak_us = 1e6 * parts[i].flops / machine.flops;
        roof_us += peak_us;
        printf("  %-18s %9.1f %8.0f", parts[i].name, parts[i].us,
               100 * parts[i].us / parts[BENCH_WHOLE].us);
        if (peak_us > 0) printf(" %10.1f", peak_us);
        printf("\n");
    }
    printf("  whole / tile at peak: %.2f; parts with multiply-adds at peak: %.1f us\n",
           parts[BENCH_WHOLE].us * machine.flops / (1e6 * parts[BENCH_TILE].flops), roof_us);
}

/* Reserves the workspace on the way. */
static void print_parts_of(const bench *b, bench_job *job)
{
    static const char *const paths[] = { "avx512", "avx2", "neon" };
    for (int i = 0; i < 3; i++) {
        const rkv_backend *backend = rkv_backend_find(paths[i]);
        if (!backend) continue;
        bench_job_time(job, backend, BENCH_SCORE, 0);
        print_parts(b, job, backend);
    }
    bench_job_free(job);
}

static void show_parts(const bench *b)
{
    bench_job job;
    printf("\n# parts of rkv_score, each timed by itself from a warm cache, the kv heads together\n"
           "# newest columns: the first pass less the parts above\n"
           "# search, mix: less the second pass\n");
    for (int i = 0; i < N_REAL; i++) {
        golden g;
        if (!read_real(&g, i)) continue;
        make_real(&job, &g, i, RKV_F16);
        print_parts_of(b, &job);
        golden_free(&g);
    }
    for (int i = 0; i < N_MODEL_SHAPES; i++) {
        const bench_shape shape = model_shape(i, RKV_F16);
        bench_job_make(&job, &shape);
        print_parts_of(b, &job);
    }
    for (int t = 0; t < N_DTYPES; t++) {
        const bench_shape shape = shape_of(BENCH_COSINE_07, dtypes[t], 1152);
        bench_job_make(&job, &shape);
        print_parts_of(b, &job);
    }
}

static void table_growth(bench *b)
{
    static const int lengths[] = { 640, 1152, 2176, 4224, 16384, 65536 };
    static const bench_keys keys[] = { BENCH_COSINE_07, BENCH_COSINE_04, BENCH_DISTINCT };
    const int n_lengths = b->smoke ? 2 : 6;
    print_columns("growth with n; 128 tokens are evicted");
    for (int k = 0; k < 3; k++)
        for (int t = 0; t < N_DTYPES; t++)
            for (int i = 0; i < n_lengths; i++) {
                const int worst = keys[k] == BENCH_DISTINCT;
                if (worst && !b->full && (t > 0 || lengths[i] > 16384)) continue;
                bench_stages(b, keys[k], dtypes[t], lengths[i], b->best, BENCH_COMPRESS,
                             BENCH_COMPRESS);
            }
}

/* A layer that is never read: addresses enough apart to be told from one another. */
static void describe(rkv_layer *layer, const bench_shape *s, int window, int index)
{
    const size_t apart = (size_t)s->kv_heads * (size_t)s->n_tokens * (size_t)s->head_dim * 4;
    const uintptr_t base = (uintptr_t)(3 * index + 1) * apart;
    layer->keys = rkv_tensor_make((void *)base, s->dtype, s->kv_heads, s->n_tokens, s->head_dim);
    layer->values =
        rkv_tensor_make((void *)(base + apart), s->dtype, s->kv_heads, s->n_tokens, s->head_dim);
    layer->queries = rkv_tensor_make((void *)(base + 2 * apart), s->dtype, s->kv_heads * s->group,
                                     window, s->head_dim);
    layer->n_tokens = s->n_tokens;
}

static void table_workspace(bench *b)
{
    static const int lengths[] = { 640, 1152, 2176, 4224, 16384, 65536 };
    printf("\n# workspace of one call, 8 kv heads, 1 thread: bytes\n"
           "# %6s %12s %12s %16s\n",
           "n", "1 layer", "32 layers", "per head, token");
    for (int i = 0; i < 6; i++) {
        const bench_shape s = shape_of(BENCH_COSINE_07, RKV_F32, lengths[i]);
        const rkv_config config = rkv_config_default(s.budget);
        rkv_layer layers[32];
        size_t one = 0, many = 0;
        memset(layers, 0, sizeof layers);
        for (int l = 0; l < 32; l++) describe(layers + l, &s, config.window, l);
        if (rkv_workspace_size(NULL, &config, layers, 1, &one) != RKV_OK ||
            rkv_workspace_size(NULL, &config, layers, 32, &many) != RKV_OK) {
            printf("FAIL  workspace size of n %d\n", s.n_tokens);
            b->failures++;
            continue;
        }
        printf("  %6d %12zu %12zu %16.2f\n", s.n_tokens, one, many,
               (double)many / (32.0 * n_kv_heads * s.n_tokens));
    }
}

/* One and two threads take turns, so that both see the same neighbours. What two threads gain on
 * plain multiply-adds and copies, in the same minute, is what this machine has to give. */
static void table_threads(bench *b)
{
    static const bench_keys keys[] = { BENCH_COSINE_07, BENCH_COSINE_04, BENCH_DISTINCT };
    static const int lengths[] = { 1152, 4224 };
    bench_machine one = { 0, 0, 0, 0 }, two = one;
    rkv_threads *pool = NULL;
    if (rkv_threads_create(&pool, 2) != RKV_OK) {
        printf("# threads: none to be had\n");
        return;
    }
    printf("\n# threads, f32, one layer of %d kv heads\n# %-12s %6s %12s %12s %8s\n", n_kv_heads,
           "keys", "n", "us, 1", "us, 2", "x");
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < (b->smoke ? 1 : 2); i++) {
            const bench_shape shape = shape_of(keys[k], RKV_F32, lengths[i]);
            double us[2] = { HUGE_VAL, HUGE_VAL };
            bench_job job;
            bench_job_make(&job, &shape);
            const rkv_config alone = job.config;
            for (int turn = 0; turn < 8; turn++) {
                job.config = alone;
                if (turn % 2) rkv_threads_use(pool, &job.config);
                us[turn % 2] = fmin(
                    us[turn % 2], bench_job_time(&job, b->best, BENCH_COMPRESS, 0.25 * b->seconds));
            }
            bench_job_free(&job);
            printf("  %-12s %6d %12.1f %12.1f %8.2f\n", bench_keys_name(shape.keys), lengths[i],
                   us[0], us[1], us[0] / us[1]);
            fflush(stdout);
            csv_line(b, &job, "compress", b->best->name, 2, us[1], 0, 0);
            bench_machine_measure(&one, b->best->name, 1);
            bench_machine_measure(&two, b->best->name, 2);
        }
    printf("# the machine itself: fma x %.2f, move x %.2f\n", two.flops / one.flops,
           two.move / one.move);
    rkv_threads_destroy(pool);
}

/* ==== OpenBLAS, where there is one ========================================================== */

typedef void (*cblas_sgemm_function)(int order, int trans_a, int trans_b, int m, int n, int k,
                                     float alpha, const float *a, int lda, const float *b, int ldb,
                                     float beta, float *c, int ldc);

/* dlsym returns a data pointer; POSIX has it hold a function, C has no cast for that. */
static void *symbol(void *library, const char *name, void *function)
{
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
    return address;
}

static double gram_time(const bench_job *job, cblas_sgemm_function sgemm, float *gram)
{
    enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
    const bench_shape *s = &job->shape;
    const int n = s->n_tokens, d = s->head_dim;
    const double before = bench_seconds();
    for (int h = 0; h < s->kv_heads; h++) {
        const float *keys = (const float *)job->pristine + (size_t)h * (size_t)n * (size_t)d;
        sgemm(ROW_MAJOR, NO_TRANS, TRANS, n, n, d, 1.0f, keys, d, keys, d, 0.0f, gram, n);
    }
    return (bench_seconds() - before) * 1e6;
}

/* An OpenBLAS older than the CPU takes SSE kernels; it is told the registers that rkv found. */
static void *open_blas(const char *isa)
{
    if (!strcmp(isa, "avx512")) setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
    if (!strcmp(isa, "avx2")) setenv("OPENBLAS_CORETYPE", "Haswell", 0);
    return dlopen("libopenblas.so.0", RTLD_NOW);
}

static void table_blas(bench *b)
{
    static const int lengths[] = { 1152, 2176, 4224 };
    void *library = open_blas(b->best->name);
    cblas_sgemm_function sgemm;
    void (*set_threads)(int);
    char *(*core_name)(void);
    if (!library || !symbol(library, "cblas_sgemm", &sgemm) ||
        !symbol(library, "openblas_get_corename", &core_name) ||
        !symbol(library, "openblas_set_num_threads", &set_threads)) {
        printf("\n# sgemm of the Gram matrix: not run, there is no libopenblas.so.0\n");
        return;
    }
    set_threads(1);
    printf("\n# worst case, no two keys similar, f32, beside OpenBLAS's sgemm (%s) of the n x n\n"
           "# Gram matrix alone, 1 thread, in turns; the whole of rkv_compress against only that\n"
           "# %6s %14s %14s %12s\n",
           core_name(), "n", "rkv us", "sgemm us", "sgemm / rkv");
    for (int i = 0; i < (b->smoke ? 1 : 3); i++) {
        const bench_shape shape = shape_of(BENCH_DISTINCT, RKV_F32, lengths[i]);
        double rkv_us = HUGE_VAL, sgemm_us = HUGE_VAL;
        bench_job job;
        float *gram = (float *)malloc((size_t)lengths[i] * (size_t)lengths[i] * sizeof *gram);
        if (!gram) break;
        bench_job_make(&job, &shape);
        for (int turn = 0; turn < 6; turn++) {
            rkv_us = fmin(rkv_us, bench_job_time(&job, b->best, BENCH_COMPRESS, 0.2 * b->seconds));
            sgemm_us = fmin(sgemm_us, gram_time(&job, sgemm, gram));
        }
        bench_job_free(&job);
        free(gram);
        printf("  %6d %14.1f %14.1f %12.2f\n", lengths[i], rkv_us, sgemm_us, sgemm_us / rkv_us);
        fflush(stdout);
        csv_line(b, &job, "gram", "openblas", 1, sgemm_us, 0, 0);
    }
}

/* ==== Program =============================================================================== */

static void print_machine(const bench *b, const char *when)
{
    printf("# %s: fma %.1f GFLOP/s (%s); 64 MiB copied %.1f GB/s, moved down by 50 KB %.1f GB/s;\n"
           "#   256 KiB copied %.1f GB/s; 1 thread, bytes read + written\n",
           when, b->machine.flops * 1e-9, b->best->name, b->machine.copy * 1e-9,
           b->machine.move * 1e-9, b->machine.cache * 1e-9);
}

static int usage(void)
{
    fprintf(stderr,
            "usage: bench [--full | --smoke | --real | --types | --policies | --stages]\n"
            "             [--csv FILE]\n"
            "  --full   the worst case also in f16 and bf16 and at n 65536 (minutes)\n"
            "  --smoke  only that everything runs: short lengths, short timings\n"
            "  --real   keys of a real model and shapes of models, and nothing else\n"
            "  --types  quantised keys beside f16, and nothing else\n"
            "  --policies  the policies beside R-KV, and nothing else\n"
            "  --stages where the time of rkv_score goes, part by part, and nothing else\n");
    return 2;
}

int main(int argc, char **argv)
{
    bench b = { 0 };
    const char *csv = NULL;
    int stages = 0, real = 0, types = 0, policies = 0, all;
    b.seconds = 0.5;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--full"))
            b.full = 1;
        else if (!strcmp(argv[i], "--smoke"))
            b.smoke = 1, b.seconds = 0.01, n_kv_heads = 1;
        else if (!strcmp(argv[i], "--stages"))
            stages = 1;
        else if (!strcmp(argv[i], "--real"))
            real = 1;
        else if (!strcmp(argv[i], "--types"))
            types = 1;
        else if (!strcmp(argv[i], "--policies"))
            policies = 1;
        else if (!strcmp(argv[i], "--csv") && i + 1 < argc)
            csv = argv[++i];
        else
            return usage();
    }
    if (csv && !(b.csv = fopen(csv, "w"))) {
        fprintf(stderr, "bench: cannot write %s\n", csv);
        return 1;
    }
    b.best = rkv_backend_find(NULL);
    b.scalar = rkv_backend_find("scalar");
    bench_machine_measure(&b.machine, b.best->name, 1);
    bench_machine_title(BENCH_FLAGS);
    print_machine(&b, "this machine");
    if (stages) {
        show_parts(&b);
        return 0;
    }
    printf("# %d kv heads, %d query heads, head dim %d, window 8; 1 thread unless said otherwise\n"
           "# us: least of the runs that fit in %.2g s, over copies of the layer of 64 MiB in all\n"
           "# roof: per stage the larger of flops / peak and bytes / bandwidth, added up;\n"
           "#   score    (2 window group (n - window) + 6 n + 2 pairs) d flops, keys read once\n"
           "#            pairs: those that a scan from the newest key back to the first similar\n"
           "#            key of each row meets, each once\n"
           "#   compact  rows that move, K and V, read and written\n"
           "# before it is timed each case is compared with scalar (the all-pairs case at large n\n"
           "# with another path): scores to the bit, kept sets, moved rows\n",
           n_kv_heads, n_kv_heads * GROUP, HEAD_DIM, b.seconds);
    if (b.csv)
        fprintf(b.csv, "keys,stage,backend,dtype,kv_heads,group,head_dim,n,budget,threads,us,"
                       "scalar_us,roof_us\n");
    all = !real && !types && !policies;
    if (all) {
        table_stages(&b);
        table_backends(&b);
        table_keys(&b);
    }
    if (all || types) table_types(&b);
    if (all || policies) table_policies(&b);
    if (all || real) {
        table_real(&b);
        table_shapes(&b);
    }
    if (all) {
        table_threads(&b);
        table_blas(&b);
        table_workspace(&b);
        table_growth(&b);
    }
    print_machine(&b, "highest seen");
    if (b.smoke) show_parts(&b);
    if (b.csv) fclose(b.csv);
    if (b.failures) printf("# %d cases FAILED\n", b.failures);
    return b.failures ? 1 : 0;
}
