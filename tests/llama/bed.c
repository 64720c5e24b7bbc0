/* bed.c - see bed.h. Build: part of `make test-llama`. */
#include "bed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void quiet(enum ggml_log_level level, const char *text, void *user)
{
    (void)level;
    (void)user;
    if (getenv("RKV_TEST_LOG")) fputs(text, stderr);
}

void beds_begin(void)
{
    llama_log_set(quiet, NULL);
    llama_backend_init();
}

int beds_end(void)
{
    llama_backend_free();
    return close_tests();
}

setup setup_of(tiny_kind kind, int budget, int buffer)
{
    setup s;
    memset(&s, 0, sizeof s);
    s.kind = kind;
    s.keys = GGML_TYPE_F16;
    s.flash = 1;
    s.n_ctx = 512;
    s.n_batch = 512;
    s.n_sequences = s.n_threads = 1;
    s.options.budget = budget;
    s.options.buffer = buffer;
    return s;
}

void bed_open(bed *b, const setup *s)
{
    /* llama.cpp wants this number signed, which the writer of tiny models cannot make. */
    const struct llama_model_kv_override sections[2] = {
        { LLAMA_KV_OVERRIDE_TYPE_INT, "qwen2vl.rope.dimension_sections", { TINY_DIM / 8 } },
        { LLAMA_KV_OVERRIDE_TYPE_INT, "", { 0 } }
    };
    struct llama_model_params model = llama_model_default_params();
    struct llama_context_params params = llama_context_default_params();
    const char *wrong;
    memset(b, 0, sizeof *b);
    model.n_gpu_layers = 0;
    if (s->kind == TINY_QWEN2VL) model.kv_overrides = sections;
    b->model = llama_model_load_from_file(s->path ? s->path : tiny_write(s->kind), model);
    if (!b->model) {
        printf("FAIL  %s: llama.cpp does not load it\n", s->path ? s->path : tiny_name(s->kind));
        exit(1);
    }
    b->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(b->model));
    params.n_ctx = (uint32_t)s->n_ctx;
    params.n_batch = (uint32_t)s->n_batch;
    params.n_ubatch = s->n_batch < 128 ? (uint32_t)s->n_batch : 128;
    params.n_seq_max = (uint32_t)s->n_sequences;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = s->n_threads;
    params.type_k = s->keys;
    params.type_v = GGML_TYPE_F16;
    params.flash_attn_type =
        s->flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.no_perf = true;
    params.swa_full = false;
    params.cb_eval = s->other;
    params.cb_eval_user_data = s->other_user;
    if (!s->is_plain) {
        wrong = rkv_llama_create(&b->r, &s->options);
        if (wrong) case_fail("create: %s", wrong);
        if (!b->r) exit(1);
        rkv_llama_hook(b->r, &params);
    }
    b->ctx = llama_init_from_model(b->model, params);
    if (!b->ctx) {
        printf("FAIL  %s: no context\n", tiny_name(s->kind));
        exit(1);
    }
    if (b->r) b->attached = rkv_llama_attach(b->r, b->ctx);
}

void bed_close(bed *b)
{
    llama_free(b->ctx);
    rkv_llama_destroy(b->r);
    llama_model_free(b->model);
}

llama_token token_at(int i)
{
    rng r = rng_seed(1000 + (uint64_t)i);
    return rng_below(&r, TINY_VOCABULARY);
}

int decode_tokens(bed *b, llama_seq_id seq, int begin, const llama_token *tokens, int n)
{
    struct llama_batch batch = llama_batch_init(n, 0, 1);
    int i, status;
    for (i = 0; i < n; i++) {
        batch.token[i] = tokens ? tokens[i] : token_at(begin + i);
        batch.pos[i] = begin + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i] = 1;
    }
    batch.n_tokens = n;
    status = b->r ? rkv_llama_decode(b->r, batch) : llama_decode(b->ctx, batch);
    llama_batch_free(batch);
    return status;
}

int decode(bed *b, llama_seq_id seq, int begin, int n)
{
    return decode_tokens(b, seq, begin, NULL, n);
}

int expect_decode(bed *b, llama_seq_id seq, int begin, int n)
{
    int status = decode(b, seq, begin, n);
    if (status == 0) return 1;
    case_fail("decode of %d tokens at %d: %d: %s", n, begin, status,
              b->r ? rkv_llama_error(b->r) : "");
    return 0;
}

void expect_same_logits(const char *at, bed *a, bed *b)
{
    expect_bytes(at, llama_get_logits_ith(a->ctx, -1), llama_get_logits_ith(b->ctx, -1),
                 (size_t)b->n_vocab * sizeof(float));
}

void expect_refusal(const char *at, bed *b, int status, const char *words)
{
    expect_int(at, 0, status, RKV_LLAMA_REFUSED);
    if (!strstr(rkv_llama_error(b->r), words))
        case_fail("%s: said \"%s\", not \"%s\"", at, rkv_llama_error(b->r), words);
}

void read_row(const struct ggml_tensor *rows, int row, float *out)
{
    const char *data = (const char *)rows->data + (size_t)row * rows->nb[1];
    if (rows->type == GGML_TYPE_F32)
        memcpy(out, data, (size_t)rows->ne[0] * sizeof *out);
    else
        ggml_get_type_traits(rows->type)->to_float(data, out, rows->ne[0]);
}
