/* See stages.h. The parts are private functions of rkv.h, so this file has an implementation of its
 * own. They are called in the order of rkvi_score_head, each on what the parts before it left. */
#define RKV_IMPLEMENTATION
#define RKV_STATIC
#define RKV_NO_CACHE
#include "bench/stages.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct part_input {
    const rkvi_head *head;
    rkvi_scratch *s;
    rkvi_packed newest;
    size_t logit_stride;
    float total;
} part_input;

static void pack_queries(part_input *in)
{
    rkvi_pack_queries(in->head, in->s, 0, in->head->n_queries);
    rkvi_take_newest(in->head, in->s, &in->newest);
}

static void load_keys(part_input *in)
{
    for (int first = 0; first < in->head->n_tokens; first += RKVI_CHUNK)
        rkvi_key_chunk(in->head, first, in->s->rows);
}

/* The parts of the first pass after it take one chunk for all: loading is a part of its own. */
static void norms(part_input *in)
{
    const rkvi_rows rows = rkvi_key_chunk(in->head, 0, in->s->rows);
    for (int first = 0; first < in->head->n_tokens; first += RKVI_CHUNK)
        rkvi_chunk_norms(in->head, in->s, rows, first, NULL, NULL);
}

static void sum_of_keys(part_input *in)
{
    const rkvi_rows rows = rkvi_key_chunk(in->head, 0, in->s->rows);
    const int span = in->head->n_span;
    for (int first = 0; first < span; first += RKVI_CHUNK)
        rkvi_chunk_sum(in->head, in->s, rows, first, rkvi_min(first + RKVI_CHUNK, span));
}

static void query_key_tile(part_input *in)
{
    const rkvi_rows rows = rkvi_key_chunk(in->head, 0, in->s->rows);
    for (int first = 0; first < in->head->n_candidates; first += RKVI_CHUNK)
        rkvi_chunk_dots(in->head, in->s, rows, first, in->s->panel, in->head->n_queries);
}

static void fold(part_input *in)
{
    for (int first = 0; first < in->head->n_candidates; first += RKVI_CHUNK)
        rkvi_chunk_logits(in->head, in->s, first, in->head->group, in->head->votes);
}

/* The whole first pass, so that the parts after it find what they need. */
static void first_pass(part_input *in)
{
    rkvi_pack_queries(in->head, in->s, 0, in->head->n_queries);
    rkvi_read_keys(in->head, in->s);
}

static void importance(part_input *in)
{
    rkvi_importance(in->head, in->s, in->s->signal);
}

static void second_pass(part_input *in)
{
    rkvi_read_columns(in->head, in->s);
}

static void redundancy(part_input *in)
{
    rkvi_redundancy(in->head, in->s, in->s->signal + in->logit_stride, &in->total);
}

static void whole(part_input *in)
{
    rkvi_score_head(in->head, in->s);
}

/* Least time of `part`, in us, over runs that each start from what `before` leaves. */
static double time_part(part_input *in, void (*before)(part_input *), void (*part)(part_input *),
                        double seconds)
{
    const double start = bench_seconds();
    double best = HUGE_VAL;
    do {
        double from;
        if (before) before(in);
        from = bench_seconds();
        part(in);
        best = fmin(best, bench_seconds() - from);
    } while (bench_seconds() - start < seconds);
    return best * 1e6;
}

static void time_head(part_input *in, double seconds, bench_part *parts)
{
    static const struct {
        const char *name;
        void (*before)(part_input *), (*part)(part_input *);
    } table[BENCH_N_PARTS] = {
        { "pack queries", NULL, pack_queries },
        { "load keys", NULL, load_keys },
        { "norms", NULL, norms },
        { "sum of unit keys", NULL, sum_of_keys },
        { "query-key tile", NULL, query_key_tile },
        { "fold groups", NULL, fold },
        { "newest columns", NULL, first_pass }, /* less the parts above */
        { "softmax, pool", first_pass, importance },
        { "second pass", first_pass, second_pass },
        { "search, mix", first_pass, redundancy }, /* less the second pass */
        { "whole stage", NULL, whole },
    };
    const double keys = 2.0 * in->head->n_tokens * in->head->keys->dim;
    double us[BENCH_N_PARTS];
    first_pass(in); /* norms, for the parts that are called by themselves */
    for (int i = 0; i < BENCH_N_PARTS; i++)
        us[i] = time_part(in, table[i].before, table[i].part, seconds);
    for (int i = 0; i < BENCH_NEWEST; i++) us[BENCH_NEWEST] -= us[i];
    us[BENCH_SEARCH] -= us[BENCH_SECOND_PASS];
    for (int i = 0; i < BENCH_N_PARTS; i++) {
        parts[i].name = table[i].name;
        parts[i].us += fmax(us[i], 0);
    }
    parts[BENCH_NORMS].flops += keys;
    parts[BENCH_SUM].flops += keys;
    parts[BENCH_SECOND_PASS].flops += keys;
    parts[BENCH_TILE].flops +=
        2.0 * in->head->n_queries * in->head->n_candidates * in->head->keys->dim;
}

void bench_time_parts(const bench_job *job, const char *backend, double seconds,
                      bench_part parts[BENCH_N_PARTS])
{
    const rkv_config config = rkvi_resolve(&job->config);
    rkv_layer layer = job->layers[0];
    rkv_call call = { &config, &layer, 1, RKV_SCORE, job->workspace, job->workspace_bytes };
    rkvi_job own;
    rkvi_float_mode saved;
    layer.n_tokens = job->shape.n_tokens;
    if (rkvi_open_job(&own, rkv_backend_find(backend), &call) != RKV_OK) {
        fprintf(stderr, "bench: the parts of the score stage: refused\n");
        exit(1);
    }
    saved = rkvi_enter_float_mode();
    memset(parts, 0, BENCH_N_PARTS * sizeof *parts);
    for (int i = 0; i < job->shape.kv_heads; i++) {
        const rkvi_head head = rkvi_head_of(&own, own.scratches, 0, i);
        part_input in = { &head, own.scratches, { 0 }, rkvi_padded((size_t)head.n_tokens), 0 };
        time_head(&in, seconds / BENCH_N_PARTS / job->shape.kv_heads, parts);
    }
    rkvi_leave_float_mode(saved);
}
