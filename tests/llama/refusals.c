/* refusals.c - every sentence by which examples/llama/rkv_llama.h refuses something, read from its
 * source: each is provoked here, or listed with the reason why not.
 * make test-llama        (needs llama.cpp: make llama-cpp) */
#include "bed.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- faults: what calls of llama.cpp and of the C library answer, on demand ------------------ */

static struct {
    int seq_rm, state_get, state_set, no_cells, threads; /* not 0: fails */
    int is_elsewhere;                                    /* 1: the last position is another one */
    int allocation;                                      /* n: the n-th from now on fails */
} fault;

static int allocation_fails(void)
{
    return fault.allocation > 0 && --fault.allocation == 0;
}

static bool seq_rm(llama_memory_t memory, llama_seq_id seq, llama_pos p0, llama_pos p1)
{
    return !fault.seq_rm && llama_memory_seq_rm(memory, seq, p0, p1);
}

static llama_pos last_position(llama_memory_t memory, llama_seq_id seq)
{
    return llama_memory_seq_pos_max(memory, seq) + fault.is_elsewhere;
}

static size_t state_get(struct llama_context *ctx, uint8_t *to, size_t n, llama_seq_id seq)
{
    return fault.state_get ? 0 : llama_state_seq_get_data(ctx, to, n, seq);
}

static size_t state_set(struct llama_context *ctx, const uint8_t *from, size_t n, llama_seq_id seq)
{
    return fault.state_set ? 0 : llama_state_seq_set_data(ctx, from, n, seq);
}

#define llama_memory_seq_rm             seq_rm
#define llama_memory_seq_pos_max        last_position
#define llama_state_seq_get_data        state_get
#define llama_state_seq_set_data        state_set
#define llama_n_ctx(c)                  (fault.no_cells ? 0 : (llama_n_ctx)(c))
#define ggml_backend_init_by_type(t, p) (fault.threads ? NULL : (ggml_backend_init_by_type)(t, p))
#define malloc(n)                       (allocation_fails() ? NULL : (malloc)(n))
#define calloc(n, s)                    (allocation_fails() ? NULL : (calloc)(n, s))
#define realloc(p, n)                   (allocation_fails() ? NULL : (realloc)(p, n))

#define RKV_LLAMA_IMPLEMENTATION
#include "rkv_llama.h"

#undef malloc
#undef calloc
#undef realloc

/* ---- what has been said ---------------------------------------------------------------------- */

enum { MAX_HEARD = 400, LONGEST_SENTENCE = 512 };
static char heard[MAX_HEARD][LONGEST_SENTENCE];
static int n_heard;

static void hear(const char *text)
{
    int i;
    for (i = 0; i < n_heard; i++)
        if (strcmp(heard[i], text) == 0) return;
    if (n_heard < MAX_HEARD) snprintf(heard[n_heard++], LONGEST_SENTENCE, "%s", text);
}

static void refuses(const char *at, bed *b, int status, const char *words)
{
    hear(rkv_llama_error(b->r));
    expect_refusal(at, b, status, words);
}

/* Refused with another status than RKV_LLAMA_REFUSED. */
static void fails(const char *at, bed *b, int status, int want, const char *words)
{
    hear(rkv_llama_error(b->r));
    expect_int(at, 0, status, want);
    if (!strstr(rkv_llama_error(b->r), words))
        case_fail("%s: said \"%s\", not \"%s\"", at, rkv_llama_error(b->r), words);
}

static void expect_said(const char *said, const char *words)
{
    if (said) hear(said);
    if (!said || !strstr(said, words))
        case_fail("said \"%s\", not \"%s\"", said ? said : "", words);
}

/* ---- options --------------------------------------------------------------------------------- */

static void test_options(void)
{
    static const struct {
        int budget, buffer, pin_limit, n_threads;
        const char *words;
    } wrong[] = { { 0, 0, 0, 0, "budget" },       { -2, 0, 0, 0, "budget" },
                  { 64, -1, 0, 0, "buffer" },     { RKVLI_MAX_TOKENS + 1, 0, 0, 0, "below 2^28" },
                  { 64, 0, -2, 0, "pin_limit" },  { 64, 0, 0, -1, "n_threads" },
                  { 4, 0, 0, 0, "config.budget" } };
    rkv_config config = rkv_config_default(64);
    rkv_llama_options options;
    rkv_llama *r = NULL;
    size_t i;
    case_begin("refused: options that are wrong");
    for (i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        memset(&options, 0, sizeof options);
        options.budget = wrong[i].budget;
        options.buffer = wrong[i].buffer;
        options.pin_limit = wrong[i].pin_limit;
        options.n_threads = wrong[i].n_threads;
        expect_said(rkv_llama_create(&r, &options), wrong[i].words);
        expect_true("no adapter", r == NULL);
    }
    options = setup_of(TINY_LLAMA, 64, 0).options;
    config.lambda = 2;
    options.config = &config;
    expect_said(rkv_llama_create(&r, &options), "config.lambda");
    config = rkv_config_default(64);
    config.policy = RKV_POLICY_OWN_SCORE;
    expect_said(rkv_llama_create(&r, &options), "give options.score");
    expect_said(rkv_llama_create(NULL, &options), "out is NULL");
    expect_said(rkv_llama_create(&r, NULL), "options is NULL");
    rkv_llama_destroy(NULL);
    case_end();
}

/* ---- models, contexts ------------------------------------------------------------------------ */

/* attach, then a first decode: the first that refuses must say the words. */
static void refused_with(const char *at, const setup *s, const char *words)
{
    bed b;
    int status;
    case_begin("refused: %s", at);
    bed_open(&b, s);
    status = b.attached ? b.attached : decode(&b, 0, 0, 10);
    refuses(at, &b, status, words);
    expect_int("nothing stays", 0, rkv_llama_live(b.r, 0), 0);
    bed_close(&b);
    case_end();
}

static void test_models(void)
{
    static const struct {
        tiny_kind kind;
        const char *at, *words;
    } refused[] = { { TINY_MAMBA, "a recurrent model", "recurrent" },
                    { TINY_FALCON, "a hybrid model", "hybrid" },
                    { TINY_QWEN2VL, "M-RoPE", "M-RoPE" },
                    { TINY_LLADA, "a diffusion model", "diffusion" },
                    { TINY_T5, "an encoder", "encoder" },
                    { TINY_BERT, "a model without a cache", "no cache" },
                    { TINY_MPT, "ALiBi", "ALiBi" },
                    { TINY_SINKS, "attention sinks", "attention sinks" } };
    size_t i;
    int flash;
    for (i = 0; i < sizeof refused / sizeof *refused; i++)
        for (flash = 0; flash < 2; flash++) {
            setup s = setup_of(refused[i].kind, 96, 32);
            s.flash = flash;
            refused_with(refused[i].at, &s, refused[i].words);
        }
}

/* Attention sinks are in nobody's way where nothing is scored. */
static void test_sinks_unscored(void)
{
    const rkv_config streaming = rkv_config_streaming(96);
    setup s = setup_of(TINY_SINKS, 96, 32);
    bed b;
    int i;
    case_begin("attention sinks, StreamingLLM");
    s.options.config = &streaming;
    bed_open(&b, &s);
    for (i = 0; i < 300; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    expect_true("rounds", rkv_llama_get_counters(b.r).n_rounds > 4);
    bed_close(&b);
    case_end();
}

/* The hook sees other parameters than llama.cpp. */
static void open_with_streams(bed *b, const setup *s)
{
    struct llama_context_params params = llama_context_default_params();
    setup plain = *s;
    plain.is_plain = 1;
    bed_open(b, &plain);
    llama_free(b->ctx);
    expect_true("create", rkv_llama_create(&b->r, &s->options) == NULL);
    params.n_ctx = 1024;
    params.n_seq_max = 2;
    params.kv_unified = true;
    rkv_llama_hook(b->r, &params);
    params.kv_unified = false;
    b->ctx = llama_init_from_model(b->model, params);
    expect_int("attach", 0, rkv_llama_attach(b->r, b->ctx), 0);
}

static void test_contexts(void)
{
    struct llama_context_params params = llama_context_default_params();
    setup s = setup_of(TINY_LLAMA, 480, 64);
    bed b;
    refused_with("too few cells", &s, "need 544");
    s = setup_of(TINY_GEMMA3, 32, 64);
    refused_with("a budget within the sliding window", &s, "sliding window");
    s = setup_of(TINY_LLAMA, 96, 32);
    fault.no_cells = 1;
    refused_with("no cells", &s, "no cells");
    fault.no_cells = 0;
    s.options.n_threads = 2;
    fault.threads = 1;
    refused_with("threads that cannot be made", &s, "threads");
    fault.threads = 0;

    case_begin("refused: sequences with streams of their own");
    s = setup_of(TINY_LLAMA, 96, 32);
    bed_open(&b, &s);
    params.n_seq_max = 2;
    params.kv_unified = false;
    rkv_llama_hook(b.r, &params);
    b.r->ctx = NULL;
    refuses("streams", &b, rkv_llama_attach(b.r, b.ctx), "in the context's parameters");
    bed_close(&b);
    open_with_streams(&b, &s);
    refuses("streams in the graph", &b, decode(&b, 0, 0, 10), "streams of their own");
    bed_close(&b);
    case_end();
}

/* ---- graphs ---------------------------------------------------------------------------------- */

/* A callback of the test's own renames what the adapter looks for. It comes after the adapter's:
 * the first layer is seen under its name, unless a decode without the adapter goes before. */
static bool rename_cache(struct ggml_tensor *t, bool ask, void *user)
{
    const char *prefix = user;
    if (ask && t->op == GGML_OP_SET_ROWS) {
        struct ggml_tensor *root = t;
        while (root->view_src) root = root->view_src;
        if (strncmp(root->name, prefix, strlen(prefix)) == 0) root->name[0] = 'x';
    }
    return !ask;
}

static void refused_renamed(const char *at, const char *prefix, int decode_before,
                            const char *words)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    char name[16];
    bed b;
    case_begin("refused: %s", at);
    snprintf(name, sizeof name, "%s", prefix);
    s.other = rename_cache;
    s.other_user = name;
    bed_open(&b, &s);
    if (decode_before) {
        llama_token token = 1;
        llama_decode(b.ctx, llama_batch_get_one(&token, 1));
        llama_memory_clear(llama_get_memory(b.ctx), true);
    }
    refuses(at, &b, decode(&b, 0, 0, 10), words);
    bed_close(&b);
    case_end();
}

static void test_graphs(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    struct ggml_tensor *keys;
    bed b;
    refused_renamed("other names of keys", "cache_k_l", 0, "was not found");
    refused_renamed("no keys at all", "cache_k_l", 1, "no node stores keys");
    refused_renamed("no values", "cache_v_l", 1, "the values of a layer");
    case_begin("refused: the names of keys change between two decodes");
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 10);
    keys = b.r->layers[0].keys;
    keys->name[0] = 'x';
    refuses("cells", &b, decode(&b, 0, 10, 1), "the cells of the batch were not found");
    keys->name[0] = 'c';
    expect_int("taken back", 0, rkv_llama_live(b.r, 0), 10);
    expect_decode(&b, 0, 10, 1);
    bed_close(&b);
    case_end();
}

static void doctored(bed *b, const char *words)
{
    const char *said = rkvli_check_graph(b->r);
    expect_said(said, words);
    b->r->is_checked = 0;
    refuses("self-test", b, rkvli_self_test(b->r), words);
    b->r->is_checked = 1;
}

/* What no tiny model has: one number is changed after a first decode, then the graph is checked
 * again. */
static void test_doctored(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    rkvli_layer *layer;
    bed b;
    case_begin("refused: what only a graph shows");
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 10);
    layer = &b.r->layers[1];
    expect_true("as it is", rkvli_check_graph(b.r) == NULL);
    layer->n_attended++;
    doctored(&b, "share keys");
    layer->n_attended--;
    layer->heads++;
    doctored(&b, "shapes");
    layer->heads--;
    layer->scale = 0;
    doctored(&b, "scale");
    layer->scale = 1;
    b.r->part.n_attention++;
    doctored(&b, "without cached keys");
    b.r->part.n_attention--;
    b.r->is_broken = 1;
    doctored(&b, "another form than is looked for");
    b.r->is_broken = 0;
    b.r->n_groups = 2;
    doctored(&b, "more than one cache");
    b.r->n_groups = 1;
    b.r->n_swa = 32; /* a model with windows in all layers ends llama-cpp-python 0.3.20 */
    doctored(&b, "all layers have a sliding window");
    b.r->n_swa = 0;
    b.r->n_cells += 512;
    b.r->is_checked = 0;
    refuses("cells", &b, rkvli_self_test(b.r), "fewer cells than the context says");
    b.r->n_cells -= 512;
    expect_int("as it was", 0, rkvli_self_test(b.r), 0);
    bed_close(&b);
    case_end();
}

/* ---- rotary embeddings that cannot be turned back -------------------------------------------- */

/* A node that turns rows of 32 numbers, as llama.cpp writes it. */
static struct ggml_tensor rope_node(int dims, int mode, float base, float share_of_yarn)
{
    struct ggml_tensor t;
    const int32_t whole[5] = { 0, dims, mode, 0, 0 };
    const float real[3] = { base, 1, share_of_yarn };
    memset(&t, 0, sizeof t);
    t.op = GGML_OP_ROPE;
    t.ne[0] = 32;
    memcpy(t.op_params, whole, sizeof whole);
    memcpy((char *)t.op_params + sizeof whole, real, sizeof real);
    return t;
}

/* The first layer's keys are stored as this node leaves them. */
static void refuses_node(bed *b, const struct ggml_tensor *node, const char *words)
{
    rkvli_layer *layer = &b->r->layers[0], old = *layer;
    layer->frequencies = NULL;
    layer->rope_fault = NULL;
    rkvli_see_rope(layer, node);
    doctored(b, words);
    free(layer->frequencies);
    *layer = old;
}

static void test_ropes(void)
{
    const rkv_config memory = rkv_config_memory_traces(96);
    setup s = setup_of(TINY_LLAMA, 96, 32);
    struct ggml_tensor node, scaled, factors;
    rkvli_layer layer;
    bed b;
    s.options.config = &memory;
    case_begin("refused: rotary embeddings that cannot be turned back");
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 10);
    node = rope_node(32, GGML_ROPE_TYPE_MROPE, 10000, 0);
    refuses_node(&b, &node, "does not know the rotary embedding");
    node = rope_node(32, GGML_ROPE_TYPE_NEOX, 10000, 1);
    refuses_node(&b, &node, "YaRN");
    node = rope_node(32, GGML_ROPE_TYPE_NEOX, 10000, 0);
    memset(&factors, 0, sizeof factors);
    factors.type = GGML_TYPE_F16;
    node.src[2] = &factors;
    refuses_node(&b, &node, "cannot be read");
    node.src[2] = NULL;
    node.ne[0] = 64;
    refuses_node(&b, &node, "whole heads");
    node.ne[0] = 32;
    memset(&scaled, 0, sizeof scaled);
    scaled.op = GGML_OP_RMS_NORM;
    scaled.src[0] = &node;
    refuses_node(&b, &scaled, "changed before they are stored");
    memset(&layer, 0, sizeof layer);
    scaled.op =
        GGML_OP_MUL_MAT; /* into another basis, as quantised caches of real models have it */
    scaled.src[1] = &node;
    refuses_node(&b, &scaled, "quantised caches");
    scaled.src[1] = NULL; /* a projection alone: these keys are not turned */
    rkvli_see_rope(&layer, &scaled);
    expect_true("no rotary embedding", layer.rope.pairing == RKV_ROPE_NONE && !layer.rope_fault);
    bed_close(&b);
    case_end();
}

/* ---- rounds ---------------------------------------------------------------------------------- */

static void bad_score(void *user, llama_seq_id seq, int n, const int32_t *positions, float *scores)
{
    int i;
    (void)user;
    (void)seq;
    (void)positions;
    for (i = 0; i < n; i++) scores[i] = (float)NAN;
}

static void test_rounds(void)
{
    setup s = setup_of(TINY_LLAMA, 64, 32);
    struct ggml_tensor odd;
    rkvli_layer layer;
    bed b;
    case_begin("refused: rounds");
    s.n_sequences = 2;
    s.options.score = bad_score;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 80);
    refuses("scores that are no numbers", &b, rkv_llama_compress(b.r, 0), "a round of sequence 0");
    expect_int("nothing is evicted", 0, rkv_llama_live(b.r, 0), 80);
    b.r->method = RKVLI_SCORED;
    expect_int("pins", 0, rkv_llama_pin(b.r, 0, 0, 70), 0);
    refuses("too many pins", &b, rkv_llama_compress(b.r, 0),
            "leave none to choose in a budget of 64");
    expect_int("unpin", 0, rkv_llama_unpin(b.r, 0, 0, -1), 0);
    b.r->is_undecided = 1;
    refuses("two caches", &b, rkv_llama_compress(b.r, 0), "cannot be told apart");
    b.r->is_undecided = 0;
    layer = b.r->layers[0];
    odd = *layer.keys;
    odd.type = GGML_TYPE_I32;
    layer.keys = &odd;
    refuses("integers", &b, rkvli_copy_keys(b.r, &layer, &b.r->sequences[0]),
            "cannot be converted");
    fault.seq_rm = 1;
    refuses("llama_memory_seq_rm", &b, rkv_llama_compress(b.r, 0), "refused to free cells");
    fault.seq_rm = 0;
    refuses("after that", &b, decode(&b, 0, 80, 1), "in doubt");
    bed_close(&b);
    case_end();
}

/* ---- misuse ---------------------------------------------------------------------------------- */

static bool abort_at_once(void *user)
{
    const int *is_on = user;
    return *is_on != 0;
}

static bool break_adapter(struct ggml_tensor *t, bool ask, void *user)
{
    rkv_llama **r = user;
    (void)t;
    if (*r) (*r)->is_broken = 1;
    return !ask;
}

static void test_batches(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    int32_t none = 0;
    llama_token token = 0;
    llama_seq_id seq = 0, *seqs = &seq;
    struct llama_batch batch = { 0 };
    rkv_llama *to_break = NULL;
    int is_aborting = 1;
    bed b;
    case_begin("refused: batches");
    s.n_sequences = 2;
    s.n_ctx = 256;
    s.other = break_adapter;
    s.other_user = &to_break;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 10);
    fails("a gap", &b, decode(&b, 0, 11, 1), -1, "where 10 is next");
    fails("again", &b, decode(&b, 0, 9, 1), -1, "where 10 is next");
    fails("no such sequence", &b, decode(&b, 2, 0, 1), -1, "there is no sequence 2");
    fails("no tokens", &b, decode(&b, 0, 10, 0), -1, "no tokens");
    batch.n_tokens = 1;
    batch.token = &token;
    batch.n_seq_id = &none;
    batch.seq_id = &seqs;
    fails("no sequence", &b, rkv_llama_decode(b.r, batch), -1, "belongs to no sequence");
    llama_set_abort_callback(b.ctx, abort_at_once, &is_aborting);
    fails("aborted", &b, decode(&b, 0, 10, 1), 2, "llama_decode returned 2");
    is_aborting = 0;
    b.r->owners[10] = 1;
    refuses("a cell in use", &b, decode(&b, 0, 10, 1), "which is not free");
    b.r->owners[10] = 0;
    to_break = b.r;
    refuses("another form", &b, decode(&b, 0, 10, 1), "another form than before");
    to_break = NULL;
    bed_close(&b);
    s.options.budget = -1;
    bed_open(&b, &s);
    expect_decode(&b, 0, 0, 256);
    fails("no cells", &b, decode(&b, 0, 256, 1), RKV_LLAMA_NO_CELLS, "all 256 cells are in use");
    expect_int("taken back", 0, rkv_llama_live(b.r, 0), 256);
    bed_close(&b);
    case_end();
}

static void test_misuse(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32);
    bed b, c;
    int i;
    case_begin("refused: misuse");
    s.n_sequences = 2;
    bed_open(&b, &s);
    bed_open(&c, &s);
    refuses("attach", &b, rkv_llama_attach(b.r, b.ctx), "already");
    c.r->ctx = NULL;
    expect_decode(&b, 0, 0, 10);
    refuses("a context in use", &c, rkv_llama_attach(c.r, b.ctx), "not empty");
    refuses("decode", &c, decode(&c, 0, 0, 1), "attach comes first");
    refuses("clear", &c, rkv_llama_clear(c.r), "attach comes first");
    refuses("pin", &c, rkv_llama_pin(c.r, 0, 0, 1), "attach comes first");
    refuses("seq_rm", &c, rkv_llama_seq_rm(c.r, 0, 0, 1), "attach comes first");
    refuses("seq_rm", &b, rkv_llama_seq_rm(b.r, 5, -1, -1), "no such sequence");
    refuses("seq_cp", &b, rkv_llama_seq_cp(b.r, 0, 7, -1, -1), "no such sequence");
    refuses("seq_cp", &b, rkv_llama_seq_cp(b.r, 1, 0, -1, -1), "not empty");
    refuses("seq_keep", &b, rkv_llama_seq_keep(b.r, -1), "no such sequence");
    refuses("pin", &b, rkv_llama_pin(b.r, 2, 0, 1), "no such sequence");
    refuses("compress", &b, rkv_llama_compress(b.r, 2), "no such sequence");
    refuses("load", &b, rkv_llama_load(b.r, 2, "", 0), "no such sequence");
    fault.seq_rm = 1;
    refuses("llama_memory_seq_rm", &b, rkv_llama_seq_rm(b.r, 0, 5, -1), "seq_rm refused");
    fault.seq_rm = 0;
    for (i = 10; i < 200; i++)
        if (!expect_decode(&b, 0, i, 1)) break;
    refuses("too far back", &b, rkv_llama_seq_rm(b.r, 0, 20, -1), "cannot be taken back");
    llama_memory_seq_rm(llama_get_memory(b.ctx), 0, 198, -1);
    refuses("memory changed", &b, decode(&b, 0, 200, 1), "behind rkv_llama's back");
    expect_int("clear", 0, rkv_llama_clear(b.r), 0);
    expect_decode(&b, 0, 0, 10);
    bed_close(&c);
    bed_close(&b);
    case_end();
}

/* ---- saved states ---------------------------------------------------------------------------- */

static void refuses_state(bed *b, unsigned char *bytes, size_t n, const char *words)
{
    refuses("load", b, rkv_llama_load(b->r, 0, bytes, n), words);
    expect_int("the sequence is empty", 0, rkv_llama_live(b->r, 0), 0);
}

/* Changes one bit and makes the checksum right again. */
static void forge(unsigned char *bytes, size_t n, size_t at)
{
    rkvli_header header;
    bytes[at] ^= 1;
    memcpy(&header, bytes, sizeof header);
    header.checksum = rkvli_hash(0xcbf29ce484222325u, bytes + sizeof header, n - sizeof header);
    memcpy(bytes, &header, sizeof header);
}

static void test_states(void)
{
    setup s = setup_of(TINY_LLAMA, 96, 32), small = setup_of(TINY_LLAMA, 64, 16);
    setup qwen = setup_of(TINY_QWEN3, 96, 32);
    const rkv_config memory = rkv_config_memory_prose(96);
    unsigned char *bytes;
    size_t n, hashes;
    bed b, other;
    case_begin("refused: saved states");
    s.n_sequences = 2;
    bed_open(&b, &s);
    refuses("nothing yet", &b, rkv_llama_save(b.r, 0, &b, 0), "nothing has been decoded");
    expect_decode(&b, 0, 0, 120);
    n = rkv_llama_save_size(b.r, 0);
    bytes = alloc_checked(n);
    refuses("too few bytes", &b, rkv_llama_save(b.r, 0, bytes, n - 1), "too few bytes");
    fault.state_get = 1;
    refuses("get_data", &b, rkv_llama_save(b.r, 0, bytes, n), "get_data failed");
    fault.state_get = 0;
    expect_int("save", 0, rkv_llama_save(b.r, 0, bytes, n), 0);
    refuses_state(&b, bytes, 7, "cut off");
    refuses_state(&b, bytes, n - 1, "cut off");
    bytes[0] ^= 1;
    refuses_state(&b, bytes, n, "not a state");
    bytes[0] ^= 1;
    bytes[n - 1] ^= 1;
    refuses_state(&b, bytes, n, "damaged");
    bytes[n - 1] ^= 1;
    hashes = sizeof(rkvli_header) + 120 * (2 * sizeof(int32_t) + 1) +
             (size_t)b.r->ring * sizeof(int32_t);
    forge(bytes, n, hashes);
    refuses_state(&b, bytes, n, "other cells than expected");
    forge(bytes, n, hashes);
    fault.state_set = 1;
    refuses_state(&b, bytes, n, "set_data failed");
    fault.state_set = 0;
    fault.is_elsewhere = 1;
    refuses_state(&b, bytes, n, "restored other positions");
    fault.is_elsewhere = 0;
    expect_int("as it was", 0, rkv_llama_load(b.r, 0, bytes, n), 0);
    rkv_llama_clear(b.r);
    expect_decode(&b, 1, 0, 10);
    refuses_state(&b, bytes, n, "another sequence holds tokens");
    bed_open(&other, &small);
    refuses_state(&other, bytes, n, "more tokens than there are cells for");
    bed_close(&other);
    bed_open(&other, &qwen);
    refuses_state(&other, bytes, n, "another model");
    bed_close(&other);
    s.options.config = &memory;
    bed_open(&other, &s);
    refuses_state(&other, bytes, n, "another policy");
    bed_close(&other);
    small = setup_of(TINY_GEMMA3, 96, 32);
    small.n_ctx = 256;
    bed_open(&other, &small);
    expect_decode(&other, 0, 0, 10);
    refuses("a short sequence", &other, rkv_llama_save(other.r, 0, bytes, n),
            "longer than the sliding window");
    refuses_state(&other, bytes, n, "longer than the sliding window");
    bed_close(&other);
    bed_close(&b);
    free(bytes);
    case_end();
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* From nothing to a saved state, with the n-th allocation failing. Returns whether one did. */
static int run_short(struct llama_model *model, int n)
{
    struct llama_context_params params = llama_context_default_params();
    const setup s = setup_of(TINY_LLAMA, 64, 32);
    const rkv_config configs[2] = { rkv_config_memory_traces(64), rkv_config_triattention(64) };
    llama_token tokens[150];
    unsigned char *bytes = NULL;
    const char *said;
    struct llama_context *ctx;
    rkv_llama *r;
    int i, status;
    rkv_llama_options options = s.options;
    for (i = 0; i < 150; i++) tokens[i] = token_at(i);
    options.copy_keys = n & 1;
    if (n % 3) options.config = &configs[n % 3 - 1];
    fault.allocation = n;
    said = rkv_llama_create(&r, &options);
    if (said) {
        expect_said(said, "out of memory");
        return 1;
    }
    params.n_ctx = 256;
    params.n_threads = params.n_threads_batch = 1;
    rkv_llama_hook(r, &params);
    ctx = llama_init_from_model(model, params);
    status = rkv_llama_attach(r, ctx);
    if (!status) status = rkv_llama_decode(r, llama_batch_get_one(tokens, 150));
    if (!status) status = rkv_llama_compress(r, 0);
    if (!status) {
        const size_t size = rkv_llama_save_size(r, 0);
        bytes = alloc_checked(size);
        status = rkv_llama_save(r, 0, bytes, size);
        if (!status) status = rkv_llama_load(r, 0, bytes, size);
    }
    if (status) {
        hear(rkv_llama_error(r));
        expect_int("status", n, status, RKV_LLAMA_REFUSED);
        if (!strstr(rkv_llama_error(r), "out of memory"))
            case_fail("allocation %d: said \"%s\"", n, rkv_llama_error(r));
    }
    free(bytes);
    llama_free(ctx);
    rkv_llama_destroy(r);
    return fault.allocation == 0;
}

static void test_memory(void)
{
    struct llama_model_params params = llama_model_default_params();
    struct llama_model *model;
    int n = 1;
    params.n_gpu_layers = 0;
    model = llama_model_load_from_file(tiny_write(TINY_LLAMA), params);
    case_begin("refused: each allocation fails once");
    expect_true("model", model != NULL);
    while (model && n < 1000 && run_short(model, n)) n++;
    expect_true("allocations", n > 20 && n < 1000);
    fault.allocation = 0;
    llama_model_free(model);
    case_end();
}

/* ---- the source ------------------------------------------------------------------------------ */

static const struct {
    const char *sentence, *reason;
} not_provoked[] = {
    { "options.config: not valid", "every rule of rkv.h has a text of its own" },
};

static int is_excused(const char *sentence)
{
    size_t i;
    for (i = 0; i < sizeof not_provoked / sizeof *not_provoked; i++)
        if (strcmp(not_provoked[i].sentence, sentence) == 0) return 1;
    return 0;
}

/* Does the text follow the format? All pieces between its conversions are there, in order. */
static int follows(const char *text, const char *format)
{
    char piece[LONGEST_SENTENCE];
    while (*format) {
        const size_t n = strcspn(format, "%");
        memcpy(piece, format, n);
        piece[n] = 0;
        text = strstr(text, piece);
        if (!text) return 0;
        text += n;
        format += n;
        if (*format) format += 2; /* %d, %s */
    }
    return 1;
}

static void check_sentence(const char *sentence, int *n)
{
    int i, n_heard_here = 0;
    ++*n;
    for (i = 0; i < n_heard; i++) n_heard_here += follows(heard[i], sentence);
    if (n_heard_here > 0 && is_excused(sentence))
        case_fail("\"%s\" is provoked, but listed as not", sentence);
    if (n_heard_here == 0 && !is_excused(sentence)) case_fail("nothing provokes \"%s\"", sentence);
}

/* A literal of three words or more, with those that continue it, is a sentence. */
static const char *read_sentence(const char *at, char *out)
{
    size_t n = 0;
    while (*at == '"') {
        for (at++; *at && *at != '"'; at++)
            if (n + 1 < LONGEST_SENTENCE) out[n++] = *at;
        if (*at) at++;
        while (isspace((unsigned char)*at)) at++;
    }
    out[n] = 0;
    return at;
}

static void test_source(const char *path)
{
    static char source[1 << 18];
    char sentence[LONGEST_SENTENCE];
    FILE *file = fopen(path, "rb");
    const char *at;
    int n = 0;
    size_t size;
    if (!file) {
        skip("the sentences of rkv_llama.h: there is no file %s", path);
        return;
    }
    case_begin("every sentence of %s", path);
    size = fread(source, 1, sizeof source - 1, file);
    expect_true("the file fits", size < sizeof source - 1);
    fclose(file);
    source[size] = 0;
    for (at = strstr(source, "\n#ifdef RKV_LLAMA_IMPLEMENTATION"); at && *at;) {
        if (strncmp(at, "/*", 2) == 0) { /* a comment */
            at = strstr(at, "*/");
        } else if (*at == '"') {
            const char *blank;
            at = read_sentence(at, sentence);
            blank = strchr(sentence, ' ');
            if (blank && strchr(blank + 1, ' ')) check_sentence(sentence, &n);
        } else {
            at++;
        }
    }
    expect_true("sentences", n > 50);
    case_end();
}

int main(int argc, char **argv)
{
    beds_begin();
    test_options();
    test_models();
    test_sinks_unscored();
    test_contexts();
    test_graphs();
    test_doctored();
    test_ropes();
    test_rounds();
    test_batches();
    test_misuse();
    test_states();
    test_memory();
    test_source(argc > 1 ? argv[1] : "examples/llama/rkv_llama.h");
    return beds_end();
}
