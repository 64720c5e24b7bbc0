/* model_put.c - see model_put.h. Build: part of `make train` and `make bench-decode`. */
#include "model_put.h"

#include <stdio.h>

void model_put_shape(gguf_writer *w, const model_shape *s)
{
    const struct {
        const char *key;
        int value;
    } numbers[] = { { "general.file_type", 1 }, /* mostly F16 */
                    { "llama.vocab_size", s->vocabulary },
                    { "llama.context_length", s->context },
                    { "llama.embedding_length", s->dim },
                    { "llama.block_count", s->n_layers },
                    { "llama.feed_forward_length", s->ffn_dim },
                    { "llama.attention.head_count", s->n_heads },
                    { "llama.attention.head_count_kv", s->n_kv_heads },
                    { "llama.rope.dimension_count", s->head_dim } };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        gguf_put_u32(w, numbers[i].key, (uint32_t)numbers[i].value);
}

static void put_matrix(gguf_writer *w, int layer, const char *name, int rows, int cols,
                       const float *values)
{
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", layer, name);
    gguf_put_tensor(w, full, rows > 0 ? GGUF_F16 : GGUF_F32, (uint64_t)rows, (uint64_t)cols,
                    values);
}

static void put_layer(gguf_writer *w, const model_shape *s, const weights *all, int l)
{
    const int q_dim = shape_q_dim(s), kv_dim = shape_kv_dim(s);
    const float *qkv = all->layer[l].qkv, *gate_up = all->layer[l].gate_up;
    put_matrix(w, l, "attn_norm", 0, s->dim, all->layer[l].attn_norm);
    put_matrix(w, l, "attn_q", q_dim, s->dim, qkv);
    put_matrix(w, l, "attn_k", kv_dim, s->dim, qkv + (ptrdiff_t)q_dim * s->dim);
    put_matrix(w, l, "attn_v", kv_dim, s->dim, qkv + (ptrdiff_t)(q_dim + kv_dim) * s->dim);
    put_matrix(w, l, "attn_output", s->dim, q_dim, all->layer[l].attn_out);
    put_matrix(w, l, "ffn_norm", 0, s->dim, all->layer[l].ffn_norm);
    put_matrix(w, l, "ffn_gate", s->ffn_dim, s->dim, gate_up);
    put_matrix(w, l, "ffn_up", s->ffn_dim, s->dim, gate_up + (ptrdiff_t)s->ffn_dim * s->dim);
    put_matrix(w, l, "ffn_down", s->dim, s->ffn_dim, all->layer[l].down);
}

void model_put_weights(gguf_writer *w, const model_shape *s, const weights *all)
{
    gguf_put_tensor(w, "token_embd.weight", GGUF_F16, (uint64_t)s->vocabulary, (uint64_t)s->dim,
                    all->embedding);
    gguf_put_tensor(w, "output_norm.weight", GGUF_F32, 0, (uint64_t)s->dim, all->final_norm);
    for (int l = 0; l < s->n_layers; l++) put_layer(w, s, all, l);
}
