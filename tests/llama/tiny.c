/* tiny.c - see tiny.h. Build: part of `make test-llama`. */
#include "tiny.h"
#include "gguf.h"
#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EMBEDDING = 128, FFN = 96, KV = TINY_KV_HEADS * TINY_DIM, Q = TINY_HEADS * TINY_DIM };

static const struct {
    const char *name, *architecture;
    int n_layers;
} kinds[N_TINY] = { { "tiny-llama", "llama", 3 }, { "tiny-qwen2", "qwen2", 2 },
                    { "tiny-qwen3", "qwen3", 2 }, { "tiny-gemma3", "gemma3", 6 },
                    { "tiny-mpt", "mpt", 2 },     { "tiny-mamba", "mamba", 2 } };

const char *tiny_name(tiny_kind kind)
{
    return kinds[kind].name;
}

typedef struct put {
    gguf_writer *w;
    rng random;
    const char *architecture;
    int layer;
} put;

static void number(put *p, const char *key, int value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", p->architecture, key);
    gguf_put_u32(p->w, name, (uint32_t)value);
}

static void real(put *p, const char *key, float value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", p->architecture, key);
    gguf_put_f32(p->w, name, value);
}

/* rows 0: a vector. Normal numbers around `mean`. */
static void tensor(put *p, const char *name, int rows, int cols, double mean, double spread)
{
    const size_t n = (size_t)(rows > 0 ? rows : 1) * (size_t)cols;
    float *values = alloc_checked(n * sizeof *values);
    char full[96];
    for (size_t i = 0; i < n; i++) values[i] = (float)(mean + spread * rng_normal(&p->random));
    if (p->layer >= 0)
        snprintf(full, sizeof full, "blk.%d.%s", p->layer, name);
    else
        snprintf(full, sizeof full, "%s", name);
    gguf_put_tensor(p->w, full, GGUF_F32, (uint64_t)rows, (uint64_t)cols, values);
    free(values);
}

static void matrix(put *p, const char *name, int rows, int cols)
{
    tensor(p, name, rows, cols, 0, 1.5 / sqrt((double)cols));
}

static void norm(put *p, const char *name, int n)
{
    tensor(p, name, 0, n, 1, 0.1);
}

static void put_attention(put *p, tiny_kind kind)
{
    norm(p, "attn_norm.weight", EMBEDDING);
    matrix(p, "attn_q.weight", Q, EMBEDDING);
    matrix(p, "attn_k.weight", KV, EMBEDDING);
    matrix(p, "attn_v.weight", KV, EMBEDDING);
    matrix(p, "attn_output.weight", EMBEDDING, Q);
    if (kind == TINY_QWEN2) {
        tensor(p, "attn_q.bias", 0, Q, 0, 0.3);
        tensor(p, "attn_k.bias", 0, KV, 0, 0.3);
        tensor(p, "attn_v.bias", 0, KV, 0, 0.3);
    }
    if (kind == TINY_QWEN3 || kind == TINY_GEMMA3) {
        norm(p, "attn_q_norm.weight", TINY_DIM);
        norm(p, "attn_k_norm.weight", TINY_DIM);
    }
    norm(p, "ffn_norm.weight", EMBEDDING);
    matrix(p, "ffn_gate.weight", FFN, EMBEDDING);
    matrix(p, "ffn_up.weight", FFN, EMBEDDING);
    matrix(p, "ffn_down.weight", EMBEDDING, FFN);
    if (kind == TINY_GEMMA3) {
        norm(p, "post_attention_norm.weight", EMBEDDING);
        norm(p, "post_ffw_norm.weight", EMBEDDING);
    }
}

static void put_mpt(put *p)
{
    norm(p, "attn_norm.weight", EMBEDDING);
    matrix(p, "attn_qkv.weight", 3 * EMBEDDING, EMBEDDING);
    matrix(p, "attn_output.weight", EMBEDDING, EMBEDDING);
    norm(p, "ffn_norm.weight", EMBEDDING);
    matrix(p, "ffn_up.weight", FFN, EMBEDDING);
    matrix(p, "ffn_down.weight", EMBEDDING, FFN);
}

static void put_mamba(put *p)
{
    enum { INNER = 2 * EMBEDDING, STATE = 16, RANK = 4, CONV = 4 };
    norm(p, "attn_norm.weight", EMBEDDING);
    matrix(p, "ssm_in.weight", 2 * INNER, EMBEDDING);
    tensor(p, "ssm_conv1d.weight", INNER, CONV, 0, 0.3);
    tensor(p, "ssm_conv1d.bias", 0, INNER, 0, 0.1);
    matrix(p, "ssm_x.weight", RANK + 2 * STATE, INNER);
    matrix(p, "ssm_dt.weight", INNER, RANK);
    tensor(p, "ssm_dt.bias", 0, INNER, 0, 0.1);
    tensor(p, "ssm_a", INNER, STATE, -1, 0.1);
    norm(p, "ssm_d", INNER);
    matrix(p, "ssm_out.weight", EMBEDDING, INNER);
}

static void put_shape(put *p, tiny_kind kind)
{
    gguf_put_string(p->w, "general.architecture", p->architecture);
    gguf_put_string(p->w, "tokenizer.ggml.model", "none");
    number(p, "vocab_size", TINY_VOCABULARY);
    number(p, "context_length", 16384);
    number(p, "embedding_length", EMBEDDING);
    number(p, "block_count", kinds[kind].n_layers);
    number(p, "feed_forward_length", kind == TINY_MAMBA ? 0 : FFN);
    number(p, "attention.head_count", kind == TINY_MAMBA ? 0 : TINY_HEADS);
    if (kind != TINY_MPT) real(p, "attention.layer_norm_rms_epsilon", 1e-5f);
    if (kind == TINY_MPT) {
        real(p, "attention.layer_norm_epsilon", 1e-5f);
        real(p, "attention.max_alibi_bias", 8);
        return;
    }
    if (kind == TINY_MAMBA) {
        number(p, "ssm.conv_kernel", 4);
        number(p, "ssm.inner_size", 2 * EMBEDDING);
        number(p, "ssm.state_size", 16);
        number(p, "ssm.time_step_rank", 4);
        return;
    }
    number(p, "attention.head_count_kv", TINY_KV_HEADS);
    number(p, "attention.key_length", TINY_DIM);
    number(p, "attention.value_length", TINY_DIM);
    number(p, "rope.dimension_count", TINY_DIM);
    if (kind == TINY_GEMMA3) number(p, "attention.sliding_window", TINY_WINDOW);
}

const char *tiny_write(tiny_kind kind)
{
    static char path[512];
    gguf_error error;
    put p = { gguf_writer_create(), rng_seed(7 + (uint64_t)kind), kinds[kind].architecture, -1 };
    snprintf(path, sizeof path, "%s/%s.gguf", MODELS, kinds[kind].name);
    put_shape(&p, kind);
    tensor(&p, "token_embd.weight", TINY_VOCABULARY, EMBEDDING, 0, 0.3);
    norm(&p, "output_norm.weight", EMBEDDING);
    for (p.layer = 0; p.layer < kinds[kind].n_layers; p.layer++) {
        if (kind == TINY_MAMBA)
            put_mamba(&p);
        else if (kind == TINY_MPT)
            put_mpt(&p);
        else
            put_attention(&p, kind);
    }
    if (!gguf_write(p.w, path, &error)) {
        printf("%s: %s\n", path, error.text);
        exit(1);
    }
    gguf_writer_destroy(p.w);
    return path;
}
