/* A paged pool as vLLM has it: NHD pages, block tables, two sequences that share the pages of a
 * prefix. The prefix is pinned, so its pages are not written; emptied pages are given back.
 * cc -O2 -I. examples/pages.c -o pages -lm && ./pages */
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { n_layers = 2, kv_heads = 2, group = 2, query_heads = kv_heads * group, head_dim = 32 };
enum { page_tokens = 16, n_pages = 24, prefix = 2 * page_tokens }; /* whole pages */
enum { budget = 96, buffer = 32, capacity = budget + buffer, window = 8, n_sequences = 2 };

typedef uint16_t page[page_tokens][kv_heads][head_dim]; /* NHD */
static page keys[n_layers][n_pages], values[n_layers][n_pages], prefix_before[2];
static int references[n_pages];

static struct sequence {
    int32_t pages[capacity / page_tokens]; /* the block table, the same for all layers */
    int n_pages, rows, position;
    uint16_t queries[n_layers][query_heads][window][head_dim]; /* token t in slot t % window */
    int32_t positions[n_layers][kv_heads][capacity];
} sequences[n_sequences];

static int new_page(void)
{
    for (int p = 0; p < n_pages; p++)
        if (references[p] == 0) {
            references[p] = 1;
            return p;
        }
    abort(); /* an engine would preempt a sequence */
}

static rkv_tensor paged_view(page *pool, const struct sequence *s)
{
    rkv_tensor view = rkv_tensor_make(pool, RKV_BF16, kv_heads, capacity, head_dim);
    view.token_stride = kv_heads * head_dim;
    view.head_stride = head_dim;
    view.block_table = s->pages;
    view.block_tokens = page_tokens;
    view.block_stride = page_tokens * kv_heads * head_dim;
    return view;
}

static uint16_t noise(void) /* bf16: 0.5 to 1, either sign */
{
    return (uint16_t)(0x3f00 | (rand() >> 4 & 1) << 15 | (rand() >> 4 & 0x7f));
}

/* The first element of a value is the position of its token, for rows_are_true. */
static void store_token(struct sequence *s)
{
    int slot = s->position % window, at = s->rows % page_tokens;
    if (s->rows / page_tokens == s->n_pages) s->pages[s->n_pages++] = new_page();
    int p = s->pages[s->rows / page_tokens];
    for (int l = 0; l < n_layers; l++) {
        for (int h = 0; h < kv_heads; h++) {
            for (int i = 0; i < head_dim; i++) keys[l][p][at][h][i] = noise();
            values[l][p][at][h][0] = (uint16_t)s->position;
            s->positions[l][h][s->rows] = s->position;
        }
        for (int h = 0; h < query_heads; h++)
            for (int i = 0; i < head_dim; i++) s->queries[l][h][slot][i] = noise();
    }
    s->rows++;
    s->position++;
}

static void describe(struct sequence *s, rkv_layer *layers)
{
    for (int l = 0; l < n_layers; l++) {
        layers[l].keys = paged_view(keys[l], s);
        layers[l].values = paged_view(values[l], s);
        layers[l].queries = rkv_tensor_make(s->queries[l], RKV_BF16, query_heads, window, head_dim);
        layers[l].positions = s->positions[l][0];
        layers[l].n_tokens = capacity;
    }
}

static void give_back(struct sequence *s)
{
    int needed = (s->rows + page_tokens - 1) / page_tokens;
    while (s->n_pages > needed) references[s->pages[--s->n_pages]]--;
}

static int rows_are_true(const struct sequence *s)
{
    int wrong = 0;
    for (int l = 0; l < n_layers; l++)
        for (int h = 0; h < kv_heads; h++)
            for (int row = 0; row < s->rows; row++) {
                int p = s->pages[row / page_tokens], at = row % page_tokens;
                wrong += values[l][p][at][h][0] != s->positions[l][h][row];
            }
    return wrong == 0;
}

int main(void)
{
    static rkv_layer layers[n_sequences * n_layers];
    struct sequence *first = &sequences[0], *second = &sequences[1];
    char text[256];
    size_t bytes;
    rkv_error error;
    rkv_config config = rkv_config_default(budget);
    config.error = &error;
    config.pinned = prefix; /* the same for all sequences of a call */
    for (int i = 0; i < n_sequences; i++) describe(&sequences[i], layers + i * n_layers);
    rkv_status status = rkv_workspace_size(NULL, &config, layers, n_sequences * n_layers, &bytes);
    void *workspace = status == RKV_OK ? malloc(bytes) : NULL;

    while (first->rows < prefix) store_token(first);
    *second = *first; /* the table names the same pages */
    for (int i = 0; i < first->n_pages; i++) references[first->pages[i]]++;
    memcpy(prefix_before, keys[0], sizeof prefix_before);

    while (status == RKV_OK && first->position < prefix + 400) {
        for (int i = 0; i < n_sequences; i++) store_token(&sequences[i]);
        if (first->rows < capacity) continue;
        for (int l = 0; l < n_sequences * n_layers; l++) layers[l].n_tokens = capacity;
        status = rkv_compress(NULL, &config, layers, n_sequences * n_layers, workspace, bytes);
        for (int i = 0; i < n_sequences; i++) {
            sequences[i].rows = layers[i * n_layers].n_tokens;
            give_back(&sequences[i]);
        }
    }
    if (status != RKV_OK) printf("%s\n", rkv_explain(&error, text, sizeof text));

    int used = 0;
    for (int p = 0; p < n_pages; p++) used += references[p] > 0;
    int same = memcmp(prefix_before, keys[0], sizeof prefix_before) == 0;
    int true_rows = rows_are_true(first) && rows_are_true(second);
    printf("2 sequences of %d tokens in %d of %d pages; the shared prefix is %s\n", first->position,
           used, n_pages, same ? "untouched" : "changed");
    free(workspace);
    return status == RKV_OK && same && true_rows && used == 2 * first->n_pages - 2 ? 0 : 1;
}
