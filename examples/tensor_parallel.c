/* Tensor parallelism: two ranks hold half of the KV heads each and must keep the same tokens. Each
 * scores its own heads; the sum of their shared_scores, an all-reduce, then selects on both.
 * cc -O2 -I. examples/tensor_parallel.c -o tensor_parallel -lm && ./tensor_parallel */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { n_ranks = 2, kv_heads = 8, group = 4, query_heads = kv_heads * group, head_dim = 64 };
enum { n_tokens = 320, budget = 256, window = 8, n_scores = n_tokens - window };
static float keys[kv_heads][n_tokens][head_dim], values[kv_heads][n_tokens][head_dim];
static float queries[query_heads][window][head_dim];

struct rank {
    float shared_scores[n_scores];
    int32_t kept[budget];
    rkv_error error;
    rkv_config config;
    rkv_layer layer;
    void *workspace;
    size_t bytes;
};

static void require(const struct rank *r, rkv_status status)
{
    char text[256];
    if (status == RKV_OK) return;
    printf("%s\n", rkv_explain(&r->error, text, sizeof text));
    exit(1);
}

/* A rank with n KV heads, `first` and the next ones. Here they lie in one memory. */
static void start(struct rank *r, int first, int n)
{
    r->config = rkv_config_default(budget);
    r->config.error = &r->error;
    r->config.scope = RKV_PER_LAYER; /* one kept set for all heads */
    r->layer.keys = rkv_tensor_make(keys[first], RKV_F32, n, n_tokens, head_dim);
    r->layer.values = rkv_tensor_make(values[first], RKV_F32, n, n_tokens, head_dim);
    r->layer.queries =
        rkv_tensor_make(queries[first * group], RKV_F32, n * group, window, head_dim);
    r->layer.n_tokens = n_tokens;
    r->layer.shared_scores = r->shared_scores;
    r->layer.kept = r->kept;
    require(r, rkv_workspace_size(NULL, &r->config, &r->layer, 1, &r->bytes));
    r->workspace = malloc(r->bytes);
}

static void score(struct rank *r)
{
    require(r, rkv_score(NULL, &r->config, &r->layer, 1, r->workspace, r->bytes));
}

static void select_tokens(struct rank *r)
{
    require(r, rkv_select(NULL, &r->config, &r->layer, 1, r->workspace, r->bytes));
}

static void compact(struct rank *r)
{
    require(r, rkv_compact(NULL, &r->config, &r->layer, 1, r->workspace, r->bytes));
}

/* Gives every rank the sums over all ranks, the same bits to each, as ncclAllReduce does. */
static void all_reduce(struct rank *ranks)
{
    for (int i = 0; i < n_scores; i++) {
        float sum = 0.0f;
        for (int r = 0; r < n_ranks; r++) sum += ranks[r].shared_scores[i];
        for (int r = 0; r < n_ranks; r++) ranks[r].shared_scores[i] = sum;
    }
}

static void fill(float *x, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *x; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.3f;
}

int main(void)
{
    static struct rank ranks[n_ranks], whole;
    int n_same = 0, n_different = 0;
    fill(keys[0][0], sizeof keys);
    fill(values[0][0], sizeof values);
    fill(queries[0][0], sizeof queries);

    start(&whole, 0, kv_heads); /* for comparison: all heads on one rank */
    score(&whole);
    select_tokens(&whole);

    for (int r = 0; r < n_ranks; r++) {
        start(&ranks[r], r * kv_heads / n_ranks, kv_heads / n_ranks);
        score(&ranks[r]);
    }
    all_reduce(ranks);
    for (int r = 0; r < n_ranks; r++) {
        select_tokens(&ranks[r]);
        compact(&ranks[r]);
    }

    for (int i = 0, j = 0; i < budget; i++) {
        n_different += ranks[0].kept[i] != ranks[1].kept[i];
        while (j < budget && whole.kept[j] < ranks[0].kept[i]) j++;
        n_same += j < budget && whole.kept[j] == ranks[0].kept[i];
    }
    printf("2 ranks keep %s %d of %d tokens; %d of them are those of 1 rank\n",
           n_different == 0 ? "the same" : "different", budget, n_tokens, n_same);
    for (int r = 0; r < n_ranks; r++) free(ranks[r].workspace);
    free(whole.workspace);
    /* The sums of the two are rounded in another order: near the edge a token may differ. */
    return n_different == 0 && n_same >= budget - 2 ? 0 : 1;
}
