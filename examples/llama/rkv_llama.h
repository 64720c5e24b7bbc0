/* rkv_llama.h - KV cache eviction (R-KV and others) inside an unpatched llama.cpp, in one C header.
 * SPDX-License-Identifier: MIT OR Unlicense      (both texts are at the end of rkv.h)
 *
 * A context with n_ctx cells then generates without end: whenever a sequence holds budget + buffer
 * tokens, one round keeps the best `budget` of them and frees the cells of the others. Everything
 * goes through llama.cpp's public API: an evaluation callback shows keys and queries, and
 * llama_memory_seq_rm frees cells. Positions run on: rotary embedding sees the true ones.
 *
 * In exactly one C file define RKV_IMPLEMENTATION and RKV_LLAMA_IMPLEMENTATION before the include.
 *
 *     rkv_llama_options options = {0};
 *     options.budget = 1024;                                  cells that a sequence keeps
 *     if ((wrong = rkv_llama_create(&r, &options)) != NULL) puts(wrong);
 *     params.n_ctx = 1024 + 128;                              budget + buffer, for each sequence
 *     rkv_llama_hook(r, &params);                             1: before the context is made
 *     ctx = llama_init_from_model(model, params);
 *     if (rkv_llama_attach(r, ctx) != 0) puts(rkv_llama_error(r));                 2: after
 *     if (rkv_llama_decode(r, batch) != 0) puts(rkv_llama_error(r));  3: not llama_decode
 *     token = llama_sampler_sample(sampler, ctx, -1);
 *     ...
 *     llama_free(ctx);
 *     rkv_llama_destroy(r);                                   after the context
 *
 * From attach on, change the context's memory through the calls below only: llama_decode,
 * llama_memory_*, llama_state_*set* behind the adapter's back make its list of cells wrong. It
 * compares positions at every decode and refuses when they differ.
 *
 * The prompt is pinned: the tokens of a sequence's first decode are never evicted, up to about half
 * of the budget (pin_limit). Without that, R-KV evicts facts of the prompt; see rkv_llama_pin.
 *
 * Kept set   One per sequence, for all layers and heads: a cell of llama.cpp is shared by all of
 *            them. Scores are those of rkv.h with RKV_PER_SEQUENCE.
 * Policies   Every one of rkv.h: options.config is any preset. What a policy carries from round to
 *            round (memory, H2O: a few floats per token; TriAttention: running means of queries) is
 *            the adapter's. Policies that turn keys back (memory, TriAttention) learn the rotary
 *            embedding from the graph of the first decode: any base, linear scaling, tables of
 *            factors. YaRN, keys that are changed behind it, and the rotated basis of quantised
 *            caches (where head_dim is a multiple of 64) are refused.
 * Keys       Read in place in host memory, in every type that ggml can convert to f32, flash
 *            attention on or off. Copied to f32, layer by layer, where they lie elsewhere or a
 *            head is not a whole number of blocks. Values are not read.
 * Windows    Sliding-window models (Gemma 3): the layers that see everything are scored. Tokens
 *            inside the window are never evicted, so the budget must be larger than the window.
 * Refused    with a sentence: recurrent and hybrid models, encoders, M-RoPE, ALiBi, attention
 *            sinks, models whose layers share keys, contexts whose sequences have streams of their
 *            own (set kv_unified), and a llama.cpp in whose graph keys and queries are not found
 *            where they are looked for: the first decode makes sure.
 * Threads    One rkv_llama belongs to one context, and to the thread that uses it. A round runs on
 *            llama.cpp's own threads, as many as the context has.
 * Versions   The tests pass with llama-cpp-python 0.3.20 (llama.cpp f49e91787, April 2026) and
 *            0.3.36 (0c1e57098, October 2026). Older ones were not tried.
 * Memory     The adapter allocates: lists of cells; the newest queries of every sequence, in floats
 *            [layers][query heads][votes + window, 16 more at most][head_dim], 32 of each head for
 *            TriAttention; what the policy carries; the workspace of rkv.h.
 */
#ifndef RKV_LLAMA_H
#define RKV_LLAMA_H

#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include "rkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== 1. Types ============================================================================== */

typedef struct rkv_llama rkv_llama;

/* clang-format off */
/* What the calls below return besides what llama_decode returns (0 done, 1 no free cells, 2
 * aborted, other negative numbers: llama.cpp's own errors). */
enum {
    RKV_LLAMA_OK = 0,
    RKV_LLAMA_NO_CELLS = 1,  /* the sequences together need more cells than the context has      */
    RKV_LLAMA_REFUSED = -100 /* rkv_llama_error says why. Nothing was evicted blindly            */
};

/* One round, as shown to rkv_llama_options.observe: after the choice, before cells are freed. The
 * arrays last until the callback returns. It must not call the adapter. */
typedef struct rkv_llama_round {
    llama_seq_id seq;
    int n_tokens, n_kept;
    const int32_t *positions; /* [n_tokens] ascending: the tokens that the sequence holds        */
    const int32_t *cells;     /* [n_tokens] their cells                                          */
    const uint8_t *pins;      /* [n_tokens] not 0: pinned, or shared with another sequence       */
    const int32_t *kept;      /* [n_kept] ascending indices of those that stay                   */
    int n_scores;             /* n_tokens - window; 0 where nothing had to be scored             */
    const float *scores;      /* [n_scores] higher stays                                         */
} rkv_llama_round;

/* Scores tokens by another method: writes scores[i], finite, for the first n_scores of a
 * sequence's tokens; higher stays. positions: [n_scores], ascending. */
typedef void (*rkv_llama_score)(void *user, llama_seq_id seq, int n_scores,
                                const int32_t *positions, float *scores);

/* What to do. Most callers zero it and set budget. */
typedef struct rkv_llama_options {
    int budget;    /* cells that a sequence keeps in a round, pinned tokens and window included;
                      required. -1: nothing is ever evicted (the full cache, counted alike)      */
    int buffer;    /* tokens between two rounds; 0 means 128. A sequence holds at most budget +
                      buffer cells                                                               */
    int pin_limit; /* the most tokens of a prompt that are pinned by themselves, from its start;
                      0 means half of what the window, or a sliding window, leaves of the
                      budget; -1 pins none. Never so many that beside the window none is left
                      to choose                                                                  */
    int n_threads; /* of a round; 0 means config->n_threads if that is above 1, else as many as
                      the context has at attach. They are llama.cpp's own, or those that
                      config->parallel_for lends                                                 */
    const rkv_config *config; /* method: lambda, window, pool, ...; copied. NULL means
                      rkv_config_default. Its budget, scope and error are the adapter's; not
                      RKV_POLICY_OWN_SCORE, whose place `score` takes. pinned
                      counts as pins on a sequence's first tokens, besides the prompt. A protect
                      that does not fit beside the pinned tokens shrinks, so that
                      rkv_config_streaming goes with a pinned prompt; so does H2O's window,
                      to 8 at least                                                             */

    /* Advanced */
    rkv_llama_score score; /* NULL: as config says. rkv_llama_score_random, or your own          */
    void *score_user;
    void (*observe)(void *user, const rkv_llama_round *round); /* may be NULL                    */
    void *observe_user;
    int copy_keys; /* not 0: copies keys to f32 even where they could be read in place           */
} rkv_llama_options;

/* Since attach, over all sequences. Bytes are those of keys and values in the layers that are
 * scored: all layers, or those without a sliding window. */
typedef struct rkv_llama_counters {
    int64_t n_tokens;  /* decoded, ever                                                          */
    int64_t n_rounds;
    int64_t n_evicted; /* tokens                                                                 */
    int64_t n_removes; /* calls of llama_memory_seq_rm that rounds made                          */
    int64_t n_decodes; /* calls of llama_decode: more than yours where batches were split        */
    int n_live;        /* cells in use now                                                       */
    int highest_cell;  /* highest index of a cell ever used; -1: none yet                        */
    int peak_live;     /* most cells in use at a time                                            */
    size_t bytes_per_cell;
    size_t bytes_live;  /* of the cells in use now                                               */
    size_t bytes_saved; /* of those that rounds have freed: a full cache would hold them too     */
    double seconds_rkv, seconds_copies, seconds_removes; /* scoring and choosing; copies of keys
                                                            and queries; llama_memory_seq_rm     */
} rkv_llama_counters;
/* clang-format on */

/* ==== 2. Functions ==========================================================================
 * rkv_llama_error: one sentence about the last call on r that did not return 0 (or true), "" if
 * there was none. Owned by r, until its next call. */

/* rkv_llama_create: makes an adapter for one context. Returns NULL when done, else one sentence
 * (static text) about what is wrong with the options, and *out is NULL.
 * rkv_llama_destroy: after llama_free of its context. Takes NULL. */
const char *rkv_llama_create(rkv_llama **out, const rkv_llama_options *options);
void rkv_llama_destroy(rkv_llama *r);
const char *rkv_llama_error(const rkv_llama *r);

/* rkv_llama_hook: sets params->cb_eval. Call it last before llama_init_from_model. A callback that
 * stands there already is called too.
 * rkv_llama_attach: takes the new, empty context. 0, or RKV_LLAMA_REFUSED: a kind of model or
 * context that is named above, or fewer cells than budget + buffer. */
void rkv_llama_hook(rkv_llama *r, struct llama_context_params *params);
int rkv_llama_attach(rkv_llama *r, struct llama_context *ctx);

/* rkv_llama_decode: llama_decode, with rounds where they are due. Any number of tokens, of any
 * number of sequences; pos, n_seq_id, seq_id and logits may be NULL as in llama_batch_get_one.
 *
 * Rounds are made before tokens are decoded, never behind the last one: what you take back by
 * rkv_llama_seq_rm right after decode (rejected draft tokens) has evicted nothing, as long as the
 * batch fits into the buffer. A larger batch is decoded in parts with rounds in between. Only the
 * outputs of the last part are then where llama_get_logits_ith looks for them; rkv_llama_logits
 * has them all. The last token's are always at llama_get_logits_ith(ctx, -1).
 *
 * Returns what llama_decode returns, or RKV_LLAMA_REFUSED. When it is not 0, no token of the batch
 * is in the cache; tokens that rounds between its parts evicted are gone all the same. */
int rkv_llama_decode(rkv_llama *r, struct llama_batch batch);

/* rkv_llama_logits: the logits of token i of the last decoded batch, [n_vocab], as
 * llama_get_logits_ith; -1 is the last output. NULL if its logits were not asked for. They last
 * until the next decode.
 * rkv_llama_index: token i as an index into the context's own outputs, for llama_sampler_sample;
 * -1 where it was in an earlier part. */
float *rkv_llama_logits(rkv_llama *r, int i);
int rkv_llama_index(const rkv_llama *r, int i);

/* rkv_llama_compress: a round now, if the sequence holds more than its budget: after a prompt, say,
 * or to make room for another sequence. 0, or RKV_LLAMA_REFUSED. */
int rkv_llama_compress(rkv_llama *r, llama_seq_id seq);

/* rkv_llama_pin: tokens at positions [p0, p1) of a sequence are never evicted, those that are still
 * to be decoded included; p1 < 0: to the end of time. Pinned tokens count towards the budget and
 * must leave room in it for the window and, where the config leaves tokens to choose, for one of
 * them: the round that finds them too many is refused.
 *     rkv_llama_pin(r, 0, 0, n_prompt);      before a prompt that comes in several batches
 * The first decode of a sequence does this by itself for its tokens, up to pin_limit, unless
 * rkv_llama_pin or rkv_llama_unpin was called for the sequence before. 0, or RKV_LLAMA_REFUSED.
 * rkv_llama_unpin: takes that back. */
int rkv_llama_pin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);
int rkv_llama_unpin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);

/* In place of llama_memory_seq_rm, _cp, _keep and llama_memory_clear; p0 < 0 means from the start,
 * p1 < 0 to the end. There is no _add and no _div: a shift would rotate keys and is not needed.
 *   rm     takes back tokens. The end of a sequence can be taken back up to the tokens that the
 *          last round could not evict (window, protect), or all of it; further back the tokens
 *          before p0 are no longer all there, and the call is refused: clear and decode again.
 *          Then fewer queries may vote in the next round than usual. What rounds have remembered of
 *          other tokens because of those that are taken back stays. Rejected drafts leave no trace;
 *          with TriAttention those of up to 32 tokens, the means keep the queries of larger ones.
 *   cp     both sequences then share cells; a shared cell counts in the budget of each and is
 *          never evicted while two hold it. dst must be empty; it gets a copy of what the policy
 *          carries.
 *   keep   forgets all sequences but one.        clear: forgets everything.
 * 0, or RKV_LLAMA_REFUSED and nothing changed. */
int rkv_llama_seq_rm(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1);
int rkv_llama_seq_cp(rkv_llama *r, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
int rkv_llama_seq_keep(rkv_llama *r, llama_seq_id seq);
int rkv_llama_clear(rkv_llama *r);

/* A sequence as bytes: llama_state_seq_get_data's, and before them what the adapter knows
 * (positions, pins, queries, what the policy carries): later rounds go on as if nothing had
 * happened.
 *   save_size   bytes that save writes
 *   save        0, or RKV_LLAMA_REFUSED when bytes are fewer
 *   load        into a context in which no other sequence holds tokens; what `seq` held is
 *               forgotten. The model, the types of the cache, the policy and its window and votes
 *               must be the same; budget and buffer may differ as long as the tokens fit. With
 *               sliding windows, and caches of one size, only after a sequence has been longer than
 *               the window. RKV_LLAMA_REFUSED: damaged bytes, another model, other sequences there;
 *               the sequence is then empty. */
size_t rkv_llama_save_size(rkv_llama *r, llama_seq_id seq);
int rkv_llama_save(rkv_llama *r, llama_seq_id seq, void *memory, size_t bytes);
int rkv_llama_load(rkv_llama *r, llama_seq_id seq, const void *memory, size_t bytes);

/* rkv_llama_live: cells that a sequence holds. rkv_llama_position: of its next token.
 * rkv_llama_positions: of the tokens it holds, [rkv_llama_live] ascending, until the next call. */
int rkv_llama_live(const rkv_llama *r, llama_seq_id seq);
llama_pos rkv_llama_position(const rkv_llama *r, llama_seq_id seq);
const int32_t *rkv_llama_positions(const rkv_llama *r, llama_seq_id seq);
rkv_llama_counters rkv_llama_get_counters(const rkv_llama *r);

/* Random eviction, the baseline for every other: options.score. user: the generator's state, a
 * uint64_t of yours that holds the seed. */
void rkv_llama_score_random(void *user, llama_seq_id seq, int n_scores, const int32_t *positions,
                            float *scores);

#ifdef __cplusplus
}
#endif

/* ---- callers need read no further ---------------------------------------------------------- */

#endif /* RKV_LLAMA_H */

#ifdef RKV_LLAMA_IMPLEMENTATION
#undef RKV_LLAMA_IMPLEMENTATION

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ==== 3. Records ============================================================================ */

enum {
    RKVLI_GROUPS = 2,   /* caches of a context: one, or with sliding windows two              */
    RKVLI_CHAIN = 8,    /* steps from an operand back to the tensor of the cache               */
    RKVLI_PENDING = 32, /* newest queries that have not entered the running means yet         */
    RKVLI_MAX_TOKENS = 1 << 28
};

/* One attention layer, as the graph shows it. */
typedef struct rkvli_layer {
    int il, group;
    struct ggml_tensor *keys;   /* root: [kv_heads * dim][cells]                                 */
    struct ggml_tensor *values; /* root; for the byte counts                                     */
    int kv_heads, heads, dim;   /* dim 0: its attention has not been seen                        */
    float scale, softcap, max_bias;
    int has_sinks, n_attended; /* attention nodes in the ubatch                                 */
    float *queries;            /* [sequences][heads][ring][dim]                                 */
    rkv_rope rope;
    float *frequencies;     /* of rope */
    int rope_row;           /* numbers in a row that the graph turns; 0: it turns none           */
    const char *rope_fault; /* why keys cannot be turned back; NULL: they can                    */
    float *state;           /* [sequences][kv_heads][floats][stride], as rkv_layer.state         */
    float *means; /* [2][sequences][mean floats]; the second as they were before the batch       */
} rkvli_layer;

typedef enum rkvli_pinning { RKVLI_PIN_NOT_YET, RKVLI_PIN_PROMPT, RKVLI_PIN_CALLER } rkvli_pinning;

/* What the adapter knows of a sequence. Arrays have `capacity` entries, `n` are in use. */
typedef struct rkvli_sequence {
    int n, capacity;
    int32_t *positions; /* ascending                                                            */
    int32_t *cells[RKVLI_GROUPS];
    uint8_t *pins;
    llama_pos next;  /* position of the next token                                           */
    llama_pos reach; /* rounds have evicted nothing from here on                             */
    rkvli_pinning pinning;
    llama_pos pin_begin, pin_end; /* of tokens still to come                                    */
    int64_t n_evicted;
    int n_new; /* newest tokens, which were no part of a round yet                              */
    int32_t *query_positions; /* [ring]: whose query is in that slot; -1: nobody's              */
    llama_pos averaged; /* the means of queries hold those of tokens before this position       */
    llama_pos averaged_before; /* as it was before the batch                                    */
    /* While a batch is decoded: its tokens that are still to come, those of the part under way,
     * and the position of the first of the batch. */
    int is_in_batch, n_wanted, n_part;
    llama_pos first;
} rkvli_sequence;

typedef enum rkvli_method {
    RKVLI_SCORED,  /* by rkv_score                                                              */
    RKVLI_NEWEST,  /* pinned and protected tokens fill the budget: the newest stay              */
    RKVLI_CALLBACK /* by options.score                                                          */
} rkvli_method;

/* The part of a batch that llama_decode works on. */
typedef struct rkvli_part {
    const struct llama_batch *batch;
    int begin, n;
    int n_seen[RKVLI_GROUPS]; /* tokens whose cells have been seen                              */
    int n_ubatches;
    int begin_ubatch[RKVLI_GROUPS];
    int32_t *cells[RKVLI_GROUPS]; /* [n]                                                        */
    int wants_queries, n_attention;
} rkvli_part;

struct rkv_llama {
    rkv_llama_options options;
    rkv_config config;
    rkv_error why; /* of the last call of rkv.h */
    rkvli_method method;
    int budget, buffer, pin_limit, ring, keeps_all;
    int n_floats, stride; /* of state: floats a row, rows of a plane; 0: there is none           */
    int has_means, needs_rope;
    char error[512];

    struct llama_context *ctx;
    llama_memory_t memory;
    int n_swa, n_vocab, n_embd, n_cells, max_batch, is_checked, is_broken;
    int is_short; /* the callback was out of memory                                             */
    int streams_wanted; /* kv_unified was not set                                              */
    ggml_backend_sched_eval_callback other; /* that stood in the parameters                     */
    void *other_user;
    int is_ours, is_others; /* who asked for the node under way                                */

    rkvli_layer *layers; /* in the order of the graph                                          */
    int n_layers, max_layers, n_groups;
    int full, is_undecided; /* the group that is scored; whether it is known which that is      */
    const struct ggml_tensor *group_cells[RKVLI_GROUPS]; /* of the graph under way              */
    rkvli_sequence *sequences;
    int n_sequences;
    uint16_t *owners; /* [n_cells]: sequences that hold a cell                                  */
    int n_used;

    rkvli_part part;
    llama_pos *positions; /* of the batch that is decoded, filled in                            */
    int8_t *outputs;
    int32_t *cells; /* [groups][n]                                                              */
    llama_seq_id **seq_ids;
    int32_t *n_seq_ids;
    int max_tokens, n_tokens, last_begin;
    int *saved_rows; /* [n_tokens]: row in `saved` of a token's logits; -1: none             */
    float *saved;    /* logits of the parts before the last                                  */
    size_t saved_floats;
    int n_saved;

    rkv_layer *views; /* [n_layers]                                                           */
    float *votes;     /* queries of the window, [layers][heads][window][dim]                  */
    float *scores, *sum, *rows;
    float *state_before; /* of the sequence, all layers, before the round                       */
    int32_t *kept;
    uint8_t *round_pins;
    rkv_run *runs;
    int max_round;
    size_t rows_floats;
    void *workspace;
    size_t workspace_bytes;
    unsigned char *raw;
    size_t raw_bytes;
    /* Threads of rounds: a graph of one node, and the tasks that it does. */
    ggml_backend_t cpu;
    struct ggml_context *graph_memory;
    struct ggml_cgraph *graph;
    void (*task)(void *arg, int index);
    void *task_arg;
    int n_tasks;
    rkv_llama_counters counters;
};

/* ==== 4. Helpers ============================================================================ */

#ifdef __GNUC__
__attribute__((format(printf, 3, 4)))
#endif
static int
rkvli_say(rkv_llama *r, int status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(r->error, sizeof r->error, format, list);
    va_end(list);
    return status;
}

static int rkvli_refuse(rkv_llama *r, const char *sentence)
{
    return rkvli_say(r, RKV_LLAMA_REFUSED, "%s", sentence);
}

static int rkvli_no_memory(rkv_llama *r)
{
    return rkvli_refuse(r, "out of memory");
}

/* Makes room for n elements, with some to spare; keeps what is there. 0: out of memory. */
static int rkvli_grow(void *array, size_t *capacity, size_t n, size_t size)
{
    void *old, *more;
    size_t wanted = n + n / 2 + 16;
    if (n <= *capacity) return 1;
    if (n > SIZE_MAX / 4 / size) return 0;
    memcpy(&old, array, sizeof old);
    more = realloc(old, wanted * size);
    if (!more) return 0;
    memcpy(array, &more, sizeof more);
    *capacity = wanted;
    return 1;
}

static double rkvli_seconds(void)
{
    return 1e-6 * (double)ggml_time_us();
}

static const struct ggml_tensor *rkvli_root(const struct ggml_tensor *t)
{
    while (t && t->view_src) t = t->view_src;
    return t;
}

static int rkvli_is_cache(const struct ggml_tensor *t, const char *prefix)
{
    return t && t->op == GGML_OP_NONE && strncmp(t->name, prefix, strlen(prefix)) == 0;
}

/* The cache's key tensor behind an attention operand: a view of it, or a cast of a view, whose name
 * also begins with that of the cache. NULL: there is none. */
static struct ggml_tensor *rkvli_keys_behind(const struct ggml_tensor *t)
{
    int i;
    for (i = 0; t && i < RKVLI_CHAIN; i++) {
        const struct ggml_tensor *root = rkvli_root(t);
        if (rkvli_is_cache(root, "cache_k_l")) return (struct ggml_tensor *)(uintptr_t)root;
        t = root->src[0];
    }
    return NULL;
}

static rkvli_layer *rkvli_find_layer(rkv_llama *r, const struct ggml_tensor *keys)
{
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].keys == keys) return &r->layers[i];
    return NULL;
}

static int rkvli_is_host(const struct ggml_tensor *t)
{
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return buffer && ggml_backend_buffer_is_host(buffer);
}

/* A sequence gives up the cell of its token i. */
static void rkvli_release(rkv_llama *r, rkvli_sequence *s, int i)
{
    const int cell = s->cells[r->full][i];
    if (--r->owners[cell] == 0) r->n_used--;
}

/* Numbers of one sequence in a layer's state. */
static size_t rkvli_state_size(const rkv_llama *r, const rkvli_layer *layer)
{
    return (size_t)layer->kv_heads * (size_t)r->n_floats * (size_t)r->stride;
}

static size_t rkvli_means_size(const rkv_llama *r, const rkvli_layer *layer)
{
    return r->has_means ? rkv_query_means_floats(layer->heads, layer->dim) : 0;
}

static float *rkvli_state(const rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq)
{
    return layer->state ? layer->state + (size_t)seq * rkvli_state_size(r, layer) : NULL;
}

static float *rkvli_means(const rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq)
{
    return layer->means ? layer->means + (size_t)seq * rkvli_means_size(r, layer) : NULL;
}

static void rkvli_forget_queries(rkv_llama *r, rkvli_sequence *s, llama_pos from)
{
    int i;
    for (i = 0; s->query_positions && i < r->ring; i++)
        if (s->query_positions[i] >= from) s->query_positions[i] = -1;
}

/* An empty sequence: no new tokens, no means of queries. State needs no first value. */
static void rkvli_forget_carried(rkv_llama *r, rkvli_sequence *s)
{
    int i;
    s->n_new = 0;
    s->averaged = 0;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        if (layer->means)
            memset(rkvli_means(r, layer, (llama_seq_id)(s - r->sequences)), 0,
                   rkvli_means_size(r, layer) * sizeof(float));
    }
}

static void rkvli_reset_sequence(rkv_llama *r, rkvli_sequence *s)
{
    int i;
    for (i = 0; i < s->n; i++) rkvli_release(r, s, i);
    s->n = 0;
    s->next = s->reach = 0;
    s->pinning = RKVLI_PIN_NOT_YET;
    s->pin_begin = s->pin_end = 0;
    s->n_evicted = 0;
    rkvli_forget_carried(r, s);
    rkvli_forget_queries(r, s, INT_MIN);
}

/* Forgets the tokens from position p0 on. */
static void rkvli_truncate(rkv_llama *r, rkvli_sequence *s, llama_pos p0)
{
    for (; s->n > 0 && s->positions[s->n - 1] >= p0; s->n_new -= s->n_new > 0)
        rkvli_release(r, s, --s->n);
    s->next = s->n > 0 ? s->positions[s->n - 1] + 1 : 0;
    if (s->averaged > s->next) s->averaged = s->next;
    rkvli_forget_queries(r, s, p0);
    if (s->n > 0) return;
    rkvli_forget_carried(r, s);
    s->reach = 0;
    s->n_evicted = 0;
    if (s->pinning != RKVLI_PIN_PROMPT) return;
    s->pinning = RKVLI_PIN_NOT_YET;
    s->pin_begin = s->pin_end = 0;
}

static int rkvli_reserve(rkvli_sequence *s, int n)
{
    size_t room[3 + RKVLI_GROUPS];
    int i;
    for (i = 0; i < 3 + RKVLI_GROUPS; i++) room[i] = (size_t)s->capacity;
    if (n <= s->capacity) return 1;
    for (i = 0; i < RKVLI_GROUPS; i++)
        if (!rkvli_grow(&s->cells[i], &room[i], (size_t)n, sizeof(int32_t))) return 0;
    if (!rkvli_grow(&s->positions, &room[2], (size_t)n, sizeof(int32_t)) ||
        !rkvli_grow(&s->pins, &room[3], (size_t)n, 1))
        return 0;
    s->capacity = n; /* the arrays may have more, never fewer */
    return 1;
}

static rkvli_sequence *rkvli_sequence_of(const rkv_llama *r, llama_seq_id seq)
{
    return r->sequences && seq >= 0 && seq < r->n_sequences ? &r->sequences[seq] : NULL;
}

/* ==== 5. The callback =======================================================================
 * Sees every node of the graph before it is computed (ask), and those that it asked for again
 * afterwards. Stores of keys tell the cells, attention nodes the queries. */

/* Behind nodes that leave the numbers of a head as they are. */
static const struct ggml_tensor *rkvli_behind(const struct ggml_tensor *t)
{
    int i;
    for (i = 0; t && i < RKVLI_CHAIN; i++, t = t->src[0]) {
        switch ((int)t->op) {
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP: break;
        default: return t;
        }
    }
    return t;
}

/* Is there a rotary embedding behind this node? The projection of keys ends the search. */
static int rkvli_has_rope(const struct ggml_tensor *t, int depth)
{
    t = rkvli_behind(t);
    if (!t || depth == 0) return 0;
    if (t->op == GGML_OP_ROPE) return 1;
    if (t->op == GGML_OP_MUL_MAT) {
        t = rkvli_behind(t->src[1]);
        return t && t->op == GGML_OP_ROPE;
    }
    return rkvli_has_rope(t->src[0], depth - 1) || rkvli_has_rope(t->src[1], depth - 1);
}

/* The frequencies of a rotary embedding; NULL: unreadable. factors divide them, if any. */
static float *rkvli_frequencies(int n, float base, float scale, const struct ggml_tensor *factors)
{
    float *all, factor = 1;
    int f;
    if (factors && (factors->type != GGML_TYPE_F32 || factors->ne[0] < n || !factors->buffer))
        return NULL;
    all = (float *)calloc((size_t)n, sizeof *all);
    for (f = 0; all && f < n; f++) {
        if (factors)
            ggml_backend_tensor_get(factors, &factor, (size_t)f * sizeof factor, sizeof factor);
        all[f] = (float)(pow((double)base, -(double)f / n) * (double)scale / (double)factor);
    }
    return all;
}

/* What is done to keys before they are stored: `stored` is the operand of the store. */
static void rkvli_see_rope(rkvli_layer *layer, const struct ggml_tensor *stored)
{
    const struct ggml_tensor *t = rkvli_behind(stored);
    int32_t whole[5]; /* nothing, dims, mode, nothing, context of the training */
    float real[3];    /* base, scale, share of YaRN */
    layer->rope.pairing = RKV_ROPE_NONE;
    if (!t || t->op != GGML_OP_ROPE) {
        if (rkvli_has_rope(t, RKVLI_CHAIN))
            layer->rope_fault = "this policy needs keys as the rotary embedding leaves them: here "
                                "they are changed before they are stored (llama.cpp does so in "
                                "quantised caches)";
        return;
    }
    memcpy(whole, t->op_params, sizeof whole);
    memcpy(real, (const char *)t->op_params + sizeof whole, sizeof real);
    layer->rope_row = (int)t->ne[0];
    layer->rope.pairing = whole[2] == GGML_ROPE_TYPE_NEOX ? RKV_ROPE_HALVES : RKV_ROPE_ADJACENT;
    layer->rope.dims = whole[1];
    if ((whole[2] != GGML_ROPE_TYPE_NEOX && whole[2] != GGML_ROPE_TYPE_NORMAL) || whole[1] < 2 ||
        whole[1] % 2 || !(real[0] > 0) || !(real[1] > 0))
        layer->rope_fault = "this policy does not know the rotary embedding of this model";
    else if (real[2] > 0 || real[2] < 0)
        layer->rope_fault = "this policy does not know YaRN, which scales the rotary embedding";
    if (layer->rope_fault) return;
    layer->frequencies = rkvli_frequencies(whole[1] / 2, real[0], real[1], t->src[2]);
    layer->rope.frequencies = layer->frequencies;
    if (!layer->frequencies)
        layer->rope_fault = "the factors of the rotary embedding cannot be read";
}

static rkvli_layer *rkvli_add_layer(rkv_llama *r, const struct ggml_tensor *keys)
{
    size_t capacity = (size_t)r->max_layers;
    rkvli_layer *layer;
    if (!rkvli_grow(&r->layers, &capacity, (size_t)r->n_layers + 1, sizeof *r->layers)) return NULL;
    r->max_layers = (int)capacity;
    layer = &r->layers[r->n_layers++];
    memset(layer, 0, sizeof *layer);
    layer->keys = (struct ggml_tensor *)(uintptr_t)keys;
    layer->il = atoi(keys->name + strlen("cache_k_l"));
    return layer;
}

/* Which cache a store goes to: stores into the same one share their list of cells. */
static int rkvli_group_of(rkv_llama *r, const struct ggml_tensor *cells, int *is_new)
{
    int g;
    *is_new = 0;
    for (g = 0; g < r->n_groups; g++)
        if (r->group_cells[g] == cells) return g;
    *is_new = 1;
    if (r->n_groups == RKVLI_GROUPS) return -1;
    r->group_cells[r->n_groups] = cells;
    return r->n_groups++;
}

/* The first store of a ubatch into a cache: the cells of its tokens, in their order. */
static void rkvli_see_cells(rkv_llama *r, int group, const struct ggml_tensor *cells)
{
    rkvli_part *part = &r->part;
    const int n = (int)cells->ne[0], at = part->n_seen[group];
    int64_t chunk[64];
    int i, j;
    part->begin_ubatch[group] = at;
    part->n_seen[group] = at + n;
    if (group == 0) part->n_ubatches++;
    if (cells->type != GGML_TYPE_I64 || n > part->n - at) {
        r->is_broken = 1;
        return;
    }
    for (i = 0; i < n; i += 64) {
        const int m = n - i < 64 ? n - i : 64;
        ggml_backend_tensor_get(cells, chunk, (size_t)i * 8, (size_t)m * 8);
        for (j = 0; j < m; j++) part->cells[group][at + i + j] = (int32_t)chunk[j];
    }
}

static void rkvli_see_store(rkv_llama *r, const struct ggml_tensor *t)
{
    const struct ggml_tensor *root = rkvli_root(t), *cells = t->src[1];
    rkvli_layer *layer;
    int i, g;
    if (rkvli_is_cache(root, "cache_v_l")) {
        const int il = atoi(root->name + strlen("cache_v_l"));
        for (i = 0; i < r->n_layers && !r->is_checked; i++)
            if (r->layers[i].il == il) r->layers[i].values = (struct ggml_tensor *)(uintptr_t)root;
        return;
    }
    if (!rkvli_is_cache(root, "cache_k_l")) return;
    layer = rkvli_find_layer(r, root);
    if (!layer) {
        int is_new;
        if (r->is_checked) return;
        g = rkvli_group_of(r, cells, &is_new);
        if (g < 0) return; /* more caches than are known: the self-test will tell */
        layer = rkvli_add_layer(r, root);
        if (!layer) {
            r->is_short = 1;
            return;
        }
        layer->group = g;
        rkvli_see_rope(layer, t->src[0]);
    }
    g = layer->group;
    /* A group's first layer opens the ubatch for it. */
    for (i = 0; r->layers[i].group != g;) i++;
    if (layer != &r->layers[i]) return;
    rkvli_see_cells(r, g, cells);
}

/* Without flash attention the logits pass through scale, tanh and scale (a softcap) on their way
 * from the product to the softmax: b * tanh(a * x), times the softmax's own scale. */
static rkvli_layer *rkvli_behind_softmax(rkv_llama *r, const struct ggml_tensor *t, float *before,
                                         float *after, int *is_capped)
{
    int i;
    *before = *after = 1;
    *is_capped = 0;
    for (i = 0, t = t->src[0]; t && i < RKVLI_CHAIN; i++, t = t->src[0]) {
        float factor;
        if (t->op == GGML_OP_MUL_MAT) {
            struct ggml_tensor *keys = rkvli_keys_behind(t->src[0]);
            return keys ? rkvli_find_layer(r, keys) : NULL;
        }
        if (t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_TANH) {
            *is_capped = 1;
        } else if (t->op == GGML_OP_SCALE) {
            memcpy(&factor, t->op_params, sizeof factor);
            if (*is_capped)
                *before *= factor;
            else
                *after *= factor;
        } else if (t->op != GGML_OP_NONE && t->op != GGML_OP_RESHAPE && t->op != GGML_OP_VIEW) {
            return NULL; /* a bias, say */
        }
    }
    return NULL;
}

/* Which cache is scored, and what follows from it: who owns its cells, what they weigh. */
static void rkvli_set_full(rkv_llama *r, int group)
{
    size_t bytes = 0;
    int i, k;
    r->full = group;
    r->n_used = 0;
    memset(r->owners, 0, (size_t)r->n_cells * sizeof *r->owners);
    for (i = 0; i < r->n_sequences; i++)
        for (k = 0; k < r->sequences[i].n; k++)
            if (r->owners[r->sequences[i].cells[group][k]]++ == 0) r->n_used++;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        if (layer->group == group)
            bytes += (ggml_nbytes(layer->keys) + ggml_nbytes(layer->values)) /
                     (size_t)layer->keys->ne[1];
    }
    r->counters.bytes_per_cell = bytes;
}

/* With sliding windows there are two caches. A mask that lets a token see more than a window is
 * that of the other one. The mask must be in memory now: an input that was cast to f16 may be
 * overwritten as soon as the cast is made, and the cast is there once its reader has been computed.
 */
static int rkvli_mask_exceeds(rkv_llama *r, const struct ggml_tensor *mask, int n_swa)
{
    int64_t row, i;
    if (!mask || (mask->type != GGML_TYPE_F32 && mask->type != GGML_TYPE_F16)) return 0;
    if (!rkvli_grow(&r->raw, &r->raw_bytes, mask->nb[1], 1)) {
        r->is_short = 1;
        return 0;
    }
    for (row = 0; row < mask->ne[1]; row++) {
        const size_t width = mask->nb[0];
        int n_visible = 0;
        ggml_backend_tensor_get(mask, r->raw, (size_t)row * mask->nb[1], mask->nb[1]);
        for (i = 0; i < mask->ne[0]; i++) /* minus infinity: the sign is in the last byte */
            n_visible += !(r->raw[(size_t)i * width + width - 1] & 0x80);
        if (n_visible > n_swa) return 1;
    }
    return 0;
}

static void rkvli_see_mask(rkv_llama *r, const rkvli_layer *layer, const struct ggml_tensor *mask)
{
    if (!r->is_undecided || !rkvli_mask_exceeds(r, mask, r->n_swa)) return;
    r->is_undecided = 0;
    rkvli_set_full(r, layer->group);
}

static void rkvli_see_softmax(rkv_llama *r, const struct ggml_tensor *t)
{
    const struct ggml_tensor *mask = rkvli_root(t->src[1]);
    float before, after, params[2];
    int is_capped;
    rkvli_layer *layer;
    if (!mask) return; /* no mask: a router's */
    r->part.n_attention++;
    layer = rkvli_behind_softmax(r, t, &before, &after, &is_capped);
    if (!layer) return;
    if (mask->op == GGML_OP_NONE) rkvli_see_mask(r, layer, mask); /* an input, still to be read */
    if (r->is_checked) return;
    memcpy(params, t->op_params, sizeof params);
    layer->softcap = is_capped ? after * params[0] : 0;
    layer->scale = before * after * params[0];
    layer->max_bias = params[1];
    layer->has_sinks = t->src[2] != NULL;
}

/* An attention node's operands: 1, or 0 if it is none. */
static int rkvli_attention(const struct ggml_tensor *t, const struct ggml_tensor **queries,
                           struct ggml_tensor **keys)
{
    if (t->op != GGML_OP_FLASH_ATTN_EXT && t->op != GGML_OP_MUL_MAT) return 0;
    *queries = t->src[t->op == GGML_OP_FLASH_ATTN_EXT ? 0 : 1];
    *keys = rkvli_keys_behind(t->src[t->op == GGML_OP_FLASH_ATTN_EXT ? 1 : 0]);
    return *keys != NULL;
}

/* What the policy carries from round to round. 0: out of memory. */
static int rkvli_make_carried(const rkv_llama *r, rkvli_layer *layer)
{
    const size_t n = (size_t)r->n_sequences;
    if (layer->kv_heads < 1) return 1; /* the self-test will tell */
    if (r->n_floats) layer->state = (float *)calloc(n, rkvli_state_size(r, layer) * sizeof(float));
    if (r->has_means)
        layer->means = (float *)calloc(2 * n, rkvli_means_size(r, layer) * sizeof(float));
    return (layer->state || !r->n_floats) && (layer->means || !r->has_means);
}

/* What the first decode learns about a layer. */
static void rkvli_describe(rkv_llama *r, rkvli_layer *layer, const struct ggml_tensor *t,
                           const struct ggml_tensor *queries)
{
    float params[3];
    layer->dim = (int)queries->ne[0];
    layer->heads = (int)queries->ne[2];
    layer->kv_heads = layer->dim > 0 ? (int)(layer->keys->ne[0] / layer->dim) : 0;
    layer->queries = (float *)calloc((size_t)r->n_sequences * (size_t)layer->heads,
                                     (size_t)r->ring * (size_t)layer->dim * sizeof(float));
    if (!layer->queries || !rkvli_make_carried(r, layer)) r->is_short = 1;
    if (t->op != GGML_OP_FLASH_ATTN_EXT) return;
    memcpy(params, t->op_params, sizeof params);
    layer->scale = params[0];
    layer->max_bias = params[1];
    layer->softcap = params[2];
    layer->has_sinks = t->src[4] != NULL;
}

static float *rkvli_ring(const rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq, int head)
{
    const size_t rings = (size_t)seq * (size_t)layer->heads + (size_t)head;
    return layer->queries + rings * (size_t)r->ring * (size_t)layer->dim;
}

/* Copies token i's query into the rings of its sequences, if it can still vote. */
static void rkvli_store_query(rkv_llama *r, const rkvli_layer *layer, int i, const char *data,
                              const struct ggml_tensor *queries)
{
    const llama_pos position = r->positions[i];
    const size_t dim = (size_t)layer->dim;
    int k, head;
    for (k = 0; k < r->n_seq_ids[i]; k++) {
        const llama_seq_id seq = r->seq_ids[i][k];
        const rkvli_sequence *s = &r->sequences[seq];
        const int slot = position % r->ring;
        if (s->query_positions[slot] != position) continue;
        for (head = 0; head < layer->heads; head++)
            memcpy(rkvli_ring(r, layer, seq, head) + (size_t)slot * dim,
                   data + (size_t)head * queries->nb[2], dim * sizeof(float));
    }
}

/* ---- Running means of queries. Those of the newest tokens wait in the ring until tokens behind
 * them come: until then a draft can be taken back without a trace. Only where a part of a batch has
 * more tokens than the ring are queries added at once. ---- */

/* Adds n rows of queries, from row `slot` of the view on. Queries that are not finite are left out:
 * the round will find the keys of such a token. */
static void rkvli_average(rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq,
                          const rkv_tensor *queries, int slot, int n, llama_pos position)
{
    (void)rkv_query_means_update(NULL, &r->config, &layer->rope, queries, slot, n, position,
                                 rkvli_means(r, layer, seq));
}

/* Does a sequence have more tokens in this part than its ring can hold? */
static int rkvli_exceeds_ring(const rkv_llama *r, const rkvli_sequence *s)
{
    return r->has_means && s->n_part > r->ring;
}

/* The tokens of a ubatch that are added at once; runs of one sequence in one call. */
static void rkvli_average_ubatch(rkv_llama *r, const rkvli_layer *layer, const char *data,
                                 const struct ggml_tensor *queries)
{
    const int begin = r->part.begin + r->part.begin_ubatch[layer->group];
    const int end = begin + (int)queries->ne[1];
    const double start = rkvli_seconds();
    rkv_tensor rows =
        rkv_tensor_make((void *)(uintptr_t)data, RKV_F32, layer->heads, end - begin, layer->dim);
    int i, n, k;
    rows.token_stride = (int64_t)(queries->nb[1] / sizeof(float));
    rows.head_stride = (int64_t)(queries->nb[2] / sizeof(float));
    for (i = begin; i < end; i += n) {
        for (n = 1; r->n_seq_ids[i] == 1 && i + n < end && r->n_seq_ids[i + n] == 1 &&
                    r->seq_ids[i + n][0] == r->seq_ids[i][0];)
            n++;
        for (k = 0; k < r->n_seq_ids[i]; k++) {
            const llama_seq_id seq = r->seq_ids[i][k];
            if (rkvli_exceeds_ring(r, &r->sequences[seq]))
                rkvli_average(r, layer, seq, &rows, i - begin, n, r->positions[i]);
        }
    }
    r->counters.seconds_rkv += rkvli_seconds() - start;
}

/* Adds the queries that wait in the ring. */
static void rkvli_average_ring(rkv_llama *r, llama_seq_id seq)
{
    rkvli_sequence *s = &r->sequences[seq];
    const double start = rkvli_seconds();
    llama_pos p = s->next - r->ring > s->averaged ? s->next - r->ring : s->averaged;
    int i, n;
    for (; p < s->next; p += n) {
        const int slot = p % r->ring;
        for (n = 0; p + n < s->next && slot + n < r->ring && s->query_positions[slot + n] == p + n;)
            n++;
        for (i = 0; n > 0 && i < r->n_layers; i++) {
            const rkvli_layer *layer = &r->layers[i];
            rkv_tensor ring;
            if (!layer->means || (!r->is_undecided && layer->group != r->full)) continue;
            ring = rkv_tensor_make(rkvli_ring(r, layer, seq, 0), RKV_F32, layer->heads, r->ring,
                                   layer->dim);
            rkvli_average(r, layer, seq, &ring, slot, n, p);
        }
        if (n == 0) n = 1; /* a query that was never seen */
    }
    s->averaged = s->next;
    r->counters.seconds_rkv += rkvli_seconds() - start;
}

static void rkvli_see_queries(rkv_llama *r, rkvli_layer *layer, const struct ggml_tensor *queries)
{
    const rkvli_part *part = &r->part;
    const int n = (int)queries->ne[1], at = part->begin_ubatch[layer->group];
    const char *data = (const char *)queries->data;
    const double start = rkvli_seconds();
    int i;
    layer->n_attended++;
    if (!layer->queries) return;
    if (queries->type != GGML_TYPE_F32 || queries->ne[0] != layer->dim ||
        queries->ne[2] != layer->heads || queries->ne[3] != 1 ||
        n != part->n_seen[layer->group] - at || at + n > part->n) {
        r->is_broken = 1;
        return;
    }
    if (!rkvli_is_host(queries)) {
        const size_t bytes = ggml_nbytes(queries);
        if (!rkvli_grow(&r->raw, &r->raw_bytes, bytes, 1)) {
            r->is_short = 1;
            return;
        }
        ggml_backend_tensor_get(queries, r->raw, 0, bytes);
        data = (const char *)r->raw;
    }
    for (i = 0; i < n; i++)
        rkvli_store_query(r, layer, part->begin + at + i, data + (size_t)i * queries->nb[1],
                          queries);
    r->counters.seconds_copies += rkvli_seconds() - start;
    if (layer->means) rkvli_average_ubatch(r, layer, data, queries);
}

/* Returns whether it wants to see the node again, computed. */
static int rkvli_see(rkv_llama *r, struct ggml_tensor *t, int ask)
{
    const struct ggml_tensor *queries;
    struct ggml_tensor *keys;
    rkvli_layer *layer;
    if (!r->part.batch) return 0; /* not in rkv_llama_decode */
    if (ask && t->op == GGML_OP_SET_ROWS) rkvli_see_store(r, t);
    if (!r->part.wants_queries) return 0;
    if (ask && t->op == GGML_OP_SOFT_MAX && (!r->is_checked || r->is_undecided))
        rkvli_see_softmax(r, t);
    if (ask && t->op == GGML_OP_FLASH_ATTN_EXT) r->part.n_attention++;
    if (!rkvli_attention(t, &queries, &keys)) return 0;
    layer = rkvli_find_layer(r, keys);
    if (!layer) return 0;
    if (!ask && t->op == GGML_OP_FLASH_ATTN_EXT) rkvli_see_mask(r, layer, t->src[3]);
    if (r->is_checked && !r->is_undecided && layer->group != r->full) return 0;
    if (ask && !layer->dim) rkvli_describe(r, layer, t, queries);
    if (!ask) rkvli_see_queries(r, layer, queries);
    return 1;
}

static bool rkvli_callback(struct ggml_tensor *t, bool ask, void *user)
{
    rkv_llama *r = (rkv_llama *)user;
    if (ask) {
        r->is_ours = rkvli_see(r, t, 1);
        r->is_others = r->other && r->other(t, true, r->other_user);
        return r->is_ours || r->is_others;
    }
    if (r->is_ours) rkvli_see(r, t, 0);
    return !r->is_others || r->other(t, false, r->other_user);
}

/* ==== 6. Create, attach ===================================================================== */

static const char *rkvli_check_options(const rkv_llama_options *o)
{
    if (o->budget < -1 || o->budget == 0) return "options.budget: must be at least 1, or -1";
    if (o->buffer < 0) return "options.buffer: must not be negative";
    if (o->budget > RKVLI_MAX_TOKENS || o->buffer > RKVLI_MAX_TOKENS)
        return "options: budget and buffer must be below 2^28";
    if (o->pin_limit < -1) return "options.pin_limit: must be at least -1";
    if (o->n_threads < 0) return "options.n_threads: must not be negative";
    return NULL;
}

/* The rule that the config breaks, as rkv.h tells it, NULL for none. */
static const char *rkvli_check_config(rkv_llama *r)
{
    rkv_layer none = RKV_INIT;
    size_t bytes;
    if (rkv_workspace_size(NULL, &r->config, &none, 0, &bytes) == RKV_OK) return NULL;
    return r->why.rule ? r->why.rule : "options.config: not valid";
}

/* Do pinned and protected tokens fill the budget, as in rkv_config_streaming? Then the newest stay
 * and nobody votes; a window as wide as the budget would leave no place for the prompt. */
static int rkvli_keeps_newest(const rkv_config *c)
{
    const int window = c->window ? c->window : 8;
    return c->pinned + (c->protect > window ? c->protect : window) == c->budget;
}

/* What the policy needs. The ring holds the queries that vote, and some more: that many tokens can
 * be taken back, and as many as before still vote. */
static void rkvli_configure_policy(rkv_llama *r)
{
    const rkv_policy policy = r->config.policy;
    const int spare = r->config.window < 16 ? r->config.window : 16;
    r->ring = r->config.votes + spare;
    if (r->keeps_all) return; /* no rounds */
    r->has_means = policy == RKV_POLICY_TRIATTENTION;
    r->needs_rope =
        r->has_means || policy == RKV_POLICY_MEMORY_TRACES || policy == RKV_POLICY_MEMORY_PROSE;
    if (r->has_means) r->ring = RKVLI_PENDING;
    r->n_floats = rkv_state_floats(&r->config);
    r->stride = r->n_floats ? r->budget + r->buffer : 0;
}

static const char *rkvli_configure(rkv_llama *r)
{
    const rkv_llama_options *o = &r->options;
    r->keeps_all = o->budget < 0;
    r->budget = r->keeps_all ? RKVLI_MAX_TOKENS : o->budget;
    r->buffer = o->buffer ? o->buffer : 128;
    r->config = o->config ? *o->config : rkv_config_default(r->budget);
    if (r->config.window == 0) r->config.window = 8;
    r->method = o->score                         ? RKVLI_CALLBACK
                : rkvli_keeps_newest(&r->config) ? RKVLI_NEWEST
                                                 : RKVLI_SCORED;
    if (r->method == RKVLI_NEWEST) {
        r->config.window = r->budget > 16 ? 8 : 1;
        r->config.protect = 0;
    }
    if (r->method != RKVLI_SCORED) {
        r->config.policy = RKV_POLICY_RKV;
        r->config.votes = 0;
    }
    if (r->config.policy == RKV_POLICY_OWN_SCORE)
        return "options.config: RKV_POLICY_OWN_SCORE needs scores: give options.score";
    if (r->config.votes == 0) r->config.votes = r->config.window;
    r->config.budget = r->budget;
    r->config.scope = RKV_PER_SEQUENCE;
    r->config.error = &r->why;
    r->config.device_error = NULL;
    rkvli_configure_policy(r);
    return rkvli_check_config(r);
}

const char *rkv_llama_create(rkv_llama **out, const rkv_llama_options *options)
{
    const char *wrong;
    rkv_llama *r;
    if (!out) return "rkv_llama_create: out is NULL";
    *out = NULL;
    if (!options) return "rkv_llama_create: options is NULL";
    wrong = rkvli_check_options(options);
    if (wrong) return wrong;
    r = (rkv_llama *)calloc(1, sizeof *r);
    if (!r) return "out of memory";
    r->options = *options;
    wrong = rkvli_configure(r);
    r->options.config = NULL;
    if (wrong) {
        rkv_llama_destroy(r);
        return wrong;
    }
    r->counters.highest_cell = -1;
    *out = r;
    return NULL;
}

void rkv_llama_destroy(rkv_llama *r)
{
    int i, g;
    if (!r) return;
    for (i = 0; i < r->n_layers; i++) {
        free(r->layers[i].queries);
        free(r->layers[i].frequencies);
        free(r->layers[i].state);
        free(r->layers[i].means);
    }
    for (i = 0; r->sequences && i < r->n_sequences; i++) {
        rkvli_sequence *s = &r->sequences[i];
        for (g = 0; g < RKVLI_GROUPS; g++) free(s->cells[g]);
        free(s->positions);
        free(s->pins);
        free(s->query_positions);
    }
    free(r->sequences);
    free(r->layers);
    free(r->owners);
    free(r->positions);
    free(r->outputs);
    free(r->cells);
    free(r->seq_ids);
    free(r->n_seq_ids);
    free(r->saved_rows);
    free(r->saved);
    free(r->views);
    free(r->votes);
    free(r->scores);
    free(r->sum);
    free(r->rows);
    free(r->state_before);
    free(r->kept);
    free(r->round_pins);
    free(r->runs);
    free(r->workspace);
    free(r->raw);
    ggml_backend_free(r->cpu);
    ggml_free(r->graph_memory);
    free(r);
}

const char *rkv_llama_error(const rkv_llama *r)
{
    return r->error;
}

void rkv_llama_hook(rkv_llama *r, struct llama_context_params *params)
{
    r->other = params->cb_eval;
    r->other_user = params->cb_eval_user_data;
    r->streams_wanted = params->n_seq_max > 1 && !params->kv_unified;
    params->cb_eval = rkvli_callback;
    params->cb_eval_user_data = r;
    params->swa_full = false; /* a cache of full size would make the saving void */
}

static const char *rkvli_check_model(const struct llama_model *model)
{
    const enum llama_rope_type rope = llama_model_rope_type(model);
    if (llama_model_is_recurrent(model))
        return "recurrent models have no cache of keys: nothing to evict";
    if (llama_model_is_hybrid(model))
        return "hybrid models are not supported: their recurrent state cannot forget tokens";
    if (llama_model_has_encoder(model)) return "models with an encoder are not supported";
    if (llama_model_is_diffusion(model)) return "diffusion models are not supported";
    if (rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE ||
        rope == LLAMA_ROPE_TYPE_VISION)
        return "models with M-RoPE are not supported: a token has several positions";
    return NULL;
}

static int rkvli_make_sequences(rkv_llama *r)
{
    int i, k;
    r->owners = (uint16_t *)calloc((unsigned)r->n_cells, sizeof *r->owners);
    r->sequences = (rkvli_sequence *)calloc((unsigned)r->n_sequences, sizeof *r->sequences);
    if (!r->owners || !r->sequences) return 0;
    for (i = 0; i < r->n_sequences; i++) {
        int32_t *slots = (int32_t *)malloc((size_t)r->ring * sizeof *slots);
        r->sequences[i].query_positions = slots;
        if (!slots) return 0;
        for (k = 0; k < r->ring; k++) slots[k] = -1;
    }
    return 1;
}

/* Do budget, buffer and window fit the context? */
static int rkvli_check_sizes(rkv_llama *r)
{
    if (r->n_sequences < 1 || r->n_cells < 1) return rkvli_refuse(r, "the context has no cells");
    if (r->keeps_all) return RKV_LLAMA_OK;
    if (r->n_cells < r->budget + r->buffer)
        return rkvli_say(r, RKV_LLAMA_REFUSED,
                         "the context has %d cells; budget %d and buffer %d need %d", r->n_cells,
                         r->budget, r->buffer, r->budget + r->buffer);
    if (r->n_swa >= r->budget)
        return rkvli_say(r, RKV_LLAMA_REFUSED,
                         "the model's sliding window is %d tokens, which are never evicted: the "
                         "budget (%d) must be larger",
                         r->n_swa, r->budget);
    return RKV_LLAMA_OK;
}

/* How much of a prompt is pinned: one token is left to choose beside it and what must stay. */
static int rkvli_pin_limit(const rkv_llama *r)
{
    const int tail = r->config.window > r->n_swa ? r->config.window : r->n_swa;
    const int left = r->budget - tail, most = left > 0 ? left - 1 : 0;
    const int wanted = r->options.pin_limit;
    if (wanted == 0) return left / 2;
    return wanted < most ? wanted : most;
}

/* ---- Threads of rounds: llama.cpp's own, as a node of a graph. Behind a decode they wait in a
 * loop for their next graph, with OpenMP for longer than a round lasts: threads beside them would
 * get half of their processors. ---- */

static void rkvli_run_tasks(struct ggml_tensor *node, int thread, int n_threads, void *user)
{
    const rkv_llama *r = (const rkv_llama *)user;
    int i;
    (void)node;
    for (i = thread; i < r->n_tasks; i += n_threads) r->task(r->task_arg, i);
}

/* An rkv_parallel_for. */
static void rkvli_parallel_for(void *pool, int n_tasks, void (*task)(void *arg, int index),
                               void *arg)
{
    rkv_llama *r = (rkv_llama *)pool;
    int i;
    r->task = task;
    r->task_arg = arg;
    r->n_tasks = n_tasks;
    if (ggml_backend_graph_compute(r->cpu, r->graph) == GGML_STATUS_SUCCESS) return;
    for (i = 0; i < n_tasks; i++) task(arg, i); /* it was out of memory before the first task */
}

static int rkvli_set_threads(ggml_backend_t cpu, int n)
{
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    void *address = ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    ggml_backend_set_n_threads_t set;
    if (!address) return 0;
    memcpy(&set, &address, sizeof set); /* ISO C has no cast from void * to a function */
    set(cpu, n);
    return 1;
}

static int rkvli_make_graph(rkv_llama *r, int n_threads)
{
    enum { NODES = 8, DATA = 256 }; /* more than one of each needs */
    struct ggml_init_params params;
    memset(&params, 0, sizeof params);
    params.mem_size = ggml_tensor_overhead() + ggml_graph_overhead_custom(NODES, false) + DATA;
    r->cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    r->graph_memory = ggml_init(params);
    if (!r->cpu || !r->graph_memory || !rkvli_set_threads(r->cpu, n_threads)) return 0;
    r->graph = ggml_new_graph_custom(r->graph_memory, NODES, false);
    ggml_build_forward_expand(r->graph, ggml_custom_4d(r->graph_memory, GGML_TYPE_F32, 1, 1, 1, 1,
                                                       NULL, 0, rkvli_run_tasks, n_threads, r));
    return 1;
}

/* How many: as the options say, else the caller's config, else the context. */
static int rkvli_make_threads(rkv_llama *r, struct llama_context *ctx)
{
    if (r->options.n_threads)
        r->config.n_threads = r->options.n_threads;
    else if (r->config.n_threads < 2)
        r->config.n_threads = (int)llama_n_threads(ctx);
    if (r->config.parallel_for || r->config.n_threads < 2) return 1;
    if (!rkvli_make_graph(r, r->config.n_threads)) return 0;
    r->config.parallel_for = rkvli_parallel_for;
    r->config.pool_handle = r;
    return 1;
}

int rkv_llama_attach(rkv_llama *r, struct llama_context *ctx)
{
    const struct llama_model *model = llama_get_model(ctx);
    const char *wrong = rkvli_check_model(model);
    llama_seq_id seq;
    int status;
    r->error[0] = 0;
    if (r->ctx) return rkvli_refuse(r, "this rkv_llama belongs to a context already");
    if (wrong) return rkvli_refuse(r, wrong);
    if (r->streams_wanted)
        return rkvli_refuse(r, "sequences with streams of their own are not supported: set "
                               "kv_unified in the context's parameters");
    r->memory = llama_get_memory(ctx);
    if (!r->memory) return rkvli_refuse(r, "this context has no cache");
    r->n_swa = llama_model_n_swa(model);
    r->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    r->n_embd = llama_model_n_embd(model);
    r->n_cells = (int)llama_n_ctx(ctx);
    r->max_batch = (int)llama_n_batch(ctx);
    r->n_sequences = (int)llama_n_seq_max(ctx);
    status = rkvli_check_sizes(r);
    if (status) return status;
    r->pin_limit = rkvli_pin_limit(r);
    for (seq = 0; seq < r->n_sequences; seq++)
        if (llama_memory_seq_pos_max(r->memory, seq) >= 0)
            return rkvli_refuse(r, "the context is not empty");
    if (!rkvli_make_threads(r, ctx))
        return rkvli_refuse(r, "the threads of rounds could not be made");
    if (!rkvli_make_sequences(r)) return rkvli_no_memory(r);
    r->ctx = ctx;
    return RKV_LLAMA_OK;
}

static int rkvli_reads_keys(const rkv_llama *r)
{
    return r->method == RKVLI_SCORED && r->config.policy != RKV_POLICY_RANDOM;
}

/* After the first decode: was everything where it is looked for? Also what only the graph shows. */
static const char *rkvli_check_layer(const rkv_llama *r, const rkvli_layer *layer)
{
    if (layer->keys->ne[2] > 1)
        return "sequences with streams of their own are not supported: set kv_unified";
    if (!layer->dim || layer->n_attended < r->part.n_ubatches)
        return "the attention over the keys of a layer was not found";
    if (layer->n_attended > r->part.n_ubatches)
        return "models whose layers share keys are not supported";
    if (layer->kv_heads < 1 || layer->keys->ne[0] != (int64_t)layer->kv_heads * layer->dim ||
        layer->heads % layer->kv_heads != 0)
        return "the shapes of keys and queries do not match";
    if (layer->max_bias > 0 || layer->max_bias < 0) return "models with ALiBi are not supported";
    if (layer->has_sinks && rkvli_reads_keys(r))
        return "models with attention sinks are not supported";
    if (r->needs_rope && layer->rope_fault) return layer->rope_fault;
    if (r->needs_rope && layer->rope_row && layer->rope_row != layer->dim)
        return "this policy needs a rotary embedding of whole heads";
    if (!(layer->scale > 0)) return "the scale of the logits was not found";
    if (!layer->values) return "the values of a layer were not found";
    return NULL;
}

static const char *rkvli_check_graph(rkv_llama *r)
{
    const char *wrong;
    int i, n_attended = 0;
    if (r->is_broken) return "keys or queries have another form than is looked for";
    if (r->n_layers == 0) return "no node stores keys";
    for (i = 0; i < r->n_layers; i++) {
        n_attended += r->layers[i].n_attended;
        wrong = rkvli_check_layer(r, &r->layers[i]);
        if (wrong) return wrong;
    }
    if (n_attended != r->part.n_attention) return "there are attention nodes without cached keys";
    if (r->n_groups > 1 && !r->n_swa) return "there is more than one cache";
    if (r->n_groups == 1 && r->n_swa)
        return "all layers have a sliding window: the cache is bounded without eviction";
    return NULL;
}

/* Two caches: the one for layers without a window is larger. Where it is not, masks will tell, once
 * a sequence is longer than the window. */
static int rkvli_choose_group(rkv_llama *r)
{
    int64_t cells[RKVLI_GROUPS] = { 0, 0 };
    int i, full;
    for (i = 0; i < r->n_layers; i++) cells[r->layers[i].group] = r->layers[i].keys->ne[1];
    full = r->n_groups > 1 && cells[1] > cells[0];
    r->is_undecided = r->n_groups > 1 && cells[0] == cells[1];
    if (cells[full] < r->n_cells)
        return rkvli_refuse(r, "the cache has fewer cells than the context says");
    rkvli_set_full(r, full);
    return RKV_LLAMA_OK;
}

static int rkvli_self_test(rkv_llama *r)
{
    const char *wrong = rkvli_check_graph(r);
    int status;
    if (wrong)
        return rkvli_say(r, RKV_LLAMA_REFUSED, "in this model's graph, of this llama.cpp: %s",
                         wrong);
    status = rkvli_choose_group(r);
    if (status) return status;
    r->is_checked = 1;
    return RKV_LLAMA_OK;
}

/* ==== 7. Rounds ============================================================================= */

/* Rows of any type of ggml, by ggml's own conversion: a row loader. */
static int rkvli_load_rows(void *traits, const rkv_rows *rows, float *dst)
{
    const char *row = (const char *)rows->data;
    int i;
    for (i = 0; i < rows->n_rows; i++, row += rows->stride, dst += rows->dim)
        ((const struct ggml_type_traits *)traits)->to_float(row, dst, rows->dim);
    return rows->n_rows;
}

static rkv_dtype rkvli_dtype(enum ggml_type type)
{
    switch ((int)type) {
    case GGML_TYPE_F32: return RKV_F32;
    case GGML_TYPE_F16: return RKV_F16;
    case GGML_TYPE_BF16: return RKV_BF16;
    case GGML_TYPE_Q8_0: return RKV_Q8_0;
    default: return RKV_OPAQUE;
    }
}

/* Can the heads' keys be told apart and read, where they are? */
static int rkvli_is_readable(const rkvli_layer *layer)
{
    const struct ggml_type_traits *traits = ggml_get_type_traits(layer->keys->type);
    return rkvli_is_host(layer->keys) && layer->dim % (int)traits->blck_size == 0 &&
           (traits->to_float || rkvli_dtype(layer->keys->type) != RKV_OPAQUE);
}

static int rkvli_reads_in_place(const rkv_llama *r)
{
    int i;
    if (r->options.copy_keys) return 0;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        if (layer->group != r->full) continue;
        if (!rkvli_is_readable(layer)) return 0;
    }
    return 1;
}

static int rkvli_round_fails(rkv_llama *r, llama_seq_id seq, int layer)
{
    char text[256];
    if (layer >= 0) r->why.layer = layer;
    return rkvli_say(r, RKV_LLAMA_REFUSED, "a round of sequence %d: %s", (int)seq,
                     rkv_explain(&r->why, text, sizeof text));
}

/* The queries that vote, gathered from the ring, the oldest first: [heads][votes][dim]. A slot that
 * does not hold its token's query any more: nobody votes there, zeros like all tokens alike. */
static void rkvli_gather_votes(const rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq,
                               int votes, float *out)
{
    const rkvli_sequence *s = &r->sequences[seq];
    const size_t dim = (size_t)layer->dim;
    int head, i;
    for (head = 0; head < layer->heads; head++)
        for (i = 0; i < votes; i++, out += dim) {
            const int32_t position = s->positions[s->n - votes + i];
            const int slot = position % r->ring;
            if (s->query_positions[slot] == position)
                memcpy(out, rkvli_ring(r, layer, seq, head) + (size_t)slot * dim,
                       dim * sizeof(float));
            else
                memset(out, 0, dim * sizeof(float));
        }
}

/* How many of the newest tokens have their queries in the ring, those that vote at most. */
static int rkvli_count_votes(const rkv_llama *r, const rkvli_sequence *s)
{
    int n = 0;
    while (n < r->config.votes && n < s->n) {
        const int32_t position = s->positions[s->n - 1 - n];
        if (s->query_positions[position % r->ring] != position) break;
        n++;
    }
    return n;
}

/* A layer's keys where they are, by the list of cells. */
static void rkvli_view_layer(const rkv_llama *r, const rkvli_layer *layer, llama_seq_id seq,
                             const rkv_config *config, float *votes, rkv_layer *shown)
{
    const rkvli_sequence *s = &r->sequences[seq];
    const rkv_layer empty = RKV_INIT;
    const rkv_dtype dtype = rkvli_dtype(layer->keys->type);
    *shown = empty;
    shown->keys = rkv_tensor_make(layer->keys->data, dtype, layer->kv_heads, s->n, layer->dim);
    shown->keys.block_table = s->cells[r->full];
    shown->keys.block_tokens = 1;
    shown->keys.block_stride = layer->keys->ne[0];
    shown->keys.head_stride = layer->dim;
    if (dtype == RKV_OPAQUE) {
        const size_t bytes = ggml_row_size(layer->keys->type, layer->dim);
        shown->keys.block_stride = (int64_t)layer->keys->nb[1];
        shown->keys.head_stride = (int64_t)bytes;
        shown->keys.element_bytes = (int)bytes;
        shown->keys.load = rkvli_load_rows;
        shown->keys.load_user = (void *)ggml_get_type_traits(layer->keys->type);
    }
    shown->queries = rkv_tensor_make(votes, RKV_F32, layer->heads, config->votes, layer->dim);
    shown->n_tokens = s->n;
    shown->scale = layer->scale;
    shown->softcap = layer->softcap;
    shown->row_stride = r->stride;
    shown->state = rkvli_state(r, layer, seq);
    shown->n_new = s->n_new;
    shown->rope = layer->rope;
    shown->query_means = rkvli_means(r, layer, seq);
}

/* A cell's keys as they are stored. */
static const void *rkvli_read_row(rkv_llama *r, const rkvli_layer *layer, int cell)
{
    const size_t bytes = layer->keys->nb[1], at = (size_t)cell * bytes;
    if (rkvli_is_host(layer->keys)) return (const char *)layer->keys->data + at;
    ggml_backend_tensor_get(layer->keys, r->raw, at, bytes);
    return r->raw;
}

/* A layer's keys as floats, [n_tokens][kv_heads * dim]; rows of adjacent cells in one copy. */
static int rkvli_copy_keys(rkv_llama *r, const rkvli_layer *layer, const rkvli_sequence *s)
{
    const struct ggml_type_traits *traits = ggml_get_type_traits(layer->keys->type);
    const size_t floats = (size_t)layer->keys->ne[0], row = layer->keys->nb[1];
    const int32_t *cells = s->cells[r->full];
    const double start = rkvli_seconds();
    int i, n;
    if (layer->keys->type != GGML_TYPE_F32 && !traits->to_float)
        return rkvli_refuse(r, "the type of the cached keys cannot be converted");
    if (!rkvli_grow(&r->rows, &r->rows_floats, (size_t)s->n * floats, sizeof(float)) ||
        !rkvli_grow(&r->raw, &r->raw_bytes, (size_t)s->n * row, 1))
        return rkvli_no_memory(r);
    for (i = 0; i < s->n; i += n) {
        const char *data = (const char *)r->raw;
        const size_t at = (size_t)cells[i] * row;
        float *out = r->rows + (size_t)i * floats;
        for (n = 1; i + n < s->n && cells[i + n] == cells[i] + n;) n++;
        if (rkvli_is_host(layer->keys))
            data = (const char *)layer->keys->data + at;
        else
            ggml_backend_tensor_get(layer->keys, r->raw, at, (size_t)n * row);
        if (layer->keys->type == GGML_TYPE_F32)
            memcpy(out, data, (size_t)n * row);
        else
            traits->to_float(data, out, (int64_t)((size_t)n * floats));
    }
    r->counters.seconds_copies += rkvli_seconds() - start;
    return RKV_LLAMA_OK;
}

static int rkvli_make_workspace(rkv_llama *r, const rkv_config *config, int n_views)
{
    size_t bytes;
    if (rkv_workspace_size(NULL, config, r->views, n_views, &bytes) != RKV_OK) return 0;
    if (!rkvli_grow(&r->workspace, &r->workspace_bytes, bytes, 1)) {
        r->why.rule = "out of memory";
        return 0;
    }
    return 1;
}

/* All layers in one call, on the keys where they lie. */
static int rkvli_score_in_place(rkv_llama *r, const rkv_config *config, llama_seq_id seq)
{
    rkvli_sequence *s = &r->sequences[seq];
    float *votes = r->votes;
    int i, n = 0;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        if (layer->group != r->full) continue;
        rkvli_gather_votes(r, layer, seq, config->votes, votes);
        rkvli_view_layer(r, layer, seq, config, votes, &r->views[n]);
        /* Random scores read no keys: their type and place do not matter. */
        if (config->policy == RKV_POLICY_RANDOM)
            r->views[n].keys =
                rkv_tensor_make(layer->keys->data, RKV_F32, layer->kv_heads, s->n, 1);
        votes += (size_t)layer->heads * (size_t)config->votes * (size_t)layer->dim;
        n++;
    }
    r->views[0].shared_scores = r->sum;
    r->views[0].kept = r->kept;
    r->views[0].positions = s->positions;
    if (!rkvli_make_workspace(r, config, n) ||
        rkv_score(NULL, config, r->views, n, r->workspace, r->workspace_bytes) != RKV_OK)
        return rkvli_round_fails(r, seq, -1);
    return RKV_LLAMA_OK;
}

/* One layer after the other, on a copy of its keys; the sum as rkv_score makes it. */
static int rkvli_score_copies(rkv_llama *r, const rkv_config *config, llama_seq_id seq)
{
    rkvli_sequence *s = &r->sequences[seq];
    int i, k, status, n = 0;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        rkv_layer *shown = &r->views[0];
        if (layer->group != r->full) continue;
        status = rkvli_copy_keys(r, layer, s);
        if (status) return status;
        rkvli_gather_votes(r, layer, seq, config->votes, r->votes);
        rkvli_view_layer(r, layer, seq, config, r->votes, shown);
        shown->keys = rkv_tensor_make(r->rows, RKV_F32, layer->kv_heads, s->n, layer->dim);
        shown->keys.token_stride = layer->keys->ne[0];
        shown->keys.head_stride = layer->dim;
        shown->positions = s->positions;
        shown->shared_scores = r->scores;
        if (!rkvli_make_workspace(r, config, 1) ||
            rkv_score(NULL, config, shown, 1, r->workspace, r->workspace_bytes) != RKV_OK)
            return rkvli_round_fails(r, seq, n);
        for (k = 0; k < s->n - config->window; k++)
            r->sum[k] = n ? r->sum[k] + r->scores[k] : r->scores[k];
        n++;
    }
    return RKV_LLAMA_OK;
}

/* The choice, from r->sum and r->round_pins into r->kept; how many, or a refusal. */
static int rkvli_select(rkv_llama *r, const rkv_config *config, llama_seq_id seq)
{
    const rkvli_sequence *s = &r->sequences[seq];
    const rkv_layer empty = RKV_INIT;
    rkv_config by_scores = *config;
    rkv_layer *shown = &r->views[0];
    float dummy = 0; /* keys are not read */
    by_scores.policy = RKV_POLICY_RKV;
    by_scores.lambda = 0;
    by_scores.votes = 0;
    *shown = empty;
    shown->keys = rkv_tensor_make(&dummy, RKV_F32, 1, s->n, 1);
    shown->n_tokens = s->n;
    shown->shared_scores = r->sum;
    shown->pins = r->round_pins;
    shown->kept = r->kept;
    if (!rkvli_make_workspace(r, &by_scores, 1) ||
        rkv_select(NULL, &by_scores, shown, 1, r->workspace, r->workspace_bytes) != RKV_OK)
        return rkvli_round_fails(r, seq, -1);
    return shown->n_kept;
}

static int rkvli_reserve_round(rkv_llama *r, int n)
{
    size_t room[6], views = (size_t)r->n_layers, votes = 0, state = 0;
    int i;
    if (!r->views) {
        for (i = 0; i < r->n_layers; i++) {
            const rkvli_layer *layer = &r->layers[i];
            votes += (size_t)layer->heads * (size_t)r->config.votes * (size_t)layer->dim;
            state += rkvli_state_size(r, layer);
        }
        r->views = (rkv_layer *)calloc(views, sizeof *r->views);
        r->votes = (float *)calloc(votes, sizeof *r->votes);
        r->state_before = (float *)calloc(state + 1, sizeof *r->state_before);
        if (!r->views || !r->votes || !r->state_before) return 0;
    }
    if (n <= r->max_round) return 1;
    for (i = 0; i < 5; i++) room[i] = (size_t)r->max_round;
    if (!rkvli_grow(&r->scores, &room[0], (size_t)n, sizeof(float)) ||
        !rkvli_grow(&r->sum, &room[1], (size_t)n, sizeof(float)) ||
        !rkvli_grow(&r->kept, &room[2], (size_t)n, sizeof(int32_t)) ||
        !rkvli_grow(&r->round_pins, &room[3], (size_t)n, 1) ||
        !rkvli_grow(&r->runs, &room[4], (size_t)n, sizeof(rkv_run)))
        return 0;
    r->max_round = n;
    return 1;
}

/* The newest tokens that must stay: those inside a sliding window, and the window, but of H2O's
 * only 8: it is a share of the budget, more than is asked of others. */
static int rkvli_least_tail(const rkv_llama *r)
{
    const int is_share = r->config.policy == RKV_POLICY_H2O && r->config.window > 8;
    const int window = is_share ? 8 : r->config.window;
    return window > r->n_swa ? window : r->n_swa;
}

/* The config of one round: pins take the place of config.pinned; a tail beside which they leave no
 * token to choose shrinks, down to what must stay. If that and config.pinned fill the budget, no
 * other token can be pinned, and nothing is chosen. */
static int rkvli_round_config(rkv_llama *r, llama_seq_id seq, rkv_config *config, int *tail)
{
    const rkvli_sequence *s = &r->sequences[seq];
    int i, n_pins = 0, n_before, n_left, votes = rkvli_count_votes(r, s);
    int least = rkvli_least_tail(r);
    *config = r->config;
    *tail = config->protect > config->window ? config->protect : config->window;
    if (*tail < least) *tail = least;
    for (i = 0; i < s->n; i++) {
        r->round_pins[i] =
            s->pins[i] || i < r->config.pinned || r->owners[s->cells[r->full][i]] > 1;
        n_pins += r->round_pins[i];
    }
    for (;; --*tail) { /* pins within the tail count once */
        for (n_before = 0, i = 0; i < s->n - *tail; i++) n_before += r->round_pins[i];
        n_left = r->budget - *tail - n_before;
        if (n_left > 0 || (n_left == 0 && n_before == r->config.pinned)) break;
        if (*tail == least)
            return rkvli_say(r, RKV_LLAMA_REFUSED,
                             "a round of sequence %d: %d pinned or shared tokens and the newest %d "
                             "leave none to choose in a budget of %d",
                             (int)seq, n_pins, least, r->budget);
    }
    config->pinned = n_left > 0 ? 0 : n_before;
    config->protect = *tail;
    if (config->window > *tail) config->window = *tail;
    if (r->method == RKVLI_SCORED && votes == 0 && config->policy == RKV_POLICY_RKV)
        config->lambda = 0; /* nobody votes: redundancy alone */
    config->votes = votes ? votes : 1;
    return RKV_LLAMA_OK;
}

/* ---- State that is carried from round to round: one array per layer, in the order of the
 * sequence's tokens ---- */

/* All layers' state of the sequence, into r->state_before or back from it. */
static void rkvli_copy_state(const rkv_llama *r, llama_seq_id seq, int is_back)
{
    float *saved = r->state_before;
    int i;
    for (i = 0; i < r->n_layers; i++) {
        const size_t n = rkvli_state_size(r, &r->layers[i]);
        float *state = rkvli_state(r, &r->layers[i], seq);
        if (!state) continue;
        memcpy(is_back ? state : saved, is_back ? saved : state, n * sizeof *state);
        saved += n;
    }
}

/* Tokens that nothing has scored begin with zeros. */
static void rkvli_clear_new_state(const rkv_llama *r, llama_seq_id seq)
{
    const rkvli_sequence *s = &r->sequences[seq];
    int i, plane;
    for (i = 0; i < r->n_layers; i++) {
        float *state = rkvli_state(r, &r->layers[i], seq);
        for (plane = 0; state && plane < r->layers[i].kv_heads * r->n_floats; plane++)
            memset(state + (size_t)plane * (size_t)r->stride + (s->n - s->n_new), 0,
                   (size_t)s->n_new * sizeof *state);
    }
}

/* The state of tokens kept[0 .. n) of one sequence becomes that of tokens 0 .. n of another, or of
 * the same. */
static void rkvli_move_state(const rkv_llama *r, llama_seq_id from, llama_seq_id to,
                             const int32_t *kept, int n)
{
    int i, k, plane;
    for (i = 0; i < r->n_layers; i++) {
        const float *src = rkvli_state(r, &r->layers[i], from);
        float *dst = rkvli_state(r, &r->layers[i], to);
        for (plane = 0; src && plane < r->layers[i].kv_heads * r->n_floats; plane++) {
            for (k = 0; k < n; k++) dst[k] = src[kept[k]];
            src += r->stride;
            dst += r->stride;
        }
    }
}

static int rkvli_score(rkv_llama *r, const rkv_config *config, llama_seq_id seq)
{
    const rkvli_sequence *s = &r->sequences[seq];
    const int n = s->n - config->window;
    if (r->method == RKVLI_CALLBACK) {
        r->options.score(r->options.score_user, seq, n, s->positions, r->sum);
        return RKV_LLAMA_OK;
    }
    if (r->method == RKVLI_NEWEST || config->pinned + config->protect == r->budget) {
        memset(r->sum, 0, (size_t)n * sizeof *r->sum); /* of equals the newest stay */
        rkvli_clear_new_state(r, seq);
        return RKV_LLAMA_OK;
    }
    if (r->has_means) rkvli_average_ring(r, seq);
    return rkvli_reads_in_place(r) || config->policy == RKV_POLICY_RANDOM
               ? rkvli_score_in_place(r, config, seq)
               : rkvli_score_copies(r, config, seq);
}

static void rkvli_show(const rkv_llama *r, const rkv_config *config, llama_seq_id seq, int n_kept)
{
    const rkvli_sequence *s = &r->sequences[seq];
    rkv_llama_round round;
    if (!r->options.observe) return;
    memset(&round, 0, sizeof round);
    round.seq = seq;
    round.n_tokens = s->n;
    round.n_kept = n_kept;
    round.positions = s->positions;
    round.cells = s->cells[r->full];
    round.pins = r->round_pins;
    round.kept = r->kept;
    round.n_scores = s->n - config->window;
    round.scores = r->sum;
    r->options.observe(r->options.observe_user, &round);
}

/* Frees the cells of what is not kept, in llama.cpp and in the lists. */
static int rkvli_evict(rkv_llama *r, llama_seq_id seq, int n_kept)
{
    rkvli_sequence *s = &r->sequences[seq];
    const int n = s->n;
    const int n_runs = rkv_evicted_runs(r->kept, n_kept, n, s->positions, r->runs, n);
    const double start = rkvli_seconds();
    int i, k, g;
    for (i = 0; i < n_runs; i++)
        if (!llama_memory_seq_rm(r->memory, seq, r->runs[i].begin, r->runs[i].end)) {
            r->is_broken = 1;
            return rkvli_refuse(r, "llama_memory_seq_rm refused to free cells");
        }
    r->counters.seconds_removes += rkvli_seconds() - start;
    r->counters.n_removes += n_runs;
    for (i = 0, k = 0; i < n; i++) {
        if (k < n_kept && r->kept[k] == i)
            k++;
        else
            rkvli_release(r, s, i);
    }
    rkv_apply_kept(s->positions, sizeof *s->positions, r->kept, n_kept);
    rkv_apply_kept(s->pins, sizeof *s->pins, r->kept, n_kept);
    for (g = 0; g < r->n_groups; g++) rkv_apply_kept(s->cells[g], sizeof(int32_t), r->kept, n_kept);
    rkvli_move_state(r, seq, seq, r->kept, n_kept);
    s->n = n_kept;
    s->n_new = 0;
    s->n_evicted += n - n_kept;
    r->counters.n_evicted += n - n_kept;
    r->counters.n_rounds++;
    return RKV_LLAMA_OK;
}

/* One round: the sequence keeps its budget. */
static int rkvli_round(rkv_llama *r, llama_seq_id seq)
{
    rkvli_sequence *s = &r->sequences[seq];
    rkv_config config;
    int status, n_kept, tail;
    double start, copies = r->counters.seconds_copies;
    if (s->n <= r->budget) return RKV_LLAMA_OK;
    if (r->is_undecided)
        return rkvli_refuse(r, "the caches with and without a sliding window cannot be told apart: "
                               "make n_ctx larger, or n_ubatch smaller");
    if (!rkvli_reserve_round(r, s->n)) return rkvli_no_memory(r);
    llama_synchronize(r->ctx);
    start = rkvli_seconds();
    status = rkvli_round_config(r, seq, &config, &tail);
    if (status) return status;
    if (s->n_new == 0) s->n_new = 1; /* loaded from a larger budget, and nothing decoded since */
    rkvli_copy_state(r, seq, 0);
    status = rkvli_score(r, &config, seq);
    n_kept = status ? status : rkvli_select(r, &config, seq);
    if (n_kept < 0) {
        rkvli_copy_state(r, seq, 1);
        return n_kept;
    }
    r->counters.seconds_rkv += rkvli_seconds() - start - (r->counters.seconds_copies - copies);
    rkvli_show(r, &config, seq, n_kept);
    status = rkvli_evict(r, seq, n_kept);
    if (status) return status;
    s->reach = s->positions[n_kept - tail];
    return RKV_LLAMA_OK;
}

int rkv_llama_compress(rkv_llama *r, llama_seq_id seq)
{
    r->error[0] = 0;
    if (!r->ctx || !rkvli_sequence_of(r, seq)) return rkvli_refuse(r, "no such sequence");
    return rkvli_round(r, seq);
}

/* ==== 8. Decoding =========================================================================== */

static int rkvli_reserve_batch(rkv_llama *r, int n)
{
    size_t room[6];
    int i;
    if (n <= r->max_tokens) return 1;
    for (i = 0; i < 6; i++) room[i] = (size_t)r->max_tokens;
    room[2] *= RKVLI_GROUPS;
    if (!rkvli_grow(&r->positions, &room[0], (size_t)n, sizeof *r->positions) ||
        !rkvli_grow(&r->outputs, &room[1], (size_t)n, 1) ||
        !rkvli_grow(&r->cells, &room[2], (size_t)n * RKVLI_GROUPS, sizeof *r->cells) ||
        !rkvli_grow(&r->seq_ids, &room[3], (size_t)n, sizeof *r->seq_ids) ||
        !rkvli_grow(&r->n_seq_ids, &room[4], (size_t)n, sizeof *r->n_seq_ids) ||
        !rkvli_grow(&r->saved_rows, &room[5], (size_t)n, sizeof *r->saved_rows))
        return 0;
    r->max_tokens = n;
    return 1;
}

/* Fills in what the caller left out and checks the rest: -1 as llama_decode for a batch that is
 * wrong. */
static int rkvli_read_batch(rkv_llama *r, const struct llama_batch *batch)
{
    static llama_seq_id zero[1] = { 0 };
    int i, k;
    if (batch->n_tokens < 1) return rkvli_say(r, -1, "the batch has no tokens");
    if (!rkvli_reserve_batch(r, batch->n_tokens)) return rkvli_no_memory(r);
    r->n_tokens = batch->n_tokens;
    for (i = 0; i < r->n_sequences; i++) r->sequences[i].n_wanted = r->sequences[i].is_in_batch = 0;
    for (i = 0; i < batch->n_tokens; i++) {
        r->n_seq_ids[i] = batch->n_seq_id && batch->seq_id ? batch->n_seq_id[i] : 1;
        r->seq_ids[i] = batch->n_seq_id && batch->seq_id ? batch->seq_id[i] : zero;
        r->outputs[i] = batch->logits ? batch->logits[i] : i == batch->n_tokens - 1;
        r->saved_rows[i] = -1;
        if (r->n_seq_ids[i] < 1) return rkvli_say(r, -1, "token %d belongs to no sequence", i);
        for (k = 0; k < r->n_seq_ids[i]; k++) {
            const llama_seq_id seq = r->seq_ids[i][k];
            rkvli_sequence *s = rkvli_sequence_of(r, seq);
            llama_pos next;
            if (!s)
                return rkvli_say(r, -1, "token %d: there is no sequence %d, n_seq_max is %d", i,
                                 (int)seq, r->n_sequences);
            next = s->n_wanted ? s->first + s->n_wanted : s->next;
            if (k == 0) r->positions[i] = batch->pos ? batch->pos[i] : next;
            if (!s->n_wanted) {
                s->first = r->positions[i];
                if (s->n == 0 && s->first >= 0) next = s->first; /* it may begin anywhere */
            }
            if (r->positions[i] != next)
                return rkvli_say(r, -1, "token %d has position %d in sequence %d, where %d is next",
                                 i, (int)r->positions[i], (int)seq, (int)next);
            s->n_wanted++;
            s->is_in_batch = 1;
        }
    }
    return RKV_LLAMA_OK;
}

/* Has anybody else changed the memory? */
static int rkvli_check_memory(rkv_llama *r)
{
    int i;
    for (i = 0; i < r->n_sequences; i++) {
        const rkvli_sequence *s = &r->sequences[i];
        const llama_pos last = s->n ? s->positions[s->n - 1] : -1;
        if (!s->n_wanted || llama_memory_seq_pos_max(r->memory, i) == last) continue;
        return rkvli_say(r, RKV_LLAMA_REFUSED,
                         "the memory of sequence %d was changed behind rkv_llama's back: its last "
                         "position is %d, not %d",
                         i, (int)llama_memory_seq_pos_max(r->memory, i), (int)last);
    }
    return RKV_LLAMA_OK;
}

static int rkvli_room(const rkv_llama *r, const rkvli_sequence *s)
{
    if (r->keeps_all) return r->n_cells;
    return r->budget + r->buffer > s->n ? r->budget + r->buffer - s->n : 0;
}

/* Rounds of the sequences that will not have room for their share of the batch. A share that the
 * buffer can hold is not torn apart. */
static int rkvli_make_room(rkv_llama *r)
{
    int i, status;
    for (i = 0; i < r->n_sequences; i++) {
        const rkvli_sequence *s = &r->sequences[i];
        const int room = rkvli_room(r, s);
        if (!s->n_wanted || s->n_wanted <= room) continue;
        if (s->n_wanted > r->buffer && room > 0) continue; /* first fill what is free */
        status = rkvli_round(r, i);
        if (status) return status;
    }
    return RKV_LLAMA_OK;
}

/* The tokens from `begin` on that every sequence has room for. */
static int rkvli_fitting(rkv_llama *r, int begin)
{
    int i, k, n;
    for (i = 0; i < r->n_sequences; i++) r->sequences[i].n_part = 0;
    for (n = 0; begin + n < r->n_tokens && n < r->max_batch; n++) {
        const int token = begin + n;
        for (k = 0; k < r->n_seq_ids[token]; k++) {
            const rkvli_sequence *s = &r->sequences[r->seq_ids[token][k]];
            if (s->n_part + 1 > rkvli_room(r, s)) return n;
        }
        for (k = 0; k < r->n_seq_ids[token]; k++) r->sequences[r->seq_ids[token][k]].n_part++;
    }
    return n;
}

/* Cells are short: a round of the sequence that is furthest above its budget. 0: there is none. */
static int rkvli_relieve(rkv_llama *r, int *status)
{
    int i, worst = -1;
    for (i = 0; i < r->n_sequences; i++)
        if (r->sequences[i].n > r->budget &&
            (worst < 0 || r->sequences[i].n > r->sequences[worst].n))
            worst = i;
    *status = worst < 0 ? RKV_LLAMA_OK : rkvli_round(r, worst);
    return worst >= 0 && *status == RKV_LLAMA_OK;
}

/* How many tokens from `begin` on go into the next part; rounds come first where they are due. */
static int rkvli_plan_part(rkv_llama *r, int begin, int *n)
{
    int status = rkvli_make_room(r);
    if (status) return status;
    *n = rkvli_fitting(r, begin);
    while (*n > r->n_cells - r->n_used && rkvli_relieve(r, &status)) {}
    if (status) return status;
    if (*n > r->n_cells - r->n_used) *n = r->n_cells - r->n_used;
    if (*n > 0) return RKV_LLAMA_OK;
    return rkvli_say(r, RKV_LLAMA_NO_CELLS, "all %d cells are in use", r->n_cells);
}

/* Do the queries of this part have to be seen? Those of the next round's window, and at the first
 * decode, for the self-test. */
static int rkvli_wants_queries(const rkv_llama *r)
{
    int i;
    if (!r->is_checked || r->is_undecided) return 1;
    if (r->keeps_all || !rkvli_reads_keys(r)) return 0;
    if (r->has_means) return 1;
    for (i = 0; i < r->n_sequences; i++) {
        const rkvli_sequence *s = &r->sequences[i];
        if (!s->n_part) continue;
        if (s->n_part > 1 || s->n + s->n_part + r->ring > r->budget + r->buffer ||
            r->n_used + r->ring > r->n_cells)
            return 1;
    }
    return 0;
}

/* Queries that wait in the ring enter the means before tokens of this part take their slots. */
static void rkvli_make_ring_room(rkv_llama *r)
{
    int i;
    for (i = 0; i < r->n_sequences; i++) {
        const rkvli_sequence *s = &r->sequences[i];
        if (s->n_part > 0 && s->next - s->averaged + s->n_part > r->ring) rkvli_average_ring(r, i);
    }
}

/* The means as they are before a batch of several tokens, and back to them. One token alone waits
 * in the ring. */
static void rkvli_copy_means(rkv_llama *r, int is_back)
{
    int i, k;
    if (!r->has_means || r->n_tokens < 2) return;
    for (i = 0; i < r->n_sequences; i++) {
        rkvli_sequence *s = &r->sequences[i];
        if (!s->is_in_batch) continue;
        if (!is_back) rkvli_average_ring(r, i);
        if (is_back)
            s->averaged = s->averaged_before;
        else
            s->averaged_before = s->averaged;
        for (k = 0; k < r->n_layers; k++) {
            const size_t n = rkvli_means_size(r, &r->layers[k]);
            float *means = rkvli_means(r, &r->layers[k], i);
            float *saved = means ? means + (size_t)r->n_sequences * n : NULL;
            if (means) memcpy(is_back ? means : saved, is_back ? saved : means, n * sizeof *means);
        }
    }
}

/* Whose queries the rings will hold after this part. */
static void rkvli_open_rings(rkv_llama *r, int begin, int n)
{
    int i, k;
    for (i = begin; i < begin + n; i++)
        for (k = 0; k < r->n_seq_ids[i]; k++) {
            rkvli_sequence *s = &r->sequences[r->seq_ids[i][k]];
            s->query_positions[r->positions[i] % r->ring] = r->positions[i];
        }
}

/* Logits of a part that is not the last. */
static int rkvli_save_logits(rkv_llama *r, int begin, int n)
{
    int i;
    for (i = 0; i < n; i++) {
        const float *logits;
        const size_t row = (size_t)r->n_vocab;
        if (!r->outputs[begin + i]) continue;
        logits = llama_get_logits_ith(r->ctx, i);
        if (!logits ||
            !rkvli_grow(&r->saved, &r->saved_floats, (size_t)(r->n_saved + 1) * row, sizeof(float)))
            return rkvli_no_memory(r);
        memcpy(r->saved + (size_t)r->n_saved * row, logits, row * sizeof(float));
        r->saved_rows[begin + i] = r->n_saved++;
    }
    return RKV_LLAMA_OK;
}

/* The tokens of a part, and their cells, become part of the lists. */
static int rkvli_commit(rkv_llama *r, int begin, int n)
{
    int i, k, g;
    for (g = 0; g < r->n_groups; g++)
        if (r->part.n_seen[g] != n)
            return rkvli_refuse(r, "the cells of the batch were not found in the graph");
    if (r->is_broken) return rkvli_refuse(r, "keys or queries have another form than before");
    for (i = 0; i < n; i++) {
        const int cell = r->part.cells[r->full][i];
        if (cell < 0 || cell >= r->n_cells || r->owners[cell])
            return rkvli_say(r, RKV_LLAMA_REFUSED,
                             "llama.cpp put a token into cell %d, which is not free", cell);
        for (k = 0; k < r->n_seq_ids[begin + i]; k++) {
            rkvli_sequence *s = &r->sequences[r->seq_ids[begin + i][k]];
            const llama_pos position = r->positions[begin + i];
            /* Positions have room for a plane of state: rkv.h takes them to be of one length. */
            if (!rkvli_reserve(s, s->n < r->stride ? r->stride : s->n + 1))
                return rkvli_no_memory(r);
            s->positions[s->n] = position;
            s->pins[s->n] = position >= s->pin_begin && position < s->pin_end;
            for (g = 0; g < RKVLI_GROUPS; g++)
                s->cells[g][s->n] = g < r->n_groups ? r->part.cells[g][i] : 0;
            s->n++;
            s->n_new++;
            s->n_wanted--;
            s->next = position + 1;
            if (r->owners[cell]++ == 0) r->n_used++;
        }
        if (cell > r->counters.highest_cell) r->counters.highest_cell = cell;
    }
    if (r->n_used > r->counters.peak_live) r->counters.peak_live = r->n_used;
    r->counters.n_tokens += n;
    return RKV_LLAMA_OK;
}

/* The batch from token `begin` on, as llama_decode gets it. */
static struct llama_batch rkvli_slice(const rkv_llama *r, const struct llama_batch *batch,
                                      int begin, int n)
{
    struct llama_batch part = *batch;
    part.n_tokens = n;
    if (part.token) part.token += begin;
    if (part.embd) part.embd += (size_t)begin * (size_t)r->n_embd;
    part.pos = r->positions + begin;
    part.n_seq_id = r->n_seq_ids + begin;
    part.seq_id = r->seq_ids + begin;
    part.logits = r->outputs + begin;
    return part;
}

static int rkvli_decode_part(rkv_llama *r, const struct llama_batch *batch, int begin, int n)
{
    const struct llama_batch slice = rkvli_slice(r, batch, begin, n);
    rkvli_part *part = &r->part;
    int i, g, status;
    memset(part, 0, sizeof *part);
    part->begin = begin;
    part->n = n;
    part->wants_queries = rkvli_wants_queries(r);
    if (!r->is_checked) r->n_groups = 0;
    for (g = 0; g < RKVLI_GROUPS; g++) part->cells[g] = r->cells + (size_t)g * (size_t)n;
    for (i = 0; i < r->n_layers; i++) r->layers[i].n_attended = 0;
    if (r->has_means) rkvli_make_ring_room(r);
    if (part->wants_queries) rkvli_open_rings(r, begin, n);
    part->batch = batch;
    status = llama_decode(r->ctx, slice);
    part->batch = NULL;
    r->counters.n_decodes++;
    if (status)
        return rkvli_say(r, status, "llama_decode returned %d for %d tokens with %d cells in use",
                         status, n, r->n_used);
    if (r->is_short) {
        r->is_broken = 1;
        return rkvli_no_memory(r);
    }
    if (!r->is_checked) {
        llama_synchronize(r->ctx);
        status = rkvli_self_test(r);
        if (status) return status;
    }
    status = rkvli_commit(r, begin, n);
    if (status) return status;
    for (i = 0; i < r->n_sequences; i++)
        if (rkvli_exceeds_ring(r, &r->sequences[i]))
            r->sequences[i].averaged = r->sequences[i].next;
    r->last_begin = begin;
    return begin + n < r->n_tokens ? rkvli_save_logits(r, begin, n) : RKV_LLAMA_OK;
}

/* A sequence's first batch is its prompt. */
static void rkvli_pin_prompts(rkv_llama *r)
{
    int i;
    for (i = 0; i < r->n_sequences; i++) {
        rkvli_sequence *s = &r->sequences[i];
        if (!s->n_wanted || s->pinning != RKVLI_PIN_NOT_YET) continue;
        s->pinning = RKVLI_PIN_PROMPT;
        if (r->pin_limit < 0) continue;
        s->pin_begin = s->first;
        s->pin_end = s->first + (s->n_wanted < r->pin_limit ? s->n_wanted : r->pin_limit);
    }
}

/* Takes back what a failed batch has left, in llama.cpp and in the lists. */
static void rkvli_take_back(rkv_llama *r)
{
    int i;
    for (i = 0; i < r->n_sequences; i++) {
        rkvli_sequence *s = &r->sequences[i];
        if (!s->is_in_batch) continue;
        llama_memory_seq_rm(r->memory, i, s->first, -1);
        rkvli_truncate(r, s, s->first);
    }
    rkvli_copy_means(r, 1);
    r->n_tokens = 0;
}

int rkv_llama_decode(rkv_llama *r, struct llama_batch batch)
{
    int begin, n = 0, status;
    r->error[0] = 0;
    r->n_tokens = r->n_saved = 0;
    if (!r->ctx) return rkvli_refuse(r, "rkv_llama_attach comes first");
    if (r->is_broken) return rkvli_refuse(r, "an earlier call left the cache in doubt");
    status = rkvli_read_batch(r, &batch);
    if (!status) status = rkvli_check_memory(r);
    if (status) {
        r->n_tokens = 0;
        return status;
    }
    rkvli_pin_prompts(r);
    rkvli_copy_means(r, 0);
    for (begin = 0; begin < r->n_tokens; begin += n) {
        status = rkvli_plan_part(r, begin, &n);
        if (!status) status = rkvli_decode_part(r, &batch, begin, n);
        if (status) {
            rkvli_take_back(r);
            r->counters.n_tokens -= begin;
            return status;
        }
    }
    return RKV_LLAMA_OK;
}

int rkv_llama_index(const rkv_llama *r, int i)
{
    int k;
    if (i < 0) { /* from the end of the outputs */
        for (k = r->n_tokens - 1; k >= 0; k--)
            if (r->outputs[k] && ++i == 0) break;
        i = k;
    }
    return i >= r->last_begin && i < r->n_tokens && r->outputs[i] ? i - r->last_begin : -1;
}

float *rkv_llama_logits(rkv_llama *r, int i)
{
    int k, index;
    if (i < 0) {
        for (k = r->n_tokens - 1; k >= 0; k--)
            if (r->outputs[k] && ++i == 0) break;
        i = k;
    }
    if (i < 0 || i >= r->n_tokens) return NULL;
    if (r->saved_rows[i] >= 0) return r->saved + (size_t)r->saved_rows[i] * (size_t)r->n_vocab;
    index = rkv_llama_index(r, i);
    return index < 0 ? NULL : llama_get_logits_ith(r->ctx, index);
}

/* ==== 9. Pins, sequences ==================================================================== */

static int rkvli_mark(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1, int pinned)
{
    rkvli_sequence *s = r->ctx ? rkvli_sequence_of(r, seq) : NULL;
    int i;
    r->error[0] = 0;
    if (!s) return rkvli_refuse(r, r->ctx ? "no such sequence" : "rkv_llama_attach comes first");
    if (p0 < 0) p0 = 0;
    if (p1 < 0) p1 = INT_MAX;
    for (i = 0; i < s->n; i++)
        if (s->positions[i] >= p0 && s->positions[i] < p1) s->pins[i] = (uint8_t)pinned;
    s->pinning = RKVLI_PIN_CALLER;
    if (pinned && p1 > s->next) { /* one range of tokens to come: the newest call's */
        s->pin_begin = p0;
        s->pin_end = p1;
    }
    if (!pinned && p0 <= s->pin_begin) s->pin_begin = p1 < s->pin_end ? p1 : s->pin_end;
    if (!pinned && p0 > s->pin_begin && p0 < s->pin_end) s->pin_end = p0;
    return RKV_LLAMA_OK;
}

int rkv_llama_pin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1)
{
    return rkvli_mark(r, seq, p0, p1, 1);
}

int rkv_llama_unpin(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1)
{
    return rkvli_mark(r, seq, p0, p1, 0);
}

int rkv_llama_seq_rm(rkv_llama *r, llama_seq_id seq, llama_pos p0, llama_pos p1)
{
    rkvli_sequence *s = r->ctx ? rkvli_sequence_of(r, seq) : NULL;
    int i, g, n = 0, n_new_gone = 0, is_tail;
    r->error[0] = 0;
    if (!s) return rkvli_refuse(r, r->ctx ? "no such sequence" : "rkv_llama_attach comes first");
    if (s->n > 0 && !rkvli_reserve_round(r, s->n)) return rkvli_no_memory(r);
    if (p0 < 0) p0 = 0;
    if (p1 < 0) p1 = INT_MAX;
    is_tail = s->n > 0 && p1 > s->positions[s->n - 1];
    if (is_tail && p0 > s->positions[0] && p0 < s->reach)
        return rkvli_say(r, RKV_LLAMA_REFUSED,
                         "sequence %d cannot be taken back to position %d: a round has evicted "
                         "tokens up to %d",
                         (int)seq, (int)p0, (int)s->reach);
    if (!llama_memory_seq_rm(r->memory, seq, p0, p1 == INT_MAX ? -1 : p1))
        return rkvli_refuse(r, "llama_memory_seq_rm refused");
    if (is_tail) {
        rkvli_truncate(r, s, p0);
        return RKV_LLAMA_OK;
    }
    for (i = 0; i < s->n; i++) {
        if (s->positions[i] >= p0 && s->positions[i] < p1) {
            rkvli_release(r, s, i);
            n_new_gone += i >= s->n - s->n_new;
            continue;
        }
        r->kept[n] = i;
        s->positions[n] = s->positions[i];
        s->pins[n] = s->pins[i];
        for (g = 0; g < RKVLI_GROUPS; g++) s->cells[g][n] = s->cells[g][i];
        n++;
    }
    rkvli_move_state(r, seq, seq, r->kept, n);
    s->n = n;
    s->n_new -= n_new_gone;
    return RKV_LLAMA_OK;
}

int rkv_llama_seq_cp(rkv_llama *r, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1)
{
    rkvli_sequence *from = r->ctx ? rkvli_sequence_of(r, src) : NULL;
    rkvli_sequence *to = r->ctx ? rkvli_sequence_of(r, dst) : NULL;
    int i, g, l, head;
    r->error[0] = 0;
    if (!from || !to) return rkvli_refuse(r, "no such sequence");
    if (to->n || from == to) return rkvli_refuse(r, "the sequence that is copied to is not empty");
    if (!rkvli_reserve(to, from->n < r->stride ? r->stride : from->n) ||
        (from->n > 0 && !rkvli_reserve_round(r, from->n)))
        return rkvli_no_memory(r);
    if (p0 < 0) p0 = 0;
    if (p1 < 0) p1 = INT_MAX;
    rkvli_reset_sequence(r, to);
    llama_memory_seq_cp(r->memory, src, dst, p0, p1 == INT_MAX ? -1 : p1);
    for (i = 0; i < from->n; i++) {
        if (from->positions[i] < p0 || from->positions[i] >= p1) continue;
        to->positions[to->n] = from->positions[i];
        to->pins[to->n] = from->pins[i];
        for (g = 0; g < RKVLI_GROUPS; g++) to->cells[g][to->n] = from->cells[g][i];
        r->owners[from->cells[r->full][i]]++;
        r->kept[to->n] = i;
        to->next = from->positions[i] + 1;
        to->n_new += i >= from->n - from->n_new;
        to->n++;
    }
    if (to->n == 0) return RKV_LLAMA_OK;
    rkvli_move_state(r, src, dst, r->kept, to->n);
    to->averaged = from->averaged < to->next ? from->averaged : to->next;
    to->reach = from->reach;
    to->pinning = from->pinning;
    to->pin_begin = from->pin_begin;
    to->pin_end = from->pin_end;
    memcpy(to->query_positions, from->query_positions, (size_t)r->ring * sizeof(int32_t));
    rkvli_forget_queries(r, to, to->next);
    for (l = 0; l < r->n_layers; l++) {
        const rkvli_layer *layer = &r->layers[l];
        for (head = 0; head < layer->heads && layer->queries; head++)
            memcpy(rkvli_ring(r, layer, dst, head), rkvli_ring(r, layer, src, head),
                   (size_t)r->ring * (size_t)layer->dim * sizeof(float));
        if (layer->means)
            memcpy(rkvli_means(r, layer, dst), rkvli_means(r, layer, src),
                   rkvli_means_size(r, layer) * sizeof(float));
    }
    return RKV_LLAMA_OK;
}

int rkv_llama_seq_keep(rkv_llama *r, llama_seq_id seq)
{
    int i;
    r->error[0] = 0;
    if (!r->ctx || !rkvli_sequence_of(r, seq)) return rkvli_refuse(r, "no such sequence");
    llama_memory_seq_keep(r->memory, seq);
    for (i = 0; i < r->n_sequences; i++)
        if (i != seq) rkvli_reset_sequence(r, &r->sequences[i]);
    return RKV_LLAMA_OK;
}

int rkv_llama_clear(rkv_llama *r)
{
    int i;
    r->error[0] = 0;
    if (!r->ctx) return rkvli_refuse(r, "rkv_llama_attach comes first");
    llama_memory_clear(r->memory, false);
    for (i = 0; i < r->n_sequences; i++) rkvli_reset_sequence(r, &r->sequences[i]);
    return RKV_LLAMA_OK;
}

int rkv_llama_live(const rkv_llama *r, llama_seq_id seq)
{
    const rkvli_sequence *s = rkvli_sequence_of(r, seq);
    return s ? s->n : 0;
}

llama_pos rkv_llama_position(const rkv_llama *r, llama_seq_id seq)
{
    const rkvli_sequence *s = rkvli_sequence_of(r, seq);
    return s ? s->next : 0;
}

const int32_t *rkv_llama_positions(const rkv_llama *r, llama_seq_id seq)
{
    const rkvli_sequence *s = rkvli_sequence_of(r, seq);
    return s ? s->positions : NULL;
}

rkv_llama_counters rkv_llama_get_counters(const rkv_llama *r)
{
    rkv_llama_counters counters = r->counters;
    int i;
    counters.n_live = r->n_used;
    counters.bytes_live = (size_t)r->n_used * counters.bytes_per_cell;
    for (i = 0; i < r->n_sequences; i++)
        counters.bytes_saved += (size_t)r->sequences[i].n_evicted * counters.bytes_per_cell;
    return counters;
}

void rkv_llama_score_random(void *user, llama_seq_id seq, int n_scores, const int32_t *positions,
                            float *scores)
{
    uint64_t *state = (uint64_t *)user; /* splitmix64 */
    int i;
    (void)seq;
    (void)positions;
    for (i = 0; i < n_scores; i++) {
        uint64_t z = *state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        scores[i] = (float)((z ^ (z >> 31)) >> 40) * (1.0f / 16777216.0f);
    }
}

/* ==== 10. Save, load ======================================================================== */

#define RKVLI_MAGIC 0x32564b52u /* "RKV2" */

typedef struct rkvli_header {
    uint32_t magic, n, ring, n_layers;
    int32_t next, reach, pin_begin, pin_end, pinning;
    int32_t n_new, averaged;
    uint32_t token_floats, mean_floats; /* of state, a token; of running means */
    uint32_t unused;
    uint64_t n_evicted, query_floats, state_bytes, checksum; /* of all that follows */
} rkvli_header;

static uint64_t rkvli_hash(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < bytes; i++) hash = (hash ^ p[i]) * 0x100000001b3u;
    return hash;
}

static size_t rkvli_query_floats(const rkv_llama *r)
{
    size_t n = 0;
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].group == r->full)
            n += (size_t)r->layers[i].heads * (size_t)r->ring * (size_t)r->layers[i].dim;
    return n;
}

/* Floats of state that a token has in all layers that are scored. */
static size_t rkvli_token_floats(const rkv_llama *r)
{
    size_t n = 0;
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].group == r->full && r->layers[i].state)
            n += (size_t)r->layers[i].kv_heads * (size_t)r->n_floats;
    return n;
}

static size_t rkvli_mean_floats(const rkv_llama *r)
{
    size_t n = 0;
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].group == r->full && r->layers[i].means)
            n += rkvli_means_size(r, &r->layers[i]);
    return n;
}

/* Header; per token its position, its place among the cells, its pin; the ring's positions; a hash
 * of each token's keys; the queries; state, means; llama.cpp's own bytes. */
static size_t rkvli_fixed_bytes(const rkv_llama *r, size_t n)
{
    return sizeof(rkvli_header) + n * (2 * sizeof(int32_t) + 1 + sizeof(uint64_t)) +
           (size_t)r->ring * sizeof(int32_t) +
           (rkvli_query_floats(r) + n * rkvli_token_floats(r) + rkvli_mean_floats(r)) *
               sizeof(float);
}

size_t rkv_llama_save_size(rkv_llama *r, llama_seq_id seq)
{
    const rkvli_sequence *s = r->ctx ? rkvli_sequence_of(r, seq) : NULL;
    if (!s || !r->is_checked) return 0;
    return rkvli_fixed_bytes(r, (size_t)s->n) + llama_state_seq_get_size(r->ctx, seq);
}

static unsigned char *rkvli_put(unsigned char *at, const void *data, size_t bytes)
{
    memcpy(at, data, bytes);
    return at + bytes;
}

static const unsigned char *rkvli_get(const unsigned char *at, void *data, size_t bytes)
{
    memcpy(data, at, bytes);
    return at + bytes;
}

/* What the policy carries, behind the queries. */
static unsigned char *rkvli_put_carried(const rkv_llama *r, llama_seq_id seq, unsigned char *at)
{
    const size_t bytes = (size_t)r->sequences[seq].n * sizeof(float);
    int i, plane;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        const float *state = rkvli_state(r, layer, seq);
        if (layer->group != r->full) continue;
        for (plane = 0; state && plane < layer->kv_heads * r->n_floats; plane++)
            at = rkvli_put(at, state + (size_t)plane * (size_t)r->stride, bytes);
        if (layer->means)
            at = rkvli_put(at, rkvli_means(r, layer, seq),
                           rkvli_means_size(r, layer) * sizeof(float));
    }
    return at;
}

static void rkvli_get_carried(const rkv_llama *r, llama_seq_id seq, int n, const unsigned char *at)
{
    int i, plane;
    for (i = 0; i < r->n_layers; i++) {
        const rkvli_layer *layer = &r->layers[i];
        float *state = rkvli_state(r, layer, seq);
        if (layer->group != r->full) continue;
        for (plane = 0; state && plane < layer->kv_heads * r->n_floats; plane++)
            at =
                rkvli_get(at, state + (size_t)plane * (size_t)r->stride, (size_t)n * sizeof(float));
        if (layer->means)
            at = rkvli_get(at, rkvli_means(r, layer, seq),
                           rkvli_means_size(r, layer) * sizeof(float));
    }
}

/* A cell's keys in every layer that is scored. */
static uint64_t rkvli_hash_cell(rkv_llama *r, int cell)
{
    uint64_t hash = 0xcbf29ce484222325u;
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].group == r->full)
            hash =
                rkvli_hash(hash, rkvli_read_row(r, &r->layers[i], cell), r->layers[i].keys->nb[1]);
    return hash;
}

static int rkvli_reserve_row(rkv_llama *r)
{
    size_t bytes = 0;
    int i;
    for (i = 0; i < r->n_layers; i++)
        if (r->layers[i].keys->nb[1] > bytes) bytes = r->layers[i].keys->nb[1];
    return rkvli_grow(&r->raw, &r->raw_bytes, bytes, 1);
}

int rkv_llama_save(rkv_llama *r, llama_seq_id seq, void *memory, size_t bytes)
{
    const rkvli_sequence *s = r->ctx ? rkvli_sequence_of(r, seq) : NULL;
    unsigned char *at = (unsigned char *)memory + sizeof(rkvli_header);
    rkvli_header header;
    int i, k, head;
    r->error[0] = 0;
    if (!s || !r->is_checked) return rkvli_refuse(r, "nothing has been decoded yet");
    if (r->is_undecided)
        return rkvli_refuse(r, "no sequence has been longer than the sliding window yet");
    if (bytes < rkv_llama_save_size(r, seq)) return rkvli_refuse(r, "too few bytes for the state");
    if (!rkvli_reserve_row(r)) return rkvli_no_memory(r);
    llama_synchronize(r->ctx);
    memset(&header, 0, sizeof header);
    header.magic = RKVLI_MAGIC;
    header.n = (uint32_t)s->n;
    header.ring = (uint32_t)r->ring;
    header.n_layers = (uint32_t)r->n_layers;
    header.next = s->next;
    header.reach = s->reach;
    header.pin_begin = s->pin_begin;
    header.pin_end = s->pin_end;
    header.pinning = (int32_t)s->pinning;
    header.n_evicted = (uint64_t)s->n_evicted;
    header.query_floats = rkvli_query_floats(r);
    header.n_new = s->n_new;
    header.averaged = s->averaged;
    header.token_floats = (uint32_t)rkvli_token_floats(r);
    header.mean_floats = (uint32_t)rkvli_mean_floats(r);
    at = rkvli_put(at, s->positions, (size_t)s->n * sizeof(int32_t));
    for (i = 0; i < s->n; i++) { /* llama.cpp saves the cells in ascending order */
        int32_t rank = 0;
        for (k = 0; k < s->n; k++) rank += s->cells[r->full][k] < s->cells[r->full][i];
        at = rkvli_put(at, &rank, sizeof rank);
    }
    at = rkvli_put(at, s->pins, (size_t)s->n);
    at = rkvli_put(at, s->query_positions, (size_t)r->ring * sizeof(int32_t));
    for (i = 0; i < s->n; i++) {
        const uint64_t hash = rkvli_hash_cell(r, s->cells[r->full][i]);
        at = rkvli_put(at, &hash, sizeof hash);
    }
    for (i = 0; i < r->n_layers; i++)
        for (head = 0; r->layers[i].group == r->full && head < r->layers[i].heads; head++)
            at = rkvli_put(at, rkvli_ring(r, &r->layers[i], seq, head),
                           (size_t)r->ring * (size_t)r->layers[i].dim * sizeof(float));
    at = rkvli_put_carried(r, seq, at);
    header.state_bytes = llama_state_seq_get_size(r->ctx, seq);
    if (llama_state_seq_get_data(r->ctx, at, (size_t)header.state_bytes, seq) != header.state_bytes)
        return rkvli_refuse(r, "llama_state_seq_get_data failed");
    at += header.state_bytes;
    header.checksum = rkvli_hash(0xcbf29ce484222325u, (unsigned char *)memory + sizeof header,
                                 (size_t)(at - (unsigned char *)memory) - sizeof header);
    memcpy(memory, &header, sizeof header);
    return RKV_LLAMA_OK;
}

static const char *rkvli_check_saved(const rkv_llama *r, const void *memory, size_t bytes,
                                     rkvli_header *header)
{
    if (bytes < sizeof *header) return "the saved state is cut off";
    memcpy(header, memory, sizeof *header);
    if (header->magic != RKVLI_MAGIC) return "not a state that rkv_llama_save wrote";
    if (header->token_floats != rkvli_token_floats(r) ||
        header->mean_floats != rkvli_mean_floats(r) || header->ring != (uint32_t)r->ring)
        return "the saved state is of another policy, or of another model";
    if (header->n_layers != (uint32_t)r->n_layers || header->query_floats != rkvli_query_floats(r))
        return "the saved state is of another model";
    if (header->n > (uint32_t)r->n_cells ||
        (!r->keeps_all && header->n > (uint32_t)(r->budget + r->buffer)))
        return "the saved state has more tokens than there are cells for";
    if (header->state_bytes > bytes ||
        bytes - header->state_bytes != rkvli_fixed_bytes(r, header->n))
        return "the saved state is cut off";
    if (header->n_new < 0 || (uint32_t)header->n_new > header->n || header->averaged < 0 ||
        header->averaged > header->next)
        return "the saved state is damaged";
    if (header->checksum != rkvli_hash(0xcbf29ce484222325u,
                                       (const unsigned char *)memory + sizeof *header,
                                       bytes - sizeof *header))
        return "the saved state is damaged";
    return NULL;
}

/* In an empty cache llama.cpp puts the saved cells side by side from cell 0 on. The hashes prove
 * it. */
static int rkvli_take_saved(rkv_llama *r, llama_seq_id seq, const unsigned char *at,
                            const rkvli_header *header)
{
    rkvli_sequence *s = &r->sequences[seq];
    const int n = (int)header->n;
    uint64_t hash;
    int i, head;
    if (!rkvli_reserve(s, n < r->stride ? r->stride : n)) return rkvli_no_memory(r);
    at = rkvli_get(at, s->positions, (size_t)n * sizeof(int32_t));
    at = rkvli_get(at, s->cells[r->full], (size_t)n * sizeof(int32_t));
    at = rkvli_get(at, s->pins, (size_t)n);
    at = rkvli_get(at, s->query_positions, (size_t)r->ring * sizeof(int32_t));
    for (i = 0; i < n; i++) {
        at = rkvli_get(at, &hash, sizeof hash);
        if (hash != rkvli_hash_cell(r, s->cells[r->full][i]))
            return rkvli_refuse(r, "llama.cpp restored the state into other cells than expected, "
                                   "or the cache has other types");
    }
    for (i = 0; i < r->n_layers; i++)
        for (head = 0; r->layers[i].group == r->full && head < r->layers[i].heads; head++)
            at = rkvli_get(at, rkvli_ring(r, &r->layers[i], seq, head),
                           (size_t)r->ring * (size_t)r->layers[i].dim * sizeof(float));
    rkvli_get_carried(r, seq, n, at);
    s->n = n;
    s->n_new = header->n_new;
    s->averaged = header->averaged;
    s->next = header->next;
    s->reach = header->reach;
    s->pin_begin = header->pin_begin;
    s->pin_end = header->pin_end;
    s->pinning = (rkvli_pinning)header->pinning;
    s->n_evicted = (int64_t)header->n_evicted;
    for (i = 0; i < n; i++) r->owners[s->cells[r->full][i]] = 1;
    r->n_used = n;
    if (n - 1 > r->counters.highest_cell) r->counters.highest_cell = n - 1;
    if (n > r->counters.peak_live) r->counters.peak_live = n;
    return RKV_LLAMA_OK;
}

/* The layers are known after a decode only. A fresh context decodes one token and forgets it. */
static int rkvli_warm_up(rkv_llama *r)
{
    llama_token token = 0;
    int status;
    if (r->is_checked) return RKV_LLAMA_OK;
    status = rkv_llama_decode(r, llama_batch_get_one(&token, 1));
    if (status == RKV_LLAMA_OK) r->counters.n_tokens--;
    return status;
}

int rkv_llama_load(rkv_llama *r, llama_seq_id seq, const void *memory, size_t bytes)
{
    const rkvli_sequence *s = r->ctx ? rkvli_sequence_of(r, seq) : NULL;
    const unsigned char *state;
    const char *wrong;
    rkvli_header header;
    int i, status;
    r->error[0] = 0;
    if (!s) return rkvli_refuse(r, "no such sequence");
    for (i = 0; i < r->n_sequences; i++)
        if (i != seq && r->sequences[i].n)
            return rkvli_refuse(r, "another sequence holds tokens: a state can be loaded into an "
                                   "otherwise empty context only");
    status = rkvli_warm_up(r);
    if (status) return status;
    rkv_llama_clear(r);
    if (r->is_undecided)
        return rkvli_refuse(r, "no sequence has been longer than the sliding window yet");
    wrong = rkvli_check_saved(r, memory, bytes, &header);
    if (wrong) return rkvli_refuse(r, wrong);
    if (!rkvli_reserve_row(r)) return rkvli_no_memory(r);
    state = (const unsigned char *)memory + (bytes - (size_t)header.state_bytes);
    if (llama_state_seq_set_data(r->ctx, state, (size_t)header.state_bytes, seq) !=
        header.state_bytes)
        status = rkvli_refuse(r, "llama_state_seq_set_data failed");
    else
        status = rkvli_take_saved(r, seq, (const unsigned char *)memory + sizeof header, &header);
    if (!status && header.n &&
        llama_memory_seq_pos_max(r->memory, seq) != s->positions[header.n - 1])
        status = rkvli_refuse(r, "llama.cpp restored other positions");
    if (status) { /* empty, and the sentence is about why */
        llama_memory_clear(r->memory, false);
        for (i = 0; i < r->n_sequences; i++) rkvli_reset_sequence(r, &r->sequences[i]);
    }
    return status;
}

#endif /* RKV_LLAMA_IMPLEMENTATION */
