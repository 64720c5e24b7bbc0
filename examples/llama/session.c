/* session.c - see session.h. Build: part of `make llama`. */
#include "session.h"
#include "../ponder/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- policies ------------------------------------------------------------------------------ */

static rkv_config unpooled(int budget)
{
    rkv_config c = rkv_config_default(budget);
    c.pool = 1;
    return c;
}

static rkv_config by_chance(int budget)
{
    return rkv_config_random(budget, 0); /* make_adapter sets the seed */
}

const policy policies[N_POLICIES] = {
    { "full", "every token is kept", NULL },
    { "rkv", "R-KV", rkv_config_default },
    { "rkv-pool1", "R-KV without pooling", unpooled },
    { "paper", "R-KV by the paper", rkv_config_paper },
    { "wide", "R-KV, wide", rkv_config_wide },
    { "snapkv", "SnapKV", rkv_config_snapkv },
    { "memory_traces", "memory, traces", rkv_config_memory_traces },
    { "memory_prose", "memory, prose", rkv_config_memory_prose },
    { "memory_wide", "memory, wide", rkv_config_memory_wide },
    { "h2o", "H2O", rkv_config_h2o },
    { "triattention", "TriAttention", rkv_config_triattention },
    { "streaming", "StreamingLLM", rkv_config_streaming },
    { "random", "random", by_chance },
};

const policy *policy_find(const char *name, size_t n)
{
    for (int i = 0; i < N_POLICIES; i++)
        if (strlen(policies[i].name) == n && strncmp(policies[i].name, name, n) == 0)
            return &policies[i];
    die("no policy %.*s; --help lists them", (int)n, name);
}

/* ---- models -------------------------------------------------------------------------------- */

static char first_error[160]; /* of llama.cpp's log since it was emptied, without line's end */

static void listen(enum ggml_log_level level, const char *text, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR && !first_error[0])
        snprintf(first_error, sizeof first_error, "%.*s", (int)strcspn(text, "\n"), text);
}

struct llama_model *model_open(const char *path)
{
    struct llama_model_params params = llama_model_default_params();
    FILE *f = fopen(path, "rb");
    if (!f) die("cannot read %s", path);
    fclose(f);
    llama_log_set(listen, NULL);
    ggml_backend_load_all();
    struct llama_model *model = llama_model_load_from_file(path, params);
    if (!model) die("%s: llama.cpp cannot load it: %s", path, first_error);
    if (llama_vocab_type(llama_model_get_vocab(model)) == LLAMA_VOCAB_TYPE_NONE)
        die("%s: the model has no tokeniser", path);
    return model;
}

/* ---- sessions ------------------------------------------------------------------------------ */

static enum ggml_type type_of(const char *name)
{
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char *known = ggml_type_name((enum ggml_type)i);
        if (known && strcmp(known, name) == 0) return (enum ggml_type)i;
    }
    die("--kv: no type %s", name);
}

static enum llama_flash_attn_type flash_of(const char *name)
{
    if (strcmp(name, "on") == 0) return LLAMA_FLASH_ATTN_TYPE_ENABLED;
    if (strcmp(name, "off") == 0) return LLAMA_FLASH_ATTN_TYPE_DISABLED;
    die("--flash: on or off, not %s", name);
}

static void make_adapter(session *s, const settings *set, const policy *p, int budget, int n_pinned)
{
    rkv_config config = p->config(budget);
    rkv_llama_options options;
    config.seed = (uint32_t)set->seed;
    memset(&options, 0, sizeof options);
    options.budget = budget;
    options.buffer = set->buffer;
    options.pin_limit = n_pinned == PIN_PROMPT ? 0 : -1;
    options.config = &config;
    const char *wrong = rkv_llama_create(&s->adapter, &options);
    if (wrong) die("%s", wrong);
}

void session_open(session *out, struct llama_model *model, const settings *set, const policy *p,
                  int budget, int n_cells, int n_pinned)
{
    struct llama_context_params params = llama_context_default_params();
    memset(out, 0, sizeof *out);
    out->n_batch = 512;
    if (p->config && budget >= 0) n_cells = budget + set->buffer;
    params.n_ctx = (uint32_t)n_cells;
    params.n_batch = params.n_ubatch = (uint32_t)out->n_batch;
    params.n_threads = params.n_threads_batch = set->n_threads;
    params.flash_attn_type = flash_of(set->flash);
    params.type_k = params.type_v = type_of(set->kv);
    if (p->config) {
        make_adapter(out, set, p, budget, n_pinned);
        rkv_llama_hook(out->adapter, &params);
    }
    first_error[0] = 0;
    out->context = llama_init_from_model(model, params);
    if (!out->context) die("llama.cpp makes no context: %s", first_error);
    if (out->adapter && rkv_llama_attach(out->adapter, out->context) != 0)
        die("%s", rkv_llama_error(out->adapter));
    if (n_pinned > 0 && out->adapter && rkv_llama_pin(out->adapter, 0, 0, n_pinned) != 0)
        die("%s", rkv_llama_error(out->adapter));
}

void session_close(session *s)
{
    if (s->batch.token) llama_batch_free(s->batch);
    llama_free(s->context);
    rkv_llama_destroy(s->adapter);
    memset(s, 0, sizeof *s);
}

static void fill_batch(session *s, const llama_token *tokens, int n, const unsigned char *wanted)
{
    llama_batch *b = &s->batch;
    if (s->n_room < n) {
        if (b->token) llama_batch_free(*b);
        *b = llama_batch_init(n, 0, 1);
        s->n_room = n;
    }
    b->n_tokens = n;
    for (int i = 0; i < n; i++) {
        b->token[i] = tokens[i];
        b->pos[i] = s->position + i;
        b->n_seq_id[i] = 1;
        b->seq_id[i][0] = 0;
        b->logits[i] = wanted ? wanted[i] != 0 : i == n - 1;
    }
}

/* Without an adapter: at most n_batch tokens in a call. */
static void decode_all(session *s, const llama_token *tokens, int n, const unsigned char *wanted)
{
    for (int i = 0; i < n; i += s->n_batch) {
        const int part = n - i < s->n_batch ? n - i : s->n_batch;
        fill_batch(s, tokens + i, part, wanted ? wanted + i : NULL);
        const int status = llama_decode(s->context, s->batch);
        if (status == 1) die("the full cache has no cells left");
        if (status != 0) die("llama_decode returned %d: %s", status, first_error);
        s->position += part;
    }
}

void session_decode(session *s, const llama_token *tokens, int n, const unsigned char *wanted)
{
    if (!s->adapter) {
        decode_all(s, tokens, n, wanted);
    } else {
        fill_batch(s, tokens, n, wanted);
        const int status = rkv_llama_decode(s->adapter, s->batch);
        if (status == RKV_LLAMA_REFUSED) die("%s", rkv_llama_error(s->adapter));
        if (status != 0) die("llama_decode returned %d: %s", status, first_error);
        s->position += n;
    }
    llama_synchronize(s->context);
}

float *session_logits(session *s, int i)
{
    float *logits =
        s->adapter ? rkv_llama_logits(s->adapter, i) : llama_get_logits_ith(s->context, i);
    if (!logits) die("llama.cpp has no logits for token %d", i);
    return logits;
}

int session_live(const session *s)
{
    return s->adapter ? rkv_llama_live(s->adapter, 0) : s->position;
}

int session_cells(const session *s)
{
    return (int)llama_n_ctx(s->context);
}

rkv_llama_counters session_counters(session *s)
{
    rkv_llama_counters none;
    if (s->adapter) return rkv_llama_get_counters(s->adapter);
    memset(&none, 0, sizeof none);
    return none;
}
