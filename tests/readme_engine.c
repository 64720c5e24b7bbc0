/* Runs the engine of README.md: rounds, a NaN in the cache, the variant that frees cells, which
 * must keep the tokens that one with rows in a row keeps, and the managed cache. The snippets come
 * as README_SNIPPETS.
 *     make check */
#define RKV_IMPLEMENTATION
#include README_SNIPPETS

#include <stdio.h>
#include <string.h>

enum { ROUNDS = 3, LAST = ROWS + (ROUNDS - 1) * BUFFER };

static int failures;

static void expect(const char *what, int holds)
{
    if (holds) return;
    failures++;
    printf("FAIL  README.md's engine: %s\n", what);
}

/* A number that depends on all of these alone, as bf16 between -1 and 1. */
static uint16_t number(int kind, size_t layer, int head, int position, int i)
{
    uint32_t x = (uint32_t)kind * 40503u + (uint32_t)layer * 2654435761u +
                 (uint32_t)head * 2246822519u + (uint32_t)position * 3266489917u +
                 (uint32_t)i * 668265263u;
    float value;
    uint32_t bits;
    x = (x ^ x >> 15) * 2246822519u;
    x = (x ^ x >> 13) * 3266489917u;
    value = (float)(x >> 8 & 0xffff) / 32768.0f - 1.0f;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* What a forward pass leaves behind for the token at e->position, in row or cell `row`. */
static void decode(struct engine *e, int row)
{
    for (size_t l = 0; l < LAYERS; l++) {
        for (int h = 0; h < KV_HEADS; h++)
            for (int i = 0; i < DIM; i++) {
                const size_t at = ((l * KV_HEADS + (size_t)h) * ROWS + (size_t)row) * DIM;
                e->keys[at + (size_t)i] = number(0, l, h, e->position, i);
                e->values[at + (size_t)i] = number(1, l, h, e->position, i);
            }
        for (int h = 0; h < QUERY_HEADS; h++)
            for (int i = 0; i < DIM; i++)
                engine_query_slot(e, l, (size_t)h)[i] = number(2, l, h, e->position, i);
    }
}

static void allocate(struct engine *e)
{
    const size_t rows = (size_t)LAYERS * KV_HEADS * ROWS * DIM;
    memset(e, 0, sizeof *e);
    e->keys = (uint16_t *)malloc(rows * sizeof *e->keys);
    e->values = (uint16_t *)malloc(rows * sizeof *e->values);
    e->queries =
        (uint16_t *)malloc((size_t)LAYERS * QUERY_HEADS * WINDOW * DIM * sizeof *e->queries);
    if (e->keys && e->values && e->queries && engine_start(e) == RKV_OK) return;
    printf("FAIL  out of memory\n");
    exit(1);
}

static struct cells cells;
static int in_use[ROWS]; /* position of the token in a cell, or -1 */

static void free_range(int begin, int end)
{
    for (int cell = 0; cell < ROWS; cell++)
        if (in_use[cell] >= begin && in_use[cell] < end) in_use[cell] = -1;
}

static int free_cell(int position) /* any, not the first */
{
    for (int i = 0; i < ROWS; i++) {
        const int cell = (position * 7 + i) % ROWS;
        if (in_use[cell] < 0) return cell;
    }
    expect("a free cell", 0);
    return 0;
}

/* One round of the managed cache, on the rows of an engine. */
static void run_managed_cache(const struct engine *e)
{
    rkv_cache *cache = NULL;
    rkv_tensor keys, values;
    expect("cache_start", cache_start(&cache) == RKV_OK);
    while (failures == 0 && rkv_cache_position(cache, 0) < ROWS) {
        const size_t at = (size_t)rkv_cache_position(cache, 0) * DIM;
        for (int l = 0; l < LAYERS; l++)
            expect("layer_step", layer_step(cache, l, e->keys + at, e->values + at, e->queries,
                                            &keys, &values) == RKV_OK);
        expect("all rows", keys.tokens == rkv_cache_rows(cache, LAYERS - 1));
        expect("token_done", token_done(cache) == RKV_OK);
    }
    expect("a round", cache && rkv_cache_rows(cache, 0) == BUDGET);
    rkv_cache_destroy(cache);
}

int main(void)
{
    static struct engine rows, free_rows;
    static int32_t positions[ROWS];
    int rounds = 0;
    allocate(&rows);
    allocate(&free_rows);
    rows.config.scope = RKV_PER_SEQUENCE;
    rows.layers[0].positions = positions;
    describe_cells(&free_rows, &cells);
    free(free_rows.workspace);
    expect("size", rkv_workspace_size(NULL, &free_rows.config, free_rows.layers, LAYERS,
                                      &free_rows.bytes) == RKV_OK);
    free_rows.workspace = malloc(free_rows.bytes);
    for (int cell = 0; cell < ROWS; cell++) in_use[cell] = -1;
    while (rows.position < LAST && failures == 0) {
        const int cell = free_cell(rows.position);
        positions[rows.rows] = rows.position;
        decode(&rows, rows.rows);
        decode(&free_rows, cell);
        in_use[cell] = rows.position;
        cells.cell[free_rows.rows] = cell;
        cells.position[free_rows.rows] = free_rows.position++;
        free_rows.rows++;
        if (free_rows.rows == ROWS) {
            expect("free_cells", free_cells(&free_rows, &cells, free_range) == RKV_OK);
            rounds++;
        }
        expect("engine_token_done", engine_token_done(&rows) == RKV_OK);
        expect("as many rows", rows.rows == free_rows.rows);
    }
    expect("rounds", rounds == ROUNDS && rows.rows == BUDGET);
    expect("the same tokens", memcmp(positions, cells.position, BUDGET * sizeof *positions) == 0);
    for (int i = 0; i < BUDGET; i++)
        expect("a cell that holds its token", in_use[cells.cell[i]] == cells.position[i]);

    run_managed_cache(&free_rows);
    rows.config.scope = RKV_PER_HEAD; /* a NaN in the last row */
    rows.layers[0].positions = NULL;
    for (; rows.rows < ROWS - 1; rows.rows++) decode(&rows, rows.rows);
    decode(&rows, rows.rows);
    rows.keys[(size_t)rows.rows * DIM] = 0x7fc0;
    expect("a NaN", engine_token_done(&rows) == RKV_OK && rows.rows == BUDGET);
    expect("is kept in the window", rows.keys[(size_t)(BUDGET - 1) * DIM] == 0x7fc0);
    return failures > 0;
}
