/* An engine that frees cells instead of moving rows, as llama.cpp does: all layers and KV heads of
 * a token share a cell. rkv_score and rkv_select choose, the engine frees; nothing is copied.
 * cc -O2 -I. examples/free_cells.c -o free_cells -lm && ./free_cells */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { n_layers = 3, kv_heads = 2, group = 2, query_heads = kv_heads * group, head_dim = 32 };
enum { budget = 96, buffer = 32, capacity = budget + buffer, window = 8, n_cells = 200 };

static float keys[n_layers][kv_heads][n_cells][head_dim];
static float queries[n_layers][query_heads][window][head_dim]; /* token t in slot t % window */
static int owner[n_cells]; /* 1 + position of the token in the cell; 0: free */

static struct sequence {
    int rows;                    /* cells in use */
    int32_t cell[capacity];      /* by ascending position: where a token lies, */
    int32_t positions[capacity]; /* and which one it is */
    int32_t kept[budget];
    float shared_scores[capacity];
    rkv_run runs[capacity];
    rkv_error error;
    rkv_config config;
    rkv_layer layers[n_layers];
    void *workspace;
    size_t bytes;
} sequence;

static rkv_status start(struct sequence *s)
{
    s->config = rkv_config_default(budget);
    s->config.error = &s->error;
    s->config.scope = RKV_PER_SEQUENCE; /* one kept set for all layers and heads */
    for (int l = 0; l < n_layers; l++) {
        rkv_layer *layer = &s->layers[l];
        layer->keys = rkv_tensor_make(keys[l], RKV_F32, kv_heads, capacity, head_dim);
        layer->keys.head_stride = n_cells * head_dim;
        layer->keys.block_table = s->cell; /* a list of rows: one token per block */
        layer->keys.block_tokens = 1;
        layer->keys.block_stride = head_dim;
        layer->queries = rkv_tensor_make(queries[l], RKV_F32, query_heads, window, head_dim);
        layer->n_tokens = capacity; /* values stay undescribed: nothing moves */
    }
    s->layers[0].kept = s->kept; /* what belongs to the set is given in its first layer */
    s->layers[0].shared_scores = s->shared_scores;
    rkv_status status = rkv_workspace_size(NULL, &s->config, s->layers, n_layers, &s->bytes);
    if (status == RKV_OK) s->workspace = malloc(s->bytes);
    return status;
}

static void free_cells(int begin, int end) /* those of positions [begin, end) */
{
    for (int c = 0; c < n_cells; c++)
        if (owner[c] > begin && owner[c] <= end) owner[c] = 0;
}

static rkv_status evict(struct sequence *s)
{
    for (int l = 0; l < n_layers; l++) s->layers[l].n_tokens = s->rows;
    rkv_status status = rkv_score(NULL, &s->config, s->layers, n_layers, s->workspace, s->bytes);
    if (status == RKV_OK)
        status = rkv_select(NULL, &s->config, s->layers, n_layers, s->workspace, s->bytes);
    if (status != RKV_OK) return status;
    int n_kept = s->layers[0].n_kept;
    int n = rkv_evicted_runs(s->kept, n_kept, s->rows, s->positions, s->runs, capacity);
    if (n < 0) return RKV_ERROR_ARGUMENT; /* positions that do not ascend: not in this engine */
    for (int i = 0; i < n; i++) free_cells(s->runs[i].begin, s->runs[i].end);
    rkv_apply_kept(s->cell, sizeof *s->cell, s->kept, n_kept);
    rkv_apply_kept(s->positions, sizeof *s->positions, s->kept, n_kept);
    s->rows = n_kept;
    return RKV_OK;
}

/* The same tokens in an engine that moves rows, for comparison. */
static float moved[n_layers][kv_heads][capacity][head_dim];
static int32_t moved_positions[capacity];

static rkv_status move_rows(const struct sequence *s)
{
    rkv_layer layers[n_layers];
    for (int l = 0; l < n_layers; l++) {
        layers[l] = s->layers[l];
        layers[l].keys = rkv_tensor_make(moved[l], RKV_F32, kv_heads, capacity, head_dim);
        layers[l].n_tokens = capacity;
    }
    layers[0].positions = moved_positions;
    return rkv_compress(NULL, &s->config, layers, n_layers, s->workspace, s->bytes);
}

static void decode(struct sequence *s, int position)
{
    int c = position * 7 % n_cells; /* any free cell */
    while (owner[c]) c = (c + 1) % n_cells;
    owner[c] = position + 1;
    s->cell[s->rows] = c;
    s->positions[s->rows] = moved_positions[s->rows] = position;
    for (int l = 0; l < n_layers; l++)
        for (int i = 0; i < head_dim; i++) {
            for (int h = 0; h < kv_heads; h++)
                keys[l][h][c][i] = moved[l][h][s->rows][i] = (float)(rand() % 2001 - 1000) / 1000;
            for (int h = 0; h < query_heads; h++)
                queries[l][h][position % window][i] = (float)(rand() % 2001 - 1000) / 1000;
        }
    s->rows++;
}

int main(void)
{
    struct sequence *s = &sequence;
    char text[256];
    int in_use = 0, same = 1;
    rkv_status status = start(s);
    for (int position = 0; position < 1000 && status == RKV_OK; position++) {
        decode(s, position);
        if (s->rows < capacity) continue;
        status = move_rows(s);
        if (status == RKV_OK) status = evict(s);
        same = same && memcmp(s->positions, moved_positions, sizeof s->kept) == 0;
    }
    if (status != RKV_OK) printf("%s\n", rkv_explain(&s->error, text, sizeof text));
    for (int c = 0; c < n_cells; c++) in_use += owner[c] != 0;
    for (int i = 0; i < s->rows; i++) same = same && owner[s->cell[i]] == s->positions[i] + 1;
    printf("%d of %d cells in use after 1000 tokens; the kept tokens are %s when rows move\n",
           in_use, n_cells, same ? "the same" : "others");
    free(s->workspace);
    return status == RKV_OK && same && in_use == s->rows ? 0 : 1;
}
