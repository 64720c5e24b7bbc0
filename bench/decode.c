/* What compressing costs a decode loop, and what it saves, at the sizes of real layers.
 * make bench-decode      or:  build/bench/decode [--smoke] [--csv FILE]
 *
 * The engine of examples/ponder/ runs layers of random weights. Of the data only one thing matters
 * to the time that compressing takes: how much the keys resemble each other. So they are made to
 * order. */
#include "bench/machine.h"
#include "examples/ponder/kernels.h"
#include "examples/ponder/model.h"
#include "examples/ponder/model_put.h"
#include "examples/ponder/options.h"
#include "examples/ponder/own_cache.h"
#include "examples/ponder/seconds.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS ""
#endif

const char program_name[] = "decode";

enum { MAX_LANES = 8, VOCABULARY = 32, CONTEXT = 8192, FULL_STEPS = 16 };

typedef struct bench_case {
    const char *name;
    int n_layers, dim, n_heads, n_kv_heads, ffn_dim;
    int budget, buffer, full_rows;
} bench_case;

static const bench_case cases[] = {
    { "the demo's model", 3, 128, 4, 2, 320, 230, 32, 920 },
    { "Llama-3.2-1B", 1, 2048, 32, 8, 8192, 1024, 128, 4096 },
    { "Qwen3-1.7B", 1, 2048, 16, 8, 6144, 1024, 128, 4096 },
    { "Llama-3-8B", 1, 4096, 32, 8, 14336, 1024, 128, 4096 },
};
static const bench_case smoke_cases[] = { { "tiny", 2, 64, 4, 2, 160, 32, 16, 128 } };

typedef struct bench {
    bench_machine machine;
    double seconds; /* for each measurement, at least */
    FILE *csv;
} bench;

/* ==== A model of random weights ============================================================= */

static float noise(prng *r) /* mean 0, variance 1 */
{
    return 3.4641016f * (prng_uniform(r) - 0.5f);
}

static void fill(float *x, int n, float value)
{
    for (int i = 0; i < n; i++) x[i] = value;
}

static model_shape shape_of(const bench_case *c)
{
    const model_shape s = {
        c->n_layers, c->dim,  c->n_heads, c->n_kv_heads, c->dim / c->n_heads, c->ffn_dim,
        VOCABULARY,  CONTEXT, 10000.0f,   1e-5f,         ROPE_ADJACENT
    };
    return s;
}

/* 0: out of memory, which is to skip a case and not to end the program. */
static int put_random(gguf_writer *w, const model_shape *s)
{
    const size_t n = weights_count(s);
    const float scale = 1.0f / sqrtf((float)s->dim);
    float *all = malloc(n * sizeof *all);
    prng random = { 1 };
    if (!all || !w) {
        free(all);
        return 0;
    }
    const weights view = weights_view(s, all);
    for (size_t i = 0; i < n; i++) all[i] = scale * noise(&random);
    fill(view.final_norm, s->dim, 1.0f);
    for (int l = 0; l < s->n_layers; l++) {
        fill(view.layer[l].attn_norm, s->dim, 1.0f);
        fill(view.layer[l].ffn_norm, s->dim, 1.0f);
    }
    gguf_put_string(w, "general.architecture", "llama");
    model_put_shape(w, s);
    model_put_weights(w, s, &view);
    free(all);
    return 1;
}

static model *random_model(const model_shape *s, gguf_error *error)
{
    gguf_writer *w = gguf_writer_create();
    gguf *g = NULL;
    model *m = NULL;
    size_t bytes;
    const unsigned char *file = put_random(w, s) ? gguf_bytes(w, &bytes) : NULL;
    if (file && gguf_parse(&g, file, bytes, error)) model_from_gguf(&m, g, error);
    gguf_close(g);
    gguf_writer_destroy(w);
    return m;
}

/* ==== Decoding, in lockstep ================================================================= */

typedef struct lockstep {
    const model *model;
    model_scratch *scratch;
    own_cache *lanes[MAX_LANES];
    int n_lanes;
    float cosine; /* of any two keys of a KV head, on average */
    float *key;
} lockstep;

/* A key made to order: the share `cosine` of its squared length lies in a direction that all keys
 * of the layer have in common. What a model with so few words computes would be the same few keys
 * again and again. */
static void make_key(const lockstep *t, int lane, int layer, int position, float *key)
{
    const float common = sqrtf(t->cosine), own = sqrtf(1.0f - t->cosine);
    prng direction = { ~(uint64_t)layer };
    prng random = { (uint64_t)lane << 48 | (uint64_t)layer << 32 | (uint64_t)position };
    const int n = shape_kv_dim(model_get_shape(t->model));
    for (int i = 0; i < n; i++) key[i] = common * noise(&direction) + own * noise(&random);
}

static void attend(void *user, int layer, int n, const float *q, const float *k, const float *v,
                   float *out)
{
    const lockstep *t = user;
    const model_shape *s = model_get_shape(t->model);
    const ptrdiff_t q_dim = shape_q_dim(s), kv_dim = shape_kv_dim(s);
    (void)k; /* was computed, as in any engine; see make_key */
    for (int i = 0; i < n; i++) {
        make_key(t, i, layer, t->lanes[i]->position, t->key);
        own_cache_attend(t->lanes[i], layer, 0, q + i * q_dim, t->key, v + i * kv_dim,
                         out + i * q_dim);
    }
}

/* One token of every sequence; which, does not matter. */
static void decode_step(lockstep *t)
{
    int tokens[MAX_LANES], positions[MAX_LANES];
    for (int i = 0; i < t->n_lanes; i++) {
        positions[i] = t->lanes[i]->position % CONTEXT;
        tokens[i] = (positions[i] + i) % VOCABULARY;
    }
    model_forward(t->model, t->scratch, t->n_lanes, tokens, positions, attend, t);
    for (int i = 0; i < t->n_lanes; i++) {
        const rkv_status status = own_cache_advance(t->lanes[i], 1);
        char why[256];
        if (status != RKV_OK) die("%s", rkv_explain(&t->lanes[i]->error, why, sizeof why));
    }
}

/* The cache as if n_rows tokens had gone through the model. */
static void fill_cache(const lockstep *t, int lane, int n_rows)
{
    own_cache *c = t->lanes[lane];
    const int kv_dim = shape_kv_dim(&c->shape);
    prng random = { ~(uint64_t)lane };
    for (int l = 0; l < c->shape.n_layers; l++)
        for (int row = 0; row < n_rows; row++) {
            const ptrdiff_t at = ((ptrdiff_t)l * c->capacity + row) * kv_dim;
            make_key(t, lane, l, row, c->keys + at);
            for (int i = 0; i < kv_dim; i++) c->values[at + i] = noise(&random);
            for (int h = 0; h < c->shape.n_kv_heads; h++)
                c->positions[(l * c->shape.n_kv_heads + h) * c->capacity + row] = row;
        }
    c->n_rows = c->position = n_rows;
}

/* Share of the rows that look like another, in the first KV head. */
static double share_alike(const own_cache *c)
{
    const int d = c->shape.head_dim, kv_dim = shape_kv_dim(&c->shape);
    int n_alike = 0;
    for (int i = 0; i < c->n_rows; i++) {
        const float *a = c->keys + (ptrdiff_t)i * kv_dim;
        int alike = 0;
        for (int j = 0; j < c->n_rows && !alike; j++) {
            const float *b = c->keys + (ptrdiff_t)j * kv_dim;
            alike = j != i &&
                    dot(a, b, d) > c->policy.config.threshold * sqrtf(dot(a, a, d) * dot(b, b, d));
        }
        n_alike += alike;
    }
    return (double)n_alike / c->n_rows;
}

typedef struct timing {
    double step;  /* seconds a layer for one token of every sequence, without compressing */
    double round; /* seconds a layer to compress one sequence                             */
    double alike;
} timing;

static double seconds_compressing(const lockstep *t)
{
    double sum = 0.0;
    for (int i = 0; i < t->n_lanes; i++) sum += t->lanes[i]->seconds;
    return sum;
}

/* All the tokens between two rounds, and the round. A full cache is cut back instead of being
 * compressed, so that it stays near its length. What took less time before is left as it was. */
static void decode_round(lockstep *t, const policy *p, timing *least)
{
    const int n_layers = model_get_shape(t->model)->n_layers;
    const double start = seconds(), before = seconds_compressing(t);
    for (int i = 0; i < p->buffer; i++) decode_step(t);
    const double compressing = seconds_compressing(t) - before;
    const double decoding = seconds() - start - compressing;
    least->step = fmin(least->step, decoding / p->buffer / n_layers);
    least->round = fmin(least->round, compressing / t->n_lanes / n_layers);
    for (int i = 0; i < t->n_lanes && p->keeps_all; i++) {
        t->lanes[i]->n_rows -= p->buffer;
        t->lanes[i]->position -= p->buffer;
    }
}

/* From n_rows rows on, two rounds at least. */
static timing measure(const model *m, const policy *p, int n_lanes, float cosine, int n_rows,
                      double at_least)
{
    const size_t kv_dim = (size_t)shape_kv_dim(model_get_shape(m));
    lockstep t = { m, model_scratch_create(m, n_lanes), { NULL }, n_lanes, cosine, NULL };
    timing result = { HUGE_VAL, HUGE_VAL, 0.0 };
    const char *why = "out of memory";
    t.key = allocate(kv_dim, sizeof *t.key);
    for (int i = 0; i < n_lanes; i++) {
        t.lanes[i] = own_cache_create(model_get_shape(m), p, n_rows + p->buffer, &why);
        if (!t.lanes[i] || !t.scratch) die("%s", why);
        fill_cache(&t, i, n_rows);
    }
    result.alike = share_alike(t.lanes[0]);
    const double start = seconds();
    for (int i = 0; i < 2 || seconds() - start < at_least; i++) decode_round(&t, p, &result);
    for (int i = 0; i < n_lanes; i++) own_cache_destroy(t.lanes[i]);
    model_scratch_destroy(t.scratch);
    free(t.key);
    return result;
}

/* ==== The table ============================================================================= */

static double layer_weights(const model_shape *s)
{
    const double q = shape_q_dim(s), kv = shape_kv_dim(s), dim = s->dim, ffn = s->ffn_dim;
    return dim * (2 * q + 2 * kv + 3 * ffn);
}

/* Per layer: what a step has to read, and the least time this machine needs for a step. */
static double step_bytes(const model_shape *s, int n_lanes, int n_rows)
{
    return 4.0 * (layer_weights(s) + 2.0 * n_lanes * n_rows * shape_kv_dim(s));
}

static double memory_rate(const bench *b)
{
    return fmax(b->machine.copy, b->machine.move);
}

static double step_roof(const bench *b, const model_shape *s, int n_lanes, int n_rows)
{
    const double bytes = step_bytes(s, n_lanes, n_rows);
    const double flops = 2.0 * n_lanes * (layer_weights(s) + 2.0 * n_rows * shape_q_dim(s));
    const int stays_cached = bytes * s->n_layers < 16 << 20; /* from one step to the next */
    return fmax(flops / b->machine.flops,
                bytes / (stays_cached ? b->machine.cache : memory_rate(b)));
}

static void print_columns(const bench *b)
{
    bench_machine_title(BENCH_FLAGS);
    printf(
        "# this machine: fma %.1f GFLOP/s, memory %.1f GB/s, 256 KiB copied %.1f GB/s; 1 thread\n",
        1e-9 * b->machine.flops, 1e-9 * memory_rate(b), 1e-9 * b->machine.cache);
    printf(
        "# f32; all figures are for one layer, of random weights (3 layers of the demo's model, 1\n"
        "# of the others, behind them a vocabulary of %d words, so that only layers count).\n"
        "# 1024 tokens are kept, 128 come between rounds; the demo's 230 and 32. Sequences are\n"
        "# decoded in lockstep: one pass over the weights, a cache and rounds for each. Times are\n"
        "# the least of two rounds, or of as many as fit in a second.\n"
        "#   keys      isotropic: the worst case, nearly all are compared with all;\n"
        "#             cosine 0.7: of any two keys, on average\n"
        "#   alike     %% of the rows that look like another (cosine above 0.5) at the start\n"
        "#   token us  to decode a token of one sequence, compressing left out\n"
        "#   round us  to compress the cache of one sequence\n"
        "#   share     %% of the time that goes into compressing; (roof): would go, if all else\n"
        "#             took no longer than this machine needs to read weights and caches, or for\n"
        "#             the multiply-adds\n"
        "#   GB/s      weights and caches read, over the time that decoding takes here\n"
        "#   tokens/s  through one layer, with rounds; full: with 4096 tokens cached (the demo's:\n"
        "#             920) and no rounds; gain: the one over the other; (roof): as above\n"
        "# %-16s %7s %4s  %-10s %5s %8s %8s %6s %6s %5s %8s %6s %5s %6s\n",
        VOCABULARY, "layer of", "weights", "seqs", "keys", "alike", "token us", "round us", "share",
        "(roof)", "GB/s", "tokens/s", "full", "gain", "(roof)");
    if (b->csv)
        fprintf(b->csv, "layer_of,weights,sequences,keys,alike,token_us,round_us,share,share_roof,"
                        "full_us,gain,gain_roof\n");
}

static void print_line(const bench *b, const bench_case *c, const model_shape *s, int n_lanes,
                       const char *keys, timing t, timing full)
{
    const int rows = c->budget + c->buffer / 2;          /* on average */
    const double rounds = n_lanes * t.round / c->buffer; /* a step's part of them */
    const double n_weights = layer_weights(s), roof = step_roof(b, s, n_lanes, rows);
    const double token_us = 1e6 * t.step / n_lanes, full_us = 1e6 * full.step / n_lanes;
    const double share = 100 * rounds / (rounds + t.step), gain = full.step / (rounds + t.step);
    const double share_roof = 100 * rounds / (rounds + roof);
    const double gain_roof = step_roof(b, s, n_lanes, c->full_rows) / (rounds + roof);
    printf(
        "  %-16s %6.1fM %4d  %-10s %5.0f %8.1f %8.1f %6.2f %6.2f %5.1f %8.0f %6.0f %5.2f %6.2f\n",
        c->name, 1e-6 * n_weights, n_lanes, keys, 100 * t.alike, token_us, 1e6 * t.round, share,
        share_roof, 1e-9 * step_bytes(s, n_lanes, rows) / t.step, n_lanes / (rounds + t.step),
        1e6 / full_us, gain, gain_roof);
    fflush(stdout);
    if (b->csv)
        fprintf(b->csv, "%s,%.0f,%d,%s,%.3f,%.2f,%.2f,%.3f,%.3f,%.2f,%.3f,%.3f\n", c->name,
                n_weights, n_lanes, keys, t.alike, token_us, 1e6 * t.round, share, share_roof,
                full_us, gain, gain_roof);
}

static void run_case(const bench *b, const bench_case *c)
{
    static const struct {
        const char *name;
        float cosine;
    } keys[] = { { "isotropic", 0.0f }, { "cosine 0.7", 0.7f } };
    const model_shape s = shape_of(c);
    gguf_error error = { "out of memory" };
    policy rkv, all;
    model *m = random_model(&s, &error);
    if (!m) {
        printf("# skip  %s: %s\n", c->name, error.text);
        return;
    }
    policy_make(&rkv, "rkv-pool7", c->budget, c->buffer);
    policy_make(&all, "full", c->budget, FULL_STEPS);
    for (int n_lanes = 1; n_lanes <= MAX_LANES; n_lanes *= MAX_LANES) {
        const timing full =
            measure(m, &all, n_lanes, 0.0f, c->full_rows - FULL_STEPS / 2, b->seconds);
        for (int k = 0; k < 2; k++)
            print_line(b, c, &s, n_lanes, keys[k].name,
                       measure(m, &rkv, n_lanes, keys[k].cosine, c->budget, b->seconds), full);
    }
    model_free(m);
}

int main(int argc, char **argv)
{
    bench b = { { 0, 0, 0, 0 }, 1.0, NULL };
    const bench_case *list = cases;
    size_t n = sizeof cases / sizeof *cases;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--smoke")) {
            list = smoke_cases;
            n = sizeof smoke_cases / sizeof *smoke_cases;
            b.seconds = 0.01;
        } else if (!strcmp(argv[i], "--csv") && i + 1 < argc) {
            if (!(b.csv = fopen(argv[++i], "w"))) die("cannot write %s", argv[i]);
        } else {
            die("unknown option %s; usage: decode [--smoke] [--csv FILE]", argv[i]);
        }
    }
    bench_machine_measure(&b.machine, rkv_backend_find(NULL)->name, 1);
    print_columns(&b);
    for (size_t i = 0; i < n; i++) run_case(&b, &list[i]);
    if (b.csv && fclose(b.csv) != 0) die("cannot write the CSV file");
    return 0;
}
