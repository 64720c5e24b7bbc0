/* The reader of golden files: see golden_file.h. Built by
 *     make test */
#include "golden_file.h"
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t take_u32(golden *g)
{
    uint32_t x = 0;
    int i;
    for (i = 0; i < 4; i++)
        if (g->at < g->size) x |= (uint32_t)g->bytes[g->at++] << (8 * i);
    return x;
}

static float take_f32(golden *g)
{
    uint32_t bits = take_u32(g);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float *take_floats(golden *g, size_t n)
{
    float *list = (float *)alloc_checked(n * sizeof *list);
    size_t i;
    for (i = 0; i < n; i++) list[i] = take_f32(g);
    return list;
}

static int32_t *take_ints(golden *g, size_t n)
{
    int32_t *list = (int32_t *)alloc_checked(n * sizeof *list);
    size_t i;
    for (i = 0; i < n; i++) list[i] = (int32_t)take_u32(g);
    return list;
}

static float *take_numbers(golden *g, size_t n) /* of the file's dtype */
{
    float *list;
    size_t i;
    if (g->dtype == RKV_F32) return take_floats(g, n);
    list = (float *)alloc_checked(n * sizeof *list);
    for (i = 0; i < n && g->at + 2 <= g->size; i++, g->at += 2) {
        uint16_t bits = (uint16_t)(g->bytes[g->at] | g->bytes[g->at + 1] << 8);
        list[i] = g->dtype == RKV_F16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
    return list;
}

unsigned char *golden_bytes(const char *directory, const char *name, size_t *size)
{
    char path[512];
    unsigned char *bytes;
    FILE *file;
    long end;
    *size = 0;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    end = ftell(file);
    rewind(file);
    bytes = (unsigned char *)alloc_checked(end > 0 ? (size_t)end : 1);
    *size = fread(bytes, 1, end > 0 ? (size_t)end : 0, file);
    fclose(file);
    return bytes;
}

static int read_file(golden *g, const char *directory, const char *name)
{
    char file[256];
    memset(g, 0, sizeof *g);
    snprintf(file, sizeof file, "%s.rkvg", name);
    g->bytes = golden_bytes(directory, file, &g->size);
    return g->bytes && g->size > 56;
}

static void take_header(golden *g)
{
    g->at = 8;
    take_u32(g); /* version */
    g->kv_heads = (int)take_u32(g);
    g->group = (int)take_u32(g);
    g->dim = (int)take_u32(g);
    g->n_tokens = (int)take_u32(g);
    g->budget = (int)take_u32(g);
    g->window = (int)take_u32(g);
    g->pool = (int)take_u32(g);
    g->dtype = (rkv_dtype)take_u32(g);
    g->rounds = (int)take_u32(g);
    g->lambda = take_f32(g);
    g->threshold = take_f32(g);
}

static size_t product(int a, int b, int c)
{
    return (size_t)a * (size_t)b * (size_t)c;
}

static void take_single(golden *g)
{
    int candidates = g->n_tokens - g->window;
    g->round[0].appended = g->n_tokens;
    g->round[0].queries = take_numbers(g, product(g->kv_heads * g->group, g->window, g->dim));
    g->round[0].keys = take_numbers(g, product(g->kv_heads, g->n_tokens, g->dim));
    g->importance = take_floats(g, product(g->kv_heads, candidates, 1));
    g->redundancy = take_floats(g, product(g->kv_heads, g->n_tokens, 1));
    g->score = take_floats(g, product(g->kv_heads, candidates, 1));
    g->kept = take_ints(g, product(g->kv_heads, g->budget, 1));
    g->gap = take_floats(g, product(g->kv_heads, 1, 1));
}

int golden_round_rows(const golden *g, int r)
{
    return r == 0 ? g->n_tokens : g->budget + g->round[r].appended;
}

static void take_rounds(golden *g)
{
    int r;
    for (r = 0; r < g->rounds && r < GOLDEN_MAX_ROUNDS; r++) {
        golden_round *d = &g->round[r];
        int candidates;
        d->appended = (int)take_u32(g);
        candidates = golden_round_rows(g, r) - g->window;
        d->queries = take_numbers(g, product(g->kv_heads * g->group, g->window, g->dim));
        d->keys = take_numbers(g, product(g->kv_heads, d->appended, g->dim));
        d->kept_published = take_ints(g, product(g->kv_heads, g->budget, 1));
        d->kept_positional = take_ints(g, product(g->kv_heads, g->budget, 1));
        d->score_published = take_floats(g, product(g->kv_heads, candidates, 1));
        d->score_positional = take_floats(g, product(g->kv_heads, candidates, 1));
        free(take_floats(g, product(g->kv_heads, 2, 1))); /* gaps: all large enough */
    }
}

int golden_read(golden *g, const char *directory, const char *name)
{
    int single;
    if (!read_file(g, directory, name)) return 0;
    single = memcmp(g->bytes, "RKVGOLD1", 8) == 0;
    if (!single && memcmp(g->bytes, "RKVGOLDM", 8) != 0) return 0;
    take_header(g);
    if (single)
        take_single(g);
    else
        take_rounds(g);
    return g->at == g->size; /* all of it, and no more */
}

void golden_free(golden *g)
{
    int r;
    for (r = 0; r < GOLDEN_MAX_ROUNDS; r++) {
        free(g->round[r].queries);
        free(g->round[r].keys);
        free(g->round[r].kept_published);
        free(g->round[r].kept_positional);
        free(g->round[r].score_published);
        free(g->round[r].score_positional);
    }
    free(g->importance);
    free(g->redundancy);
    free(g->score);
    free(g->gap);
    free(g->kept);
    free(g->bytes);
}
