/* witness.c - see witness.h. Build: part of `make test-llama`. */
#include "witness.h"

#include <math.h>
#include <string.h>

void witness_begin(witness *w, tiny_kind kind)
{
    const int is_gemma = kind == TINY_GEMMA3, is_qwen = kind == TINY_QWEN2 || kind == TINY_QWEN3;
    memset(w, 0, sizeof *w);
    w->n_layers = is_gemma ? 6 : is_qwen ? 2 : 3;
    w->full_layer = is_gemma ? 5 : -1;
    w->scale = is_gemma ? 1 : 1 / sqrt((double)TINY_DIM); /* Gemma's queries come scaled */
}

bool witness_watch(struct ggml_tensor *t, bool ask, void *user)
{
    witness *w = user;
    const struct ggml_tensor *q;
    int i, h;
    if (t->op != GGML_OP_FLASH_ATTN_EXT && strncmp(t->name, "kq-", 3) != 0) return !ask;
    if (ask) return true;
    q = t->src[t->op == GGML_OP_FLASH_ATTN_EXT ? 0 : 1];
    for (i = 0; i < (int)q->ne[1] && w->begin + i < WITNESS_TOKENS; i++)
        for (h = 0; h < TINY_HEADS; h++)
            memcpy(&w->queries[w->layer][w->begin + i][h * TINY_DIM],
                   (const char *)q->data + (size_t)i * q->nb[1] + (size_t)h * q->nb[2],
                   TINY_DIM * sizeof(float));
    if (++w->layer < w->n_layers) return true;
    w->layer = 0;
    w->begin += (int)q->ne[1];
    return true;
}

int witness_scored(const witness *w)
{
    return w->full_layer < 0 ? w->n_layers : 1;
}

int witness_layer(const witness *w, int nth)
{
    return w->full_layer < 0 ? nth : w->full_layer;
}
