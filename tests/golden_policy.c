/* The reader of golden files of policies: see golden_policy.h. Built by
 *     make test */
#include "golden_policy.h"
#include "golden_file.h"
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const golden_policy_names[] = {
    "policy_traces_gqa4_d64",
    "policy_traces_multi_adjacent_f16",
    "policy_traces_multi_few_votes_bf16",
    "policy_traces_layer_multi_f16",
    "policy_prose_norope_d40",
    "policy_prose_multi_table_bf16",
    "policy_prose_multi_votes_f16",
    "policy_h2o_mqa_d96_f16",
    "policy_h2o_multi_f16",
    "policy_h2o_multi_few_votes_bf16",
    "policy_triattention_gqa4_d64",
    "policy_triattention_multi_adjacent_bf16",
    "policy_triattention_table_f16",
    "policy_triattention_norope",
    "policy_random_multi",
    "policy_own_score_multi_f16",
    "policy_wide_gqa4_d64",
    "policy_wide_multi_f16",
    "policy_wide_paper_bf16",
    "policy_wide_mean_pool_4",
};
const int n_golden_policies = sizeof golden_policy_names / sizeof *golden_policy_names;

static uint32_t take_u32(golden_policy *g)
{
    uint32_t x = 0;
    int i;
    for (i = 0; i < 4; i++)
        if (g->at < g->size) x |= (uint32_t)g->bytes[g->at++] << (8 * i);
    return x;
}

static int take_int(golden_policy *g)
{
    return (int)(int32_t)take_u32(g);
}

static float take_float(golden_policy *g)
{
    uint32_t bits = take_u32(g);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float *take_floats(golden_policy *g, int n)
{
    float *list = (float *)alloc_checked((size_t)n * sizeof *list);
    int i;
    for (i = 0; i < n; i++) list[i] = take_float(g);
    return list;
}

static int32_t *take_ints(golden_policy *g, int n)
{
    int32_t *list = (int32_t *)alloc_checked((size_t)n * sizeof *list);
    int i;
    for (i = 0; i < n; i++) list[i] = (int32_t)take_u32(g);
    return list;
}

static float *take_numbers(golden_policy *g, int n) /* of the file's dtype */
{
    float *list;
    int i;
    if (g->dtype == RKV_F32) return take_floats(g, n);
    list = (float *)alloc_checked((size_t)n * sizeof *list);
    memset(list, 0, (size_t)n * sizeof *list);
    for (i = 0; i < n && g->at + 2 <= g->size; i++, g->at += 2) {
        uint16_t bits = (uint16_t)(g->bytes[g->at] | g->bytes[g->at + 1] << 8);
        list[i] = g->dtype == RKV_F16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
    return list;
}

static int read_file(golden_policy *g, const char *directory, const char *name)
{
    char file[256];
    memset(g, 0, sizeof *g);
    snprintf(file, sizeof file, "%s.rkvp", name);
    g->bytes = golden_bytes(directory, file, &g->size);
    return g->bytes && g->size > 128 && memcmp(g->bytes, "RKVGOLDP", 8) == 0;
}

static void take_header(golden_policy *g)
{
    rkv_config *c = &g->config;
    int has_table;
    g->at = 8;
    take_int(g); /* version */
    c->policy = (rkv_policy)take_int(g);
    c->variant = (rkv_variant)take_int(g);
    c->scope = (rkv_scope)take_int(g);
    g->kv_heads = take_int(g);
    g->group = take_int(g);
    g->dim = take_int(g);
    g->n_tokens = take_int(g);
    c->budget = take_int(g);
    c->window = take_int(g);
    c->protect = take_int(g);
    c->pinned = take_int(g);
    c->votes = take_int(g);
    c->pool = take_int(g);
    c->mean_pool = take_int(g);
    c->recent = take_int(g);
    g->dtype = (rkv_dtype)take_int(g);
    g->rounds = take_int(g);
    g->rope.pairing = (rkv_pairing)take_int(g);
    g->rope.dims = take_int(g);
    has_table = take_int(g);
    g->has_bias = take_int(g);
    g->layer = take_int(g);
    c->seed = take_u32(g);
    c->lambda = take_float(g);
    c->threshold = take_float(g);
    c->decay = take_float(g);
    g->scale = take_float(g);
    g->softcap = take_float(g);
    g->rope.base = take_float(g);
    if (has_table) g->rope.frequencies = g->frequencies = take_floats(g, g->rope.dims / 2);
    g->sets = c->scope == RKV_PER_HEAD ? g->kv_heads : 1;
    g->floats = config_state_floats(c);
}

int golden_policy_rows(const golden_policy *g, int r)
{
    return r == 0 ? g->n_tokens : g->config.budget + g->round[r].appended;
}

static void take_round(golden_policy *g, int r)
{
    golden_policy_round *d = &g->round[r];
    const rkv_policy policy = g->config.policy;
    int rows;
    d->appended = take_int(g);
    d->first_query = take_int(g);
    rows = golden_policy_rows(g, r);
    if (policy == RKV_POLICY_RKV || g->floats > 0)
        d->queries = take_numbers(g, g->kv_heads * g->group * g->config.votes * g->dim);
    d->keys = take_numbers(g, g->kv_heads * d->appended * g->dim);
    d->positions = take_ints(g, d->appended);
    if (g->has_bias) d->bias = take_floats(g, g->kv_heads * d->appended);
    d->state = take_floats(g, g->kv_heads * g->floats * rows);
    d->score = take_floats(g, g->kv_heads * (rows - g->config.window));
    d->kept = take_ints(g, g->sets * g->config.budget);
}

int golden_policy_read(golden_policy *g, const char *directory, const char *name)
{
    int r, query_heads;
    if (!read_file(g, directory, name)) return 0;
    take_header(g);
    query_heads = g->kv_heads * g->group;
    if (g->config.policy == RKV_POLICY_TRIATTENTION) {
        g->n_stream = take_int(g);
        g->stream = take_numbers(g, query_heads * g->n_stream * g->dim);
        g->means = take_floats(g, query_heads * (g->dim + g->dim / 2) + 1);
    }
    for (r = 0; r < g->rounds && r < GOLDEN_POLICY_ROUNDS; r++) take_round(g, r);
    return g->at == g->size; /* all of it, and no more */
}

void golden_policy_free(golden_policy *g)
{
    int r;
    for (r = 0; r < GOLDEN_POLICY_ROUNDS; r++) {
        golden_policy_round *d = &g->round[r];
        free(d->queries);
        free(d->keys);
        free(d->positions);
        free(d->bias);
        free(d->state);
        free(d->score);
        free(d->kept);
    }
    free(g->frequencies);
    free(g->stream);
    free(g->means);
    free(g->bytes);
}
