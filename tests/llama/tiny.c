/* tiny.c - see tiny.h. Build: part of `make test-llama`. */
#include "tiny.h"
#include "gguf.h"
#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    EMBEDDING = 128,
    FFN = 96,
    CONTEXT = 16384,
    BUCKETS = 32,
    KV = TINY_KV_HEADS * TINY_DIM,
    Q = TINY_HEADS * TINY_DIM
};

static const struct {
    const char *name, *architecture;
    int n_layers;
} kinds[N_TINY] = { { "tiny-llama", "llama", 3 },      { "tiny-qwen2", "qwen2", 2 },
                    { "tiny-qwen3", "qwen3", 2 },      { "tiny-gemma3", "gemma3", 6 },
                    { "tiny-mpt", "mpt", 2 },          { "tiny-mamba", "mamba", 2 },
                    { "tiny-falcon", "falcon-h1", 2 }, { "tiny-qwen2vl", "qwen2vl", 2 },
                    { "tiny-llada", "llada", 2 },      { "tiny-bert", "bert", 2 },
                    { "tiny-t5", "t5encoder", 2 },     { "tiny-sinks", "gpt-oss", 2 },
                    { "tiny-llama3", "llama", 3 } };

const char *tiny_name(tiny_kind kind)
{
    return kinds[kind].name;
}

typedef struct put {
    gguf_writer *w;
    rng random;
    const char *architecture, *prefix; /* of a layer's tensors */
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
        snprintf(full, sizeof full, "%sblk.%d.%s", p->prefix, p->layer, name);
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

static void put_heads(put *p, int kv)
{
    matrix(p, "attn_q.weight", Q, EMBEDDING);
    matrix(p, "attn_k.weight", kv, EMBEDDING);
    matrix(p, "attn_v.weight", kv, EMBEDDING);
}

static void put_biases(put *p)
{
    tensor(p, "attn_q.bias", 0, Q, 0, 0.3);
    tensor(p, "attn_k.bias", 0, KV, 0, 0.3);
    tensor(p, "attn_v.bias", 0, KV, 0, 0.3);
}

static void put_feed_forward(put *p, const char *norm_name)
{
    norm(p, norm_name, EMBEDDING);
    matrix(p, "ffn_gate.weight", FFN, EMBEDDING);
    matrix(p, "ffn_up.weight", FFN, EMBEDDING);
    matrix(p, "ffn_down.weight", EMBEDDING, FFN);
}

static void put_attention(put *p, tiny_kind kind)
{
    norm(p, "attn_norm.weight", EMBEDDING);
    put_heads(p, KV);
    matrix(p, "attn_output.weight", EMBEDDING, Q);
    if (kind == TINY_QWEN2 || kind == TINY_QWEN2VL) put_biases(p);
    if (kind == TINY_QWEN3 || kind == TINY_GEMMA3) {
        norm(p, "attn_q_norm.weight", TINY_DIM);
        norm(p, "attn_k_norm.weight", TINY_DIM);
    }
    put_feed_forward(p, "ffn_norm.weight");
    if (kind == TINY_GEMMA3) {
        norm(p, "post_attention_norm.weight", EMBEDDING);
        norm(p, "post_ffw_norm.weight", EMBEDDING);
    }
}

/* gpt-oss, with one expert. */
static void put_sinks(put *p)
{
    norm(p, "attn_norm.weight", EMBEDDING);
    put_heads(p, KV);
    put_biases(p);
    matrix(p, "attn_output.weight", EMBEDDING, Q);
    tensor(p, "attn_output.bias", 0, EMBEDDING, 0, 0.1);
    tensor(p, "attn_sinks.weight", 0, TINY_HEADS, 0, 1);
    norm(p, "post_attention_norm.weight", EMBEDDING);
    matrix(p, "ffn_gate_inp.weight", 1, EMBEDDING);
    tensor(p, "ffn_gate_inp.bias", 0, 1, 0, 0.1);
    matrix(p, "ffn_gate_exps.weight", FFN, EMBEDDING);
    matrix(p, "ffn_up_exps.weight", FFN, EMBEDDING);
    matrix(p, "ffn_down_exps.weight", EMBEDDING, FFN);
    tensor(p, "ffn_gate_exps.bias", 1, FFN, 0, 0.1);
    tensor(p, "ffn_up_exps.bias", 1, FFN, 0, 0.1);
    tensor(p, "ffn_down_exps.bias", 1, EMBEDDING, 0, 0.1);
}

static void put_bert(put *p)
{
    put_heads(p, KV);
    put_biases(p);
    matrix(p, "attn_output.weight", EMBEDDING, Q);
    norm(p, "attn_output_norm.weight", EMBEDDING);
    norm(p, "attn_output_norm.bias", EMBEDDING);
    matrix(p, "ffn_up.weight", FFN, EMBEDDING);
    matrix(p, "ffn_down.weight", EMBEDDING, FFN);
    norm(p, "layer_output_norm.weight", EMBEDDING);
    norm(p, "layer_output_norm.bias", EMBEDDING);
}

static void put_t5(put *p)
{
    norm(p, "attn_norm.weight", EMBEDDING);
    matrix(p, "attn_rel_b.weight", BUCKETS, TINY_HEADS);
    put_heads(p, Q);
    matrix(p, "attn_o.weight", EMBEDDING, Q);
    put_feed_forward(p, "ffn_norm.weight");
}

static void put_falcon(put *p)
{
    enum { INNER = 64, STATE = 16, CONV = 4, SSM_HEADS = 4, GROUPS = 1 };
    enum { CONVOLVED = INNER + 2 * GROUPS * STATE };
    norm(p, "attn_norm.weight", EMBEDDING);
    put_heads(p, KV);
    matrix(p, "attn_output.weight", EMBEDDING, Q);
    put_feed_forward(p, "ffn_norm");
    matrix(p, "ssm_in.weight", INNER + CONVOLVED + SSM_HEADS, EMBEDDING);
    tensor(p, "ssm_conv1d.weight", CONVOLVED, CONV, 0, 0.3);
    tensor(p, "ssm_conv1d.bias", 0, CONVOLVED, 0, 0.1);
    tensor(p, "ssm_dt.bias", 0, SSM_HEADS, 0, 0.1);
    tensor(p, "ssm_a", SSM_HEADS, 1, -1, 0.1);
    tensor(p, "ssm_d", SSM_HEADS, 1, 1, 0.1);
    matrix(p, "ssm_out.weight", EMBEDDING, INNER);
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
    number(p, "context_length", kind == TINY_BERT ? TINY_VOCABULARY : CONTEXT);
    number(p, "embedding_length", EMBEDDING);
    number(p, "block_count", kinds[kind].n_layers);
    number(p, "feed_forward_length", kind == TINY_MAMBA ? 0 : FFN);
    number(p, "attention.head_count", kind == TINY_MAMBA ? 0 : TINY_HEADS);
    real(p, "attention.layer_norm_rms_epsilon", 1e-5f);
    real(p, "attention.layer_norm_epsilon", 1e-5f);
    if (kind == TINY_MPT) {
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
    number(p, "attention.head_count_kv", kind == TINY_T5 ? TINY_HEADS : TINY_KV_HEADS);
    number(p, "attention.key_length", TINY_DIM);
    number(p, "attention.value_length", TINY_DIM);
    number(p, "rope.dimension_count", TINY_DIM);
    if (kind == TINY_GEMMA3) { /* of its layers without a window */
        real(p, "rope.freq_base", TINY_GEMMA3_BASE);
        gguf_put_string(p->w, "gemma3.rope.scaling.type", "linear");
        real(p, "rope.scaling.factor", TINY_GEMMA3_FACTOR);
    }
    if (kind == TINY_GEMMA3 || kind == TINY_SINKS)
        number(p, "attention.sliding_window", TINY_WINDOW);
    if (kind == TINY_QWEN2VL) number(p, "rope.dimension_sections", TINY_DIM / 8);
    if (kind == TINY_BERT) gguf_put_u32(p->w, "tokenizer.ggml.token_type_count", 2);
    if (kind == TINY_T5) number(p, "attention.relative_buckets_count", BUCKETS);
    if (kind == TINY_SINKS) {
        number(p, "expert_count", 1);
        number(p, "expert_used_count", 1);
        number(p, "expert_feed_forward_length", FFN);
    }
    if (kind == TINY_FALCON) {
        number(p, "ssm.conv_kernel", 4);
        number(p, "ssm.inner_size", 64);
        number(p, "ssm.state_size", 16);
        number(p, "ssm.time_step_rank", 4);
        number(p, "ssm.group_count", 1);
    }
}

static void put_layer(put *p, tiny_kind kind)
{
    switch (kind) {
    case TINY_MAMBA: put_mamba(p); break;
    case TINY_MPT: put_mpt(p); break;
    case TINY_FALCON: put_falcon(p); break;
    case TINY_BERT: put_bert(p); break;
    case TINY_T5: put_t5(p); break;
    case TINY_SINKS: put_sinks(p); break;
    default: put_attention(p, kind); break;
    }
}

float tiny_rope_factor(int pair)
{
    return 1 + 0.25f * (float)(pair % 7);
}

static void put_rope_factors(put *p)
{
    float factors[TINY_DIM / 2];
    for (int f = 0; f < TINY_DIM / 2; f++) factors[f] = tiny_rope_factor(f);
    gguf_put_tensor(p->w, "rope_freqs.weight", GGUF_F32, 0, TINY_DIM / 2, factors);
}

/* What belongs to no layer. */
static void put_ends(put *p, tiny_kind kind)
{
    tensor(p, "token_embd.weight", TINY_VOCABULARY, EMBEDDING, 0, 0.3);
    if (kind == TINY_SINKS) matrix(p, "output.weight", TINY_VOCABULARY, EMBEDDING);
    if (kind == TINY_LLAMA3) put_rope_factors(p);
    if (kind == TINY_BERT) {
        matrix(p, "position_embd.weight", TINY_VOCABULARY, EMBEDDING);
        norm(p, "token_embd_norm.weight", EMBEDDING);
        norm(p, "token_embd_norm.bias", EMBEDDING);
    } else {
        norm(p, kind == TINY_T5 ? "enc.output_norm.weight" : "output_norm.weight", EMBEDDING);
    }
}

const char *tiny_write(tiny_kind kind)
{
    static char path[512];
    gguf_error error;
    put p = { gguf_writer_create(), rng_seed(7 + (uint64_t)kind), kinds[kind].architecture,
              kind == TINY_T5 ? "enc." : "", -1 };
    snprintf(path, sizeof path, "%s/%s.gguf", MODELS, kinds[kind].name);
    put_shape(&p, kind);
    put_ends(&p, kind);
    for (p.layer = 0; p.layer < kinds[kind].n_layers; p.layer++) put_layer(&p, kind);
    if (!gguf_write(p.w, path, &error)) {
        printf("%s: %s\n", path, error.text);
        exit(1);
    }
    gguf_writer_destroy(p.w);
    return path;
}
