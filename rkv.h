/* rkv.h - v0.2.0 - R-KV key/value cache eviction for decoding, in one C header.
 * SPDX-License-Identifier: MIT OR Unlicense      (both texts are at the end of this file)
 *
 *  1 Title, map         what lies where                  13 Plans             workspace layout
 *  2 Usage              a decode loop; what to know      14 Scoring           keys to scores
 *  3 Config macros                                       15 Similar keys      the search for them
 *  4 Types              config, views, layers            16 Other policies    memory, H2O, ...
 *  5 Functions          in the order you meet them       17 Selection         scores to kept set
 *  ---- callers need read no further ----                18 Compaction        moves kept rows
 *  6 Backend interface  for authors of backends          19 CPU backends      stages, registry
 *  7 Portability        compilers, CPUs, systems         20 Validation        every rule
 *  8 Helpers            sizes, half floats, views        21 Public functions
 *  9 Scalar kernels     the definition                   22 Managed cache     rkv_cache
 * 10-12 AVX2, AVX-512, NEON: the same kernels            23 Thread pool       rkv_threads
 *                                                        24 Licence
 * (rkv_cuda.cu uses the same numbers.)
 *
 * ==== 2. Usage ==============================================================================
 * In exactly one C or C++ file define RKV_IMPLEMENTATION before #include "rkv.h".
 * A decode loop with the engine's own cache, per layer [kv_heads][capacity][head_dim]. Start-up:
 *
 *     rkv_config config = rkv_config_default(1024);    keep 1024 tokens per KV head
 *     config.error = &error;                           so that rkv_explain can say what is wrong
 *     for (l = 0; l < n_layers; l++) {                 describe each layer once
 *         layers[l].keys    = rkv_tensor_make(k[l], RKV_F16, kv_heads, capacity, head_dim);
 *         layers[l].values  = rkv_tensor_make(v[l], RKV_F16, kv_heads, capacity, head_dim);
 *         layers[l].queries = rkv_tensor_make(q[l], RKV_F16, query_heads, 8, head_dim);
 *         layers[l].n_tokens = capacity;               the largest round, to size for
 *     }
 *     rkv_workspace_size(NULL, &config, layers, n_layers, &bytes);
 *     workspace = malloc(bytes);
 *
 * For token t = 0, 1, 2, ... each layer stores its key and value in row `rows`, and its query in
 * slot t % 8 of q: the newest 8 queries vote, in any order. Rotary embedding gets position t, not
 * the row number. Attention reads rows 0 to `rows`, the new one included; it needs no mask. After
 * the last layer:
 *
 *     if (++rows == capacity) {                        say, capacity = 1024 + 128
 *         for (l = 0; l < n_layers; l++) layers[l].n_tokens = rows;
 *         status = rkv_compress(NULL, &config, layers, n_layers, workspace, bytes);
 *         if (status != RKV_OK) { puts(rkv_explain(&error, text, sizeof text)); break; }
 *         rows = layers[0].n_tokens;                   1024; on an error nothing has changed
 *     }
 *
 * Every other layout ([token][head][dim], pages, lists of cells, transposed values) is a matter of
 * strides and block tables in rkv_tensor. An engine without a cache can use rkv_cache.
 *
 * The method, R-KV (arXiv 2505.24133): each round scores every cached token of a KV head,
 *
 *     score = lambda * importance - (1 - lambda) * redundancy
 *
 * Importance is the attention that the token receives from the newest `window` queries.
 * Redundancy says how similar its key is to the other keys. The best tokens and the newest
 * `window` stay; their rows move to the front of the cache, in place and in order.
 *
 * Other policies (rkv_policy, presets beside rkv_config_default) score otherwise in the same calls.
 * Those that remember what earlier rounds saw need a little more in each layer: `state`,
 * `positions`, `rope`, and before a round `n_new` and `first_query` (examples/memory.c shows all).
 * bench/results says how they compare.
 *
 * Do not confuse rows with positions. n_tokens is the number of rows in use; a round lowers it. The
 * length of the sequence only grows; the next rotary position is that length. `positions` tells the
 * true position of each row.
 *
 * Memory     Yours. rkv_compress and its stages allocate nothing; only rkv_cache and rkv_threads
 *            do. The library keeps no pointer of yours, except in an rkv_cache.
 * Threads    Calls on distinct data may run at the same time. A call uses only the threads that
 *            rkv_config.parallel_for lends it. Register backends before the first call. An
 *            rkv_cache is for one thread at a time: rkv_cache_save and rkv_cache_fork write its
 *            error record, although they take a const pointer.
 * Errors     Every call that can fail returns rkv_status. On an error no buffer has changed except
 *            the workspace and *config.error, where rkv_explain finds a sentence.
 * Precision  Keys and queries are read as f32, f16, bf16, fp8, q8_0 or by a row loader
 *            (rkv_dtype) and computed in f32. Scores and kept sets are bit-identical on every CPU
 *            path, for any number of threads, and from machine to machine where FLT_EVAL_METHOD is
 *            0 (not x87, not s390x).
 *            The caller's floating-point environment (rounding mode, flush-to-zero, traps) makes
 *            no difference: each call and each lent task sets its own and restores the caller's,
 *            flags included.
 *
 * Before you ship:
 *  - Compress confirmed tokens only: an evicted token does not come back when a speculative
 *    draft is rejected.
 *  - Compaction writes in place. Rows that another sequence shares must be `pinned` (a shared
 *    prefix), or the layer must not be compressed.
 *  - Pin the prompt where it holds facts that must last (rkv_config.pinned): evicted facts are
 *    gone. On real models that pays where the prompt is at most a quarter of the budget; a larger
 *    one leaves too few rows to choose. layer.pins must leave one row to choose at least. Only if
 *    the prefix and the newest `protect` rows fill the budget, nothing is chosen; then no other row
 *    can be pinned.
 *  - The queries must be those of the newest `window` tokens, all of them, after rotary embedding.
 *  - The buffer (rows beyond the budget) trades memory for fewer rounds, and at tight budgets it
 *    changes quality: a published port reports 65 % on GSM8K with budget 128 and buffer 16, 90 %
 *    with buffer 256, 91 % for the full cache. Try several.
 *
 * What it does not do: run attention, quantise, rotate keys again, or split one KV head over
 * several threads.
 */
#ifndef RKV_H
#define RKV_H

/* ==== 3. Config macros ======================================================================
 * RKV_IMPLEMENTATION  this file gets the code. Define it in one file only.
 * RKV_STATIC          all functions are static. Define it where RKV_IMPLEMENTATION is.
 * RKV_NO_AVX2, RKV_NO_AVX512, RKV_NO_NEON   leave a code path out. Same file.
 * RKV_NO_CACHE        leaves the managed cache out, and with it malloc and free. All files.
 * RKV_PTHREADS        adds rkv_threads, a small pool of POSIX threads. All files; link -pthread.
 * RKV_CUDA            declares the two functions of rkv_cuda.cu. Files that call them.
 * No compiler flag is needed. The implementing file needs IEEE arithmetic: -ffast-math and
 * -ffinite-math-only are refused. -funsafe-math-optimizations is refused by gcc and has no effect
 * on this file with clang on x86-64. On other CPUs clang hides the flag from this file: do not use
 * it there, or results differ from path to path.
 */
#include <stddef.h>
#include <stdint.h>

#define RKV_VERSION_MAJOR 0
#define RKV_VERSION_MINOR 2
#define RKV_VERSION_PATCH 0

#ifndef RKV_STATIC
#define RKV_API extern
#elif defined(__GNUC__)
#define RKV_API static __attribute__((unused))
#else
#define RKV_API static
#endif

/* clang-format off */
/* rkv_layer layer = RKV_INIT;  every field zero, in C and in C++ */
#ifdef __cplusplus
#define RKV_INIT {}
extern "C" {
#else
#define RKV_INIT {0}
#endif

/* ==== 4. Types ============================================================================== */

typedef enum rkv_status {
    RKV_OK = 0,
    RKV_ERROR_NULL,        /* config, cache or a result pointer is NULL. Without a config or a
                              cache no record is written                                          */
    RKV_ERROR_ARGUMENT,    /* a field is out of range or inconsistent                             */
    RKV_ERROR_WORKSPACE,   /* the workspace is NULL or smaller than rkv_workspace_size asks       */
    RKV_ERROR_NONFINITE,   /* a key, query or score is NaN, infinite or too large, or a row loader
                              does not give it                                                    */
    RKV_ERROR_UNSUPPORTED, /* this backend does not have this option                              */
    RKV_ERROR_MEMORY,      /* an allocation failed (rkv_cache, rkv_threads)                       */
    RKV_ERROR_DEVICE       /* the device refused a launch or a copy                               */
} rkv_status;

/* What is wrong, and where. Every call that gets an rkv_config and returns a status writes
 * *config.error, unless that pointer is NULL. If nothing is wrong it writes RKV_OK and a NULL rule.
 * Calls that run at the same time need a record each. */
typedef struct rkv_error {
    const char *rule;  /* static text: the field or place and the rule it breaks; NULL: nothing   */
    int32_t status;    /* the rkv_status that was returned                                        */
    int32_t layer;     /* index into the call's layers; -1, here and below: does not apply        */
    int32_t head;      /* KV head; query head where the rule is about queries; set of a kept list */
    int32_t token;     /* row of a key, score, pin or view; entry of a kept list */
} rkv_error;

typedef enum rkv_dtype {
    RKV_F32 = 0,
    RKV_F16 = 1,
    RKV_BF16 = 2,
    RKV_OPAQUE = 3,        /* any other: rows of rkv_tensor.element_bytes bytes, all strides in
                              bytes. Keys and queries of it need rkv_tensor.load (CPU only)       */
    RKV_F8_E4M3 = 4,       /* OCP fp8 e4m3fn: up to 448, no infinity, NaN is 0x7f and 0xff        */
    RKV_F8_E5M2 = 5,       /* OCP fp8 e5m2: the upper byte of an f16                              */
    RKV_Q8_0 = 6           /* ggml's: blocks of 32 numbers in 34 bytes, an f16 scale and 32 int8.
                              dim and all strides count numbers, in multiples of 32               */
} rkv_dtype;               /* If a whole fp8 tensor has a scale: no cosine depends on it; multiply
                              rkv_layer.scale, which is then not 0, by it                         */

/* Who shares a kept set. */
typedef enum rkv_scope {
    RKV_PER_HEAD = 0, /* every KV head has its own (published code)                               */
    RKV_PER_LAYER,    /* one per layer, from the mean of its heads' scores (paper, Algorithm 1)   */
    RKV_PER_SEQUENCE  /* one for several layers, from the sum of their means: for engines whose
                         cells are shared by all heads and layers, as llama.cpp's                 */
} rkv_scope;

/* The published code and the paper's equations differ.
 *                     RKV_PUBLISHED                       RKV_PAPER
 *   max pooling       after the mean over queries         before it (Eq. 4)
 *   redundancy over   all tokens                          tokens outside the window
 *   similar keys      each row exempts its `recent`       each token's own mean leaves out its
 *                     newest similar keys from their      `recent` newest similar keys
 *                     column means; a row that has none
 *                     exempts the first token             */
typedef enum rkv_variant { RKV_PUBLISHED = 0, RKV_PAPER } rkv_variant;

/* Which score decides. Below: t, i true positions of rows; m = n_tokens - window candidates; C =
 * rkv_layer.n_new; p_t(i) = softmax over all rows i <= t of the logits of one query at t; "votes":
 * the newest min(votes, C) queries of all query heads of the group; k', q' = key, query before
 * rotary embedding; rank(x) = candidates with a smaller x, of two equal ones the more recent ranks
 * higher. I and D are carried from round to round in rkv_layer.state; a new row has I = D = 0.
 *   RKV              lambda * importance - (1 - lambda) * redundancy           (arXiv 2505.24133)
 *   MEMORY_TRACES    lambda * rank(I) / m - (1 - lambda) * rank(D) / m
 *   MEMORY_PROSE     lambda * rank(I) / m - (1 - lambda) * D
 *                    I <- max(decay^C * I, max of p_t(i) over votes t > i)
 *                    D <- max(D, max of cos(k'_i, k'_j) over new rows j > i)           (rkv's own)
 *   H2O              I <- I + sum of p_t(i) over votes t >= i                  (arXiv 2306.14048)
 *   TRIATTENTION     max over the group of z(s), z-score of s over the candidates, s(i) =
 *                    (u . k_i + sum over pairs f of (E|q'_f| - |E q'_f|) * |k_i,f|) / sqrt(dim),
 *                    u = mean over delta in {1, 2, 4, ..., 512} of E[q'] rotated to T + delta, T =
 *                    the newest position; E from rkv_layer.query_means         (arXiv 2604.04921)
 *   RANDOM           a hash of (seed, index of the layer, KV head, position), in [0, 1)
 *   OWN_SCORE        0: rkv_layer.bias alone decides
 * rkv_layer.bias, where given, is added to each of them. */
typedef enum rkv_policy {
    RKV_POLICY_RKV = 0,
    RKV_POLICY_MEMORY_TRACES,
    RKV_POLICY_MEMORY_PROSE,
    RKV_POLICY_H2O,
    RKV_POLICY_TRIATTENTION,
    RKV_POLICY_RANDOM,
    RKV_POLICY_OWN_SCORE
} rkv_policy;

/* Rotary embedding of a model, for policies that look at keys or queries before it. At position t
 * the pair f = 0 ... dims / 2 - 1 is turned by the angle t * frequency[f], in radians. */
typedef enum rkv_pairing {
    RKV_ROPE_UNKNOWN = 0, /* not told: policies that need it refuse                               */
    RKV_ROPE_NONE,        /* this layer has none                                                  */
    RKV_ROPE_HALVES,      /* pair f: numbers f and f + dims / 2 (Hugging Face, "neox")            */
    RKV_ROPE_ADJACENT     /* pair f: numbers 2 f and 2 f + 1 (llama.cpp's "normal")               */
} rkv_pairing;

typedef struct rkv_rope {
    rkv_pairing pairing;
    int dims;          /* the first numbers of a row, which are turned; even; 0 means head_dim    */
    float base;        /* frequency[f] = base^(-2 f / dims); 0 means 10000                        */
    const float *frequencies; /* [dims / 2], in [0, 4], in the backend's memory: instead of a
                          base, for scaled variants                                               */
} rkv_rope;

/* Runs task(arg, i) once for every i in [0, n_tasks), on any threads, in any order, and returns
 * when all are done. It is called in rkv's floating-point environment: if the calling thread also
 * runs tasks of your own meanwhile, restore yours for them. */
typedef void (*rkv_parallel_for)(void *pool, int n_tasks, void (*task)(void *arg, int index),
                                 void *arg);

/* What to do. Most callers write
 *     rkv_config config = rkv_config_default(1024);
 *     config.pinned = n_prompt;
 *     config.error = &error;                                                                     */
typedef struct rkv_config {
    int budget;        /* tokens kept per KV head, pinned and window included; required           */
    int pinned;        /* first tokens: always kept, neither moved nor written                    */
    rkv_error *error;  /* out, optional, host memory: see rkv_error                               */
    rkv_scope scope;
    int n_threads;     /* the most tasks in one call of parallel_for; 0 and 1: it is not called   */
    rkv_parallel_for parallel_for; /* your threads; NULL: the calling thread does all             */
    void *pool_handle; /* passed to parallel_for                                                  */

    /* Advanced. The presets fill these in; a zero means what its comment says. */
    int window;        /* w (the paper's alpha): newest tokens, which are no candidates: they are
                          kept, and vote; 0 means 8                                               */
    int protect;       /* newest tokens that are kept, voting or not: a sliding window, a tool call
                          in progress. Counts from `window` on; 0 means the window alone          */
    int pool;          /* width of max pooling, [j - pool/2, j + (pool-1)/2]; 0 means 7, 1: none */
    int mean_pool;     /* not 0: mean pooling instead; what lies outside counts as 0              */
    int recent;        /* beta: newest similar keys exempted; 0 means 1                           */
    float lambda;      /* weight of importance, in [0, 1]; 0 is redundancy alone                  */
    float threshold;   /* T: keys with a cosine above it are similar; in [-1, 1]. Below 0, a key
                          counts as similar to itself. At 1, rounding decides about equal keys    */
    rkv_variant variant;
    rkv_policy policy;
    int votes;         /* newest queries that vote: queries.tokens; 0 means `window`. More than
                          `window`: in RKV each looks at the candidates up to its own token, so
                          that the newest `votes` rows must be consecutive tokens: votes at most
                          protect + the tokens since the last round                               */
    float decay;       /* MEMORY: of importance, per token, in (0, 1]; 0 means 0.995              */
    uint32_t seed;     /* RANDOM                                                                  */
    rkv_error *device_error; /* out, optional, device backends only: device memory (rkv_cuda.cu) */
} rkv_config;

/* Rows of one head for a row loader: dim numbers each, evenly spaced. */
typedef struct rkv_rows {
    const void *data;  /* the first row                                                           */
    size_t stride;     /* bytes from one row to the next; 0 if there is one row                   */
    int head, token;   /* of the first row; the others follow it                                  */
    int n_rows, dim;
} rkv_rows;

/* Reads rows of a type that rkv does not know: dst [n_rows][dim], without gaps, gets the numbers.
 * Gets as many rows at a time as are evenly spaced in the view: up to 48. Returns how many it has
 * read; fewer than n_rows: the next row is a fault, and the call ends with RKV_ERROR_NONFINITE.
 * A row may be asked for several times and must be the same each time. Called by any thread that
 * parallel_for lends, several at a time, in rkv's floating-point environment. */
typedef int (*rkv_row_loader)(void *user, const rkv_rows *rows, float *dst);

/* A strided view of a cache, never owned. Most callers write
 *     view = rkv_tensor_make(data, RKV_F16, heads, rows, dim);                 [head][row][dim]
 *     view.token_stride = heads * dim;                          these two, for [row][head][dim]
 *     view.head_stride = dim;
 * Element [head][token][i] lies at data + head * head_stride + token * token_stride
 *     + i * dim_stride, in elements. A stride of 0 means contiguous, never a broadcast: dim_stride
 * 1, token_stride dim, head_stride tokens * dim. With a block table it lies at
 *     data + table[token / block_tokens] * block_stride + (token % block_tokens) * token_stride
 *          + head * head_stride + i * dim_stride,
 * where 0 means head_stride block_tokens * dim and block_stride heads * block_tokens * dim.
 * A table with one token per block is a list of rows. Pages of a vLLM-like pool are NHD
 * (token_stride = heads * dim, head_stride = dim) or HND (the defaults).
 * Keys and queries need dim_stride 1. Values are only moved: any width, any element size, also
 * transposed (token_stride 1, dim_stride = row capacity). Data need not be aligned. Keys, values
 * and queries may be of different types. */
typedef struct rkv_tensor {
    void *data;
    rkv_dtype dtype;
    int heads;         /* KV heads of keys and values, query heads of queries                     */
    int tokens;        /* rows the view can hold, >= n_tokens; of queries: the window             */
    int dim;           /* head dim, in elements                                                   */
    int64_t head_stride, token_stride, dim_stride; /* elements; 0 = contiguous                    */

    /* Advanced */
    int element_bytes; /* values of another element size (quantised blocks, say); 0 = the dtype's.
                          RKV_OPAQUE: the bytes of a row, required                                */
    const int32_t *block_table; /* optional: the block of tokens [0, block_tokens), of the next
                          block_tokens, ... Only entries that cover n_tokens are read; each names
                          another block. A block with a row that is not pinned is written: no other
                          view may name it, which is not checked                                  */
    int block_tokens;
    int64_t block_stride;
    rkv_row_loader load; /* RKV_OPAQUE: reads rows of keys or queries; values need none           */
    void *load_user;     /* passed to load                                                        */
} rkv_tensor;

/* One attention layer of one sequence; a call takes any number of them. Most callers write
 *     layer.keys = ...; layer.values = ...; layer.queries = ...;               once
 *     layer.n_tokens = rows;                                                   before each round
 *     rows = layer.n_tokens;                                                   after it
 * "Sets" below: the kept sets of this layer, kv_heads of them with RKV_PER_HEAD, else 1. With
 * RKV_PER_SEQUENCE, adjacent layers with the same `sequence` share one set: give kept, positions,
 * pins and shared_scores in the first of them only, NULL in the others. */
typedef struct rkv_layer {
    rkv_tensor keys;      /* in/out [kv_heads][tokens][head_dim], after rotary embedding          */
    rkv_tensor values;    /* in/out [kv_heads][tokens][any]; data NULL: you move them yourself, or
                             they lie within the keys (MLA)                                       */
    rkv_tensor queries;   /* in [kv_heads * group][votes][head_dim], after rotary embedding; query
                             head h * group + g reads KV head h. Not read where nothing is chosen,
                             with lambda 0 (RKV), and by TRIATTENTION, RANDOM and OWN_SCORE       */
    int n_tokens;         /* in/out: rows in use; n_kept after compaction                         */
    int n_kept;           /* out: rows kept, the same for every set: min(n_tokens, budget); in for
                             rkv_compact: the rows of your list                                   */
    int32_t *positions;   /* in/out, optional [sets][row_stride]: true positions; move with rows  */

    /* Advanced */
    uint8_t *pins;        /* in/out, optional [sets][row_stride]: a row whose byte is not 0 is kept
                             (it counts towards the budget, and moves); move with the rows. Select
                             and compress refuse pins that leave no row of a set to choose        */
    int row_stride;       /* entries per set in positions and pins, and per plane of state and
                             bias; 0 means keys.tokens                                            */
    float scale;          /* of logits; 0 means 1 / sqrt(head_dim)                                */
    float softcap;        /* > 0: logits become softcap * tanh(logit / softcap)                   */
    int sequence;         /* RKV_PER_SEQUENCE: layers with the same number, all adjacent, share   */
    int32_t *kept;        /* out, and in for rkv_compact, [sets][budget]: rows kept, ascending;
                             n_kept entries per set are used. Optional in rkv_compress            */
    float *scores;        /* out, and in for rkv_select, [kv_heads][n_tokens - window]; optional in
                             rkv_compress                                                         */
    float *shared_scores; /* other scopes than RKV_PER_HEAD, out of rkv_score and into rkv_select:
                             [n_tokens - window], the set's summed means. Under tensor parallelism
                             all-reduce (sum) it between the two. Optional in rkv_compress        */

    /* For other policies than RKV */
    float *bias;          /* in/out, optional, also RKV [kv_heads][row_stride]: a score of your own
                             (a learned gate, a class of token), added to each row's; moves with
                             rows                                                                 */
    float *state;         /* in/out [kv_heads][rkv_state_floats][row_stride]: what MEMORY and H2O
                             carry: I, then D. Moves with rows; needs no first value              */
    int n_new;            /* in/out, with state: the newest rows, which were no part of a round yet.
                             Count them; rkv_score and rkv_compress set it to 0                   */
    int first_query;      /* slot of the oldest query: `queries` is a ring. Slot t % votes for token
                             t: (t + 1) % votes after token t. Needed with state, and where votes
                             is above window                                                      */
    rkv_rope rope;        /* MEMORY, TRIATTENTION: required, also if it is RKV_ROPE_NONE. With other
                             pairings, and with RANDOM, positions are required                    */
    const float *query_means; /* TRIATTENTION: in; see rkv_query_means_update                     */
} rkv_layer;

typedef struct rkv_backend rkv_backend; /* an implementation of the method: room 6 */

/* clang-format on */

/* ==== 5. Functions ========================================================================== */

/* rkv_explain: writes one sentence about *error into text (256 bytes are enough for any) and
 * returns text: "layer 3, head 1, token 17: layer.keys: a key is NaN, ...". Ends in a zero, cut
 * off where size is too small. rkv_status_string: static text, never NULL. */
RKV_API const char *rkv_explain(const rkv_error *error, char *text, size_t size);
RKV_API const char *rkv_status_string(rkv_status status);

/* Presets. All keep `budget` tokens per KV head, window included; every field may be changed.
 * Formulas: rkv_policy. Cost in dot products per row (C new tokens, group G); state: floats.
 *   default        R-KV as published: window 8, pool 7, recent 1, lambda 0.1, threshold 0.5, a
 *                  kept set per head. 8 G; no state
 *   paper          R-KV by the paper's equations: RKV_PAPER, one kept set per layer (Algorithm 1)
 *   wide           R-KV with lambda 0.5, 64 votes, mean pooling over 5: another balance, in our
 *                  study level with the published one. 64 G; no state
 *   snapkv         attention alone (lambda 1), window and pooling as default
 *   memory_traces  MEMORY_TRACES: lambda 0.5, 32 votes. 32 G + C; 2 floats per row and KV head.
 *                  For long chains of thought; with 128 votes better yet, at 128 G + C
 *   memory_prose   MEMORY_PROSE: lambda 0.3, otherwise the same
 *   memory_wide    memory_prose with 128 votes (give the buffer), and the newest quarter of the
 *                  budget kept. 128 G + C. For prose and code
 *   h2o            H2O: half of the budget for the newest, 128 votes (give the buffer). 128 G; 1
 *   triattention   TRIATTENTION: the first 4 tokens pinned, window 8. G and half a dot product;
 *                  running means of the queries
 *   streaming      StreamingLLM: the first 4 tokens and the newest budget - 4; reads no keys. With
 *                  another `pinned`, window is budget - pinned
 *   random         RANDOM: window 8; the baseline. Reads no keys                                 */
RKV_API rkv_config rkv_config_default(int budget);
RKV_API rkv_config rkv_config_paper(int budget);
RKV_API rkv_config rkv_config_wide(int budget);
RKV_API rkv_config rkv_config_snapkv(int budget);
RKV_API rkv_config rkv_config_memory_traces(int budget);
RKV_API rkv_config rkv_config_memory_prose(int budget);
RKV_API rkv_config rkv_config_memory_wide(int budget);
RKV_API rkv_config rkv_config_h2o(int budget);
RKV_API rkv_config rkv_config_triattention(int budget);
RKV_API rkv_config rkv_config_streaming(int budget);
RKV_API rkv_config rkv_config_random(int budget, uint32_t seed);

/* rkv_state_floats: floats per row and KV head in rkv_layer.state: 0, 1 (H2O) or 2 (MEMORY). */
RKV_API int rkv_state_floats(const rkv_config *config);

/* rkv_query_means_update: adds the queries of tokens to the running means that TRIATTENTION needs;
 * call it for every token, or for every batch, in order.
 *   queries   in      view of query_heads heads, after rotary embedding; any number of rows
 *   slot, n   in      rows slot, slot + 1, ..., n of them, are added
 *   position  in      of the first; the tokens at positions 0 to 3 are left out
 *   means     in/out  rkv_query_means_floats of them, in the backend's memory, zeros at first:
 *                     [query_heads][head_dim] E[q'], [query_heads][head_dim / 2] E|q'_f|, the
 *                     number of tokens, and room to work. Means measured before may be given
 *                     instead; a round reads the first two
 * config: for its error record only. Returns RKV_OK, RKV_ERROR_NULL, _ARGUMENT, _NONFINITE,
 * _UNSUPPORTED or _DEVICE; on an error means is untouched. */
RKV_API size_t rkv_query_means_floats(int query_heads, int head_dim);
RKV_API rkv_status rkv_query_means_update(const rkv_backend *backend, const rkv_config *config,
                                          const rkv_rope *rope, const rkv_tensor *queries, int slot,
                                          int n, int position, float *means);

/* rkv_tensor_make: a contiguous [heads][tokens][dim] view; change its strides for other layouts.
 * rkv_tensor_strided: a view with the strides that another library tells (PyTorch's stride(), in
 * elements). Here 0 is 0: a broadcast view (expand) has rows that share memory, and every call
 * refuses it. */
RKV_API rkv_tensor rkv_tensor_make(void *data, rkv_dtype dtype, int heads, int tokens, int dim);
RKV_API rkv_tensor rkv_tensor_strided(void *data, rkv_dtype dtype, int heads, int tokens, int dim,
                                      int64_t head_stride, int64_t token_stride,
                                      int64_t dim_stride);

/* rkv_backend_find: a backend by name: "scalar", "avx2", "avx512", "neon" or a registered one
 * ("cuda"). NULL asks for the best CPU path of this machine. Returns NULL when there is none of
 * that name, when it is compiled out, or when this CPU cannot run it. Check for NULL: passing it
 * on selects the CPU, which would crash on device pointers. */
RKV_API const rkv_backend *rkv_backend_find(const char *name);

/* rkv_workspace_size: bytes that rkv_compress and each of its stages need for these layers. Checks
 * the description as they do, except that data pointers may still be NULL.
 * Never shrinks when n_tokens, n_layers or n_threads grows: size once, for the largest round.
 * Linear in n_tokens: 4 bytes per token and KV head (H2O 8, MEMORY 12), 4 per row of every kept
 * set, and per worker a scratch as large as one KV head needs (MEMORY: its keys as f32, too).
 * backend NULL means rkv_backend_find(NULL), here and below. */
RKV_API rkv_status rkv_workspace_size(const rkv_backend *backend, const rkv_config *config,
                                      const rkv_layer *layers, int n_layers, size_t *bytes);

/* rkv_compress: scores, selects and compacts all layers, all or nothing: one round.
 *
 *   layers     in/out [n_layers]   see rkv_layer; a layer with n_tokens <= budget stays as it is
 *                                  and keeps every row
 *   workspace  tmp                 rkv_workspace_size bytes, any alignment, garbage afterwards;
 *                                  device memory for a device backend
 *
 * Equations: R-KV (arXiv 2505.24133) Eq. 4 and Algorithm 1, or the published code: rkv_variant.
 * Ties: of two tokens with equal scores the more recent stays, on every backend.
 * Threads: parallel_for's, over the (layer, KV head) pairs.
 * Cost: O(n_tokens * head_dim * (window * group + a few)) on typical keys; at worst, no two keys
 * similar, n_tokens^2 / 2 more dot products.
 * Returns RKV_OK, RKV_ERROR_NULL, _ARGUMENT, _WORKSPACE, _NONFINITE, _UNSUPPORTED or _DEVICE. A
 * device backend returns before it has seen the data: a fault in the data then leaves the rows as
 * they were, and shows in *config.device_error. */
RKV_API rkv_status rkv_compress(const rkv_backend *backend, const rkv_config *config,
                                rkv_layer *layers, int n_layers, void *workspace, size_t bytes);

/* The same in three steps, for engines that reduce, select or move by themselves.
 *   rkv_score    reads keys and queries; writes scores (required) or, with a shared scope,
 *                shared_scores (required), and scores where given. Layers in which nothing is to
 *                be chosen (n_tokens <= budget, or nothing left beside pinned and protected
 *                tokens) get none.
 *   rkv_select   reads scores or shared_scores, and pins; writes kept (required) and n_kept.
 *   rkv_compact  reads kept (n_kept entries per set); moves rows of keys, values, positions and
 *                pins; sets n_tokens to n_kept. The list may be your own, of 1 to budget rows,
 *                ascending, with every pinned row. A layer with n_tokens <= budget keeps every
 *                row, whatever its list says.
 * Each is all or nothing. Errors as rkv_compress. Each checks the whole description, the queries
 * too: an engine with scores of its own sets lambda to 0 and leaves the queries out. */
RKV_API rkv_status rkv_score(const rkv_backend *backend, const rkv_config *config,
                             rkv_layer *layers, int n_layers, void *workspace, size_t bytes);
RKV_API rkv_status rkv_select(const rkv_backend *backend, const rkv_config *config,
                              rkv_layer *layers, int n_layers, void *workspace, size_t bytes);
RKV_API rkv_status rkv_compact(const rkv_backend *backend, const rkv_config *config,
                               rkv_layer *layers, int n_layers, void *workspace, size_t bytes);

/* What to do with a kept list of rkv_select (host memory) in an engine that moves or frees rows
 * itself. Each returns -1 and writes nothing if the list is not ascending and unique, or leaves
 * its range.
 *   rkv_apply_kept    array[i] = array[kept[i]] for i < n_kept: your own per-row arrays (cells,
 *                     positions). Returns n_kept.
 *   rkv_moves         the list as moves of adjacent rows, to be done in order. dst < src; the two
 *                     may overlap: memmove, or row by row ascending. Rows that stay are left out.
 *   rkv_evicted_runs  the evicted positions as runs [begin, end), to be freed. positions: true
 *                     position of each of the n_tokens rows before compaction, ascending and
 *                     below INT32_MAX (else -1); NULL means the row number. A run spans all
 *                     positions between two kept rows.
 * The last two return how many there are and write at most max_moves or max_runs of them: NULL and
 * 0 to count. */
typedef struct rkv_move {
    int32_t dst, src, count;
} rkv_move;
typedef struct rkv_run {
    int32_t begin, end;
} rkv_run;
RKV_API int rkv_apply_kept(void *array, size_t element_bytes, const int32_t *kept, int n_kept);
RKV_API int rkv_moves(const int32_t *kept, int n_kept, rkv_move *moves, int max_moves);
RKV_API int rkv_evicted_runs(const int32_t *kept, int n_kept, int n_tokens,
                             const int32_t *positions, rkv_run *runs, int max_runs);

#ifdef RKV_PTHREADS
/* A fixed pool of POSIX threads; the caller is one of the n_threads (at least 1). rkv_threads_use
 * points a config at it (NULL: at none); the pool must outlive every config and cache that uses
 * it. Calls from several threads take turns; none may come from inside a task.
 * create: RKV_ERROR_NULL or RKV_ERROR_MEMORY; *out is then NULL. destroy takes NULL. A child of
 * fork() has no workers: it must not use the pool, but may destroy it. */
typedef struct rkv_threads rkv_threads;
RKV_API rkv_status rkv_threads_create(rkv_threads **out, int n_threads);
RKV_API void rkv_threads_destroy(rkv_threads *threads);
RKV_API void rkv_threads_use(rkv_threads *threads, rkv_config *config);
#endif

#ifdef RKV_CUDA
/* Defined in rkv_cuda.cu; the comment at its top is their manual. stream is a cudaStream_t; error
 * may be NULL.
 *   rkv_cuda_register   registers the backend "cuda", which works on this stream. A later call with
 *                       another stream returns RKV_ERROR_ARGUMENT.
 *   rkv_cuda_backend    fills in a table of your own, for more streams; registers nothing.
 * RKV_ERROR_DEVICE: no device, or no code for it. */
extern rkv_status rkv_cuda_register(void *stream, rkv_error *error);
extern rkv_status rkv_cuda_backend(rkv_backend *out, void *stream, rkv_error *error);
#endif

#ifndef RKV_NO_CACHE
/* The managed cache, for engines that have none: budget + buffer rows per layer and KV head, and
 * never more. For each token: append each layer's key, value and query, run attention over
 * rkv_cache_keys and _values, and call rkv_cache_step after the last layer. It holds what the
 * policy needs: the queries that vote, state, means of queries, positions. It has no bias: under
 * OWN_SCORE the newest tokens stay. */
typedef struct rkv_cache rkv_cache;

/* clang-format off */
/* Most callers write
 *     rkv_cache_config config = RKV_INIT;
 *     config.compress = rkv_config_default(1024);
 *     config.n_layers = 32; config.kv_heads = 8; config.query_heads = 32; config.head_dim = 128; */
typedef struct rkv_cache_config {
    rkv_config compress;        /* budget and options                                             */
    int n_layers, kv_heads, query_heads, head_dim; /* required                                    */
    rkv_dtype dtype;            /* of keys, values and queries; not RKV_OPAQUE. fp8, q8_0: of keys
                                   and values, which append takes in that type; queries are f32   */
    int buffer;                 /* rows beyond the budget = tokens between rounds; 0 means 128.
                                   RKV: buffer + the larger of window and protect is at least
                                   votes, so that the tokens of all that vote have a row          */

    /* Advanced */
    int capacity;               /* rows reserved, for prompts longer than budget + buffer;
                                   0 means budget + buffer                                        */
    int value_dim;              /* 0 means head_dim                                               */
    float scale, softcap;       /* as in rkv_layer                                                */
    rkv_rope rope;              /* as in rkv_layer, of all layers; MEMORY, TRIATTENTION: required */
    const rkv_backend *backend; /* where the memory lies; NULL: rkv_backend_find(NULL)            */
    void *(*alloc)(void *user, size_t bytes); /* host memory of the cache's own records; both     */
    void (*free)(void *user, void *memory);   /* NULL: malloc and free. Rows: the backend's       */
    void *user;
} rkv_cache_config;
/* clang-format on */

/* create takes all memory here, none later. The config is copied; its backend, thread pool, error
 * records and rope.frequencies must outlive the cache; rope.frequencies are read here, too, to
 * check them. RKV_ERROR_NULL, _ARGUMENT, _MEMORY, _DEVICE or _UNSUPPORTED (a backend without memory
 * functions, or, with TRIATTENTION, without update_means); *out is then NULL. destroy takes NULL.
 * fork makes an equal, independent cache, with memory of its own from the same allocators. It
 * shares the threads and the error records of compress, if these were given.
 * error: what the last call on this cache found wrong: *config.compress.error if that was given,
 * else a record of the cache's own. Never NULL. */
RKV_API rkv_status rkv_cache_create(rkv_cache **out, const rkv_cache_config *config);
RKV_API void rkv_cache_destroy(rkv_cache *cache);
RKV_API rkv_status rkv_cache_fork(const rkv_cache *cache, rkv_cache **out);
RKV_API const rkv_error *rkv_cache_error(const rkv_cache *cache);

/* rkv_cache_append: n_tokens new tokens of one layer, in order. keys and values are views with
 * kv_heads heads, queries one with query_heads heads, each with `tokens` >= n_tokens rows of
 * which the first n_tokens are copied as they are (nothing is quantised); in the backend's memory.
 * After rotary embedding with positions rkv_cache_position(cache, layer), + 1, ... Queries are not
 * read, and may be NULL, when lambda is 0 (RKV), with RANDOM and OWN_SCORE, or when pinned and
 * protected tokens fill the budget (rkv_config_streaming).
 * TRIATTENTION: the queries enter the running means here; one that is not finite is refused with
 * RKV_ERROR_NONFINITE (on a device backend, as rkv_query_means_update says).
 * More tokens than rkv_cache_room: RKV_ERROR_ARGUMENT. On an error nothing is appended. */
RKV_API rkv_status rkv_cache_append(rkv_cache *cache, int layer, int n_tokens,
                                    const rkv_tensor *keys, const rkv_tensor *values,
                                    const rkv_tensor *queries);

/* rkv_cache_step: a round over all layers when one is due, that is when they hold budget + buffer
 * rows or more. *n_evicted (may be NULL) gets the rows evicted per KV head, 0 without a round.
 * rkv_cache_compress: the same, due or not, if there are more rows than the budget: call it after
 * a prompt longer than the budget.
 * Layers with different numbers of rows: RKV_ERROR_ARGUMENT. A round needs the queries of the last
 * `votes` tokens (MEMORY, H2O: of those that came after the last round), and the cache holds no
 * older ones. After rkv_cache_truncate has taken back n tokens, n queries are missing (at most
 * `votes`) until as many tokens have been appended. With more votes than `protect`, RKV also needs
 * the rows of these tokens: votes - protect tokens after the last round. Until then compress
 * returns RKV_ERROR_ARGUMENT, and step does nothing and returns RKV_OK. There is always room for
 * these tokens.
 * Other errors as rkv_compress; on an error the cache is as it was. A NaN in a key or query
 * (RKV_ERROR_NONFINITE) fails every round until its token is gone, and room runs out:
 *     rkv_cache_truncate(cache, rkv_cache_error_position(cache))
 * forgets that token and all later ones. Decode them again, or give up on the sequence.
 * rkv_cache_error_position: the position of the token that the last round found to hold a number
 * that is not finite; 0 if it is older than truncation reaches (a tampered snapshot) or many took
 * part (means of huge queries), so that the same line empties the cache; -1 if the last error was
 * another. Read from rkv_cache_error: ask before another call writes that record.
 * On a device backend a round waits for the device and returns the fault that the device found. If
 * the device does not answer, it returns RKV_ERROR_DEVICE, and the cache is empty. With
 * compress.device_error a round does not wait. If you find a fault there, the cache is lost: empty
 * it, or load a snapshot. */
RKV_API rkv_status rkv_cache_step(rkv_cache *cache, int *n_evicted);
RKV_API rkv_status rkv_cache_compress(rkv_cache *cache, int *n_evicted);
RKV_API int rkv_cache_error_position(const rkv_cache *cache);

/* Views for attention, in the backend's memory; `data` and strides never change, `tokens` are the
 * rows in use, the same for all heads. data is NULL when there is no such layer. */
RKV_API rkv_tensor rkv_cache_keys(const rkv_cache *cache, int layer);
RKV_API rkv_tensor rkv_cache_values(const rkv_cache *cache, int layer);
/* rows: in use. room: how many tokens append takes now. position: of the next token, which is the
 * number of tokens so far. positions: true positions of the rows, in the backend's memory. */
RKV_API int rkv_cache_rows(const rkv_cache *cache, int layer);
RKV_API int rkv_cache_room(const rkv_cache *cache, int layer);
RKV_API int rkv_cache_position(const rkv_cache *cache, int layer);
RKV_API const int32_t *rkv_cache_positions(const rkv_cache *cache, int layer, int head);

/* rkv_cache_truncate: forgets every token at `position` and after, to take back unconfirmed ones;
 * 0 empties the cache. Otherwise it reaches back to the start until the first round, then over the
 * tokens appended since the last round and the protected ones before them; further:
 * RKV_ERROR_ARGUMENT, nothing changed. It also takes back a token that only some layers have been
 * given. Costs nothing: only counters change. What the token has done to others stays: its votes
 * in a round (MEMORY, H2O: the state of other rows), its part in the means (TRIATTENTION). Only 0
 * forgets that too. */
RKV_API rkv_status rkv_cache_truncate(rkv_cache *cache, int position);

/* clang-format off */
typedef struct rkv_cache_stats {
    size_t bytes_held;  /* reserved rows of keys, values, queries and state, and means of queries,
                           all layers; not counted: 4 bytes a row for its position, and the
                           workspace                                                              */
    size_t bytes_full;  /* keys and values of a cache that had kept every token                   */
    int64_t rounds;     /* so far                                                                 */
    int64_t n_evicted;  /* rows evicted so far, per KV head and layer                             */
} rkv_cache_stats;
/* clang-format on */
RKV_API rkv_cache_stats rkv_cache_get_stats(const rkv_cache *cache);

/* A snapshot: little-endian, versioned, with a checksum; the rows in use only, with what the policy
 * carries. save writes rkv_cache_save_size bytes. Equal caches make equal snapshots.
 * load wants exactly these bytes, and a cache created with the same shapes, dtype, budget, window,
 * protect, pinned, scope, policy and votes, and with room for the rows (capacity, buffer and the
 * other options may differ). Anything else, or damage: RKV_ERROR_ARGUMENT, the cache as it was.
 * RKV_ERROR_DEVICE: a copy failed half way, the cache is empty.
 * `memory` is host memory, any alignment. The checksum detects corruption, not tampering. */
RKV_API size_t rkv_cache_save_size(const rkv_cache *cache);
RKV_API rkv_status rkv_cache_save(const rkv_cache *cache, void *memory, size_t bytes);
RKV_API rkv_status rkv_cache_load(rkv_cache *cache, const void *memory, size_t bytes);
#endif /* RKV_NO_CACHE */

/* ---- callers need read no further ---------------------------------------------------------- */

/* ==== 6. Backend interface ==================================================================
 * A backend is one implementation of the method: the CPU's are built in, rkv_cuda.cu is another.
 * Its functions get arguments that room 20 has checked and a config whose zeros are filled in;
 * `context` is the backend's own. It writes what it refuses to *config->error. A fault found after
 * the call has returned goes to *config->device_error, which a call that scores clears first. */
typedef enum rkv_stage { RKV_SCORE, RKV_SELECT, RKV_COMPACT, RKV_COMPRESS } rkv_stage;

/* One call of rkv_score, rkv_select, rkv_compact or rkv_compress. */
typedef struct rkv_call {
    const rkv_config *config;
    rkv_layer *layers;
    int n_layers;
    rkv_stage stage;
    void *workspace;
    size_t bytes;
} rkv_call;

/* One call of rkv_query_means_update, checked. */
typedef struct rkv_means_call {
    const rkv_config *config;
    rkv_rope rope;
    const rkv_tensor *queries; /* rows [slot, slot + n), the first of them at `position` >= 4 */
    int slot, n, position;
    float *means;
} rkv_means_call;

struct rkv_backend {
    const char *name;
    const void *context;
    rkv_status (*workspace_size)(const rkv_backend *self, const rkv_config *config,
                                 const rkv_layer *layers, int n_layers, size_t *bytes);
    rkv_status (*run)(const rkv_backend *self, const rkv_call *call);
    /* Memory for rkv_cache; NULL in all: the backend cannot hold one. copy takes host memory and
     * the backend's on either side, and is done when it returns. copy_rows copies n_tokens rows
     * of all heads, from row src_token of src to row dst_token of dst. Heads, dim and element size
     * are equal. If a row of src from src_token on lies in a negative block it may return
     * RKV_ERROR_ARGUMENT, before it writes. fill_positions writes first, first + 1, ... to n
     * entries at positions[s * stride + row] of each of n_sets sets. synchronize waits for all
     * earlier work. */
    void *(*alloc)(const rkv_backend *self, size_t bytes);
    void (*free)(const rkv_backend *self, void *memory);
    rkv_status (*copy)(const rkv_backend *self, void *dst, const void *src, size_t bytes);
    rkv_status (*copy_rows)(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                            const rkv_tensor *src, int src_token, int n_tokens);
    rkv_status (*fill_positions)(const rkv_backend *self, int32_t *positions, int n_sets,
                                 int stride, int row, int first, int n);
    rkv_status (*synchronize)(const rkv_backend *self);
    /* rkv_query_means_update; NULL: the backend has none. */
    rkv_status (*update_means)(const rkv_backend *self, const rkv_means_call *call);
};

/* Rules about the data, which backends check. Their texts are the same on all backends. */
#define RKVI_RULE_KEY            "layer.keys: a key is NaN, infinite or of a norm above 1e18"
#define RKVI_RULE_KEY_LOAD       "layer.keys.load: the row loader does not give a key"
#define RKVI_RULE_QUERY_LOAD     "layer.queries.load: the row loader does not give a query"
#define RKVI_RULE_QUERY          "layer.queries: a query is NaN, infinite or of a norm above 1e18"
#define RKVI_RULE_LOGITS         "layer.scale: the logits of this head overflow"
#define RKVI_RULE_STATE          "layer.state: a number is negative, NaN or infinite"
#define RKVI_RULE_BIAS           "layer.bias: a score with it is NaN"
#define RKVI_RULE_MEANS          "layer.query_means: a mean is NaN, infinite or too large"
#define RKVI_RULE_FREQUENCY      "rope.frequencies: one is not in [0, 4]"
#define RKVI_RULE_SCORE          "layer.scores: a score is NaN"
#define RKVI_RULE_KEY_BLOCKS     "layer.keys.block_table: a block is negative or occurs twice"
#define RKVI_RULE_VALUE_BLOCKS   "layer.values.block_table: a block is negative or occurs twice"
#define RKVI_RULE_QUERY_BLOCKS   "layer.queries.block_table: a block is negative or occurs twice"
#define RKVI_RULE_PINS           "layer.pins: so many rows are pinned that none is left to choose"
#define RKVI_RULE_KEPT_RANGE     "layer.kept: a row is negative or not below n_tokens"
#define RKVI_RULE_KEPT_ORDER     "layer.kept: rows must ascend, each listed once"
#define RKVI_RULE_KEPT_PINNED    "layer.kept: the first `pinned` rows must stay in their places"
#define RKVI_RULE_KEPT_PINS      "layer.kept: a row that layer.pins protects is not listed"
#define RKVI_RULE_TOO_LARGE      "layers: together they need more memory than there can be"
#define RKVI_RULE_WORKSPACE_NULL "workspace: is NULL"
#define RKVI_RULE_WORKSPACE_SIZE "workspace: smaller than rkv_workspace_size asks for"

/* rkv_backend_register: adds a backend, which must outlive its use; one of the same name is
 * replaced. Not thread-safe: call it at start-up. error may be NULL. RKV_ERROR_ARGUMENT: no name,
 * a built-in name, or a missing function; RKV_ERROR_MEMORY: 16 are registered already. */
RKV_API rkv_status rkv_backend_register(const rkv_backend *backend, rkv_error *error);

#ifdef __cplusplus
}
#endif
#endif /* RKV_H */

#ifdef RKV_IMPLEMENTATION
#ifndef RKV_IMPLEMENTED
#define RKV_IMPLEMENTED

/* ==== 7. Portability ========================================================================
 * The only room in which a compiler, a CPU or an OS is named. */
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(_M_FP_FAST) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "rkv.h needs IEEE arithmetic: compile the implementing file without -ffast-math"
#endif
#if defined(__clang__) && defined(__x86_64__)
#define RKVI_FLOAT_CONTROL /* up to the end of the implementation, whatever the flags are */
#pragma float_control(precise, on, push)
#endif

#include <float.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#if !defined(RKV_NO_CACHE) || defined(RKV_PTHREADS)
#include <stdlib.h>
#endif
#ifdef RKV_PTHREADS
#include <pthread.h>
#include <unistd.h>
#endif

#if defined(__TINYC__) || !(defined(__GNUC__) || defined(_MSC_VER))
#define RKVI_INLINE static /* a compiler without intrinsics that are known here: scalar code */
#define RKVI_TARGET(isa)
#define RKVI_UNROLL
#elif defined(_MSC_VER) && !defined(__clang__)
#define RKVI_INTRINSICS
#define RKVI_INLINE static __forceinline
#define RKVI_TARGET(isa)
#define RKVI_UNROLL
#elif defined(__clang__)
#define RKVI_INTRINSICS
#define RKVI_INLINE      static __inline__ __attribute__((always_inline))
#define RKVI_TARGET(isa) __attribute__((target(isa)))
#define RKVI_UNROLL      _Pragma("clang loop unroll(full)")
#else
#define RKVI_INTRINSICS
#define RKVI_INLINE      static __inline__ __attribute__((always_inline))
#define RKVI_TARGET(isa) __attribute__((target(isa)))
#ifdef __CUDACC__ /* nvcc warns of the pragma */
#define RKVI_UNROLL
#else
#define RKVI_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

#define RKVI_CACHE_LINE 64

/* A pointer that any thread may read and write. Without atomic operations nothing is stored. */
#if defined(__GNUC__) && defined(RKVI_INTRINSICS)
#define RKVI_ATOMIC_LOAD(at)         __atomic_load_n(at, __ATOMIC_RELAXED)
#define RKVI_ATOMIC_STORE(at, value) __atomic_store_n(at, value, __ATOMIC_RELAXED)
#elif defined(_MSC_VER) /* aligned pointers are loaded and stored whole */
#define RKVI_ATOMIC_LOAD(at)         (*(at))
#define RKVI_ATOMIC_STORE(at, value) (*(at) = (value))
#else
#define RKVI_ATOMIC_LOAD(at)         NULL
#define RKVI_ATOMIC_STORE(at, value) (void)(value)
#endif

/* The number of the highest bit that is set; bits is not 0. */
RKVI_INLINE int rkvi_top_bit(uint64_t bits)
{
#if defined(__GNUC__) && defined(RKVI_INTRINSICS)
    return 63 - __builtin_clzll(bits);
#else
    int top = 0, half;
    for (half = 32; half > 0; half /= 2)
        if (bits >> top >> half) top += half;
    return top;
#endif
}

#ifndef RKVI_INTRINSICS
#elif defined(__x86_64__) || (defined(_M_X64) && !defined(_M_ARM64EC))
#if !defined(RKV_NO_AVX2) || !defined(RKV_NO_AVX512)
#define RKVI_X86
#include <immintrin.h>
#if defined(_MSC_VER) && defined(__clang__)
/* clang-cl leaves out of immintrin.h what the command line does not enable. */
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#include <avx512fintrin.h>
#endif
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#elif (defined(__aarch64__) && !defined(__AARCH64EB__)) || defined(_M_ARM64)
#ifndef RKV_NO_NEON
#define RKVI_NEON
#include <arm_neon.h>
#endif
#endif

/* Prefetches a cache line. */
#if defined(__GNUC__) && defined(RKVI_INTRINSICS)
#define RKVI_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#elif defined(_MSC_VER) && defined(RKVI_X86)
#define RKVI_PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T1)
#else
#define RKVI_PREFETCH(address) (void)(address)
#endif

#ifdef RKVI_X86
static void rkvi_cpuid(unsigned leaf, unsigned out[4])
{
#ifdef _MSC_VER
    int regs[4];
    __cpuidex(regs, (int)leaf, 0);
    memcpy(out, regs, sizeof regs);
#else
    out[0] = out[1] = out[2] = out[3] = 0;
    (void)__get_cpuid_count(leaf, 0, &out[0], &out[1], &out[2], &out[3]);
#endif
}

/* The register state that the OS saves, XCR0: bits 1, 2 = xmm, ymm; 5 to 7 = the zmm state. */
static unsigned rkvi_os_saves(void)
{
#ifdef _MSC_VER
    return (unsigned)_xgetbv(0);
#else
    unsigned low;
    __asm__ volatile("xgetbv" : "=a"(low) : "c"(0) : "edx");
    return low;
#endif
}

static int rkvi_usable_avx2(void)
{
    const unsigned osxsave_avx_f16c_fma = 1u << 27 | 1u << 28 | 1u << 29 | 1u << 12;
    unsigned max[4], one[4], seven[4];
    rkvi_cpuid(0, max);
    if (max[0] < 7) return 0;
    rkvi_cpuid(1, one);
    rkvi_cpuid(7, seven);
    return (one[2] & osxsave_avx_f16c_fma) == osxsave_avx_f16c_fma && (seven[1] >> 5 & 1) &&
           (rkvi_os_saves() & 0x06) == 0x06;
}
#ifndef RKV_NO_AVX512
static int rkvi_usable_avx512(void)
{
    unsigned seven[4];
    if (!rkvi_usable_avx2()) return 0;
    rkvi_cpuid(7, seven);
    return (seven[1] >> 16 & 1) && (rkvi_os_saves() & 0xe6) == 0xe6;
}
#endif
#define RKVI_TARGET_AVX2   RKVI_TARGET("avx2,fma,f16c")
#define RKVI_TARGET_AVX512 RKVI_TARGET("avx512f,avx2,fma,f16c")
#endif

/* The floating-point environment of the calling thread. rkv computes in one of its own: round to
 * nearest, subnormal numbers as they are, no traps. The caller's comes back afterwards, flags
 * included. "memory": no load or store moves across. */
#if defined(RKVI_INTRINSICS) && defined(__GNUC__) && defined(__x86_64__)
typedef unsigned rkvi_float_mode; /* MXCSR */
static rkvi_float_mode rkvi_enter_float_mode(void)
{
    const unsigned masked = 0x1f80;
    unsigned saved;
    __asm__ volatile("stmxcsr %0\n\tldmxcsr %1" : "=m"(saved) : "m"(masked) : "memory");
    return saved;
}
static void rkvi_leave_float_mode(rkvi_float_mode saved)
{
    __asm__ volatile("ldmxcsr %0" : : "m"(saved) : "memory");
}
#elif defined(RKVI_INTRINSICS) && defined(__GNUC__) && defined(__aarch64__)
typedef struct rkvi_float_mode {
    uint64_t control, status; /* FPCR, FPSR */
} rkvi_float_mode;
static rkvi_float_mode rkvi_enter_float_mode(void)
{
    rkvi_float_mode saved;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr\n\tmsr fpcr, xzr"
                     : "=&r"(saved.control), "=&r"(saved.status)
                     :
                     : "memory");
    return saved;
}
static void rkvi_leave_float_mode(rkvi_float_mode saved)
{
    __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1"
                     :
                     : "r"(saved.control), "r"(saved.status)
                     : "memory");
}
#elif defined(_MSC_VER) && defined(_M_X64) && !defined(_M_ARM64EC)
#include <xmmintrin.h>
typedef unsigned rkvi_float_mode; /* MXCSR */
static rkvi_float_mode rkvi_enter_float_mode(void)
{
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return saved;
}
static void rkvi_leave_float_mode(rkvi_float_mode saved)
{
    _mm_setcsr(saved);
}
#else
#include <fenv.h>
typedef fenv_t rkvi_float_mode;
static rkvi_float_mode rkvi_enter_float_mode(void)
{
    rkvi_float_mode saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}
static void rkvi_leave_float_mode(rkvi_float_mode saved)
{
    fesetenv(&saved);
}
#endif

static int rkvi_usable_scalar(void)
{
    return 1;
}
#ifdef RKVI_NEON
static int rkvi_usable_neon(void) /* part of every AArch64 CPU */
{
    return 1;
}
#endif

/* ==== 8. Helpers ============================================================================
 * Errors, overflow-checked sizes, the carving of a workspace, half floats, views as bytes. */

static int rkvi_mul_size(size_t a, size_t b, size_t *out)
{
    if (b && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}

static int rkvi_add_size(size_t a, size_t b, size_t *out)
{
    if (a > SIZE_MAX - b) return 0;
    *out = a + b;
    return 1;
}

static const rkv_error rkvi_no_error = { NULL, RKV_OK, -1, -1, -1 };

/* Writes a record, unless error is NULL, and returns the status. */
static rkv_status rkvi_record(rkv_error *error, rkv_status status, const char *rule, int layer,
                              int head, int token)
{
    if (!error) return status;
    error->rule = rule;
    error->status = (int32_t)status;
    error->layer = layer;
    error->head = head;
    error->token = token;
    return status;
}

static rkv_status rkvi_refuse(const rkv_config *config, rkv_status status, const char *rule,
                              int layer, int head, int token)
{
    return rkvi_record(config->error, status, rule, layer, head, token);
}

static void rkvi_clear_error(const rkv_config *config)
{
    if (config->error) *config->error = rkvi_no_error;
}

static int rkvi_min(int a, int b)
{
    return a < b ? a : b;
}

static size_t rkvi_round_up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

#define RKVI_ALIGN 64u /* a cache line and an AVX-512 register */

/* Hands out pieces of a workspace. The same code measures it, with base NULL. */
typedef struct rkvi_arena {
    unsigned char *base;
    size_t used;
    int overflow;
} rkvi_arena;

static void *rkvi_take(rkvi_arena *arena, size_t count, size_t size)
{
    void *piece = arena->base ? arena->base + arena->used : NULL;
    size_t bytes;
    if (!rkvi_mul_size(count, size, &bytes) || bytes > PTRDIFF_MAX - RKVI_ALIGN ||
        !rkvi_add_size(arena->used, rkvi_round_up(bytes, RKVI_ALIGN), &arena->used) ||
        arena->used > PTRDIFF_MAX)
        arena->overflow = 1;
    return arena->overflow ? NULL : piece;
}

static float *rkvi_take_floats(rkvi_arena *arena, size_t count)
{
    return (float *)rkvi_take(arena, count, sizeof(float));
}

static float rkvi_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t rkvi_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* a * b + c, rounded once. Without an FMA instruction libm's fmaf is slow, and in some C libraries
 * (mingw-w64) not exact. In double the product is exact and the sum loses `lost`. Where something
 * is lost, the sum is rounded to odd; rounding it to float then gives the same result as rounding
 * once (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008). */
RKVI_INLINE float rkvi_fma(float a, float b, float c)
{
#ifdef FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    double product = (double)a * b, sum = product + c, added = sum - product;
    double lost = (product - (sum - added)) + (c - added);
    uint64_t bits, inexact, toward_zero;
    memcpy(&bits, &sum, sizeof bits);
    inexact = lost > 0 || lost < 0 ? ~bits & 1 : 0;
    toward_zero = (lost < 0) != (sum < 0);
    bits += inexact - 2 * (inexact & toward_zero);
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
#endif
}

static float rkvi_float_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) /* infinity, NaN */
        return rkvi_float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return rkvi_float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    {
        float subnormal = (float)magnitude * (1.0f / 16777216.0f); /* 2^-24, exact */
        return sign ? -subnormal : subnormal;
    }
}

/* e4m3fn as f16 with a smaller exponent bias: 7 instead of 15. */
static float rkvi_float_from_f8_e4m3(unsigned code)
{
    unsigned sign = (code & 0x80u) << 8, magnitude = code & 0x7fu;
    if (magnitude == 0x7fu) return rkvi_float_from_f16((uint16_t)(sign | 0x7e00u));
    return rkvi_float_from_f16((uint16_t)(sign | magnitude << 7)) * 256.0f;
}

/* A block of q8_0. */
#define RKVI_Q8_0_DIMS  32
#define RKVI_Q8_0_BYTES 34

/* An element is what lies together: a number, a block of q8_0, a byte of an opaque row. */
static size_t rkvi_dtype_bytes(rkv_dtype dtype)
{
    switch (dtype) {
    case RKV_F32: return 4;
    case RKV_F16:
    case RKV_BF16: return 2;
    case RKV_OPAQUE:
    case RKV_F8_E4M3:
    case RKV_F8_E5M2: return 1;
    case RKV_Q8_0: return RKVI_Q8_0_BYTES;
    }
    return 0;
}

/* The numbers in an element. */
static int rkvi_element_dims(rkv_dtype dtype)
{
    return dtype == RKV_Q8_0 ? RKVI_Q8_0_DIMS : 1;
}

/* An rkv_tensor with its defaults filled in and its strides in bytes. */
typedef struct rkvi_view {
    unsigned char *data;
    const int32_t *table; /* NULL: not paged */
    rkv_dtype dtype;
    int dim, block_tokens;
    size_t element, n_elements; /* bytes of an element, elements of a row */
    size_t head_stride, token_stride, dim_stride, block_stride;
    rkv_row_loader load;
    void *load_user;
} rkvi_view;

static size_t rkvi_stride(int64_t given, size_t contiguous)
{
    return given ? (size_t)given : contiguous;
}

static size_t rkvi_element_bytes(const rkv_tensor *tensor)
{
    if (tensor->dtype == RKV_OPAQUE || tensor->element_bytes == 0)
        return rkvi_dtype_bytes(tensor->dtype);
    return (size_t)tensor->element_bytes;
}

static size_t rkvi_row_elements(const rkv_tensor *tensor)
{
    return (size_t)(tensor->dtype == RKV_OPAQUE ? tensor->element_bytes
                                                : tensor->dim / rkvi_element_dims(tensor->dtype));
}

/* Strides are in elements here, in bytes in rkvi_view_of. Validation has made sure that neither
 * overflows. */
static rkvi_view rkvi_view_in_elements(const rkv_tensor *tensor)
{
    rkvi_view view;
    size_t rows = (size_t)(tensor->block_table ? tensor->block_tokens : tensor->tokens);
    size_t row = rkvi_row_elements(tensor);
    const int64_t dims = rkvi_element_dims(tensor->dtype);
    view.data = (unsigned char *)tensor->data;
    view.table = tensor->block_table;
    view.dtype = tensor->dtype;
    view.dim = tensor->dim;
    view.block_tokens = tensor->block_tokens;
    view.element = rkvi_element_bytes(tensor);
    view.n_elements = row;
    view.dim_stride = rkvi_stride(tensor->dim_stride / dims, 1);
    view.token_stride = rkvi_stride(tensor->token_stride / dims, row);
    view.head_stride = rkvi_stride(tensor->head_stride / dims, rows * row);
    view.block_stride =
        rkvi_stride(tensor->block_stride / dims, (size_t)tensor->heads * rows * row);
    view.load = tensor->load;
    view.load_user = tensor->load_user;
    return view;
}

static rkvi_view rkvi_view_of(const rkv_tensor *tensor)
{
    rkvi_view view = rkvi_view_in_elements(tensor);
    view.dim_stride *= view.element;
    view.token_stride *= view.element;
    view.head_stride *= view.element;
    view.block_stride *= view.element;
    return view;
}

static unsigned char *rkvi_row(const rkvi_view *view, int head, int token)
{
    size_t at = (size_t)head * view->head_stride;
    if (!view->table) return view->data + at + (size_t)token * view->token_stride;
    at += (size_t)view->table[token / view->block_tokens] * view->block_stride;
    return view->data + at + (size_t)(token % view->block_tokens) * view->token_stride;
}

/* ==== 9. Scalar kernels =====================================================================
 * The definition: every other kernel must give the same bits. All arithmetic is IEEE single
 * precision. Every multiply-add is fused and written out, so no compiler flag changes a bit.
 * Lengths are multiples of 16 floats (the callers pad with zeros), so no kernel has a tail.
 * "In lanes": a dot product over i keeps 16 partial sums, one per i mod 16, each in ascending i,
 * and adds them up in one fixed tree (rkvi_reduce_scalar): one AVX-512 register, two of AVX2, four
 * of NEON. */

#define RKVI_LANES      16
#define RKVI_CHUNK      48 /* rows of K that are read and summed together     */
#define RKVI_TILE_ROWS  12 /* rows of one dot_tile                            */
#define RKVI_FOLD_LANES 8  /* queries that fold_group transposes at a time    */

#define RKVI_NORM_EPSILON 1e-8f /* k^ = k / (||k|| + 1e-8) */

/* exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2)/2. The polynomial for exp(r) is that of
 * the Cephes library (expf); its error is below 2e-7. Below -86 the result is 0, so no subnormal
 * number arises. */
#define RKVI_EXP_LOWEST  (-86.0f)
#define RKVI_LOG2E       1.44269504f
#define RKVI_ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */
#define RKVI_LN2_HIGH    0.693359375f
#define RKVI_LN2_LOW     (-2.12194440e-4f)
#define RKVI_EXP_C0      1.9875691500e-4f
#define RKVI_EXP_C1      1.3981999507e-3f
#define RKVI_EXP_C2      8.3334519073e-3f
#define RKVI_EXP_C3      4.1665795894e-2f
#define RKVI_EXP_C4      1.6666665459e-1f
#define RKVI_EXP_C5      5.0000001201e-1f

/* sin and cos of an angle given in units of 2^-32 revolutions, by the polynomials of the Cephes
 * library (sinf, cosf) over an eighth of a revolution either way; their error is below 1.5e-7. */
#define RKVI_TURN_EIGHTH 0x20000000u
#define RKVI_TURN_UNIT   1.46291807926715968e-9f /* 2 pi / 2^32 */
#define RKVI_SIN_C0      (-1.9515295891e-4f)
#define RKVI_SIN_C1      8.3321608736e-3f
#define RKVI_SIN_C2      (-1.6666654611e-1f)
#define RKVI_COS_C0      2.443315711809948e-5f
#define RKVI_COS_C1      (-1.388731625493765e-3f)
#define RKVI_COS_C2      4.166664568298827e-2f

/* Rows that will be read soon. They are prefetched a line at a time between other work, so that the
 * arithmetic hides the latency of memory. */
typedef struct rkvi_fetch {
    const unsigned char *const *rows;
    int n_rows;
    size_t at, bytes; /* the next line of the first row, and a row's length */
} rkvi_fetch;

RKVI_INLINE void rkvi_fetch_line(rkvi_fetch *fetch)
{
    if (fetch->n_rows == 0) return;
    RKVI_PREFETCH(*fetch->rows + fetch->at);
    fetch->at += RKVI_CACHE_LINE;
    if (fetch->at < fetch->bytes) return;
    fetch->at = 0;
    fetch->rows++;
    fetch->n_rows--;
}

/* Dot products out[r][v] of RKVI_TILE_ROWS rows and width = 16 or 32 vectors (queries or keys). The
 * vectors are interleaved: panel[i][v]. Each step of i prefetches one line of `fetch`. */
typedef struct rkvi_dot_tile {
    const float *panel;
    int width;
    const float *rows;
    size_t stride, dim;
    float *out;
    size_t out_stride;
    rkvi_fetch *fetch;
} rkvi_dot_tile;

/* Dot products of n_rows rows with one vector or two, in lanes: with[v] NULL stands for the row
 * itself, out[1] NULL for no second vector. */
typedef struct rkvi_dot_rows {
    const float *rows;
    size_t stride, dim;
    int n_rows;
    const float *with[2];
    float *out[2]; /* [n_rows] */
} rkvi_dot_rows;

/* Dot products of n_rows rows with n <= 64 columns, n a multiple of 16:
 * x[r][v] *= row_inverse[r] * inverse[v]; bit v of above[r] says x[r][v] > threshold. */
typedef struct rkvi_cosines {
    float *x;
    size_t stride;
    int n_rows, n;
    const float *row_inverse, *inverse;
    float threshold;
    uint64_t *above;
} rkvi_cosines;

/* Rotary embedding in fixed point: pair f turns by (high[f] + low[f] * 2^-32) * 2^-32 revolutions a
 * token. Pairs are numbers f and f + n_pairs of a row, or, if adjacent, 2 f and 2 f + 1. */
typedef struct rkvi_turns {
    const uint32_t *high, *low; /* [n_pairs] */
    int n_pairs, adjacent;
} rkvi_turns;

typedef struct rkvi_kernels {
    int (*usable)(void);
    /* dst[i] = src[i] for n numbers, of any count (q8_0: whole blocks) and alignment. */
    void (*load_f16)(float *dst, const unsigned char *src, size_t n);
    void (*load_bf16)(float *dst, const unsigned char *src, size_t n);
    void (*load_f8_e4m3)(float *dst, const unsigned char *src, size_t n);
    void (*load_f8_e5m2)(float *dst, const unsigned char *src, size_t n);
    void (*load_q8_0)(float *dst, const unsigned char *src, size_t n);
    void (*dot_rows)(const rkvi_dot_rows *dots);
    /* inverse[i] = 1 / (sqrt(square[i]) + 1e-8), self[i] = (sqrt(square[i]) * inverse[i])^2 */
    void (*normalise)(const float *square, size_t n, float *inverse, float *self);
    /* sum[i] += weights[r] * rows[r][i], r ascending. */
    void (*add_rows)(float *sum, const float *rows, size_t stride, const float *weights, int n_rows,
                     size_t n);
    /* Eight rows beside each other: panel[i * width + r] = rows[r * stride + i]. */
    void (*interleave)(float *panel, size_t width, const float *rows, size_t stride, size_t dim);
    /* One chain over i, ascending, per dot product: no lanes. */
    void (*dot_tile)(const rkvi_dot_tile *tile);
    /* Dot products become cosines, and are compared with the threshold. */
    void (*cosines)(const rkvi_cosines *rows);
    /* RKVI_CHUNK rows of tile[row][g * window + v] become out[v][row] = scale * the max over the
     * `group` values of g. Reads up to 7 floats behind a row. */
    void (*fold_group)(const float *tile, size_t tile_stride, int group, int window, float scale,
                       float *out, size_t out_stride);
    /* x[i] = cap * tanh(x[i] * ratio) */
    void (*softcap)(float *x, size_t n, float ratio, float cap);
    /* x[i] = exp(x[i] - max), for x[i] <= max; returns their sum, in lanes. */
    float (*exp_sum)(float *x, size_t n, float max);
    float (*maximum)(const float *x, size_t n);
    /* dst[i] = max(dst[i], weight * src[i]), ascending; src may be dst + something. */
    void (*max_into)(float *dst, const float *src, float weight, size_t n);
    /* The n_pairs pairs of a row, any number of them, turned back by their angles. */
    void (*unrotate)(float *dst, const float *src, const rkvi_turns *turns, uint32_t position);
    /* lengths[f] = length of the pair f; any number of pairs. */
    void (*pair_lengths)(float *lengths, const float *row, const rkvi_turns *turns);
} rkvi_kernels;

static void rkvi_load_f16_scalar(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, src + 2 * i, sizeof half);
        dst[i] = rkvi_float_from_f16(half);
    }
}

static void rkvi_load_bf16_scalar(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, src + 2 * i, sizeof half);
        dst[i] = rkvi_float_from_bits((uint32_t)half << 16);
    }
}

static void rkvi_load_f8_e4m3_scalar(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) dst[i] = rkvi_float_from_f8_e4m3(src[i]);
}

static void rkvi_load_f8_e5m2_scalar(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) dst[i] = rkvi_float_from_f16((uint16_t)(src[i] << 8));
}

/* The products are exact: 8 bits by 11. */
static void rkvi_load_q8_0_scalar(float *dst, const unsigned char *src, size_t n)
{
    size_t i, k;
    for (i = 0; i < n; i += RKVI_Q8_0_DIMS, src += RKVI_Q8_0_BYTES) {
        uint16_t half;
        float scale;
        memcpy(&half, src, sizeof half);
        scale = rkvi_float_from_f16(half);
        for (k = 0; k < RKVI_Q8_0_DIMS; k++) {
            int8_t number;
            memcpy(&number, src + 2 + k, 1);
            dst[i + k] = (float)number * scale;
        }
    }
}

static float rkvi_reduce_scalar(float *lanes)
{
    int half, l;
    for (half = RKVI_LANES / 2; half > 0; half /= 2)
        for (l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

static float rkvi_dot_scalar(const float *a, const float *b, size_t dim)
{
    float lanes[RKVI_LANES] = { 0 };
    size_t i, l;
    for (i = 0; i + RKVI_LANES <= dim; i += RKVI_LANES)
        for (l = 0; l < RKVI_LANES; l++) lanes[l] = rkvi_fma(a[i + l], b[i + l], lanes[l]);
    for (l = 0; i + l < dim; l++) lanes[l] = rkvi_fma(a[i + l], b[i + l], lanes[l]);
    return rkvi_reduce_scalar(lanes);
}

static void rkvi_dot_rows_scalar(const rkvi_dot_rows *dots)
{
    const float *row = dots->rows;
    int r, v;
    for (r = 0; r < dots->n_rows; r++, row += dots->stride)
        for (v = 0; v < 2 && dots->out[v]; v++)
            dots->out[v][r] = rkvi_dot_scalar(dots->with[v] ? dots->with[v] : row, row, dots->dim);
}

static void rkvi_normalise_scalar(const float *square, size_t n, float *inverse, float *self)
{
    size_t i;
    for (i = 0; i < n; i++) {
        float norm = sqrtf(square[i]), length;
        inverse[i] = 1.0f / (norm + RKVI_NORM_EPSILON);
        length = norm * inverse[i];
        self[i] = length * length;
    }
}

static void rkvi_add_rows_scalar(float *sum, const float *rows, size_t stride, const float *weights,
                                 int n_rows, size_t n)
{
    size_t i;
    int r;
    for (r = 0; r < n_rows; r++, rows += stride)
        for (i = 0; i < n; i++) sum[i] = rkvi_fma(weights[r], rows[i], sum[i]);
}

#define RKVI_INTERLEAVED 8 /* rows of interleave */

static void rkvi_interleave_scalar(float *panel, size_t width, const float *rows, size_t stride,
                                   size_t dim)
{
    size_t i, r;
    for (i = 0; i < dim; i++)
        for (r = 0; r < RKVI_INTERLEAVED; r++) panel[i * width + r] = rows[r * stride + i];
}

static void rkvi_dot_tile_scalar(const rkvi_dot_tile *tile)
{
    const float *rows = tile->rows;
    float *out = tile->out;
    size_t i, width = (size_t)tile->width, v;
    int r;
    for (r = 0; r < RKVI_TILE_ROWS; r++, rows += tile->stride, out += tile->out_stride) {
        for (v = 0; v < width; v++) out[v] = 0;
        for (i = 0; i < tile->dim; i++)
            for (v = 0; v < width; v++)
                out[v] = rkvi_fma(tile->panel[i * width + v], rows[i], out[v]);
    }
}

/* The rows of a tile from `first` on, for paths that need several steps for a tile. */
RKVI_INLINE rkvi_dot_tile rkvi_tile_rows_from(const rkvi_dot_tile *tile, int first)
{
    rkvi_dot_tile rest = *tile;
    rest.rows += (size_t)first * tile->stride;
    rest.out += (size_t)first * tile->out_stride;
    return rest;
}

static void rkvi_cosines_scalar(const rkvi_cosines *c)
{
    float *x = c->x;
    int r, v;
    for (r = 0; r < c->n_rows; r++, x += c->stride) {
        c->above[r] = 0;
        for (v = 0; v < c->n; v++) {
            x[v] *= c->row_inverse[r] * c->inverse[v];
            if (x[v] > c->threshold) c->above[r] |= (uint64_t)1 << v;
        }
    }
}

static void rkvi_fold_group_scalar(const float *tile, size_t tile_stride, int group, int window,
                                   float scale, float *out, size_t out_stride)
{
    int g, r, v;
    for (r = 0; r < RKVI_CHUNK; r++, tile += tile_stride)
        for (v = 0; v < window; v++) {
            float best = tile[v];
            for (g = 1; g < group; g++) {
                float logit = tile[g * window + v];
                best = best > logit ? best : logit;
            }
            out[(size_t)v * out_stride + (size_t)r] = best * scale;
        }
}

static float rkvi_exp_scalar(float x)
{
    float shifted = rkvi_fma(x, RKVI_LOG2E, RKVI_ROUND_MAGIC);
    float n = shifted - RKVI_ROUND_MAGIC;
    float r = rkvi_fma(n, -RKVI_LN2_LOW, rkvi_fma(n, -RKVI_LN2_HIGH, x));
    float y = rkvi_fma(RKVI_EXP_C0, r, RKVI_EXP_C1);
    y = rkvi_fma(y, r, RKVI_EXP_C2);
    y = rkvi_fma(y, r, RKVI_EXP_C3);
    y = rkvi_fma(y, r, RKVI_EXP_C4);
    y = rkvi_fma(y, r, RKVI_EXP_C5);
    y = rkvi_fma(y, r * r, r) + 1.0f;
    if (!(x >= RKVI_EXP_LOWEST)) return 0; /* also for -infinity, where y is NaN */
    return rkvi_float_from_bits(rkvi_bits_from_float(y) + (rkvi_bits_from_float(shifted) << 23));
}

static void rkvi_softcap_scalar(float *x, size_t n, float ratio, float cap)
{
    size_t i;
    for (i = 0; i < n; i++) {
        float y = x[i] * ratio;
        float e = rkvi_exp_scalar(-2.0f * fabsf(y)); /* tanh |y| = (1 - e) / (1 + e) */
        float t = (1.0f - e) / (1.0f + e) * cap;
        x[i] = y < 0 ? -t : t;
    }
}

static float rkvi_exp_sum_scalar(float *x, size_t n, float max)
{
    float lanes[RKVI_LANES] = { 0 };
    size_t i;
    for (i = 0; i < n; i++) {
        x[i] = rkvi_exp_scalar(x[i] - max);
        lanes[i % RKVI_LANES] += x[i];
    }
    return rkvi_reduce_scalar(lanes);
}

static float rkvi_maximum_scalar(const float *x, size_t n)
{
    float max = x[0];
    size_t i;
    for (i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
}

static void rkvi_max_into_scalar(float *dst, const float *src, float weight, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        float x = weight * src[i];
        dst[i] = x > dst[i] ? x : dst[i];
    }
}

/* The angle of pair f at a position, in 2^-32 revolutions. */
static uint32_t rkvi_angle(const rkvi_turns *turns, int f, uint32_t position)
{
    return position * turns->high[f] + (uint32_t)((uint64_t)position * turns->low[f] >> 32);
}

static void rkvi_sincos(uint32_t angle, float *sine, float *cosine)
{
    uint32_t quadrant = (angle + RKVI_TURN_EIGHTH) >> 30;
    int32_t rest = (int32_t)((angle + RKVI_TURN_EIGHTH) & 0x3fffffffu) - (int32_t)RKVI_TURN_EIGHTH;
    float x = (float)rest * RKVI_TURN_UNIT, square = x * x;
    float s = rkvi_fma(rkvi_fma(RKVI_SIN_C0, square, RKVI_SIN_C1), square, RKVI_SIN_C2);
    float c = rkvi_fma(rkvi_fma(RKVI_COS_C0, square, RKVI_COS_C1), square, RKVI_COS_C2);
    s = rkvi_fma(s * square, x, x);
    c = rkvi_fma(c, square * square, rkvi_fma(square, -0.5f, 1.0f));
    *sine = quadrant & 1 ? c : s;
    *cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) *sine = -*sine;
    if ((quadrant + 1) & 2) *cosine = -*cosine;
}

/* Where the numbers of pair f lie in a row. */
static size_t rkvi_pair_at(const rkvi_turns *turns, int f, size_t *second)
{
    size_t first = (size_t)f * (turns->adjacent ? 2 : 1);
    *second = first + (turns->adjacent ? 1 : (size_t)turns->n_pairs);
    return first;
}

/* The pairs from `first` on. */
static void rkvi_unrotate_from(float *dst, const float *src, const rkvi_turns *turns,
                               uint32_t position, int first)
{
    int f;
    for (f = first; f < turns->n_pairs; f++) {
        size_t b, a = rkvi_pair_at(turns, f, &b);
        float x = src[a], y = src[b], sine, cosine;
        rkvi_sincos(rkvi_angle(turns, f, position), &sine, &cosine);
        dst[a] = rkvi_fma(x, cosine, y * sine);
        dst[b] = rkvi_fma(y, cosine, -(x * sine));
    }
}

static void rkvi_unrotate_scalar(float *dst, const float *src, const rkvi_turns *turns,
                                 uint32_t position)
{
    rkvi_unrotate_from(dst, src, turns, position, 0);
}

static void rkvi_pair_lengths_from(float *lengths, const float *row, const rkvi_turns *turns,
                                   int first)
{
    int f;
    for (f = first; f < turns->n_pairs; f++) {
        size_t b, a = rkvi_pair_at(turns, f, &b);
        lengths[f] = sqrtf(rkvi_fma(row[a], row[a], row[b] * row[b]));
    }
}

static void rkvi_pair_lengths_scalar(float *lengths, const float *row, const rkvi_turns *turns)
{
    rkvi_pair_lengths_from(lengths, row, turns, 0);
}

/* ==== 10. AVX2 kernels ======================================================================
 * The same kernels. Those that AVX-512 would not make faster come first and serve both. */
#ifdef RKVI_X86

#ifndef RKV_NO_AVX2
RKVI_TARGET_AVX2 static void rkvi_load_f16_avx2(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        __m128i half_x8 = _mm_loadu_si128((const __m128i *)(const void *)(src + 2 * i));
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(half_x8));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_f16_scalar(dst + i, src + 2 * i, n - i);
}

RKVI_TARGET_AVX2 static void rkvi_load_bf16_avx2(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        __m128i half_x8 = _mm_loadu_si128((const __m128i *)(const void *)(src + 2 * i));
        __m256i bits_x8 = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half_x8), 16);
        _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(bits_x8));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_bf16_scalar(dst + i, src + 2 * i, n - i);
}

/* As f16, with the bias of the exponent put right. A NaN, which is rare, would come out as 480: a
 * run with one is loaded again. */
RKVI_TARGET_AVX2 static void rkvi_load_f8_e4m3_avx2(float *dst, const unsigned char *src, size_t n)
{
    const __m128i magnitude_x16 = _mm_set1_epi8(0x7f);
    const __m256i bits_x16 = _mm256_set1_epi16((short)0xbf80);
    const __m256 bias_x8 = _mm256_set1_ps(256.0f);
    __m128i most_x16 = _mm_setzero_si128();
    size_t i;
    int nans;
    for (i = 0; i + 16 <= n; i += 16) {
        __m128i code_x16 = _mm_loadu_si128((const __m128i *)(const void *)(src + i));
        __m256i half_x16 = _mm256_slli_epi16(_mm256_cvtepi8_epi16(code_x16), 7);
        half_x16 = _mm256_and_si256(half_x16, bits_x16);
        most_x16 = _mm_max_epu8(most_x16, _mm_and_si128(code_x16, magnitude_x16));
        _mm256_storeu_ps(dst + i,
                         _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half_x16)), bias_x8));
        _mm256_storeu_ps(
            dst + i + 8,
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half_x16, 1)), bias_x8));
    }
    nans = _mm_movemask_epi8(_mm_cmpeq_epi8(most_x16, magnitude_x16));
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    if (nans) i = 0;
    rkvi_load_f8_e4m3_scalar(dst + i, src + i, n - i);
}

RKVI_TARGET_AVX2 static void rkvi_load_f8_e5m2_avx2(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        __m128i code_x16 = _mm_loadu_si128((const __m128i *)(const void *)(src + i));
        __m256i half_x16 = _mm256_slli_epi16(_mm256_cvtepu8_epi16(code_x16), 8);
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm256_castsi256_si128(half_x16)));
        _mm256_storeu_ps(dst + i + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(half_x16, 1)));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_f8_e5m2_scalar(dst + i, src + i, n - i);
}

RKVI_TARGET_AVX2 static void rkvi_load_q8_0_avx2(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    int k;
    for (i = 0; i < n; i += RKVI_Q8_0_DIMS, src += RKVI_Q8_0_BYTES) {
        int16_t half;
        __m256 scale_x8;
        memcpy(&half, src, sizeof half);
        scale_x8 = _mm256_cvtph_ps(_mm_set1_epi16(half));
        RKVI_UNROLL
        for (k = 0; k < RKVI_Q8_0_DIMS; k += 8) {
            __m128i bytes_x8 = _mm_loadl_epi64((const __m128i *)(const void *)(src + 2 + k));
            __m256 number_x8 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes_x8));
            _mm256_storeu_ps(dst + i + k, _mm256_mul_ps(number_x8, scale_x8));
        }
    }
}
#endif

/* The last three levels of the tree: eight sums. */
RKVI_TARGET_AVX2 RKVI_INLINE float rkvi_reduce8_avx2(__m256 sums_x8)
{
    __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(sums_x8), _mm256_extractf128_ps(sums_x8, 1));
    __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_transpose8_avx2(__m256 row[8])
{
    __m256 pair[8], quad[8];
    int i;
    RKVI_UNROLL
    for (i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    RKVI_UNROLL
    for (i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    RKVI_UNROLL
    for (i = 0; i < 4; i++) {
        row[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

RKVI_TARGET_AVX2 static void rkvi_interleave_avx2(float *panel, size_t width, const float *rows,
                                                  size_t stride, size_t dim)
{
    __m256 row[8];
    size_t i;
    int r;
    for (i = 0; i < dim; i += 8) {
        RKVI_UNROLL
        for (r = 0; r < 8; r++) row[r] = _mm256_loadu_ps(rows + (size_t)r * stride + i);
        rkvi_transpose8_avx2(row);
        RKVI_UNROLL
        for (r = 0; r < 8; r++) _mm256_storeu_ps(panel + (i + (size_t)r) * width, row[r]);
    }
}

/* fold_group takes eight rows at a time: it folds the groups in registers, eight window queries
 * wide, and transposes the 8 x 8 result. */
RKVI_TARGET_AVX2 RKVI_INLINE __m256 rkvi_fold_row_avx2(const float *row, int group, int window)
{
    __m256 best_x8 = _mm256_loadu_ps(row);
    int g;
    for (g = 1; g < group; g++) best_x8 = _mm256_max_ps(best_x8, _mm256_loadu_ps(row + g * window));
    return best_x8;
}

RKVI_TARGET_AVX2 static void rkvi_fold_group_avx2(const float *tile, size_t tile_stride, int group,
                                                  int window, float scale, float *out,
                                                  size_t out_stride)
{
    __m256 scale_x8 = _mm256_set1_ps(scale), row[8];
    int v0, r0, i;
    for (v0 = 0; v0 < window; v0 += RKVI_FOLD_LANES) {
        int n_v = rkvi_min(window - v0, RKVI_FOLD_LANES);
        for (r0 = 0; r0 < RKVI_CHUNK; r0 += 8) {
            RKVI_UNROLL
            for (i = 0; i < 8; i++)
                row[i] =
                    rkvi_fold_row_avx2(tile + (size_t)(r0 + i) * tile_stride + v0, group, window);
            rkvi_transpose8_avx2(row);
            for (i = 0; i < n_v; i++)
                _mm256_storeu_ps(out + (size_t)(v0 + i) * out_stride + r0,
                                 _mm256_mul_ps(row[i], scale_x8));
        }
    }
}

RKVI_TARGET_AVX2 static void rkvi_max_into_avx2(float *dst, const float *src, float weight,
                                                size_t n)
{
    const __m256 weight_x8 = _mm256_set1_ps(weight);
    size_t i;
    for (i = 0; i < n; i += 8) {
        __m256 src_x8 = _mm256_mul_ps(weight_x8, _mm256_loadu_ps(src + i));
        _mm256_storeu_ps(dst + i, _mm256_max_ps(src_x8, _mm256_loadu_ps(dst + i)));
    }
}

/* The numbers of 8 pairs. Adjacent ones are taken apart by shuffles within halves of a register,
 * whose quarters are then put in order. */
RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_load_pairs_avx2(const float *row, const rkvi_turns *turns,
                                                       int f, __m256 *a_x8, __m256 *b_x8)
{
    size_t b, a = rkvi_pair_at(turns, f, &b);
    __m256 low_x8, high_x8;
    if (!turns->adjacent) {
        *a_x8 = _mm256_loadu_ps(row + a);
        *b_x8 = _mm256_loadu_ps(row + b);
        return;
    }
    low_x8 = _mm256_loadu_ps(row + a);
    high_x8 = _mm256_loadu_ps(row + a + 8);
    *a_x8 = _mm256_shuffle_ps(low_x8, high_x8, 0x88);
    *b_x8 = _mm256_shuffle_ps(low_x8, high_x8, 0xdd);
    *a_x8 = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(*a_x8), 0xd8));
    *b_x8 = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(*b_x8), 0xd8));
}

RKVI_TARGET_AVX2 static void rkvi_pair_lengths_avx2(float *lengths, const float *row,
                                                    const rkvi_turns *turns)
{
    int f;
    for (f = 0; f + 8 <= turns->n_pairs; f += 8) {
        __m256 a_x8, b_x8;
        rkvi_load_pairs_avx2(row, turns, f, &a_x8, &b_x8);
        _mm256_storeu_ps(lengths + f,
                         _mm256_sqrt_ps(_mm256_fmadd_ps(a_x8, a_x8, _mm256_mul_ps(b_x8, b_x8))));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_pair_lengths_from(lengths, row, turns, f);
}

#ifndef RKV_NO_AVX2
/* The angles of 8 pairs. The products of 32 by 32 bits come from even lanes and from odd ones. */
RKVI_TARGET_AVX2 RKVI_INLINE __m256i rkvi_angle_avx2(const rkvi_turns *turns, int f,
                                                     __m256i position_x8)
{
    __m256i high_x8 = _mm256_loadu_si256((const __m256i *)(const void *)(turns->high + f));
    __m256i low_x8 = _mm256_loadu_si256((const __m256i *)(const void *)(turns->low + f));
    __m256i even_x4 = _mm256_srli_epi64(_mm256_mul_epu32(low_x8, position_x8), 32);
    __m256i odd_x4 = _mm256_mul_epu32(_mm256_srli_epi64(low_x8, 32), position_x8);
    return _mm256_add_epi32(_mm256_mullo_epi32(high_x8, position_x8),
                            _mm256_blend_epi32(even_x4, odd_x4, 0xaa));
}

RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_sincos_avx2(__m256i angle_x8, __m256 *sine_x8,
                                                   __m256 *cosine_x8)
{
    const __m256i eighth_x8 = _mm256_set1_epi32((int)RKVI_TURN_EIGHTH);
    __m256i shifted_x8 = _mm256_add_epi32(angle_x8, eighth_x8);
    __m256i rest_x8 = _mm256_and_si256(shifted_x8, _mm256_set1_epi32(0x3fffffff));
    __m256 x_x8 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(rest_x8, eighth_x8)),
                                _mm256_set1_ps(RKVI_TURN_UNIT));
    __m256 square_x8 = _mm256_mul_ps(x_x8, x_x8), s_x8, c_x8, half_x8, swap_x8;
    __m256i sign_x8 = _mm256_set1_epi32((int)0x80000000u);
    s_x8 = _mm256_fmadd_ps(_mm256_set1_ps(RKVI_SIN_C0), square_x8, _mm256_set1_ps(RKVI_SIN_C1));
    s_x8 = _mm256_fmadd_ps(s_x8, square_x8, _mm256_set1_ps(RKVI_SIN_C2));
    s_x8 = _mm256_fmadd_ps(_mm256_mul_ps(s_x8, square_x8), x_x8, x_x8);
    c_x8 = _mm256_fmadd_ps(_mm256_set1_ps(RKVI_COS_C0), square_x8, _mm256_set1_ps(RKVI_COS_C1));
    c_x8 = _mm256_fmadd_ps(c_x8, square_x8, _mm256_set1_ps(RKVI_COS_C2));
    half_x8 = _mm256_fmadd_ps(square_x8, _mm256_set1_ps(-0.5f), _mm256_set1_ps(1.0f));
    c_x8 = _mm256_fmadd_ps(c_x8, _mm256_mul_ps(square_x8, square_x8), half_x8);
    /* The quadrant is in bits 30 and 31: blendv looks at bit 31. */
    swap_x8 = _mm256_castsi256_ps(_mm256_slli_epi32(shifted_x8, 1));
    *sine_x8 = _mm256_xor_ps(_mm256_blendv_ps(s_x8, c_x8, swap_x8),
                             _mm256_castsi256_ps(_mm256_and_si256(shifted_x8, sign_x8)));
    shifted_x8 = _mm256_add_epi32(shifted_x8, _mm256_set1_epi32(0x40000000));
    *cosine_x8 = _mm256_xor_ps(_mm256_blendv_ps(c_x8, s_x8, swap_x8),
                               _mm256_castsi256_ps(_mm256_and_si256(shifted_x8, sign_x8)));
}

RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_store_pairs_avx2(float *row, const rkvi_turns *turns, int f,
                                                        __m256 a_x8, __m256 b_x8)
{
    size_t b, a = rkvi_pair_at(turns, f, &b);
    __m256 low_x8, high_x8;
    if (!turns->adjacent) {
        _mm256_storeu_ps(row + a, a_x8);
        _mm256_storeu_ps(row + b, b_x8);
        return;
    }
    low_x8 = _mm256_unpacklo_ps(a_x8, b_x8);
    high_x8 = _mm256_unpackhi_ps(a_x8, b_x8);
    _mm256_storeu_ps(row + a, _mm256_permute2f128_ps(low_x8, high_x8, 0x20));
    _mm256_storeu_ps(row + a + 8, _mm256_permute2f128_ps(low_x8, high_x8, 0x31));
}

RKVI_TARGET_AVX2 static void rkvi_unrotate_avx2(float *dst, const float *src,
                                                const rkvi_turns *turns, uint32_t position)
{
    const __m256i position_x8 = _mm256_set1_epi32((int)position);
    int f;
    for (f = 0; f + 8 <= turns->n_pairs; f += 8) {
        __m256 a_x8, b_x8, sine_x8, cosine_x8;
        rkvi_sincos_avx2(rkvi_angle_avx2(turns, f, position_x8), &sine_x8, &cosine_x8);
        rkvi_load_pairs_avx2(src, turns, f, &a_x8, &b_x8);
        rkvi_store_pairs_avx2(dst, turns, f,
                              _mm256_fmadd_ps(a_x8, cosine_x8, _mm256_mul_ps(b_x8, sine_x8)),
                              _mm256_fmsub_ps(b_x8, cosine_x8, _mm256_mul_ps(a_x8, sine_x8)));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_unrotate_from(dst, src, turns, position, f);
}

/* One row with n = 1 or 2 vectors, both halves of the lanes added up. */
RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_lanes_avx2(const float *row, const float *const with[2],
                                                  int n, size_t dim, __m256 sum_x8[2])
{
    __m256 half_x8[2][2];
    size_t i;
    int v, h;
    RKVI_UNROLL
    for (v = 0; v < n; v++) half_x8[v][0] = half_x8[v][1] = _mm256_setzero_ps();
    for (i = 0; i < dim; i += 16) {
        RKVI_UNROLL
        for (h = 0; h < 2; h++) {
            __m256 row_x8 = _mm256_loadu_ps(row + i + 8 * h);
            RKVI_UNROLL
            for (v = 0; v < n; v++)
                half_x8[v][h] =
                    _mm256_fmadd_ps(_mm256_loadu_ps(with[v] + i + 8 * h), row_x8, half_x8[v][h]);
        }
    }
    RKVI_UNROLL
    for (v = 0; v < n; v++) sum_x8[v] = _mm256_add_ps(half_x8[v][0], half_x8[v][1]);
}

RKVI_TARGET_AVX2 static void rkvi_dot_rows_avx2(const rkvi_dot_rows *dots)
{
    const float *row = dots->rows;
    __m256 sum_x8[2];
    int r;
    for (r = 0; r < dots->n_rows; r++, row += dots->stride) {
        const float *with[2];
        with[0] = dots->with[0] ? dots->with[0] : row;
        with[1] = dots->with[1] ? dots->with[1] : row;
        if (dots->out[1]) {
            rkvi_lanes_avx2(row, with, 2, dots->dim, sum_x8);
            dots->out[1][r] = rkvi_reduce8_avx2(sum_x8[1]);
        } else {
            rkvi_lanes_avx2(row, with, 1, dots->dim, sum_x8);
        }
        dots->out[0][r] = rkvi_reduce8_avx2(sum_x8[0]);
    }
}

RKVI_TARGET_AVX2 static void rkvi_normalise_avx2(const float *square, size_t n, float *inverse,
                                                 float *self)
{
    size_t i;
    for (i = 0; i < n; i += 8) {
        __m256 norm_x8 = _mm256_sqrt_ps(_mm256_loadu_ps(square + i)), length_x8, inverse_x8;
        inverse_x8 = _mm256_add_ps(norm_x8, _mm256_set1_ps(RKVI_NORM_EPSILON));
        inverse_x8 = _mm256_div_ps(_mm256_set1_ps(1.0f), inverse_x8);
        length_x8 = _mm256_mul_ps(norm_x8, inverse_x8);
        _mm256_storeu_ps(inverse + i, inverse_x8);
        _mm256_storeu_ps(self + i, _mm256_mul_ps(length_x8, length_x8));
    }
}

/* `n_vectors` columns of eight, all rows: the sums stay in registers. */
RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_add_columns_avx2(float *sum, const float *rows,
                                                        size_t stride, const float *weights,
                                                        int n_rows, int n_vectors)
{
    __m256 sum_x8[8];
    int r, i;
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) sum_x8[i] = _mm256_loadu_ps(sum + 8 * i);
    for (r = 0; r < n_rows; r++, rows += stride) {
        __m256 weight_x8 = _mm256_set1_ps(weights[r]);
        RKVI_UNROLL
        for (i = 0; i < n_vectors; i++)
            sum_x8[i] = _mm256_fmadd_ps(weight_x8, _mm256_loadu_ps(rows + 8 * i), sum_x8[i]);
    }
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) _mm256_storeu_ps(sum + 8 * i, sum_x8[i]);
}

RKVI_TARGET_AVX2 static void rkvi_add_rows_avx2(float *sum, const float *rows, size_t stride,
                                                const float *weights, int n_rows, size_t n)
{
    size_t i;
    for (i = 0; i + 64 <= n; i += 64)
        rkvi_add_columns_avx2(sum + i, rows + i, stride, weights, n_rows, 8);
    for (; i < n; i += 16) rkvi_add_columns_avx2(sum + i, rows + i, stride, weights, n_rows, 2);
}

/* n_rows x n_vectors accumulators: 3 x 4 or 6 x 2, twelve of the sixteen registers. The smaller
 * operand stays in the others; the larger is streamed. */
RKVI_TARGET_AVX2 RKVI_INLINE void rkvi_tile_rows_avx2(const rkvi_dot_tile *tile, int n_rows,
                                                      int n_vectors)
{
    const int n_held = n_rows < n_vectors ? n_rows : n_vectors;
    const int n_streamed = n_rows < n_vectors ? n_vectors : n_rows;
    const float *panel = tile->panel, *rows = tile->rows;
    const size_t stride = tile->stride, dim = tile->dim;
    rkvi_fetch fetch = *tile->fetch;
    __m256 dot_x8[6][3], held_x8[3];
    size_t i;
    int p, k;
    RKVI_UNROLL
    for (p = 0; p < n_streamed; p++) {
        RKVI_UNROLL
        for (k = 0; k < n_held; k++) dot_x8[p][k] = _mm256_setzero_ps();
    }
    for (i = 0; i < dim; i++, panel += 8 * n_vectors) {
        rkvi_fetch_line(&fetch);
        RKVI_UNROLL
        for (k = 0; k < n_held; k++)
            held_x8[k] = n_rows < n_vectors ? _mm256_broadcast_ss(rows + (size_t)k * stride + i)
                                            : _mm256_loadu_ps(panel + 8 * k);
        RKVI_UNROLL
        for (p = 0; p < n_streamed; p++) {
            __m256 streamed_x8 = n_rows < n_vectors
                                     ? _mm256_loadu_ps(panel + 8 * p)
                                     : _mm256_broadcast_ss(rows + (size_t)p * stride + i);
            RKVI_UNROLL
            for (k = 0; k < n_held; k++)
                dot_x8[p][k] = _mm256_fmadd_ps(streamed_x8, held_x8[k], dot_x8[p][k]);
        }
    }
    RKVI_UNROLL
    for (p = 0; p < n_streamed; p++) {
        RKVI_UNROLL
        for (k = 0; k < n_held; k++) {
            int row = n_rows < n_vectors ? k : p, vector = n_rows < n_vectors ? p : k;
            _mm256_storeu_ps(tile->out + (size_t)row * tile->out_stride + 8 * vector, dot_x8[p][k]);
        }
    }
    *tile->fetch = fetch;
}

RKVI_TARGET_AVX2 static void rkvi_dot_tile_avx2(const rkvi_dot_tile *tile)
{
    const int n_rows = tile->width == 32 ? 3 : 6;
    int first;
    for (first = 0; first < RKVI_TILE_ROWS; first += n_rows) {
        rkvi_dot_tile some = rkvi_tile_rows_from(tile, first);
        if (n_rows == 3)
            rkvi_tile_rows_avx2(&some, 3, 4);
        else
            rkvi_tile_rows_avx2(&some, 6, 2);
    }
}

RKVI_TARGET_AVX2 static void rkvi_cosines_avx2(const rkvi_cosines *c)
{
    __m256 threshold_x8 = _mm256_set1_ps(c->threshold);
    float *x = c->x;
    int r, v;
    for (r = 0; r < c->n_rows; r++, x += c->stride) {
        __m256 inv_x8 = _mm256_set1_ps(c->row_inverse[r]);
        uint64_t above = 0;
        for (v = 0; v < c->n; v += 8) {
            __m256 weight_x8 = _mm256_mul_ps(inv_x8, _mm256_loadu_ps(c->inverse + v));
            __m256 cosine_x8 = _mm256_mul_ps(_mm256_loadu_ps(x + v), weight_x8);
            __m256 above_x8 = _mm256_cmp_ps(cosine_x8, threshold_x8, _CMP_GT_OQ);
            _mm256_storeu_ps(x + v, cosine_x8);
            above |= (uint64_t)(unsigned)_mm256_movemask_ps(above_x8) << v;
        }
        c->above[r] = above;
    }
}

RKVI_TARGET_AVX2 RKVI_INLINE __m256 rkvi_exp_avx2(__m256 x_x8)
{
    __m256 magic_x8 = _mm256_set1_ps(RKVI_ROUND_MAGIC);
    __m256 shifted_x8 = _mm256_fmadd_ps(x_x8, _mm256_set1_ps(RKVI_LOG2E), magic_x8);
    __m256 n_x8 = _mm256_sub_ps(shifted_x8, magic_x8);
    __m256 r_x8 = _mm256_fmadd_ps(n_x8, _mm256_set1_ps(-RKVI_LN2_HIGH), x_x8);
    __m256 y_x8 = _mm256_set1_ps(RKVI_EXP_C0);
    __m256 in_range_x8 = _mm256_cmp_ps(x_x8, _mm256_set1_ps(RKVI_EXP_LOWEST), _CMP_GE_OQ);
    __m256i power_x8 = _mm256_slli_epi32(_mm256_castps_si256(shifted_x8), 23);
    r_x8 = _mm256_fmadd_ps(n_x8, _mm256_set1_ps(-RKVI_LN2_LOW), r_x8);
    y_x8 = _mm256_fmadd_ps(y_x8, r_x8, _mm256_set1_ps(RKVI_EXP_C1));
    y_x8 = _mm256_fmadd_ps(y_x8, r_x8, _mm256_set1_ps(RKVI_EXP_C2));
    y_x8 = _mm256_fmadd_ps(y_x8, r_x8, _mm256_set1_ps(RKVI_EXP_C3));
    y_x8 = _mm256_fmadd_ps(y_x8, r_x8, _mm256_set1_ps(RKVI_EXP_C4));
    y_x8 = _mm256_fmadd_ps(y_x8, r_x8, _mm256_set1_ps(RKVI_EXP_C5));
    y_x8 = _mm256_fmadd_ps(y_x8, _mm256_mul_ps(r_x8, r_x8), r_x8);
    y_x8 = _mm256_add_ps(y_x8, _mm256_set1_ps(1.0f));
    y_x8 = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y_x8), power_x8));
    return _mm256_and_ps(y_x8, in_range_x8);
}

RKVI_TARGET_AVX2 static void rkvi_softcap_avx2(float *x, size_t n, float ratio, float cap)
{
    __m256 sign_x8 = _mm256_set1_ps(-0.0f), one_x8 = _mm256_set1_ps(1.0f);
    size_t i;
    for (i = 0; i < n; i += 8) {
        __m256 y_x8 = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(ratio));
        __m256 size_x8 = _mm256_andnot_ps(sign_x8, y_x8);
        __m256 e_x8 = rkvi_exp_avx2(_mm256_mul_ps(_mm256_set1_ps(-2.0f), size_x8));
        __m256 t_x8 = _mm256_div_ps(_mm256_sub_ps(one_x8, e_x8), _mm256_add_ps(one_x8, e_x8));
        t_x8 = _mm256_mul_ps(t_x8, _mm256_set1_ps(cap));
        _mm256_storeu_ps(x + i, _mm256_or_ps(t_x8, _mm256_and_ps(sign_x8, y_x8)));
    }
}

RKVI_TARGET_AVX2 static float rkvi_exp_sum_avx2(float *x, size_t n, float max)
{
    __m256 max_x8 = _mm256_set1_ps(max);
    __m256 low_x8 = _mm256_setzero_ps(), high_x8 = _mm256_setzero_ps();
    size_t i;
    for (i = 0; i < n; i += 16) {
        __m256 a_x8 = rkvi_exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), max_x8));
        __m256 b_x8 = rkvi_exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i + 8), max_x8));
        _mm256_storeu_ps(x + i, a_x8);
        _mm256_storeu_ps(x + i + 8, b_x8);
        low_x8 = _mm256_add_ps(low_x8, a_x8);
        high_x8 = _mm256_add_ps(high_x8, b_x8);
    }
    return rkvi_reduce8_avx2(_mm256_add_ps(low_x8, high_x8));
}

RKVI_TARGET_AVX2 static float rkvi_maximum_avx2(const float *x, size_t n)
{
    __m256 max_x8 = _mm256_loadu_ps(x);
    float lanes[8];
    size_t i;
    for (i = 8; i < n; i += 8) max_x8 = _mm256_max_ps(_mm256_loadu_ps(x + i), max_x8);
    _mm256_storeu_ps(lanes, max_x8);
    return rkvi_maximum_scalar(lanes, 8);
}
#endif /* RKV_NO_AVX2 */
#endif /* RKVI_X86 */

/* ==== 11. AVX-512 kernels =================================================================== */
#if defined(RKVI_X86) && !defined(RKV_NO_AVX512)
#if defined(__GNUC__) && !defined(__clang__) /* GCC PR 105593: its own header warns */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/* No faster in 512 bits: bound by loads and shuffles, or not enough of the time. */
#define rkvi_interleave_avx512   rkvi_interleave_avx2
#define rkvi_fold_group_avx512   rkvi_fold_group_avx2
#define rkvi_max_into_avx512     rkvi_max_into_avx2
#define rkvi_pair_lengths_avx512 rkvi_pair_lengths_avx2

RKVI_TARGET_AVX512 RKVI_INLINE void rkvi_sincos_avx512(__m512i angle_x16, __m512 *sine_x16,
                                                       __m512 *cosine_x16)
{
    const __m512i eighth_x16 = _mm512_set1_epi32((int)RKVI_TURN_EIGHTH);
    const __m512i sign_x16 = _mm512_set1_epi32((int)0x80000000u);
    const __m512i quarter_x16 = _mm512_set1_epi32(0x40000000);
    __m512i shifted_x16 = _mm512_add_epi32(angle_x16, eighth_x16), flip_x16;
    __m512i rest_x16 = _mm512_and_si512(shifted_x16, _mm512_set1_epi32(0x3fffffff));
    __m512 x_x16 = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(rest_x16, eighth_x16)),
                                 _mm512_set1_ps(RKVI_TURN_UNIT));
    __m512 square_x16 = _mm512_mul_ps(x_x16, x_x16), s_x16, c_x16, half_x16;
    __mmask16 swap = _mm512_test_epi32_mask(shifted_x16, quarter_x16); /* bits 30, 31: quadrant */
    s_x16 = _mm512_fmadd_ps(_mm512_set1_ps(RKVI_SIN_C0), square_x16, _mm512_set1_ps(RKVI_SIN_C1));
    s_x16 = _mm512_fmadd_ps(s_x16, square_x16, _mm512_set1_ps(RKVI_SIN_C2));
    s_x16 = _mm512_fmadd_ps(_mm512_mul_ps(s_x16, square_x16), x_x16, x_x16);
    c_x16 = _mm512_fmadd_ps(_mm512_set1_ps(RKVI_COS_C0), square_x16, _mm512_set1_ps(RKVI_COS_C1));
    c_x16 = _mm512_fmadd_ps(c_x16, square_x16, _mm512_set1_ps(RKVI_COS_C2));
    half_x16 = _mm512_fmadd_ps(square_x16, _mm512_set1_ps(-0.5f), _mm512_set1_ps(1.0f));
    c_x16 = _mm512_fmadd_ps(c_x16, _mm512_mul_ps(square_x16, square_x16), half_x16);
    flip_x16 = _mm512_and_si512(shifted_x16, sign_x16);
    *sine_x16 = _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(_mm512_mask_blend_ps(swap, s_x16, c_x16)), flip_x16));
    flip_x16 = _mm512_and_si512(_mm512_add_epi32(shifted_x16, quarter_x16), sign_x16);
    *cosine_x16 = _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(_mm512_mask_blend_ps(swap, c_x16, s_x16)), flip_x16));
}

/* The angles of 16 pairs. */
RKVI_TARGET_AVX512 RKVI_INLINE __m512i rkvi_angle_avx512(const rkvi_turns *turns, int f,
                                                         __m512i position_x16)
{
    __m512i high_x16 = _mm512_loadu_si512((const void *)(turns->high + f));
    __m512i low_x16 = _mm512_loadu_si512((const void *)(turns->low + f));
    __m512i even_x8 = _mm512_srli_epi64(_mm512_mul_epu32(low_x16, position_x16), 32);
    __m512i odd_x8 = _mm512_mul_epu32(_mm512_srli_epi64(low_x16, 32), position_x16);
    return _mm512_add_epi32(_mm512_mullo_epi32(high_x16, position_x16),
                            _mm512_mask_blend_epi32((__mmask16)0xaaaa, even_x8, odd_x8));
}

/* Adjacent pairs keep their places: both numbers of a pair find sine and cosine in their lanes. */
RKVI_TARGET_AVX512 RKVI_INLINE void rkvi_turn_adjacent_avx512(float *dst, const float *src,
                                                              __m512i angle_x8)
{
    const __mmask16 second = (__mmask16)0xaaaa;
    __m512 row_x16 = _mm512_loadu_ps(src), other_x16 = _mm512_permute_ps(row_x16, 0xb1);
    __m512 sine_x16, cosine_x16, side_x16;
    rkvi_sincos_avx512(angle_x8, &sine_x16, &cosine_x16);
    side_x16 = _mm512_mul_ps(other_x16, sine_x16);
    side_x16 = _mm512_mask_sub_ps(side_x16, second, _mm512_setzero_ps(), side_x16);
    _mm512_storeu_ps(dst, _mm512_fmadd_ps(row_x16, cosine_x16, side_x16));
}

RKVI_TARGET_AVX512 static void rkvi_unrotate_avx512(float *dst, const float *src,
                                                    const rkvi_turns *turns, uint32_t position)
{
    const __m512i position_x16 = _mm512_set1_epi32((int)position);
    const __m512i low_x16 = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high_x16 = _mm512_add_epi32(low_x16, _mm512_set1_epi32(8));
    int f;
    for (f = 0; f + 16 <= turns->n_pairs; f += 16) {
        __m512i angle_x16 = rkvi_angle_avx512(turns, f, position_x16);
        size_t b, a = rkvi_pair_at(turns, f, &b);
        __m512 a_x16, b_x16, sine_x16, cosine_x16;
        if (turns->adjacent) {
            rkvi_turn_adjacent_avx512(dst + a, src + a,
                                      _mm512_permutexvar_epi32(low_x16, angle_x16));
            rkvi_turn_adjacent_avx512(dst + a + 16, src + a + 16,
                                      _mm512_permutexvar_epi32(high_x16, angle_x16));
            continue;
        }
        rkvi_sincos_avx512(angle_x16, &sine_x16, &cosine_x16);
        a_x16 = _mm512_loadu_ps(src + a);
        b_x16 = _mm512_loadu_ps(src + b);
        _mm512_storeu_ps(dst + a,
                         _mm512_fmadd_ps(a_x16, cosine_x16, _mm512_mul_ps(b_x16, sine_x16)));
        _mm512_storeu_ps(dst + b,
                         _mm512_fmsub_ps(b_x16, cosine_x16, _mm512_mul_ps(a_x16, sine_x16)));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_unrotate_from(dst, src, turns, position, f);
}

RKVI_TARGET_AVX512 static void rkvi_load_f16_avx512(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        __m256i half_x16 = _mm256_loadu_si256((const __m256i *)(const void *)(src + 2 * i));
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(half_x16));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_f16_scalar(dst + i, src + 2 * i, n - i);
}

RKVI_TARGET_AVX512 static void rkvi_load_bf16_avx512(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        __m256i half_x16 = _mm256_loadu_si256((const __m256i *)(const void *)(src + 2 * i));
        __m512i bits_x16 = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half_x16), 16);
        _mm512_storeu_ps(dst + i, _mm512_castsi512_ps(bits_x16));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_bf16_scalar(dst + i, src + 2 * i, n - i);
}

/* As rkvi_load_f8_e4m3_avx2. */
RKVI_TARGET_AVX512 static void rkvi_load_f8_e4m3_avx512(float *dst, const unsigned char *src,
                                                        size_t n)
{
    const __m128i magnitude_x16 = _mm_set1_epi8(0x7f);
    const __m256i bits_x16 = _mm256_set1_epi16((short)0xbf80);
    __m128i most_x16 = _mm_setzero_si128();
    size_t i;
    int nans;
    for (i = 0; i + 16 <= n; i += 16) {
        __m128i code_x16 = _mm_loadu_si128((const __m128i *)(const void *)(src + i));
        __m256i half_x16 = _mm256_slli_epi16(_mm256_cvtepi8_epi16(code_x16), 7);
        half_x16 = _mm256_and_si256(half_x16, bits_x16);
        most_x16 = _mm_max_epu8(most_x16, _mm_and_si128(code_x16, magnitude_x16));
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(_mm512_cvtph_ps(half_x16), _mm512_set1_ps(256.0f)));
    }
    nans = _mm_movemask_epi8(_mm_cmpeq_epi8(most_x16, magnitude_x16));
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    if (nans) i = 0;
    rkvi_load_f8_e4m3_scalar(dst + i, src + i, n - i);
}

RKVI_TARGET_AVX512 static void rkvi_load_f8_e5m2_avx512(float *dst, const unsigned char *src,
                                                        size_t n)
{
    size_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        __m128i code_x16 = _mm_loadu_si128((const __m128i *)(const void *)(src + i));
        __m256i half_x16 = _mm256_slli_epi16(_mm256_cvtepu8_epi16(code_x16), 8);
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(half_x16));
    }
    _mm256_zeroupper(); /* gcc 12 omits it before a tail call, which slows down SSE code */
    rkvi_load_f8_e5m2_scalar(dst + i, src + i, n - i);
}

RKVI_TARGET_AVX512 static void rkvi_load_q8_0_avx512(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    int k;
    for (i = 0; i < n; i += RKVI_Q8_0_DIMS, src += RKVI_Q8_0_BYTES) {
        int16_t half;
        __m512 scale_x16;
        memcpy(&half, src, sizeof half);
        scale_x16 = _mm512_cvtph_ps(_mm256_set1_epi16(half));
        RKVI_UNROLL
        for (k = 0; k < RKVI_Q8_0_DIMS; k += 16) {
            __m128i bytes_x16 = _mm_loadu_si128((const __m128i *)(const void *)(src + 2 + k));
            __m512 number_x16 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes_x16));
            _mm512_storeu_ps(dst + i + k, _mm512_mul_ps(number_x16, scale_x16));
        }
    }
}

/* The first level of the tree, and the other three. */
RKVI_TARGET_AVX512 RKVI_INLINE float rkvi_reduce16_avx512(__m512 sums_x16)
{
    __m512d as_double = _mm512_castps_pd(sums_x16);
    __m256 high_x8 = _mm256_castpd_ps(_mm512_extractf64x4_pd(as_double, 1));
    return rkvi_reduce8_avx2(_mm256_add_ps(_mm512_castps512_ps256(sums_x16), high_x8));
}

/* Four dot products at once, from their sixteen lanes each, by the tree. */
RKVI_TARGET_AVX512 RKVI_INLINE __m128 rkvi_reduce_four_avx512(const __m512 d[4])
{
    __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512 d01 = _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x44),
                               _mm512_shuffle_f32x4(d[0], d[1], 0xee)); /* l and l + 8 */
    __m512 d23 = _mm512_add_ps(_mm512_shuffle_f32x4(d[2], d[3], 0x44),
                               _mm512_shuffle_f32x4(d[2], d[3], 0xee));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(d01, d23, 0x88),
                               _mm512_shuffle_f32x4(d01, d23, 0xdd)); /* l and l + 4 */
    sum = _mm512_add_ps(sum, _mm512_shuffle_ps(sum, sum, 0x4e));      /* l and l + 2 */
    sum = _mm512_add_ps(sum, _mm512_shuffle_ps(sum, sum, 0xb1));      /* l and l + 1 */
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum));
}

/* Four rows with n = 1 or 2 vectors; fetches the rows 8 further on. */
RKVI_TARGET_AVX512 RKVI_INLINE void rkvi_dot_four_avx512(const rkvi_dot_rows *dots,
                                                         const float *rows, int n, int is_self,
                                                         int r0)
{
    const uintptr_t ahead = 8 * dots->stride * sizeof *rows; /* f32 keys in place: not in L1 yet */
    __m512 sum_x16[2][4];
    size_t i;
    int r, v;
    RKVI_UNROLL
    for (r = 0; r < 4; r++) sum_x16[0][r] = sum_x16[1][r] = _mm512_setzero_ps();
    for (i = 0; i < dots->dim; i += 16) {
        RKVI_UNROLL
        for (r = 0; r < 4; r++) {
            const float *row = rows + (size_t)r * dots->stride + i;
            __m512 row_x16 = _mm512_loadu_ps(row);
            _mm_prefetch((const char *)((uintptr_t)row + ahead), _MM_HINT_T0);
            RKVI_UNROLL
            for (v = 0; v < n; v++)
                sum_x16[v][r] = _mm512_fmadd_ps(
                    is_self && v == 0 ? row_x16 : _mm512_loadu_ps(dots->with[v] + i), row_x16,
                    sum_x16[v][r]);
        }
    }
    RKVI_UNROLL
    for (v = 0; v < n; v++) _mm_storeu_ps(dots->out[v] + r0, rkvi_reduce_four_avx512(sum_x16[v]));
}

RKVI_TARGET_AVX512 RKVI_INLINE float rkvi_dot_avx512(const float *a, const float *b, size_t dim)
{
    __m512 sum_x16 = _mm512_setzero_ps();
    size_t i;
    for (i = 0; i < dim; i += 16)
        sum_x16 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum_x16);
    return rkvi_reduce16_avx512(sum_x16);
}

RKVI_TARGET_AVX512 static void rkvi_dot_rows_avx512(const rkvi_dot_rows *dots)
{
    const int is_self = !dots->with[0], n = dots->out[1] ? 2 : 1;
    const float *rows = dots->rows;
    int r, v;
    for (r = 0; r + 4 <= dots->n_rows; r += 4, rows += 4 * dots->stride) {
        if (is_self && n == 2)
            rkvi_dot_four_avx512(dots, rows, 2, 1, r);
        else if (is_self)
            rkvi_dot_four_avx512(dots, rows, 1, 1, r);
        else if (n == 2)
            rkvi_dot_four_avx512(dots, rows, 2, 0, r);
        else
            rkvi_dot_four_avx512(dots, rows, 1, 0, r);
    }
    for (; r < dots->n_rows; r++, rows += dots->stride)
        for (v = 0; v < n; v++)
            dots->out[v][r] =
                rkvi_dot_avx512(dots->with[v] ? dots->with[v] : rows, rows, dots->dim);
}

RKVI_TARGET_AVX512 static void rkvi_normalise_avx512(const float *square, size_t n, float *inverse,
                                                     float *self)
{
    size_t i;
    for (i = 0; i < n; i += 16) {
        __m512 norm_x16 = _mm512_sqrt_ps(_mm512_loadu_ps(square + i)), length_x16, inverse_x16;
        inverse_x16 = _mm512_add_ps(norm_x16, _mm512_set1_ps(RKVI_NORM_EPSILON));
        inverse_x16 = _mm512_div_ps(_mm512_set1_ps(1.0f), inverse_x16);
        length_x16 = _mm512_mul_ps(norm_x16, inverse_x16);
        _mm512_storeu_ps(inverse + i, inverse_x16);
        _mm512_storeu_ps(self + i, _mm512_mul_ps(length_x16, length_x16));
    }
}

RKVI_TARGET_AVX512 RKVI_INLINE void rkvi_add_columns_avx512(float *sum, const float *rows,
                                                            size_t stride, const float *weights,
                                                            int n_rows, int n_vectors)
{
    __m512 sum_x16[8];
    int r, i;
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) sum_x16[i] = _mm512_loadu_ps(sum + 16 * i);
    for (r = 0; r < n_rows; r++, rows += stride) {
        __m512 weight_x16 = _mm512_set1_ps(weights[r]);
        RKVI_UNROLL
        for (i = 0; i < n_vectors; i++)
            sum_x16[i] = _mm512_fmadd_ps(weight_x16, _mm512_loadu_ps(rows + 16 * i), sum_x16[i]);
    }
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) _mm512_storeu_ps(sum + 16 * i, sum_x16[i]);
}

RKVI_TARGET_AVX512 static void rkvi_add_rows_avx512(float *sum, const float *rows, size_t stride,
                                                    const float *weights, int n_rows, size_t n)
{
    size_t i;
    for (i = 0; i + 128 <= n; i += 128)
        rkvi_add_columns_avx512(sum + i, rows + i, stride, weights, n_rows, 8);
    for (; i + 64 <= n; i += 64)
        rkvi_add_columns_avx512(sum + i, rows + i, stride, weights, n_rows, 4);
    for (; i < n; i += 16) rkvi_add_columns_avx512(sum + i, rows + i, stride, weights, n_rows, 1);
}

/* 12 x 2 accumulators, or 12 x 1, of the 32 registers. */
RKVI_TARGET_AVX512 RKVI_INLINE void rkvi_tile_rows_avx512(const rkvi_dot_tile *tile, int n_vectors)
{
    const float *panel = tile->panel, *third[RKVI_TILE_ROWS / 3];
    const size_t stride = tile->stride, dim = tile->dim;
    rkvi_fetch fetch = *tile->fetch;
    __m512 dot_x16[RKVI_TILE_ROWS][2];
    size_t i;
    int r, v;
    /* A pointer for every third row, strides for the others: twelve would not fit. */
    RKVI_UNROLL
    for (r = 0; r < RKVI_TILE_ROWS; r += 3) third[r / 3] = tile->rows + (size_t)r * stride;
    RKVI_UNROLL
    for (r = 0; r < RKVI_TILE_ROWS; r++) dot_x16[r][0] = dot_x16[r][1] = _mm512_setzero_ps();
    for (i = 0; i < dim; i++, panel += 16 * n_vectors) {
        rkvi_fetch_line(&fetch);
        RKVI_UNROLL
        for (r = 0; r < RKVI_TILE_ROWS; r++) {
            __m512 key_x16 = _mm512_set1_ps(third[r / 3][(size_t)(r % 3) * stride]);
            RKVI_UNROLL
            for (v = 0; v < n_vectors; v++)
                dot_x16[r][v] =
                    _mm512_fmadd_ps(_mm512_loadu_ps(panel + 16 * v), key_x16, dot_x16[r][v]);
            if (r % 3 == 2) third[r / 3]++;
        }
    }
    RKVI_UNROLL
    for (r = 0; r < RKVI_TILE_ROWS; r++) {
        RKVI_UNROLL
        for (v = 0; v < n_vectors; v++)
            _mm512_storeu_ps(tile->out + (size_t)r * tile->out_stride + 16 * v, dot_x16[r][v]);
    }
    *tile->fetch = fetch;
}

RKVI_TARGET_AVX512 static void rkvi_dot_tile_avx512(const rkvi_dot_tile *tile)
{
    if (tile->width == 32)
        rkvi_tile_rows_avx512(tile, 2);
    else
        rkvi_tile_rows_avx512(tile, 1);
}

RKVI_TARGET_AVX512 static void rkvi_cosines_avx512(const rkvi_cosines *c)
{
    __m512 threshold_x16 = _mm512_set1_ps(c->threshold);
    float *x = c->x;
    int r, v;
    for (r = 0; r < c->n_rows; r++, x += c->stride) {
        __m512 inv_x16 = _mm512_set1_ps(c->row_inverse[r]);
        uint64_t above = 0;
        for (v = 0; v < c->n; v += 16) {
            __m512 weight_x16 = _mm512_mul_ps(inv_x16, _mm512_loadu_ps(c->inverse + v));
            __m512 cosine_x16 = _mm512_mul_ps(_mm512_loadu_ps(x + v), weight_x16);
            _mm512_storeu_ps(x + v, cosine_x16);
            above |= (uint64_t)_mm512_cmp_ps_mask(cosine_x16, threshold_x16, _CMP_GT_OQ) << v;
        }
        c->above[r] = above;
    }
}

RKVI_TARGET_AVX512 RKVI_INLINE __m512 rkvi_exp_avx512(__m512 x_x16)
{
    __m512 magic_x16 = _mm512_set1_ps(RKVI_ROUND_MAGIC);
    __m512 shifted_x16 = _mm512_fmadd_ps(x_x16, _mm512_set1_ps(RKVI_LOG2E), magic_x16);
    __m512 n_x16 = _mm512_sub_ps(shifted_x16, magic_x16);
    __m512 r_x16 = _mm512_fmadd_ps(n_x16, _mm512_set1_ps(-RKVI_LN2_HIGH), x_x16);
    __m512 y_x16 = _mm512_set1_ps(RKVI_EXP_C0);
    __mmask16 in_range = _mm512_cmp_ps_mask(x_x16, _mm512_set1_ps(RKVI_EXP_LOWEST), _CMP_GE_OQ);
    __m512i power_x16 = _mm512_slli_epi32(_mm512_castps_si512(shifted_x16), 23);
    r_x16 = _mm512_fmadd_ps(n_x16, _mm512_set1_ps(-RKVI_LN2_LOW), r_x16);
    y_x16 = _mm512_fmadd_ps(y_x16, r_x16, _mm512_set1_ps(RKVI_EXP_C1));
    y_x16 = _mm512_fmadd_ps(y_x16, r_x16, _mm512_set1_ps(RKVI_EXP_C2));
    y_x16 = _mm512_fmadd_ps(y_x16, r_x16, _mm512_set1_ps(RKVI_EXP_C3));
    y_x16 = _mm512_fmadd_ps(y_x16, r_x16, _mm512_set1_ps(RKVI_EXP_C4));
    y_x16 = _mm512_fmadd_ps(y_x16, r_x16, _mm512_set1_ps(RKVI_EXP_C5));
    y_x16 = _mm512_fmadd_ps(y_x16, _mm512_mul_ps(r_x16, r_x16), r_x16);
    y_x16 = _mm512_add_ps(y_x16, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(
        _mm512_maskz_add_epi32(in_range, _mm512_castps_si512(y_x16), power_x16));
}

RKVI_TARGET_AVX512 static void rkvi_softcap_avx512(float *x, size_t n, float ratio, float cap)
{
    __m512i sign_x16 = _mm512_set1_epi32((int)0x80000000u);
    __m512 one_x16 = _mm512_set1_ps(1.0f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        __m512 y_x16 = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(ratio));
        __m512i y_bits = _mm512_castps_si512(y_x16);
        __m512 size_x16 = _mm512_castsi512_ps(_mm512_andnot_epi32(sign_x16, y_bits));
        __m512 e_x16 = rkvi_exp_avx512(_mm512_mul_ps(_mm512_set1_ps(-2.0f), size_x16));
        __m512 t_x16 = _mm512_div_ps(_mm512_sub_ps(one_x16, e_x16), _mm512_add_ps(one_x16, e_x16));
        __m512i t_bits = _mm512_castps_si512(_mm512_mul_ps(t_x16, _mm512_set1_ps(cap)));
        t_bits = _mm512_or_epi32(t_bits, _mm512_and_epi32(sign_x16, y_bits));
        _mm512_storeu_ps(x + i, _mm512_castsi512_ps(t_bits));
    }
}

RKVI_TARGET_AVX512 static float rkvi_exp_sum_avx512(float *x, size_t n, float max)
{
    __m512 max_x16 = _mm512_set1_ps(max), sum_x16 = _mm512_setzero_ps();
    size_t i;
    for (i = 0; i < n; i += 16) {
        __m512 e_x16 = rkvi_exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), max_x16));
        _mm512_storeu_ps(x + i, e_x16);
        sum_x16 = _mm512_add_ps(sum_x16, e_x16);
    }
    return rkvi_reduce16_avx512(sum_x16);
}

RKVI_TARGET_AVX512 static float rkvi_maximum_avx512(const float *x, size_t n)
{
    __m512 max_x16 = _mm512_loadu_ps(x);
    float lanes[16];
    size_t i;
    for (i = 16; i < n; i += 16) max_x16 = _mm512_max_ps(_mm512_loadu_ps(x + i), max_x16);
    _mm512_storeu_ps(lanes, max_x16);
    return rkvi_maximum_scalar(lanes, 16);
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* RKVI_X86, RKV_NO_AVX512 */

/* ==== 12. NEON kernels ====================================================================== */
#ifdef RKVI_NEON

static void rkvi_load_f16_neon(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 4 <= n; i += 4) {
        float16x4_t half_x4 = vreinterpret_f16_u8(vld1_u8(src + 2 * i));
        vst1q_f32(dst + i, vcvt_f32_f16(half_x4));
    }
    rkvi_load_f16_scalar(dst + i, src + 2 * i, n - i);
}

static void rkvi_load_bf16_neon(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 4 <= n; i += 4) {
        uint16x4_t half_x4 = vreinterpret_u16_u8(vld1_u8(src + 2 * i));
        vst1q_f32(dst + i, vreinterpretq_f32_u32(vshll_n_u16(half_x4, 16)));
    }
    rkvi_load_bf16_scalar(dst + i, src + 2 * i, n - i);
}

/* As f16, with the bias of the exponent put right. A NaN, which is rare, would come out as 480: a
 * run with one is loaded again. */
static void rkvi_load_f8_e4m3_neon(float *dst, const unsigned char *src, size_t n)
{
    const uint8x8_t magnitude_x8 = vdup_n_u8(0x7f);
    uint8x8_t most_x8 = vdup_n_u8(0);
    size_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        uint8x8_t code_x8 = vld1_u8(src + i);
        uint16x8_t half_x8 =
            vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(code_x8)), 7));
        half_x8 = vandq_u16(half_x8, vdupq_n_u16(0xbf80));
        most_x8 = vmax_u8(most_x8, vand_u8(code_x8, magnitude_x8));
        vst1q_f32(dst + i,
                  vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half_x8))), 256.0f));
        vst1q_f32(dst + i + 4,
                  vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half_x8))), 256.0f));
    }
    if (vmaxv_u8(most_x8) == 0x7f) i = 0;
    rkvi_load_f8_e4m3_scalar(dst + i, src + i, n - i);
}

static void rkvi_load_f8_e5m2_neon(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        uint16x8_t half_x8 = vshll_n_u8(vld1_u8(src + i), 8);
        vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half_x8))));
        vst1q_f32(dst + i + 4, vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half_x8))));
    }
    rkvi_load_f8_e5m2_scalar(dst + i, src + i, n - i);
}

static void rkvi_load_q8_0_neon(float *dst, const unsigned char *src, size_t n)
{
    size_t i;
    int k;
    for (i = 0; i < n; i += RKVI_Q8_0_DIMS, src += RKVI_Q8_0_BYTES) {
        uint16_t half;
        float scale;
        memcpy(&half, src, sizeof half);
        scale = rkvi_float_from_f16(half);
        RKVI_UNROLL
        for (k = 0; k < RKVI_Q8_0_DIMS; k += 8) {
            int16x8_t number_x8 = vmovl_s8(vreinterpret_s8_u8(vld1_u8(src + 2 + k)));
            float32x4_t low_x4 = vcvtq_f32_s32(vmovl_s16(vget_low_s16(number_x8)));
            float32x4_t high_x4 = vcvtq_f32_s32(vmovl_s16(vget_high_s16(number_x8)));
            vst1q_f32(dst + i + k, vmulq_n_f32(low_x4, scale));
            vst1q_f32(dst + i + k + 4, vmulq_n_f32(high_x4, scale));
        }
    }
}

/* Sixteen lanes in four registers, by the tree. */
RKVI_INLINE float rkvi_reduce16_neon(float32x4_t l0, float32x4_t l4, float32x4_t l8,
                                     float32x4_t l12)
{
    float32x4_t sum_x4 = vaddq_f32(vaddq_f32(l0, l8), vaddq_f32(l4, l12));
    float32x2_t sum_x2 = vadd_f32(vget_low_f32(sum_x4), vget_high_f32(sum_x4));
    return vget_lane_f32(sum_x2, 0) + vget_lane_f32(sum_x2, 1);
}

static void rkvi_dot_rows_neon(const rkvi_dot_rows *dots)
{
    const float *row = dots->rows;
    size_t i;
    int r, v, l;
    for (r = 0; r < dots->n_rows; r++, row += dots->stride)
        for (v = 0; v < 2 && dots->out[v]; v++) {
            const float *with = dots->with[v] ? dots->with[v] : row;
            float32x4_t sum_x4[4];
            RKVI_UNROLL
            for (l = 0; l < 4; l++) sum_x4[l] = vdupq_n_f32(0);
            for (i = 0; i < dots->dim; i += 16) {
                RKVI_UNROLL
                for (l = 0; l < 4; l++)
                    sum_x4[l] = vfmaq_f32(sum_x4[l], vld1q_f32(with + i + 4 * l),
                                          vld1q_f32(row + i + 4 * l));
            }
            dots->out[v][r] = rkvi_reduce16_neon(sum_x4[0], sum_x4[1], sum_x4[2], sum_x4[3]);
        }
}

static void rkvi_normalise_neon(const float *square, size_t n, float *inverse, float *self)
{
    size_t i;
    for (i = 0; i < n; i += 4) {
        float32x4_t norm_x4 = vsqrtq_f32(vld1q_f32(square + i)), length_x4, inverse_x4;
        inverse_x4 = vaddq_f32(norm_x4, vdupq_n_f32(RKVI_NORM_EPSILON));
        inverse_x4 = vdivq_f32(vdupq_n_f32(1.0f), inverse_x4);
        length_x4 = vmulq_f32(norm_x4, inverse_x4);
        vst1q_f32(inverse + i, inverse_x4);
        vst1q_f32(self + i, vmulq_f32(length_x4, length_x4));
    }
}

RKVI_INLINE void rkvi_add_columns_neon(float *sum, const float *rows, size_t stride,
                                       const float *weights, int n_rows, int n_vectors)
{
    float32x4_t sum_x4[16];
    int r, i;
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) sum_x4[i] = vld1q_f32(sum + 4 * i);
    for (r = 0; r < n_rows; r++, rows += stride) {
        RKVI_UNROLL
        for (i = 0; i < n_vectors; i++)
            sum_x4[i] = vfmaq_n_f32(sum_x4[i], vld1q_f32(rows + 4 * i), weights[r]);
    }
    RKVI_UNROLL
    for (i = 0; i < n_vectors; i++) vst1q_f32(sum + 4 * i, sum_x4[i]);
}

static void rkvi_add_rows_neon(float *sum, const float *rows, size_t stride, const float *weights,
                               int n_rows, size_t n)
{
    size_t i;
    for (i = 0; i + 64 <= n; i += 64)
        rkvi_add_columns_neon(sum + i, rows + i, stride, weights, n_rows, 16);
    for (; i < n; i += 16) rkvi_add_columns_neon(sum + i, rows + i, stride, weights, n_rows, 4);
}

/* Four rows at a time: what is i-th of each stands together after the structured load. */
static void rkvi_interleave_neon(float *panel, size_t width, const float *rows, size_t stride,
                                 size_t dim)
{
    size_t i, r, k;
    for (r = 0; r < RKVI_INTERLEAVED; r += 4)
        for (i = 0; i < dim; i += 4) {
            float row[16];
            float32x4x4_t by_row;
            for (k = 0; k < 4; k++) vst1q_f32(row + 4 * k, vld1q_f32(rows + (r + k) * stride + i));
            by_row = vld4q_f32(row);
            for (k = 0; k < 4; k++) vst1q_f32(panel + (i + k) * width + r, by_row.val[k]);
        }
}

/* n_rows x n_vectors accumulators: 3 x 8 or 6 x 4, of the 32 registers. */
RKVI_INLINE void rkvi_tile_rows_neon(const rkvi_dot_tile *tile, int n_rows, int n_vectors)
{
    const float *panel = tile->panel, *rows = tile->rows;
    const size_t stride = tile->stride, dim = tile->dim;
    rkvi_fetch fetch = *tile->fetch;
    float32x4_t dot_x4[6][8];
    size_t i;
    int r, v;
    RKVI_UNROLL
    for (r = 0; r < n_rows; r++) {
        RKVI_UNROLL
        for (v = 0; v < n_vectors; v++) dot_x4[r][v] = vdupq_n_f32(0);
    }
    for (i = 0; i < dim; i++, panel += 4 * n_vectors) {
        rkvi_fetch_line(&fetch);
        RKVI_UNROLL
        for (v = 0; v < n_vectors; v++) {
            float32x4_t query_x4 = vld1q_f32(panel + 4 * v);
            RKVI_UNROLL
            for (r = 0; r < n_rows; r++)
                dot_x4[r][v] = vfmaq_n_f32(dot_x4[r][v], query_x4, rows[(size_t)r * stride + i]);
        }
    }
    RKVI_UNROLL
    for (r = 0; r < n_rows; r++) {
        RKVI_UNROLL
        for (v = 0; v < n_vectors; v++)
            vst1q_f32(tile->out + (size_t)r * tile->out_stride + 4 * v, dot_x4[r][v]);
    }
    *tile->fetch = fetch;
}

static void rkvi_dot_tile_neon(const rkvi_dot_tile *tile)
{
    const int n_rows = tile->width == 32 ? 3 : 6;
    int first;
    for (first = 0; first < RKVI_TILE_ROWS; first += n_rows) {
        rkvi_dot_tile some = rkvi_tile_rows_from(tile, first);
        if (n_rows == 3)
            rkvi_tile_rows_neon(&some, 3, 8);
        else
            rkvi_tile_rows_neon(&some, 6, 4);
    }
}

static void rkvi_cosines_neon(const rkvi_cosines *c)
{
    const uint32_t bits[4] = { 1, 2, 4, 8 };
    uint32x4_t bit_x4 = vld1q_u32(bits);
    float32x4_t threshold_x4 = vdupq_n_f32(c->threshold);
    float *x = c->x;
    int r, v;
    for (r = 0; r < c->n_rows; r++, x += c->stride) {
        uint64_t above = 0;
        for (v = 0; v < c->n; v += 4) {
            float32x4_t weight_x4 = vmulq_n_f32(vld1q_f32(c->inverse + v), c->row_inverse[r]);
            float32x4_t cosine_x4 = vmulq_f32(vld1q_f32(x + v), weight_x4);
            uint32x4_t above_x4 = vandq_u32(vcgtq_f32(cosine_x4, threshold_x4), bit_x4);
            vst1q_f32(x + v, cosine_x4);
            above |= (uint64_t)vaddvq_u32(above_x4) << v;
        }
        c->above[r] = above;
    }
}

/* Four window queries at a time: fold the groups of four rows, transpose 4 x 4. */
static void rkvi_fold_group_neon(const float *tile, size_t tile_stride, int group, int window,
                                 float scale, float *out, size_t out_stride)
{
    int v0, r0, i, g;
    for (v0 = 0; v0 < window; v0 += 4)
        for (r0 = 0; r0 < RKVI_CHUNK; r0 += 4) {
            float folded[16];
            float32x4x4_t by_query;
            for (i = 0; i < 4; i++) {
                const float *row = tile + (size_t)(r0 + i) * tile_stride + v0;
                float32x4_t best_x4 = vld1q_f32(row);
                for (g = 1; g < group; g++)
                    best_x4 = vmaxq_f32(best_x4, vld1q_f32(row + g * window));
                vst1q_f32(folded + 4 * i, best_x4);
            }
            by_query = vld4q_f32(folded);
            for (i = 0; i < rkvi_min(window - v0, 4); i++)
                vst1q_f32(out + (size_t)(v0 + i) * out_stride + r0,
                          vmulq_n_f32(by_query.val[i], scale));
        }
}

RKVI_INLINE float32x4_t rkvi_exp_neon(float32x4_t x_x4)
{
    float32x4_t magic_x4 = vdupq_n_f32(RKVI_ROUND_MAGIC);
    float32x4_t shifted_x4 = vfmaq_n_f32(magic_x4, x_x4, RKVI_LOG2E);
    float32x4_t n_x4 = vsubq_f32(shifted_x4, magic_x4);
    float32x4_t r_x4 = vfmaq_n_f32(x_x4, n_x4, -RKVI_LN2_HIGH);
    float32x4_t y_x4 = vdupq_n_f32(RKVI_EXP_C0);
    uint32x4_t in_range_x4 = vcgeq_f32(x_x4, vdupq_n_f32(RKVI_EXP_LOWEST));
    uint32x4_t power_x4 = vshlq_n_u32(vreinterpretq_u32_f32(shifted_x4), 23);
    r_x4 = vfmaq_n_f32(r_x4, n_x4, -RKVI_LN2_LOW);
    y_x4 = vfmaq_f32(vdupq_n_f32(RKVI_EXP_C1), y_x4, r_x4);
    y_x4 = vfmaq_f32(vdupq_n_f32(RKVI_EXP_C2), y_x4, r_x4);
    y_x4 = vfmaq_f32(vdupq_n_f32(RKVI_EXP_C3), y_x4, r_x4);
    y_x4 = vfmaq_f32(vdupq_n_f32(RKVI_EXP_C4), y_x4, r_x4);
    y_x4 = vfmaq_f32(vdupq_n_f32(RKVI_EXP_C5), y_x4, r_x4);
    y_x4 = vfmaq_f32(r_x4, y_x4, vmulq_f32(r_x4, r_x4));
    y_x4 = vaddq_f32(y_x4, vdupq_n_f32(1.0f));
    return vreinterpretq_f32_u32(
        vandq_u32(vaddq_u32(vreinterpretq_u32_f32(y_x4), power_x4), in_range_x4));
}

static void rkvi_softcap_neon(float *x, size_t n, float ratio, float cap)
{
    float32x4_t one_x4 = vdupq_n_f32(1.0f);
    uint32x4_t sign_x4 = vdupq_n_u32(0x80000000u);
    size_t i;
    for (i = 0; i < n; i += 4) {
        float32x4_t y_x4 = vmulq_n_f32(vld1q_f32(x + i), ratio);
        float32x4_t e_x4 = rkvi_exp_neon(vmulq_n_f32(vabsq_f32(y_x4), -2.0f));
        float32x4_t t_x4 = vdivq_f32(vsubq_f32(one_x4, e_x4), vaddq_f32(one_x4, e_x4));
        vst1q_f32(x + i, vbslq_f32(sign_x4, y_x4, vmulq_n_f32(t_x4, cap)));
    }
}

static float rkvi_exp_sum_neon(float *x, size_t n, float max)
{
    float32x4_t max_x4 = vdupq_n_f32(max), sum_x4[4];
    size_t i;
    int v;
    RKVI_UNROLL
    for (v = 0; v < 4; v++) sum_x4[v] = vdupq_n_f32(0);
    for (i = 0; i < n; i += 16) {
        RKVI_UNROLL
        for (v = 0; v < 4; v++) {
            float32x4_t e_x4 = rkvi_exp_neon(vsubq_f32(vld1q_f32(x + i + 4 * v), max_x4));
            vst1q_f32(x + i + 4 * v, e_x4);
            sum_x4[v] = vaddq_f32(sum_x4[v], e_x4);
        }
    }
    return rkvi_reduce16_neon(sum_x4[0], sum_x4[1], sum_x4[2], sum_x4[3]);
}

static float rkvi_maximum_neon(const float *x, size_t n)
{
    float32x4_t max_x4 = vld1q_f32(x);
    size_t i;
    for (i = 4; i < n; i += 4) max_x4 = vmaxq_f32(max_x4, vld1q_f32(x + i));
    return vmaxvq_f32(max_x4);
}

static void rkvi_max_into_neon(float *dst, const float *src, float weight, size_t n)
{
    size_t i;
    for (i = 0; i < n; i += 4)
        vst1q_f32(dst + i, vmaxq_f32(vmulq_n_f32(vld1q_f32(src + i), weight), vld1q_f32(dst + i)));
}

/* The angles of 4 pairs. */
RKVI_INLINE uint32x4_t rkvi_angle_neon(const rkvi_turns *turns, int f, uint32_t position)
{
    uint32x4_t low_x4 = vld1q_u32(turns->low + f);
    uint64x2_t first_x2 = vmull_n_u32(vget_low_u32(low_x4), position);
    uint64x2_t second_x2 = vmull_n_u32(vget_high_u32(low_x4), position);
    uint32x4_t carried_x4 = vcombine_u32(vshrn_n_u64(first_x2, 32), vshrn_n_u64(second_x2, 32));
    return vaddq_u32(vmulq_n_u32(vld1q_u32(turns->high + f), position), carried_x4);
}

RKVI_INLINE void rkvi_sincos_neon(uint32x4_t angle_x4, float32x4_t *sine_x4, float32x4_t *cosine_x4)
{
    const uint32x4_t eighth_x4 = vdupq_n_u32(RKVI_TURN_EIGHTH), sign_x4 = vdupq_n_u32(0x80000000u);
    uint32x4_t shifted_x4 = vaddq_u32(angle_x4, eighth_x4), swap_x4, flip_x4;
    uint32x4_t rest_x4 = vsubq_u32(vandq_u32(shifted_x4, vdupq_n_u32(0x3fffffffu)), eighth_x4);
    float32x4_t x_x4 = vmulq_n_f32(vcvtq_f32_s32(vreinterpretq_s32_u32(rest_x4)), RKVI_TURN_UNIT);
    float32x4_t square_x4 = vmulq_f32(x_x4, x_x4), s_x4, c_x4, half_x4;
    s_x4 = vfmaq_n_f32(vdupq_n_f32(RKVI_SIN_C1), square_x4, RKVI_SIN_C0);
    s_x4 = vfmaq_f32(vdupq_n_f32(RKVI_SIN_C2), s_x4, square_x4);
    s_x4 = vfmaq_f32(x_x4, vmulq_f32(s_x4, square_x4), x_x4);
    c_x4 = vfmaq_n_f32(vdupq_n_f32(RKVI_COS_C1), square_x4, RKVI_COS_C0);
    c_x4 = vfmaq_f32(vdupq_n_f32(RKVI_COS_C2), c_x4, square_x4);
    half_x4 = vfmaq_n_f32(vdupq_n_f32(1.0f), square_x4, -0.5f);
    c_x4 = vfmaq_f32(half_x4, c_x4, vmulq_f32(square_x4, square_x4));
    swap_x4 = vtstq_u32(shifted_x4, vdupq_n_u32(0x40000000u)); /* bits 30, 31: the quadrant */
    flip_x4 = vandq_u32(shifted_x4, sign_x4);
    *sine_x4 = vbslq_f32(swap_x4, c_x4, s_x4);
    *sine_x4 = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(*sine_x4), flip_x4));
    flip_x4 = vandq_u32(vaddq_u32(shifted_x4, vdupq_n_u32(0x40000000u)), sign_x4);
    *cosine_x4 = vbslq_f32(swap_x4, s_x4, c_x4);
    *cosine_x4 = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(*cosine_x4), flip_x4));
}

RKVI_INLINE float32x4x2_t rkvi_load_pairs_neon(const float *row, const rkvi_turns *turns, int f)
{
    size_t b, a = rkvi_pair_at(turns, f, &b);
    float32x4x2_t pair_x4;
    if (turns->adjacent) return vld2q_f32(row + a);
    pair_x4.val[0] = vld1q_f32(row + a);
    pair_x4.val[1] = vld1q_f32(row + b);
    return pair_x4;
}

static void rkvi_unrotate_neon(float *dst, const float *src, const rkvi_turns *turns,
                               uint32_t position)
{
    int f;
    for (f = 0; f + 4 <= turns->n_pairs; f += 4) {
        float32x4x2_t from_x4 = rkvi_load_pairs_neon(src, turns, f), to_x4;
        float32x4_t sine_x4, cosine_x4;
        size_t b, a = rkvi_pair_at(turns, f, &b);
        rkvi_sincos_neon(rkvi_angle_neon(turns, f, position), &sine_x4, &cosine_x4);
        to_x4.val[0] = vfmaq_f32(vmulq_f32(from_x4.val[1], sine_x4), from_x4.val[0], cosine_x4);
        to_x4.val[1] =
            vfmaq_f32(vnegq_f32(vmulq_f32(from_x4.val[0], sine_x4)), from_x4.val[1], cosine_x4);
        if (turns->adjacent) {
            vst2q_f32(dst + a, to_x4);
            continue;
        }
        vst1q_f32(dst + a, to_x4.val[0]);
        vst1q_f32(dst + b, to_x4.val[1]);
    }
    rkvi_unrotate_from(dst, src, turns, position, f);
}

static void rkvi_pair_lengths_neon(float *lengths, const float *row, const rkvi_turns *turns)
{
    int f;
    for (f = 0; f + 4 <= turns->n_pairs; f += 4) {
        float32x4x2_t pair_x4 = rkvi_load_pairs_neon(row, turns, f);
        float32x4_t square_x4 = vmulq_f32(pair_x4.val[1], pair_x4.val[1]);
        square_x4 = vfmaq_f32(square_x4, pair_x4.val[0], pair_x4.val[0]);
        vst1q_f32(lengths + f, vsqrtq_f32(square_x4));
    }
    rkvi_pair_lengths_from(lengths, row, turns, f);
}
#endif /* RKVI_NEON */

/* The tables. rkvi_cpu_backends, in room 19, wraps each of them. */
#define RKVI_KERNELS(isa)                                                                          \
    {                                                                                              \
        rkvi_usable_##isa, rkvi_load_f16_##isa, rkvi_load_bf16_##isa, rkvi_load_f8_e4m3_##isa,     \
            rkvi_load_f8_e5m2_##isa, rkvi_load_q8_0_##isa, rkvi_dot_rows_##isa,                    \
            rkvi_normalise_##isa, rkvi_add_rows_##isa, rkvi_interleave_##isa, rkvi_dot_tile_##isa, \
            rkvi_cosines_##isa, rkvi_fold_group_##isa, rkvi_softcap_##isa, rkvi_exp_sum_##isa,     \
            rkvi_maximum_##isa, rkvi_max_into_##isa, rkvi_unrotate_##isa, rkvi_pair_lengths_##isa  \
    }
static const rkvi_kernels rkvi_kernels_scalar = RKVI_KERNELS(scalar);
#ifdef RKVI_NEON
static const rkvi_kernels rkvi_kernels_neon = RKVI_KERNELS(neon);
#endif
#if defined(RKVI_X86) && !defined(RKV_NO_AVX2)
static const rkvi_kernels rkvi_kernels_avx2 = RKVI_KERNELS(avx2);
#endif
#if defined(RKVI_X86) && !defined(RKV_NO_AVX512)
static const rkvi_kernels rkvi_kernels_avx512 = RKVI_KERNELS(avx512);
#endif

/* ==== 13. Plans =============================================================================
 * In: a checked config and layers.  Out: where in the workspace each array of a call lies.
 * Knows the sizes of all stages, not what they compute. Each layer needs O(n) memory per KV head.
 * What a worker needs to score one KV head, its scratch, exists once per thread. */

/* clang-format off */
typedef struct rkvi_plan {
    rkvi_view keys, values, queries;
    int kv_heads, group, n_tokens, n_kept;
    int sets;            /* kept sets that start in this layer: kv_heads, 1, or 0               */
    int owner;           /* the layer whose set this layer keeps; not itself in RKV_PER_SEQUENCE */
    int scored;          /* its tokens get scores and are chosen by them                        */
    float scale;         /* of the logits, resolved                                             */
    size_t score_stride; /* floats per KV head                                                  */
    float *scores;       /* [kv_heads][score_stride]                                            */
    float *shared;       /* [score_stride], with a shared scope                                 */
    int n_floats;        /* of state, per row and KV head                                       */
    float *state;        /* [kv_heads][n_floats][score_stride]: what layer.state will become    */
    rkvi_turns turns;    /* where the policy looks behind the rotary embedding                  */
    uint32_t *turn_words; /* [2][pairs], what it points to                                      */
    float *ahead;        /* TRIATTENTION: [2][pairs] cos and sin of the mean turn to come       */
    int32_t *kept;       /* [sets][budget]: the caller's list, or one in the workspace          */
} rkvi_plan;
/* clang-format on */

/* What one worker needs. Arrays over tokens are padded to whole chunks and registers. */
/* clang-format off */
typedef struct rkvi_scratch {
    rkv_error error;       /* the first that this worker met                                   */
    int error_kv_head;     /* its KV head, also where error.head is a query head               */
    int missing;           /* the first row that a row loader did not give, or -1              */
    float *panel;          /* packed queries, [block][dim][32 or 16]                           */
    float *columns;        /* packed keys of a chunk, likewise                                 */
    float *waiting;        /* packed keys of rows that search together, likewise               */
    float *rows;           /* a chunk of K as f32, [RKVI_CHUNK][dim]                           */
    float *gathered;       /* rows of K from anywhere as f32, [RKVI_TILE_ROWS][dim]            */
    float *newest;         /* the newest keys as f32, [RKVI_LANES][dim]                        */
    float *first_key;      /* the first key as f32, [dim]                                      */
    float *tile;           /* dot products of a chunk, [RKVI_CHUNK][queries]                   */
    float *logits;         /* [votes][tokens], later probabilities                             */
    float *signal;         /* [2][tokens]: importance, redundancy                              */
    float *weights;        /* [votes], and 2 for the mix                                       */
    float *pool;           /* one row with the borders that pooling looks at                   */
    float *inverse;        /* per token: 1 / (norm + 1e-8)                                     */
    float *self;           /* per token: cosine with itself: 1, below it for tiny keys, or 0   */
    float *column;         /* per token: sum of its cosines, itself included                   */
    float *first;          /* per token: its cosine with the first token                       */
    int64_t *exempt;       /* per token: sum of exempted cosines, in units of 2^-32            */
    int *wanted;           /* per token: similar keys still to be found; -1: none can be        */
    int *open;             /* tokens that still want some, ascending                           */
    float *sum, *part;     /* [dim]: normalised sum of all keys, and of one chunk              */
    float *new_keys;       /* MEMORY: unit keys of the new rows, packed, [block][dim][32 or 16] */
    float *ones;           /* TRIATTENTION: [RKVI_SUM_ROWS], 1 each                            */
    int *order;            /* [2][tokens]: rows sorted by a signal                             */
    uint32_t *ranks;       /* selection: scores as integers                                    */
    int32_t *slots;        /* selection: histogram                                             */
    int32_t *blocks;       /* hash set of a block table                                        */
} rkvi_scratch;
/* clang-format on */

typedef struct rkvi_job {
    const rkvi_kernels *kernels;
    const rkv_config *config;
    rkv_layer *layers;
    int n_layers, n_workers;
    rkvi_plan *plans;        /* [n_layers]  */
    rkvi_scratch *scratches; /* [n_workers] */
} rkvi_job;

static int rkvi_is_memory(const rkv_config *config)
{
    return config->policy == RKV_POLICY_MEMORY_TRACES || config->policy == RKV_POLICY_MEMORY_PROSE;
}

/* What a policy carries of a row: I, then D. */
static int rkvi_state_floats(const rkv_config *config)
{
    return rkvi_is_memory(config) ? 2 : config->policy == RKV_POLICY_H2O;
}

static int rkvi_has_state(const rkv_config *config)
{
    return rkvi_state_floats(config) > 0;
}

static int rkvi_reads_queries(const rkv_config *config)
{
    return config->policy == RKV_POLICY_RKV ? config->lambda > 0 : rkvi_has_state(config);
}

static int rkvi_reads_keys(const rkv_config *config)
{
    return config->policy != RKV_POLICY_RANDOM && config->policy != RKV_POLICY_OWN_SCORE;
}

/* Does the policy look at keys or queries before rotary embedding? */
static int rkvi_needs_rope(const rkv_config *config)
{
    return rkvi_is_memory(config) || config->policy == RKV_POLICY_TRIATTENTION;
}

static int rkvi_pairs(const rkv_rope *rope, int dim)
{
    return rope->pairing == RKV_ROPE_NONE ? 0 : (rope->dims > 0 ? rope->dims : dim) / 2;
}

static int rkvi_is_scored(const rkv_config *config, int n_tokens)
{
    return n_tokens > config->budget && config->budget > config->protect + config->pinned;
}

/* Entries of a block table that cover n_tokens. */
static size_t rkvi_n_blocks(const rkv_tensor *tensor, int n_tokens)
{
    if (!tensor->block_table) return 0;
    return ((size_t)n_tokens + (size_t)tensor->block_tokens - 1) / (size_t)tensor->block_tokens;
}

/* The largest sizes among the layers: a worker's scratch must hold them. */
typedef struct rkvi_needs {
    size_t tokens, dim, blocks;
    size_t vectors, logit_rows; /* of the panel that meets all keys; what its dot products become */
    int any_scored, any_moved;
} rkvi_needs;

/* Floats of a row as scoring reads it: the key, for TRIATTENTION with the lengths of its pairs. */
static size_t rkvi_row_floats(const rkv_config *config, const rkv_layer *layer)
{
    size_t dim = rkvi_round_up((size_t)layer->keys.dim, RKVI_LANES);
    if (config->policy != RKV_POLICY_TRIATTENTION) return dim;
    return dim + rkvi_round_up((size_t)rkvi_pairs(&layer->rope, layer->keys.dim), RKVI_LANES);
}

/* Vectors of the panel that all keys of a head meet. Policies with state take their queries in
 * blocks of this width: each needs its own softmax over all rows. */
#define RKVI_BLOCK 32

static size_t rkvi_vectors(const rkv_config *config, const rkv_layer *layer)
{
    size_t group = (size_t)(layer->queries.heads / layer->keys.heads);
    if (rkvi_has_state(config)) return RKVI_BLOCK;
    if (config->policy == RKV_POLICY_TRIATTENTION) return group;
    return rkvi_reads_queries(config) ? group * (size_t)config->votes : 0;
}

static void rkvi_keep_larger(size_t *most, size_t value)
{
    if (value > *most) *most = value;
}

static rkvi_needs rkvi_needs_of(const rkv_config *config, const rkv_layer *layers, int n_layers)
{
    rkvi_needs needs;
    int l;
    memset(&needs, 0, sizeof needs);
    for (l = 0; l < n_layers; l++) {
        const rkv_layer *layer = &layers[l];
        if (layer->n_tokens <= config->budget) continue;
        needs.any_moved = 1;
        rkvi_keep_larger(&needs.tokens, (size_t)layer->n_tokens);
        rkvi_keep_larger(&needs.blocks, rkvi_n_blocks(&layer->keys, layer->n_tokens));
        if (layer->values.dim > 0) /* else there are none, and their block_tokens is unchecked */
            rkvi_keep_larger(&needs.blocks, rkvi_n_blocks(&layer->values, layer->n_tokens));
        if (!rkvi_is_scored(config, layer->n_tokens)) continue;
        needs.any_scored = 1;
        rkvi_keep_larger(&needs.dim, rkvi_row_floats(config, layer));
        rkvi_keep_larger(&needs.vectors, rkvi_vectors(config, layer));
        if (rkvi_reads_queries(config))
            rkvi_keep_larger(&needs.blocks, rkvi_n_blocks(&layer->queries, config->votes));
    }
    needs.logit_rows = needs.vectors;
    if (config->policy == RKV_POLICY_RKV && needs.vectors) needs.logit_rows = (size_t)config->votes;
    return needs;
}

/* Pooling looks at L tokens before and R after a token, both clipped to n_tokens. */
static int rkvi_pool_before(const rkv_config *config, int n_tokens)
{
    return rkvi_min(config->pool / 2, n_tokens);
}

static int rkvi_pool_after(const rkv_config *config, int n_tokens)
{
    return rkvi_min((config->pool - 1) / 2, n_tokens);
}

/* Floats of the pooling row: the tokens between borders of zeros, and room for the widest shift. */
static size_t rkvi_pool_floats(const rkv_config *config, int n_tokens)
{
    size_t width =
        (size_t)rkvi_pool_before(config, n_tokens) + (size_t)rkvi_pool_after(config, n_tokens) + 1;
    return rkvi_round_up((size_t)n_tokens + width, RKVI_LANES) + width + RKVI_LANES;
}

/* The number of tokens up to whole chunks, which are whole registers. */
static size_t rkvi_padded(size_t n_tokens)
{
    return rkvi_round_up(n_tokens, RKVI_CHUNK);
}

/* What R-KV needs beside rkvi_carve_scoring. */
static void rkvi_carve_rkv(rkvi_arena *arena, const rkv_config *config, const rkvi_needs *needs,
                           rkvi_scratch *s)
{
    const size_t tokens = rkvi_padded(needs->tokens), dim = needs->dim;
    s->columns = rkvi_take_floats(arena, RKVI_CHUNK * dim);
    s->gathered = rkvi_take_floats(arena, RKVI_TILE_ROWS * dim);
    s->newest = rkvi_take_floats(arena, RKVI_LANES * dim);
    s->first_key = rkvi_take_floats(arena, dim);
    s->pool = rkvi_take_floats(arena, rkvi_pool_floats(config, (int)needs->tokens));
    s->column = rkvi_take_floats(arena, tokens);
    s->first = rkvi_take_floats(arena, tokens);
    s->exempt = (int64_t *)rkvi_take(arena, tokens, sizeof *s->exempt);
    s->wanted = (int *)rkvi_take(arena, tokens, sizeof *s->wanted);
    s->open = (int *)rkvi_take(arena, tokens, sizeof *s->open);
    s->sum = rkvi_take_floats(arena, dim);
    s->part = rkvi_take_floats(arena, dim);
}

#define RKVI_SUM_ROWS 1024 /* numbers that are summed in f32, then in double */

/* What the other policies need. */
static void rkvi_carve_others(rkvi_arena *arena, const rkv_config *config, const rkvi_needs *needs,
                              rkvi_scratch *s)
{
    const size_t tokens = rkvi_padded(needs->tokens);
    size_t new_keys = 0;
    if (config->policy == RKV_POLICY_TRIATTENTION) s->ones = rkvi_take_floats(arena, RKVI_SUM_ROWS);
    if (!rkvi_is_memory(config)) return;
    if (!rkvi_mul_size(tokens, needs->dim, &new_keys)) arena->overflow = 1;
    s->new_keys = rkvi_take_floats(arena, new_keys);
    s->order = (int *)rkvi_take(arena, 2 * tokens, sizeof *s->order);
}

static void rkvi_carve_scoring(rkvi_arena *arena, const rkv_config *config, const rkvi_needs *needs,
                               rkvi_scratch *s)
{
    size_t tokens = rkvi_padded(needs->tokens);
    size_t vectors = rkvi_round_up(needs->vectors, RKVI_LANES), panel, tile, logits;
    if (!rkvi_mul_size(vectors, needs->dim, &panel) ||
        !rkvi_mul_size(vectors + RKVI_LANES, RKVI_CHUNK, &tile) ||
        !rkvi_mul_size(needs->logit_rows, tokens, &logits))
        arena->overflow = 1;
    if (arena->overflow) return;
    s->panel = rkvi_take_floats(arena, panel);
    s->waiting = rkvi_take_floats(arena, RKVI_CHUNK * needs->dim);
    s->rows = rkvi_take_floats(arena, RKVI_CHUNK * needs->dim);
    s->tile = rkvi_take_floats(arena, tile);
    s->logits = rkvi_take_floats(arena, logits);
    s->signal = rkvi_take_floats(arena, 2 * tokens);
    s->weights = rkvi_take_floats(arena, (size_t)config->votes + 2);
    s->inverse = rkvi_take_floats(arena, tokens);
    s->self = rkvi_take_floats(arena, tokens);
    if (config->policy == RKV_POLICY_RKV)
        rkvi_carve_rkv(arena, config, needs, s);
    else
        rkvi_carve_others(arena, config, needs, s);
}

#define RKVI_RADIX_BITS 11
#define RKVI_RADIX      (1 << RKVI_RADIX_BITS)

static void rkvi_carve_scratch(rkvi_arena *arena, const rkv_config *config, const rkvi_needs *needs,
                               rkvi_scratch *s)
{
    rkvi_scratch none;
    memset(&none, 0, sizeof none);
    *s = none;
    if (needs->any_scored && rkvi_reads_keys(config)) rkvi_carve_scoring(arena, config, needs, s);
    if (!needs->any_moved) return;
    s->ranks = (uint32_t *)rkvi_take(arena, needs->tokens, sizeof *s->ranks);
    s->slots = (int32_t *)rkvi_take(arena, RKVI_RADIX, sizeof *s->slots);
    s->blocks = (int32_t *)rkvi_take(arena, 2 * needs->blocks, sizeof *s->blocks);
}

/* The layer that owns the kept set of layer l, given that of layer l - 1. */
static int rkvi_owner(const rkv_config *config, const rkv_layer *layers, int l, int owner_before)
{
    int same = l > 0 && layers[l].sequence == layers[l - 1].sequence;
    return config->scope == RKV_PER_SEQUENCE && same ? owner_before : l;
}

static int rkvi_sets(const rkv_config *config, const rkv_layer *layer, int is_owner)
{
    return !is_owner ? 0 : config->scope == RKV_PER_HEAD ? layer->keys.heads : 1;
}

static void rkvi_fill_plan(const rkv_config *config, const rkv_layer *layer, rkvi_plan *plan)
{
    plan->keys = rkvi_view_of(&layer->keys);
    plan->values = rkvi_view_of(&layer->values);
    plan->queries = rkvi_view_of(&layer->queries);
    plan->kv_heads = layer->keys.heads;
    plan->group = layer->queries.heads / layer->keys.heads;
    plan->n_tokens = layer->n_tokens;
    plan->n_kept = rkvi_min(layer->n_tokens, config->budget);
    plan->scored = rkvi_is_scored(config, layer->n_tokens);
    plan->scale = layer->scale > 0 ? layer->scale : 1.0f / sqrtf((float)layer->keys.dim);
}

/* Per layer: scores, the shared sums and the kept list. plan is NULL when only measuring. */
static void rkvi_carve_layer(rkvi_arena *arena, const rkv_config *config, const rkv_layer *layer,
                             int sets, rkvi_plan *plan)
{
    size_t stride = rkvi_padded((size_t)layer->n_tokens), n_scores, n_kept, n_state;
    size_t pairs = rkvi_needs_rope(config) ? (size_t)rkvi_pairs(&layer->rope, layer->keys.dim) : 0;
    float *scores = NULL, *shared = NULL, *state = NULL, *ahead = NULL;
    uint32_t *turns = NULL;
    int32_t *kept;
    if (!rkvi_mul_size((size_t)layer->keys.heads, stride, &n_scores) ||
        !rkvi_mul_size((size_t)sets, (size_t)config->budget, &n_kept) ||
        !rkvi_mul_size(n_scores, (size_t)rkvi_state_floats(config), &n_state))
        arena->overflow = 1;
    if (layer->n_tokens <= config->budget) n_kept = 0; /* keeps every row: no list */
    if (arena->overflow) return;
    if (rkvi_is_scored(config, layer->n_tokens)) {
        scores = rkvi_take_floats(arena, n_scores);
        if (config->scope != RKV_PER_HEAD && sets) shared = rkvi_take_floats(arena, stride);
        state = rkvi_take_floats(arena, n_state);
        if (pairs > 0) turns = (uint32_t *)rkvi_take(arena, 2 * pairs, sizeof *turns);
        if (pairs > 0 && config->policy == RKV_POLICY_TRIATTENTION)
            ahead = rkvi_take_floats(arena, 2 * pairs);
    }
    kept = (int32_t *)rkvi_take(arena, n_kept, sizeof *kept);
    if (!plan) return;
    plan->score_stride = stride;
    plan->scores = scores;
    plan->shared = shared;
    plan->state = state;
    plan->n_floats = rkvi_state_floats(config);
    plan->turn_words = turns;
    plan->ahead = ahead;
    plan->kept = layer->kept ? layer->kept : kept;
    plan->sets = sets;
}

/* Threads that have work: no more than there are KV heads. */
static int rkvi_workers(const rkv_config *config, const rkv_layer *layers, int n_layers)
{
    size_t heads = 0;
    int l;
    for (l = 0; l < n_layers; l++) heads += (size_t)layers[l].keys.heads;
    if (heads < 1) return 1;
    return heads < (size_t)config->n_threads ? (int)heads : config->n_threads;
}

/* Lays out a whole call in arena; job is NULL when only measuring. */
static void rkvi_carve(rkvi_arena *arena, const rkv_config *config, const rkv_layer *layers,
                       int n_layers, rkvi_job *job)
{
    rkvi_needs needs = rkvi_needs_of(config, layers, n_layers);
    size_t n_plans = (size_t)n_layers;
    rkvi_plan *plans = (rkvi_plan *)rkvi_take(arena, n_plans, sizeof *plans);
    rkvi_scratch unused, *scratches;
    int l, w, owner = 0, n_workers = rkvi_workers(config, layers, n_layers);
    scratches = (rkvi_scratch *)rkvi_take(arena, (size_t)n_workers, sizeof *scratches);
    for (l = 0; l < n_layers && !arena->overflow; l++) {
        int sets;
        owner = rkvi_owner(config, layers, l, owner);
        sets = rkvi_sets(config, &layers[l], owner == l);
        if (job) {
            rkvi_fill_plan(config, &layers[l], &plans[l]);
            plans[l].owner = owner;
        }
        rkvi_carve_layer(arena, config, &layers[l], sets, job ? &plans[l] : NULL);
    }
    for (w = 0; w < n_workers && !arena->overflow; w++)
        rkvi_carve_scratch(arena, config, &needs, job ? &scratches[w] : &unused);
    if (!job) return;
    job->plans = plans;
    job->scratches = scratches;
    job->n_workers = n_workers;
}

/* ==== 14. Scoring ===========================================================================
 * In: one KV head's keys and its group's window queries.  Out: a score for each candidate, that
 * is, each token outside the window. In data-flow order: read the keys once (norms, sum of the
 * unit keys, logits), importance, redundancy (with room 15), mix. Knows nothing of other heads,
 * threads or kept sets. */

typedef struct rkvi_head {
    const rkvi_kernels *kernels;
    const rkv_config *config;
    const rkv_layer *layer;
    const rkvi_plan *plan;
    const rkvi_view *keys, *queries;
    const int32_t *positions; /* of this head's rows, or NULL */
    int layer_index, index, group;
    int n_tokens, n_candidates, n_span; /* all; those outside the window; those redundancy sees */
    int votes;                          /* newest queries per query head that vote              */
    int n_queries;                      /* group * votes, or 0: importance does not count       */
    int n_newest;                       /* newest keys that the first pass compares all with    */
    int n_spare;                        /* of them in the panel of queries: all or none         */
    int wants_redundancy;
    float scale, softcap;
    size_t dim; /* padded to whole registers */
    float *scores;
    int *missing; /* in the scratch */
} rkvi_head;

static void rkvi_load(const rkvi_kernels *k, rkv_dtype dtype, float *dst, const unsigned char *src,
                      size_t n)
{
    switch (dtype) {
    case RKV_F32: memcpy(dst, src, n * sizeof *dst); break;
    case RKV_F16: k->load_f16(dst, src, n); break;
    case RKV_BF16: k->load_bf16(dst, src, n); break;
    case RKV_F8_E4M3: k->load_f8_e4m3(dst, src, n); break;
    case RKV_F8_E5M2: k->load_f8_e5m2(dst, src, n); break;
    case RKV_Q8_0: k->load_q8_0(dst, src, n); break;
    case RKV_OPAQUE: break; /* rkvi_load_opaque */
    }
}

/* How many of n rows from `token` on lie `stride` bytes apart. */
static int rkvi_even_rows(const rkvi_view *view, int head, int token, int n, size_t stride)
{
    const unsigned char *row = rkvi_row(view, head, token);
    int run = 1;
    while (run < n && rkvi_row(view, head, token + run) == row + (size_t)run * stride) run++;
    return run;
}

/* n rows by the row loader, as padded f32. The first that it does not give is *h->missing; zeros
 * stand for it and for those after it. */
static void rkvi_load_opaque(const rkvi_head *h, const rkvi_view *view, int head, int token, int n,
                             float *dst)
{
    const size_t dim = (size_t)view->dim;
    const size_t stride =
        view->table && view->block_tokens == 1 ? view->block_stride : view->token_stride;
    int end = token + n, given, r;
    for (; token < end; token += n, dst += (size_t)n * h->dim) {
        rkv_rows rows;
        n = rkvi_even_rows(view, head, token, end - token, stride);
        rows.data = rkvi_row(view, head, token);
        rows.stride = n > 1 ? stride : 0;
        rows.head = head;
        rows.token = token;
        rows.n_rows = n;
        rows.dim = view->dim;
        given = view->load(view->load_user, &rows, dst);
        if (given < 0 || given > n) given = 0;
        for (r = given - 1; r >= 0 && dim < h->dim; r--) {
            memmove(dst + (size_t)r * h->dim, dst + (size_t)r * dim, dim * sizeof *dst);
            memset(dst + (size_t)r * h->dim + dim, 0, (h->dim - dim) * sizeof *dst);
        }
        if (given == n) continue;
        memset(dst + (size_t)given * h->dim, 0, (size_t)(n - given) * h->dim * sizeof *dst);
        if (*h->missing < 0) *h->missing = token + given;
    }
}

/* One key as padded f32; a token below 0 is a row of zeros. */
static void rkvi_load_key(const rkvi_head *h, int token, float *dst)
{
    size_t dim = token < 0 ? 0 : (size_t)h->keys->dim;
    if (dim && h->keys->dtype == RKV_OPAQUE) {
        rkvi_load_opaque(h, h->keys, h->index, token, 1, dst);
        return;
    }
    if (dim) rkvi_load(h->kernels, h->keys->dtype, dst, rkvi_row(h->keys, h->index, token), dim);
    if (dim < h->dim) memset(dst + dim, 0, (h->dim - dim) * sizeof *dst);
}

typedef struct rkvi_rows {
    const float *data;
    size_t stride; /* floats */
} rkvi_rows;

/* Adjacent rows as f32. */
static rkvi_rows rkvi_staged(const rkvi_head *h, const float *data)
{
    rkvi_rows rows;
    rows.data = data;
    rows.stride = h->dim;
    return rows;
}

/* Can key rows be used in place? They must be f32, aligned, evenly spaced and need no padding. A
 * spacing of a multiple of 4 KiB would put a chunk's rows into the same few cache sets. */
static int rkvi_rows_in_place(const rkvi_head *h)
{
    const rkvi_view *keys = h->keys;
    return keys->dtype == RKV_F32 && !keys->table && (size_t)keys->dim == h->dim &&
           keys->token_stride % 4096 != 0 && keys->token_stride % sizeof(float) == 0 &&
           keys->head_stride % sizeof(float) == 0 && (uintptr_t)keys->data % sizeof(float) == 0;
}

/* Are key rows adjacent, without padding? Then many can be loaded as one. */
static int rkvi_rows_adjacent(const rkvi_head *h)
{
    const rkvi_view *keys = h->keys;
    return !keys->table && (size_t)keys->dim == h->dim &&
           keys->token_stride == keys->n_elements * keys->element;
}

/* RKVI_CHUNK keys from `first` on as f32; zeros after the last one. */
static rkvi_rows rkvi_key_chunk(const rkvi_head *h, int first, float *stage)
{
    rkvi_rows rows;
    int r = 0;
    if (first + RKVI_CHUNK <= h->n_tokens && rkvi_rows_in_place(h)) {
        rows.data = (const float *)(const void *)rkvi_row(h->keys, h->index, first);
        rows.stride = h->keys->token_stride / sizeof(float);
        return rows;
    }
    rows = rkvi_staged(h, stage);
    if (h->keys->dtype == RKV_OPAQUE) {
        r = rkvi_min(h->n_tokens - first, RKVI_CHUNK);
        rkvi_load_opaque(h, h->keys, h->index, first, r, stage);
    } else if (first + RKVI_CHUNK <= h->n_tokens && rkvi_rows_adjacent(h)) {
        rkvi_load(h->kernels, h->keys->dtype, stage, rkvi_row(h->keys, h->index, first),
                  RKVI_CHUNK * h->dim);
        return rows;
    }
    for (; r < RKVI_CHUNK; r++)
        rkvi_load_key(h, first + r < h->n_tokens ? first + r : -1, stage + (size_t)r * h->dim);
    return rows;
}

/* out[r] = dot(key, row r) for n rows, in lanes; key NULL: of each row with itself. The second key
 * and its dot products may be left out. */
static void rkvi_dot_rows_with(const rkvi_head *h, rkvi_rows rows, int n, const float *key,
                               float *out, const float *second, float *second_out)
{
    rkvi_dot_rows dots;
    dots.rows = rows.data;
    dots.stride = rows.stride;
    dots.dim = h->dim;
    dots.n_rows = n;
    dots.with[0] = key;
    dots.with[1] = second;
    dots.out[0] = out;
    dots.out[1] = second_out;
    h->kernels->dot_rows(&dots);
}

static rkv_status rkvi_nonfinite(rkvi_scratch *s, const rkvi_head *h, const char *rule, int head,
                                 int token)
{
    s->error.status = RKV_ERROR_NONFINITE;
    s->error.rule = rule;
    s->error.head = head;
    s->error.token = token;
    s->error_kv_head = h->index;
    return RKV_ERROR_NONFINITE;
}

/* Squares of norms up to here keep every product in range; NaN compares false. */
#define RKVI_MAX_SQUARE 1e36f

/* A panel holds n vectors interleaved for dot_tile, [block][dim][block width], with zeros after the
 * last. The block that starts at vector v is 32 wide, or 16 at the end. */
static int rkvi_block_width(int n, int v)
{
    return n - v > RKVI_LANES ? 2 * RKVI_LANES : RKVI_LANES;
}

static void rkvi_clear_panel(float *panel, int n, size_t dim)
{
    memset(panel, 0, rkvi_round_up((size_t)n, RKVI_LANES) * dim * sizeof *panel);
}

/* Tokens whose keys are packed into a panel: a row of K meets all of them at once. Ascending, where
 * they serve as columns. */
typedef struct rkvi_packed {
    const float *panel;
    int n;
    int token[RKVI_CHUNK];
    float inverse[RKVI_CHUNK];
} rkvi_packed;

#define RKVI_NEWEST 2 /* newest keys that all rows meet, where the panel has no place for more */

/* Places of the last block that n vectors leave free. */
static int rkvi_spare_vectors(int n)
{
    return (int)rkvi_round_up((size_t)n, RKVI_LANES) - n;
}

/* n_rows rows become the vectors v, v + 1, ... of a panel of n, eight at a time: counted from v, no
 * eight of them may lie in two blocks. */
static void rkvi_pack(const rkvi_head *h, float *panel, int n, int v, rkvi_rows rows, int n_rows)
{
    int end = v + n_rows;
    for (; v < end; v += RKVI_INTERLEAVED, rows.data += RKVI_INTERLEAVED * rows.stride) {
        int block = v / (2 * RKVI_LANES) * (2 * RKVI_LANES), r;
        size_t width = (size_t)rkvi_block_width(n, block), i;
        float *at = panel + (size_t)block * h->dim + (size_t)(v - block);
        if (v + RKVI_INTERLEAVED <= end) {
            h->kernels->interleave(at, width, rows.data, rows.stride, h->dim);
            continue;
        }
        for (r = 0; r < end - v; r++)
            for (i = 0; i < h->dim; i++)
                at[i * width + (size_t)r] = rows.data[(size_t)r * rows.stride + i];
    }
}

/* Query q of the group: of query head index * group + q / votes, the vote q % votes, 0 being the
 * oldest. A view of which all rows vote may be in any order, unless votes look at rows that come
 * after them; such a view is a ring. */
static int rkvi_query_head(const rkvi_head *h, int q)
{
    return h->index * h->group + q / h->votes;
}

static int rkvi_query_slot(const rkvi_head *h, int q)
{
    const int slots = h->config->votes;
    return (int)(((int64_t)h->layer->first_query + slots - h->votes + q % h->votes) % slots);
}

/* Queries [begin, begin + count) become the first vectors of a panel, with n_spare places behind
 * them. */
static rkv_status rkvi_pack_queries(const rkvi_head *h, rkvi_scratch *s, int begin, int count)
{
    const size_t dim = (size_t)h->queries->dim;
    float square[RKVI_CHUNK];
    int first, n, r;
    if (count == 0) return RKV_OK; /* the view may be anything */
    rkvi_clear_panel(s->panel, count + h->n_spare, h->dim);
    for (first = 0; first < count; first += n) {
        n = rkvi_min(count - first, RKVI_CHUNK);
        for (r = 0; r < n; r++) {
            int head = rkvi_query_head(h, begin + first + r);
            int token = rkvi_query_slot(h, begin + first + r);
            float *row = s->rows + (size_t)r * h->dim;
            if (h->queries->dtype == RKV_OPAQUE) {
                rkvi_load_opaque(h, h->queries, head, token, 1, row);
                if (s->missing >= 0) return rkvi_nonfinite(s, h, RKVI_RULE_QUERY_LOAD, head, token);
                continue;
            }
            rkvi_load(h->kernels, h->queries->dtype, row, rkvi_row(h->queries, head, token), dim);
            memset(row + dim, 0, (h->dim - dim) * sizeof *row);
        }
        rkvi_dot_rows_with(h, rkvi_staged(h, s->rows), n, NULL, square, NULL, NULL);
        for (r = 0; r < n; r++)
            if (!(square[r] <= RKVI_MAX_SQUARE))
                return rkvi_nonfinite(s, h, RKVI_RULE_QUERY, rkvi_query_head(h, begin + first + r),
                                      rkvi_query_slot(h, begin + first + r));
        rkvi_pack(h, s->panel, count + h->n_spare, first, rkvi_staged(h, s->rows), n);
    }
    return RKV_OK;
}

/* Norms of a chunk; finds keys that are not finite, or not there. With a key, also its dot
 * products. */
static rkv_status rkvi_chunk_norms(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first,
                                   const float *key, float *dots)
{
    float square[RKVI_CHUNK];
    int r;
    rkvi_dot_rows_with(h, rows, RKVI_CHUNK, NULL, square, key, key ? dots : NULL);
    for (r = 0; r < RKVI_CHUNK; r++) {
        if (first + r == s->missing)
            return rkvi_nonfinite(s, h, RKVI_RULE_KEY_LOAD, h->index, first + r);
        if (!(square[r] <= RKVI_MAX_SQUARE))
            return rkvi_nonfinite(s, h, RKVI_RULE_KEY, h->index, first + r);
    }
    h->kernels->normalise(square, RKVI_CHUNK, s->inverse + first, s->self + first);
    return RKV_OK;
}

/* The keys [first, first + RKVI_TILE_ROWS), as far as they exist, to be prefetched. */
static rkvi_fetch rkvi_fetch_keys(const rkvi_head *h, int first,
                                  const unsigned char *rows[RKVI_TILE_ROWS])
{
    rkvi_fetch fetch;
    int r, n = rkvi_min(h->n_tokens - first, RKVI_TILE_ROWS);
    for (r = 0; r < n; r++) rows[r] = rkvi_row(h->keys, h->index, first + r);
    fetch.rows = rows;
    fetch.n_rows = n > 0 ? n : 0;
    fetch.at = 0;
    fetch.bytes = h->keys->n_elements * h->keys->element;
    return fetch;
}

static size_t rkvi_tile_stride(int n_vectors)
{
    return rkvi_round_up((size_t)n_vectors, RKVI_LANES) + RKVI_LANES;
}

/* The newest keys of the span, which the first pass compares all rows with: packed into the places
 * that the queries leave free in the panel, or, where there are none, RKVI_NEWEST as they are. */
static void rkvi_take_newest(const rkvi_head *h, rkvi_scratch *s, rkvi_packed *newest)
{
    float square[RKVI_LANES] = { 0 }, self[RKVI_LANES];
    rkvi_rows rows = rkvi_staged(h, s->newest);
    int v;
    memset(newest, 0, sizeof *newest);
    newest->n = h->wants_redundancy ? h->n_newest : 0;
    for (v = 0; v < newest->n; v++) {
        newest->token[v] = h->n_span - newest->n + v;
        rkvi_load_key(h, newest->token[v], s->newest + (size_t)v * h->dim);
    }
    rkvi_dot_rows_with(h, rows, newest->n, NULL, square, NULL, NULL);
    h->kernels->normalise(square, RKVI_LANES, newest->inverse, self);
    if (h->n_spare == 0) return;
    rkvi_pack(h, s->panel, h->n_queries + newest->n, h->n_queries, rows, newest->n);
    memset(s->tile, 0, RKVI_CHUNK * rkvi_tile_stride(h->n_queries) * sizeof *s->tile); /* pads */
}

/* Dot products of a chunk with the n vectors of a panel: tile[row][vector]. Prefetches the chunk
 * after it. */
static void rkvi_chunk_dots(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first,
                            const float *panel, int n)
{
    const unsigned char *next_rows[RKVI_TILE_ROWS];
    const size_t tile_stride = rkvi_tile_stride(n);
    rkvi_dot_tile tile;
    rkvi_fetch fetch;
    int q0, r;
    tile.panel = panel;
    tile.stride = rows.stride;
    tile.dim = h->dim;
    tile.out_stride = tile_stride;
    tile.fetch = &fetch;
    for (q0 = 0; q0 < n; q0 += tile.width) {
        tile.width = rkvi_block_width(n, q0);
        for (r = 0; r < RKVI_CHUNK; r += RKVI_TILE_ROWS) {
            tile.rows = rows.data + (size_t)r * rows.stride;
            tile.out = s->tile + (size_t)r * tile_stride + q0;
            if (q0 == 0) fetch = rkvi_fetch_keys(h, first + RKVI_CHUNK + r, next_rows);
            h->kernels->dot_tile(&tile);
        }
        tile.panel += h->dim * (size_t)tile.width;
    }
}

/* Logits of a chunk from the dot products with group * votes vectors, folded over the group:
 * logits[v][first ...]. */
static void rkvi_chunk_logits(const rkvi_head *h, rkvi_scratch *s, int first, int group, int votes)
{
    const size_t tile_stride = rkvi_tile_stride(group * votes);
    const size_t logit_stride = rkvi_padded((size_t)h->n_tokens);
    int r;
    if (h->softcap > 0)
        for (r = 0; r < RKVI_CHUNK; r++)
            h->kernels->softcap(s->tile + (size_t)r * tile_stride, tile_stride - RKVI_LANES,
                                h->scale / h->softcap, h->softcap);
    h->kernels->fold_group(s->tile, tile_stride, group, votes, h->softcap > 0 ? 1.0f : h->scale,
                           s->logits + first, logit_stride);
}

/* Room 15: the rows [first, end) of a chunk meet their first columns, the newest keys. dots: with
 * the very newest, unless the tile has them. */
static void rkvi_meet_newest(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first,
                             int end, const rkvi_packed *newest, float *dots);

/* Adds the unit keys of a chunk to the sum. Chunk by chunk, which fixes the order of additions and
 * keeps the error small for any n. */
static void rkvi_chunk_sum(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first, int end)
{
    size_t i;
    memset(s->part, 0, h->dim * sizeof *s->part);
    h->kernels->add_rows(s->part, rows.data, rows.stride, s->inverse + first, end - first, h->dim);
    for (i = 0; i < h->dim; i++) s->sum[i] += s->part[i];
}

/* The first pass over K: norms, the sum of the unit keys, the logits, and the cosines with the
 * newest keys. */
static rkv_status rkvi_read_keys(const rkvi_head *h, rkvi_scratch *s)
{
    rkvi_packed newest;
    const float *key; /* the newest, or NULL */
    float dots[RKVI_CHUNK];
    int first, end, missing, is_met; /* by the newest: it is part of the span */
    rkvi_take_newest(h, s, &newest);
    missing = s->missing; /* of these, which are read again in their turn */
    s->missing = -1;
    key = newest.n && !h->n_spare ? s->newest + (size_t)(newest.n - 1) * h->dim : NULL;
    memset(s->sum, 0, h->dim * sizeof *s->sum);
    memset(s->exempt, 0, (size_t)h->n_span * sizeof *s->exempt);
    for (first = 0; first < h->n_tokens; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        rkv_status status = rkvi_chunk_norms(h, s, rows, first, key, dots);
        if (status != RKV_OK) return status;
        end = rkvi_min(first + RKVI_CHUNK, h->n_span);
        is_met = h->wants_redundancy && first < end;
        if (is_met) rkvi_chunk_sum(h, s, rows, first, end);
        if (h->n_queries && (first < h->n_candidates || (is_met && h->n_spare)))
            rkvi_chunk_dots(h, s, rows, first, s->panel, h->n_queries);
        if (is_met) rkvi_meet_newest(h, s, rows, first, end, &newest, dots);
        if (h->n_queries && first < h->n_candidates)
            rkvi_chunk_logits(h, s, first, h->group, h->votes);
    }
    s->missing = missing;
    return RKV_OK;
}

/* x[n] becomes the mean over [j - before, j + after]; zeros stand for what is outside. */
static void rkvi_mean_pool(const rkvi_head *h, rkvi_scratch *s, float *x, int n, int width)
{
    const float share = 1.0f / (float)h->config->pool;
    size_t padded = rkvi_round_up((size_t)n, RKVI_LANES);
    int k;
    memset(x, 0, padded * sizeof *x);
    for (k = 0; k < width; k++) h->kernels->add_rows(x, s->pool + k, 0, &share, 1, padded);
}

/* Pools x[n] in place over [j - before, j + after], clipped. Values are not negative, so zeros can
 * stand for what is outside. Maxima: doubles their width; one overlapping step ends it. */
static void rkvi_pool(const rkvi_head *h, rkvi_scratch *s, float *x, int n)
{
    int before = rkvi_pool_before(h->config, n), after = rkvi_pool_after(h->config, n);
    int width = before + after + 1, reach = 1;
    size_t length = rkvi_round_up((size_t)n + (size_t)width, RKVI_LANES);
    if (width == 1) return;
    memset(s->pool, 0, rkvi_pool_floats(h->config, n) * sizeof *s->pool);
    memcpy(s->pool + before, x, (size_t)n * sizeof *x);
    if (h->config->mean_pool) {
        rkvi_mean_pool(h, s, x, n, width);
        return;
    }
    for (; reach <= width / 2; reach *= 2)
        h->kernels->max_into(s->pool, s->pool + reach, 1, length);
    if (reach < width) h->kernels->max_into(s->pool, s->pool + (width - reach), 1, length);
    memcpy(x, s->pool, (size_t)n * sizeof *x);
}

/* x[n] becomes exp(x - max), with zeros up to a whole register. Returns the sum; NaN if x
 * overflowed. */
static float rkvi_exponentials(const rkvi_head *h, float *x, int n)
{
    size_t padded = rkvi_round_up((size_t)n, RKVI_LANES), i;
    float max;
    for (i = (size_t)n; i < padded; i++) x[i] = -FLT_MAX;
    max = h->kernels->maximum(x, padded);
    return max <= FLT_MAX ? h->kernels->exp_sum(x, padded, max) : max - max;
}

/* The rows that vote v may look at: its own token's and those before it. */
static int rkvi_seen(const rkvi_head *h, int v)
{
    return h->n_tokens - h->votes + v + 1;
}

/* Softmax over the candidates for each vote, then the mean; pooling after it or before. */
static rkv_status rkvi_importance(const rkvi_head *h, rkvi_scratch *s, float *importance)
{
    const size_t logit_stride = rkvi_padded((size_t)h->n_tokens);
    size_t padded = rkvi_round_up((size_t)h->n_candidates, RKVI_LANES);
    int pool_first = h->config->variant == RKV_PAPER, v;
    for (v = 0; v < h->votes; v++) {
        float *row = s->logits + (size_t)v * logit_stride;
        int n = rkvi_min(rkvi_seen(h, v), h->n_candidates), i;
        float sum = rkvi_exponentials(h, row, n);
        if (!(sum > 0)) return rkvi_nonfinite(s, h, RKVI_RULE_LOGITS, h->index, -1);
        for (i = n; i < h->n_candidates; i++) row[i] = 0;
        s->weights[v] = 1.0f / (sum * (float)h->votes);
        if (pool_first) rkvi_pool(h, s, row, h->n_candidates);
    }
    memset(importance, 0, padded * sizeof *importance);
    h->kernels->add_rows(importance, s->logits, logit_stride, s->weights, h->votes, padded);
    if (!pool_first) rkvi_pool(h, s, importance, h->n_candidates);
    return RKV_OK;
}

/* Redundancy needs only column sums of the cosine matrix and, per row, its `recent` newest similar
 * keys, so the matrix is never built: the sums factor through the sum of the unit keys, and room 15
 * finds the similar keys. Exempted cosines are summed as 64-bit integers, so it does not matter in
 * which order they are found. */
#define RKVI_EXEMPT_UNIT 4294967296.0f /* 2^32 per 1.0: sums of 2^30 cosines are exact */

static void rkvi_find_similar_keys(const rkvi_head *h, rkvi_scratch *s); /* room 15 */

/* Column means (paper: own means) without the exempted entries, then exp. *total is the divisor
 * that makes it a softmax. */
static void rkvi_redundancy(const rkvi_head *h, rkvi_scratch *s, float *redundancy, float *total)
{
    const int span = h->n_span, recent = h->config->recent;
    const double unit = 1.0 / (double)RKVI_EXEMPT_UNIT, share = (double)1 / span;
    int i;
    rkvi_find_similar_keys(h, s);
    if (h->config->variant == RKV_PUBLISHED)
        for (i = 1; i < span; i++)
            if (s->wanted[i] < 0 || s->wanted[i] == recent) /* found none */
                s->exempt[0] += (int64_t)(s->first[i] * RKVI_EXEMPT_UNIT);
    for (i = 0; i < span; i++) {
        double exempt = (double)s->exempt[i] * unit; /* exact: unit is a power of two */
        redundancy[i] = (float)(((double)s->column[i] - (double)s->self[i] - exempt) * share);
    }
    *total = rkvi_exponentials(h, redundancy, span);
}

/* scores, zeros so far, += weights[i] * signals[i] for n signals. */
static void rkvi_mix(const rkvi_head *h, const float *signals, const float *weights, int n)
{
    const size_t stride = rkvi_padded((size_t)h->n_tokens);
    h->kernels->add_rows(h->scores, signals, stride, weights, n,
                         rkvi_round_up((size_t)h->n_candidates, RKVI_LANES));
}

/* R-KV: one KV head, from keys and queries to scores. */
static rkv_status rkvi_score_rkv(const rkvi_head *h, rkvi_scratch *s)
{
    const float lambda = h->config->lambda;
    float *importance = s->signal, *redundancy = s->signal + rkvi_padded((size_t)h->n_tokens);
    float total = 1;
    rkv_status status = rkvi_pack_queries(h, s, 0, h->n_queries);
    if (status == RKV_OK) status = rkvi_read_keys(h, s);
    if (status != RKV_OK) return status;
    if (h->n_queries) {
        status = rkvi_importance(h, s, importance);
        if (status != RKV_OK) return status;
    }
    if (h->wants_redundancy) rkvi_redundancy(h, s, redundancy, &total);
    if (s->missing >= 0) /* given at first, but not again */
        return rkvi_nonfinite(s, h, RKVI_RULE_KEY_LOAD, h->index, s->missing);
    s->weights[0] = lambda;
    s->weights[1] = h->wants_redundancy ? -((1.0f - lambda) / total) : 0;
    rkvi_mix(h, h->n_queries ? importance : redundancy, s->weights + !h->n_queries,
             !!h->n_queries + h->wants_redundancy);
    return RKV_OK;
}

/* ==== 15. Similar keys ======================================================================
 * In: one KV head's keys and their norms.  Out: the `recent` newest similar keys of every row,
 * handed to rkvi_record_match one by one; the column sums of the cosine matrix on the way.
 *
 * Row i searches the columns j of the matrix from the newest to the oldest and stops when it has
 * found enough. On real keys almost all rows stop within the newest few columns, so these come
 * first, and cheaply:
 *   1. the newest columns, for all rows, in the first pass over K: as many as the panel of queries
 *      has places to spare, or 2 (rkvi_meet_newest). The second pass needs the cosines with row 0,
 *      so this row has then met all columns (rkvi_search_first);
 *   2. 16 columns at a time for the rows still open, while that closes many of them
 *      (rkvi_find_similar_keys);
 *   3. chunks of 48 columns, from the newest to the oldest (rkvi_search_all), packed while many
 *      rows search, where they lie for the last few (rkvi_search_few):
 *
 *       columns   0             first    end           span
 *       rows    0 +---------------+-------+
 *                 |  older rows  >| chunk |  have met      older rows search the chunk, and
 *           first +---------------+-------+  all columns   rows inside it what lies before it:
 *                 |< rows inside  | chunk |  from end on   one tile of the symmetric matrix
 *             end +---------------+-------+                can serve both (rkvi_search_older)
 *                 |< waiting rows, each from its end[i]    rows left over wait until enough
 *            span +                                        can search together
 *
 * Invariant, at the top of each turn of rkvi_search_all:
 *   - every open row before `end` has met all columns from `end` on, and no other;
 *   - every other open row waits, and has met all columns from its end[i] on, and no other;
 *   - a row meets its columns from the newest to the oldest, and each once.
 * So the first matches a row finds are its newest. */

/* What an exempted cosine takes from a column's sum. */
RKVI_INLINE int64_t rkvi_weight(float cosine)
{
    return (int64_t)(cosine * RKVI_EXEMPT_UNIT);
}

/* Token j is similar to row i. The diagonal of the matrix is 0: with a negative threshold it counts
 * as one of the row's matches, of no weight. */
RKVI_INLINE void rkvi_record_match(const rkvi_head *h, rkvi_scratch *s, int i, int j, float cosine)
{
    if (s->wanted[i] <= 0 || (i == j && h->config->threshold >= 0)) return;
    s->wanted[i]--;
    if (i != j) s->exempt[h->config->variant == RKV_PAPER ? i : j] += rkvi_weight(cosine);
}

/* A key so short that none of its cosines can exceed the threshold. */
static int rkvi_cannot_match(const rkvi_head *h, const rkvi_scratch *s, int token)
{
    float threshold = h->config->threshold;
    return threshold >= 0 && s->self[token] * 1.0001f <= threshold * threshold;
}

/* Drops the rows that have found enough from a list of rows; returns the new length. */
static int rkvi_drop_finished(const rkvi_scratch *s, int *rows, int n_rows)
{
    int i, n = 0;
    for (i = 0; i < n_rows; i++)
        if (s->wanted[rows[i]] > 0) rows[n++] = rows[i];
    return n;
}

static void rkvi_start_packing(rkvi_packed *packed, float *panel, int n, size_t dim)
{
    memset(packed, 0, sizeof *packed);
    packed->panel = panel;
    rkvi_clear_panel(panel, n, dim);
}

static void rkvi_add_packed(const rkvi_scratch *s, rkvi_packed *packed, int token)
{
    packed->token[packed->n] = token;
    packed->inverse[packed->n++] = s->inverse[token];
}

/* The tokens [first, end), in the panel `columns`. */
static void rkvi_pack_columns(const rkvi_head *h, rkvi_scratch *s, int first, int end,
                              rkvi_packed *packed)
{
    rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
    int v;
    rkvi_start_packing(packed, s->columns, end - first, h->dim);
    rkvi_pack(h, s->columns, end - first, 0, rows, end - first);
    for (v = first; v < end; v++) rkvi_add_packed(s, packed, v);
}

/* Who searches when rows of K meet packed keys: the rows (the packed keys are their columns), the
 * packed keys (the rows are their columns), or both. */
#define RKVI_ROWS_SEARCH   1
#define RKVI_PACKED_SEARCH 2

static uint64_t rkvi_open_packed(const rkvi_scratch *s, const rkvi_packed *packed)
{
    uint64_t open = 0;
    int v;
    for (v = 0; v < packed->n; v++)
        if (s->wanted[packed->token[v]] > 0) open |= (uint64_t)1 << v;
    return open;
}

/* n rows of K, ascending: at most a tile, of which what follows them is ignored, or, where their
 * dot products are known, a chunk. */
typedef struct rkvi_tile_rows {
    const float *data;
    size_t stride;
    int n, token[RKVI_CHUNK];
} rkvi_tile_rows;

/* dots[r * RKVI_CHUNK + v] */
static void rkvi_tile_dots(const rkvi_head *h, const rkvi_tile_rows *rows,
                           const rkvi_packed *packed, float *dots)
{
    rkvi_fetch nothing = { NULL, 0, 0, 0 };
    rkvi_dot_tile tile;
    int v;
    tile.panel = packed->panel;
    tile.rows = rows->data;
    tile.stride = rows->stride;
    tile.dim = h->dim;
    tile.out_stride = RKVI_CHUNK;
    tile.fetch = &nothing;
    for (v = 0; v < packed->n; v += tile.width) {
        tile.width = rkvi_block_width(packed->n, v);
        tile.out = dots + v;
        h->kernels->dot_tile(&tile);
        tile.panel += h->dim * (size_t)tile.width;
    }
}

/* The rows meet the packed keys. dots[r * stride + v] become cosines. */
static void rkvi_search_dots(const rkvi_head *h, rkvi_scratch *s, const rkvi_tile_rows *rows,
                             const rkvi_packed *packed, int who, float *dots, size_t stride)
{
    const uint64_t in_use = ~(uint64_t)0 >> (64 - packed->n);
    uint64_t open = who & RKVI_PACKED_SEARCH ? rkvi_open_packed(s, packed) : 0, left;
    uint64_t above[RKVI_CHUNK];
    float inverse[RKVI_CHUNK];
    rkvi_cosines cosines;
    int v, r;
    for (r = 0; r < rows->n; r++) inverse[r] = s->inverse[rows->token[r]];
    cosines.x = dots;
    cosines.stride = stride;
    cosines.n_rows = rows->n;
    cosines.n = (int)rkvi_round_up((size_t)packed->n, RKVI_LANES);
    cosines.row_inverse = inverse;
    cosines.inverse = packed->inverse;
    cosines.threshold = h->config->threshold;
    cosines.above = above;
    h->kernels->cosines(&cosines);
    for (r = rows->n - 1; r >= 0; r--) { /* newest first, for the packed keys */
        const int token = rows->token[r];
        const float *cosine = dots + (size_t)r * stride;
        above[r] &= in_use;
        for (left = above[r] & open; left; left ^= (uint64_t)1 << v) {
            v = rkvi_top_bit(left);
            rkvi_record_match(h, s, packed->token[v], token, cosine[v]);
            if (s->wanted[packed->token[v]] <= 0) open ^= (uint64_t)1 << v;
        }
        left = who & RKVI_ROWS_SEARCH ? above[r] : 0;
        for (; left && s->wanted[token] > 0; left ^= (uint64_t)1 << v) {
            v = rkvi_top_bit(left);
            rkvi_record_match(h, s, token, packed->token[v], cosine[v]);
        }
    }
}

static void rkvi_search_tile(const rkvi_head *h, rkvi_scratch *s, const rkvi_tile_rows *rows,
                             const rkvi_packed *packed, int who)
{
    float dots[RKVI_TILE_ROWS * RKVI_CHUNK];
    rkvi_tile_dots(h, rows, packed, dots);
    rkvi_search_dots(h, s, rows, packed, who, dots, RKVI_CHUNK);
}

/* The n listed keys: in place if they are adjacent and usable there, else gathered. */
static void rkvi_gather(const rkvi_head *h, rkvi_scratch *s, const int *tokens, int n,
                        rkvi_tile_rows *rows)
{
    int r;
    rows->n = n;
    memcpy(rows->token, tokens, (size_t)n * sizeof *tokens);
    if (n == RKVI_TILE_ROWS && tokens[n - 1] - tokens[0] == n - 1 && rkvi_rows_in_place(h)) {
        rows->data = (const float *)(const void *)rkvi_row(h->keys, h->index, tokens[0]);
        rows->stride = h->keys->token_stride / sizeof(float);
        return;
    }
    for (r = 0; r < RKVI_TILE_ROWS; r++)
        rkvi_load_key(h, r < n ? tokens[r] : -1, s->gathered + (size_t)r * h->dim);
    rows->data = s->gathered;
    rows->stride = h->dim;
}

/* The listed rows search the packed keys. */
static void rkvi_search_columns(const rkvi_head *h, rkvi_scratch *s, const int *tokens,
                                int n_tokens, const rkvi_packed *packed)
{
    rkvi_tile_rows rows;
    int i;
    for (i = 0; i < n_tokens; i += rows.n) {
        rkvi_gather(h, s, tokens + i, rkvi_min(n_tokens - i, RKVI_TILE_ROWS), &rows);
        rkvi_search_tile(h, s, &rows, packed, RKVI_ROWS_SEARCH);
    }
}

/* All tokens [first, end), at most RKVI_CHUNK, meet the packed keys. */
static void rkvi_search_chunk(const rkvi_head *h, rkvi_scratch *s, int first, int end,
                              const rkvi_packed *packed, int who)
{
    rkvi_rows chunk = rkvi_key_chunk(h, first, s->rows);
    rkvi_tile_rows rows;
    int at = (end - first - 1) / RKVI_TILE_ROWS * RKVI_TILE_ROWS, r;
    rows.stride = chunk.stride;
    for (; at >= 0; at -= RKVI_TILE_ROWS) {
        rows.data = chunk.data + (size_t)at * chunk.stride;
        rows.n = rkvi_min(end - first - at, RKVI_TILE_ROWS);
        for (r = 0; r < rows.n; r++) rows.token[r] = first + at + r;
        rkvi_search_tile(h, s, &rows, packed, who);
    }
}

/* dot_tile's order of additions decides who is similar, everywhere. dot_rows adds in another
 * order, in lanes; its result counts only where it is further from the threshold than this, so that
 * both must agree: each is off by less than (dim + 8) * 2^-24, the rounding of that many
 * operations. */
static float rkvi_rounding_band(const rkvi_head *h)
{
    return 2.0f * (float)(h->dim + 8) / 16777216.0f;
}

/* Their cosine in dot_tile's order. */
static float rkvi_exact_cosine(const float *row, float row_inverse, const float *column,
                               float inverse, size_t dim)
{
    float dot = 0;
    size_t d;
    for (d = 0; d < dim; d++) dot = rkvi_fma(row[d], column[d], dot);
    return dot * (row_inverse * inverse);
}

/* Records token j if it is similar to row i. */
static void rkvi_record_exactly(const rkvi_head *h, rkvi_scratch *s, int i, const float *row, int j,
                                const float *column)
{
    float cosine = rkvi_exact_cosine(row, s->inverse[i], column, s->inverse[j], h->dim);
    if (cosine > h->config->threshold) rkvi_record_match(h, s, i, j, cosine);
}

/* Dot products of a key, whose 1 / norm is `inverse`, with the chunk at `first`, in lanes, become
 * cosines. Bit r of the result says > threshold. */
static uint64_t rkvi_lane_cosines(const rkvi_head *h, const rkvi_scratch *s, float *dots,
                                  float inverse, int first, float threshold)
{
    rkvi_cosines row;
    uint64_t above;
    row.x = dots;
    row.stride = 0;
    row.n_rows = 1;
    row.n = RKVI_CHUNK;
    row.row_inverse = &inverse;
    row.inverse = s->inverse + first;
    row.threshold = threshold;
    row.above = &above;
    h->kernels->cosines(&row);
    return above;
}

/* The rows [first, end) of a chunk have met no column. Bit r of the result: row first + r is
 * open. */
static uint64_t rkvi_open_rows(const rkvi_head *h, rkvi_scratch *s, int first, int end)
{
    uint64_t open = ~(uint64_t)0 >> (64 - (end - first));
    const int recent = h->config->recent;
    int r;
    for (r = 0; r < RKVI_CHUNK; r++) s->wanted[first + r] = recent;
    for (r = 0; r < end - first; r++)
        if (rkvi_cannot_match(h, s, first + r)) {
            s->wanted[first + r] = -1;
            open ^= (uint64_t)1 << r;
        }
    return open;
}

/* The open rows of the chunk at `first` meet the column newest->token[v], of which dots are the dot
 * products in lanes. Returns those that are still open. */
static uint64_t rkvi_search_column(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first,
                                   uint64_t open, const rkvi_packed *newest, int v, float *dots)
{
    const float band = rkvi_rounding_band(h), threshold = h->config->threshold;
    const float inverse = newest->inverse[v], *column = s->newest + (size_t)v * h->dim;
    const int j = newest->token[v], is_paper = h->config->variant == RKV_PAPER;
    uint64_t left = open & rkvi_lane_cosines(h, s, dots, inverse, first, threshold - band);
    int64_t weight, sum = 0;
    int r;
    if (threshold >= 0 && j - first >= 0 && j - first < RKVI_CHUNK)
        left &= ~((uint64_t)1 << (j - first)); /* the diagonal is 0 */
    for (; left; left ^= (uint64_t)1 << r) {
        float cosine;
        r = rkvi_top_bit(left);
        cosine = dots[r];
        if (cosine <= threshold + band)
            cosine = rkvi_exact_cosine(rows.data + (size_t)r * rows.stride, s->inverse[first + r],
                                       column, inverse, h->dim);
        if (cosine <= threshold) continue;
        if (--s->wanted[first + r] == 0) open ^= (uint64_t)1 << r;
        weight = first + r == j ? 0 : rkvi_weight(cosine);
        if (is_paper) s->exempt[first + r] += weight;
        sum += weight;
    }
    if (!is_paper) s->exempt[j] += sum;
    return open;
}

/* The tile has the dot products with the newest keys in the places of spare vectors. */
static void rkvi_meet_spare(const rkvi_head *h, rkvi_scratch *s, int first, int end,
                            const rkvi_packed *newest)
{
    rkvi_tile_rows rows;
    int r;
    rows.data = NULL; /* not needed */
    rows.stride = 0;
    rows.n = end - first;
    for (r = 0; r < rows.n; r++) rows.token[r] = first + r;
    rkvi_search_dots(h, s, &rows, newest, RKVI_ROWS_SEARCH, s->tile + h->n_queries,
                     rkvi_tile_stride(h->n_queries));
}

static void rkvi_meet_newest(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first,
                             int end, const rkvi_packed *newest, float *dots)
{
    uint64_t open = rkvi_open_rows(h, s, first, end);
    int v;
    if (h->n_spare) {
        rkvi_meet_spare(h, s, first, end, newest);
        return;
    }
    for (v = newest->n - 1; v >= 0 && open; v--) {
        if (v < newest->n - 1)
            rkvi_dot_rows_with(h, rows, RKVI_CHUNK, s->newest + (size_t)v * h->dim, dots, NULL,
                               NULL);
        open = rkvi_search_column(h, s, rows, first, open, newest, v, dots);
    }
}

/* The second pass over K: the sum of every column, and its cosine with row 0. */
static void rkvi_read_columns(const rkvi_head *h, rkvi_scratch *s)
{
    int first;
    rkvi_load_key(h, 0, s->first_key);
    for (first = 0; first < h->n_span; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        rkvi_dot_rows_with(h, rows, RKVI_CHUNK, s->sum, s->column + first, s->first_key,
                           s->first + first);
        rkvi_lane_cosines(h, s, s->column + first, 1.0f, first, 0);
        rkvi_lane_cosines(h, s, s->first + first, s->inverse[0], first, 0);
    }
}

/* Row 0 searches all columns before `end`: the second pass has met them. In most heads of real
 * models the first token's key resembles none. */
static void rkvi_search_first(const rkvi_head *h, rkvi_scratch *s, int end)
{
    const float maybe = h->config->threshold - rkvi_rounding_band(h);
    int j;
    for (j = end - 1; j >= 0 && s->wanted[0] > 0; j--) {
        if (s->first[j] <= maybe) continue;
        rkvi_load_key(h, j, s->gathered);
        rkvi_record_exactly(h, s, 0, s->first_key, j, s->gathered);
    }
    s->wanted[0] = 0;
}

static int rkvi_chunk_before(int end)
{
    return end > RKVI_CHUNK ? end - RKVI_CHUNK : 0;
}

/* How many of an ascending list of rows lie before `end`. */
static int rkvi_count_before(const int *rows, int n_rows, int end)
{
    while (n_rows > 0 && rows[n_rows - 1] >= end) n_rows--;
    return n_rows;
}

/* Registers that n packed keys fill. */
static int rkvi_n_vectors(int n)
{
    return (n + RKVI_LANES - 1) / RKVI_LANES;
}

/* Open rows of any chunk: row token[i] has met all columns from end[i] on. They wait until enough
 * of them can search the next columns together, packed. */
typedef struct rkvi_waiting {
    int n, token[2 * RKVI_CHUNK], end[2 * RKVI_CHUNK];
} rkvi_waiting;

static void rkvi_wait(rkvi_waiting *waiting, const int *rows, int n_rows, int end)
{
    int i;
    for (i = 0; i < n_rows; i++) {
        waiting->token[waiting->n] = rows[i];
        waiting->end[waiting->n++] = end;
    }
}

/* Those that have met the fewest columns, at most RKVI_CHUNK of them: their indices in next[]. */
static int rkvi_next_waiting(const rkvi_waiting *waiting, int *next)
{
    int i, n = 0, end = 0;
    for (i = 0; i < waiting->n; i++)
        if (waiting->end[i] > end) end = waiting->end[i];
    for (i = 0; i < waiting->n && n < RKVI_CHUNK; i++)
        if (waiting->end[i] == end) next[n++] = i;
    return n;
}

/* Packs them into as few registers as they need, unless they are packed so already. */
static void rkvi_pack_waiting(const rkvi_head *h, rkvi_scratch *s, const rkvi_waiting *waiting,
                              const int *next, int n, rkvi_packed *packed)
{
    int i, r, v, n_same = 0;
    for (v = 0; v < packed->n && n_same < n; v++)
        n_same += packed->token[v] == waiting->token[next[n_same]];
    if (n_same == n && rkvi_n_vectors(n) == rkvi_n_vectors(packed->n)) return;
    rkvi_start_packing(packed, s->waiting, n, h->dim);
    for (i = 0; i < n; i += RKVI_INTERLEAVED) {
        for (r = 0; r < RKVI_INTERLEAVED && i + r < n; r++) {
            rkvi_load_key(h, waiting->token[next[i + r]], s->gathered + (size_t)r * h->dim);
            rkvi_add_packed(s, packed, waiting->token[next[i + r]]);
        }
        rkvi_pack(h, s->waiting, n, i, rkvi_staged(h, s->gathered), r);
    }
}

/* Drops those that have found enough and those that have met every column. */
static void rkvi_stop_waiting(const rkvi_scratch *s, rkvi_waiting *waiting)
{
    int i, n = 0;
    for (i = 0; i < waiting->n; i++) {
        if (s->wanted[waiting->token[i]] <= 0 || waiting->end[i] == 0) continue;
        waiting->token[n] = waiting->token[i];
        waiting->end[n++] = waiting->end[i];
    }
    waiting->n = n;
}

/* Up to this many rows search without packing. In most heads of real models only the first token's
 * key has no similar key. */
#define RKVI_FEW 12

/* The waiting row i meets the tokens [first, end), a chunk of columns; dots: with them, in lanes.
 * What may be similar is decided exactly. */
static void rkvi_search_one(const rkvi_head *h, rkvi_scratch *s, int i, const float *row,
                            rkvi_rows columns, int first, int end, float *dots)
{
    const float maybe = h->config->threshold - rkvi_rounding_band(h);
    uint64_t left = rkvi_lane_cosines(h, s, dots, s->inverse[i], first, maybe);
    int j;
    left &= ~(uint64_t)0 >> (64 - (end - first));
    for (; left && s->wanted[i] > 0; left ^= (uint64_t)1 << j) {
        j = rkvi_top_bit(left);
        rkvi_record_exactly(h, s, i, row, first + j, columns.data + (size_t)j * columns.stride);
    }
}

/* n <= RKVI_FEW waiting rows, two at a time, meet the tokens [first, end) where these lie. */
static void rkvi_search_few(const rkvi_head *h, rkvi_scratch *s, const rkvi_waiting *waiting,
                            const int *next, int n, int first, int end)
{
    const rkvi_rows columns = rkvi_key_chunk(h, first, s->rows);
    float dots[2 * RKVI_CHUNK], *row = s->gathered, *second = row + h->dim;
    int i, is_pair;
    for (i = 0; i < n; i += 2) {
        is_pair = i + 1 < n;
        rkvi_load_key(h, waiting->token[next[i]], row);
        if (is_pair) rkvi_load_key(h, waiting->token[next[i + 1]], second);
        rkvi_dot_rows_with(h, columns, RKVI_CHUNK, row, dots, is_pair ? second : NULL,
                           is_pair ? dots + RKVI_CHUNK : NULL);
        rkvi_search_one(h, s, waiting->token[next[i]], row, columns, first, end, dots);
        if (is_pair)
            rkvi_search_one(h, s, waiting->token[next[i + 1]], second, columns, first, end,
                            dots + RKVI_CHUNK);
    }
}

/* Waiting rows search, a chunk of columns at a time, while more than `most` wait or `enough` can
 * search together. */
static void rkvi_search_waiting(const rkvi_head *h, rkvi_scratch *s, rkvi_waiting *waiting,
                                int most, int enough)
{
    int next[RKVI_CHUNK], i, n, first, end;
    rkvi_packed packed;
    packed.n = 0;
    while ((n = rkvi_next_waiting(waiting, next)) > 0 && (waiting->n > most || n >= enough)) {
        end = waiting->end[next[0]];
        first = rkvi_chunk_before(end);
        if (n <= RKVI_FEW) {
            rkvi_search_few(h, s, waiting, next, n, first, end);
        } else {
            rkvi_pack_waiting(h, s, waiting, next, n, &packed);
            rkvi_search_chunk(h, s, first, end, &packed, RKVI_PACKED_SEARCH);
        }
        for (i = 0; i < n; i++) waiting->end[next[i]] = first;
        rkvi_stop_waiting(s, waiting);
    }
}

typedef struct rkvi_search {
    rkvi_packed columns; /* the chunk of columns under search */
    rkvi_waiting waiting;
} rkvi_search;

/* rows: n_older open rows before the chunk of columns, then n_inside in it. The older rows search
 * the chunk; the rows inside search the columns before it. While many are open on both sides, all
 * pairs of the chunk and an older chunk are computed, and each pair serves both its rows. Then the
 * rows inside wait, and the older rows go on alone. */
static void rkvi_search_older(const rkvi_head *h, rkvi_scratch *s, rkvi_search *search, int *rows,
                              int n_older, int n_inside)
{
    const rkvi_packed *columns = &search->columns;
    int *inside = rows + n_older, end = columns->token[0];
    while (n_inside > 0 && end > 0) {
        int first = rkvi_chunk_before(end), n_before = rkvi_count_before(rows, n_older, first);
        int n_apart = n_inside * (end - first) + (n_older - n_before) * columns->n;
        if (n_apart < (end - first) * columns->n) break; /* fewer pairs if each side goes alone */
        rkvi_search_chunk(h, s, first, end, columns, RKVI_ROWS_SEARCH | RKVI_PACKED_SEARCH);
        n_inside = rkvi_drop_finished(s, inside, n_inside);
        n_older = n_before;
        end = first;
    }
    rkvi_search_columns(h, s, rows, n_older, columns);
    if (end > 0) rkvi_wait(&search->waiting, inside, n_inside, end);
}

/* The open rows (ascending) search all columns before `end`, chunk by chunk; the columns from `end`
 * on, at most RKVI_CHUNK, they have met. Rows inside a chunk search that chunk first. */
static void rkvi_search_all(const rkvi_head *h, rkvi_scratch *s, int *rows, int n_rows, int end)
{
    int n_older = rkvi_count_before(rows, n_rows, end), n_inside, first;
    rkvi_search search;
    search.waiting.n = 0;
    if (end > 0) rkvi_wait(&search.waiting, rows + n_older, n_rows - n_older, end);
    for (n_rows = n_older; n_rows > RKVI_FEW; n_rows = rkvi_drop_finished(s, rows, n_older)) {
        first = rkvi_chunk_before(end);
        n_older = rkvi_count_before(rows, n_rows, first);
        rkvi_pack_columns(h, s, first, end, &search.columns);
        rkvi_search_columns(h, s, rows + n_older, n_rows - n_older, &search.columns);
        n_inside = rkvi_drop_finished(s, rows + n_older, n_rows - n_older);
        rkvi_search_older(h, s, &search, rows, n_older, n_inside);
        rkvi_search_waiting(h, s, &search.waiting, RKVI_CHUNK, RKVI_LANES);
        end = first;
    }
    rkvi_wait(&search.waiting, rows, n_rows, end);
    rkvi_search_waiting(h, s, &search.waiting, 0, 1);
}

#define RKVI_NARROW RKVI_LANES /* columns at a time of step 2 */

static void rkvi_find_similar_keys(const rkvi_head *h, rkvi_scratch *s)
{
    int i, n_open, n_before, first, end = h->n_span - h->n_newest;
    rkvi_packed narrow;
    rkvi_read_columns(h, s);
    rkvi_search_first(h, s, end);
    for (i = 0; i < h->n_span; i++) s->open[i] = i;
    n_open = rkvi_drop_finished(s, s->open, h->n_span);
    do {
        if (n_open == 0 || end == 0) return;
        n_before = n_open;
        first = end > RKVI_NARROW ? end - RKVI_NARROW : 0;
        rkvi_pack_columns(h, s, first, end, &narrow);
        rkvi_search_columns(h, s, s->open, n_open, &narrow);
        n_open = rkvi_drop_finished(s, s->open, n_open);
        end = first;
    } while (n_open > RKVI_FEW && n_before - n_open > n_open / 3); /* closed a quarter or more */
    rkvi_search_all(h, s, s->open, n_open, end);
}

/* ==== 16. Other policies ====================================================================
 * In: one KV head's keys, queries, carried state or query means.  Out: a score for each candidate,
 * and the state after this round. Formulas: rkv_policy. Reads keys with the functions of room 14;
 * knows nothing of other heads, threads or kept sets. */

/* frequency * 2^64 / (2 pi): the product of a position and 64 bits of a revolution is exact, modulo
 * a revolution, so no position is too large. */
#define RKVI_TURNS_PER_RADIAN (18446744073709551616.0 / 6.283185307179586476925)
#define RKVI_MAX_FREQUENCY    4.0f

/* words: [2][pairs], or NULL where the policy needs none. Returns the first pair whose frequency is
 * out of range, or -1. */
static int rkvi_fill_turns(const rkv_rope *rope, int dim, uint32_t *words, rkvi_turns *turns)
{
    const int dims = rope->dims > 0 ? rope->dims : dim, pairs = rkvi_pairs(rope, dim);
    const double base = rope->base > 0 ? (double)rope->base : 10000.0;
    int f;
    memset(turns, 0, sizeof *turns);
    if (!words) return -1;
    turns->high = words;
    turns->low = words + pairs;
    turns->n_pairs = pairs;
    turns->adjacent = rope->pairing == RKV_ROPE_ADJACENT;
    for (f = 0; f < pairs; f++) {
        float frequency =
            rope->frequencies ? rope->frequencies[f] : (float)pow(base, -2.0 * f / dims);
        uint64_t turn;
        if (!(frequency >= 0 && frequency <= RKVI_MAX_FREQUENCY)) return f;
        turn = (uint64_t)((double)frequency * RKVI_TURNS_PER_RADIAN);
        words[f] = (uint32_t)(turn >> 32);
        words[pairs + f] = (uint32_t)turn;
    }
    return -1;
}

/* The rows of a chunk before rotary embedding; those that do not exist are zeros. */
static rkvi_rows rkvi_unrotated(const rkvi_head *h, rkvi_scratch *s, rkvi_rows rows, int first)
{
    int r, n = rkvi_min(h->n_tokens - first, RKVI_CHUNK);
    for (r = 0; r < RKVI_CHUNK; r++) {
        const float *from = rows.data + (size_t)r * rows.stride;
        float *to = s->waiting + (size_t)r * h->dim;
        memcpy(to, from, h->dim * sizeof *to);
        if (r < n && h->plan->turns.n_pairs)
            h->kernels->unrotate(to, from, &h->plan->turns, (uint32_t)h->positions[first + r]);
    }
    return rkvi_staged(h, s->waiting);
}

static const int *rkvi_sort_rows(const float *x, int n, rkvi_scratch *s); /* room 17 */
static size_t rkvi_row_stride(const rkv_layer *layer);                    /* room 19 */

/* ---- Carried state ---- */

static int rkvi_first_new(const rkvi_head *h)
{
    return h->n_tokens - h->layer->n_new;
}

/* One plane of this head's state, as it will be. */
static float *rkvi_state_plane(const rkvi_head *h, int plane)
{
    const rkvi_plan *plan = h->plan;
    return plan->state +
           ((size_t)h->index * (size_t)plan->n_floats + (size_t)plane) * plan->score_stride;
}

/* x^n, with the same roundings everywhere. */
static float rkvi_power(float x, int n)
{
    double power = 1, factor = (double)x;
    for (; n > 0; n /= 2, factor *= factor)
        if (n % 2) power *= factor;
    return (float)power;
}

/* The state as the caller carried it, times `factor`, and zeros for new rows. */
static rkv_status rkvi_carry(const rkvi_head *h, rkvi_scratch *s, int plane, float factor)
{
    const size_t stride = rkvi_row_stride(h->layer);
    const float *carried =
        h->layer->state + ((size_t)h->index * (size_t)h->plan->n_floats + (size_t)plane) * stride;
    float *x = rkvi_state_plane(h, plane);
    int i, n = rkvi_first_new(h);
    memset(x, 0, h->plan->score_stride * sizeof *x);
    for (i = 0; i < n; i++) {
        if (!(carried[i] >= 0 && carried[i] <= FLT_MAX))
            return rkvi_nonfinite(s, h, RKVI_RULE_STATE, h->index, i);
        x[i] = carried[i] * factor;
    }
    return RKV_OK;
}

/* ---- D, the similarity to the most similar later key ---- */

/* The new keys before rotary embedding and of unit length become columns. They start with the chunk
 * in which the first of them lies; what is not new in it is a column of zeros, which changes no D.
 * Returns the row of the first column. */
static rkv_status rkvi_pack_new_keys(const rkvi_head *h, rkvi_scratch *s, int *first_column)
{
    const int begin = rkvi_first_new(h) / RKVI_CHUNK * RKVI_CHUNK;
    int first, r;
    *first_column = begin;
    rkvi_clear_panel(s->new_keys, h->n_tokens - begin, h->dim);
    for (first = begin; first < h->n_tokens; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        rkv_status status = rkvi_chunk_norms(h, s, rows, first, NULL, NULL);
        if (status != RKV_OK) return status;
        rkvi_unrotated(h, s, rows, first);
        for (r = 0; r < RKVI_CHUNK; r++) {
            float *key = s->waiting + (size_t)r * h->dim;
            const float weight = first + r < rkvi_first_new(h) ? 0 : s->inverse[first + r];
            memset(s->rows, 0, h->dim * sizeof *s->rows);
            h->kernels->add_rows(s->rows, key, 0, &weight, 1, h->dim);
            memcpy(key, s->rows, h->dim * sizeof *key);
        }
        rkvi_pack(h, s->new_keys, h->n_tokens - begin, first - begin, rkvi_staged(h, s->waiting),
                  rkvi_min(RKVI_CHUNK, h->n_tokens - first));
    }
    return RKV_OK;
}

/* The largest dot product of each row of a chunk with the n columns of a block, at least 0, from
 * the tile. Column v is row column + v; earlier rows than a row's own, and itself, do not count. */
static void rkvi_block_best(const rkvi_head *h, rkvi_scratch *s, int first, int column, int n,
                            float *best)
{
    enum { FOLDED = RKVI_FOLD_LANES };
    const size_t stride = rkvi_tile_stride(n);
    const int width = rkvi_block_width(n, 0);
    float folded[FOLDED * RKVI_CHUNK];
    int r, v;
    for (r = column > first ? column - first : 0; r < RKVI_CHUNK; r++)
        for (v = 0; v < width && column + v <= first + r; v++)
            s->tile[(size_t)r * stride + (size_t)v] = 0;
    h->kernels->fold_group(s->tile, stride, width / FOLDED, FOLDED, 1, folded, RKVI_CHUNK);
    for (v = 0; v < FOLDED; v++) h->kernels->max_into(best, folded + v * RKVI_CHUNK, 1, RKVI_CHUNK);
}

/* D of all rows. */
static rkv_status rkvi_later_similarity(const rkvi_head *h, rkvi_scratch *s)
{
    float *similarity = rkvi_state_plane(h, 1);
    int first, first_column, column, r;
    rkv_status status = rkvi_pack_new_keys(h, s, &first_column);
    if (status != RKV_OK) return status;
    for (first = 0; first < h->n_tokens; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        float best[RKVI_CHUNK] = { 0 };
        status = rkvi_chunk_norms(h, s, rows, first, NULL, NULL);
        if (status != RKV_OK) return status;
        rows = rkvi_unrotated(h, s, rows, first);
        for (column = first_column; column < h->n_tokens; column += RKVI_BLOCK) {
            const int n = rkvi_min(RKVI_BLOCK, h->n_tokens - column);
            if (column + n <= first + 1) continue; /* no column is later than any row */
            rkvi_chunk_dots(h, s, rows, column == first_column ? first : h->n_tokens,
                            s->new_keys + (size_t)(column - first_column) * h->dim, n);
            rkvi_block_best(h, s, first, column, n, best);
        }
        for (r = 0; r < RKVI_CHUNK; r++) {
            float cosine = best[r] * s->inverse[first + r];
            if (cosine > similarity[first + r]) similarity[first + r] = cosine;
        }
    }
    return RKV_OK;
}

/* ---- I, attention that is remembered ---- */

/* Logits of a block of n packed queries with all keys: logits[v][row]. H2O reads the keys here for
 * the first time, and checks them. */
static rkv_status rkvi_block_logits(const rkvi_head *h, rkvi_scratch *s, int n, int check)
{
    int first;
    for (first = 0; first < h->n_tokens; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        rkv_status status = check ? rkvi_chunk_norms(h, s, rows, first, NULL, NULL) : RKV_OK;
        if (status != RKV_OK) return status;
        rkvi_chunk_dots(h, s, rows, first, s->panel, n);
        rkvi_chunk_logits(h, s, first, 1, n);
    }
    return RKV_OK;
}

/* Each vote's softmax over the rows that it sees enters I: the largest probability (MEMORY), where
 * a query does not vote for its own row, or the sum (H2O). */
static rkv_status rkvi_remember(const rkvi_head *h, rkvi_scratch *s)
{
    const size_t stride = rkvi_padded((size_t)h->n_tokens);
    float *importance = rkvi_state_plane(h, 0);
    int q, v, n;
    for (q = 0; q < h->n_queries; q += n) {
        rkv_status status;
        n = rkvi_min(h->n_queries - q, RKVI_BLOCK);
        status = rkvi_pack_queries(h, s, q, n);
        if (status == RKV_OK)
            status = rkvi_block_logits(h, s, n, q == 0 && h->config->policy == RKV_POLICY_H2O);
        if (status != RKV_OK) return status;
        for (v = 0; v < n; v++) {
            const int seen = rkvi_seen(h, (q + v) % h->votes);
            const size_t padded = rkvi_round_up((size_t)seen, RKVI_LANES);
            float *row = s->logits + (size_t)v * stride, sum = rkvi_exponentials(h, row, seen);
            if (!(sum > 0)) return rkvi_nonfinite(s, h, RKVI_RULE_LOGITS, h->index, -1);
            sum = 1.0f / sum;
            if (h->config->policy == RKV_POLICY_H2O) {
                h->kernels->add_rows(importance, row, 0, &sum, 1, padded);
                continue;
            }
            row[seen - 1] = 0;
            h->kernels->max_into(importance, row, sum, padded);
        }
    }
    return RKV_OK;
}

/* signal[i] = rank of x[i] among the candidates. */
static void rkvi_rank_candidates(const rkvi_head *h, rkvi_scratch *s, const float *x, float *signal)
{
    const int *order = rkvi_sort_rows(x, h->n_candidates, s);
    int rank;
    for (rank = 0; rank < h->n_candidates; rank++) signal[order[rank]] = (float)rank;
}

static rkv_status rkvi_score_memory(const rkvi_head *h, rkvi_scratch *s)
{
    const float lambda = h->config->lambda, share = 1.0f / (float)h->n_candidates;
    const int ranked = h->config->policy == RKV_POLICY_MEMORY_TRACES;
    const size_t stride = rkvi_padded((size_t)h->n_tokens);
    const float *similarity = rkvi_state_plane(h, 1);
    rkv_status status = rkvi_carry(h, s, 0, rkvi_power(h->config->decay, h->layer->n_new));
    int i;
    if (status == RKV_OK) status = rkvi_carry(h, s, 1, 1);
    if (status == RKV_OK) status = rkvi_later_similarity(h, s);
    if (status == RKV_OK) status = rkvi_remember(h, s);
    if (status != RKV_OK) return status;
    memset(s->signal, 0, 2 * stride * sizeof *s->signal);
    rkvi_rank_candidates(h, s, rkvi_state_plane(h, 0), s->signal);
    if (ranked)
        rkvi_rank_candidates(h, s, similarity, s->signal + stride);
    else
        memcpy(s->signal + stride, similarity, (size_t)h->n_candidates * sizeof *similarity);
    /* Ranks are mixed first and divided then: equal sums of ranks stay equal. */
    s->weights[0] = ranked ? lambda : lambda * share;
    s->weights[1] = -(1.0f - lambda);
    rkvi_mix(h, s->signal, s->weights, 2);
    for (i = 0; ranked && i < h->n_candidates; i++) h->scores[i] *= share;
    return RKV_OK;
}

static rkv_status rkvi_score_h2o(const rkvi_head *h, rkvi_scratch *s)
{
    rkv_status status = rkvi_carry(h, s, 0, 1);
    if (status == RKV_OK) status = rkvi_remember(h, s);
    if (status != RKV_OK) return status;
    s->weights[0] = 1;
    rkvi_mix(h, rkvi_state_plane(h, 0), s->weights, 1);
    return RKV_OK;
}

/* ---- TriAttention ---- */

/* Where in query_means a head has E|q'_f|, after all heads' E[q'], and where the count is. */
static size_t rkvi_lengths_at(int query_heads, int head, int dim)
{
    return (size_t)query_heads * (size_t)dim + (size_t)head * (size_t)(dim / 2);
}

static size_t rkvi_count_at(int query_heads, int dim)
{
    return rkvi_lengths_at(query_heads, query_heads, dim);
}

/* Floats of query_means, with room to work for rkv_query_means_update behind the count: a row, the
 * same before rotary embedding, lengths and turns of pairs. */
static size_t rkvi_means_floats(int query_heads, int dim)
{
    return rkvi_count_at(query_heads, dim) + 1 + 4 * rkvi_round_up((size_t)dim, RKVI_LANES);
}

#define RKVI_OFFSETS 10 /* of future queries: 2^0 to 2^9 tokens */

/* The mean over the offsets of each pair's turn from the newest position on. */
static void rkvi_fill_ahead(const rkvi_turns *turns, float *ahead)
{
    int f, k;
    for (f = 0; f < turns->n_pairs; f++) {
        float *cosine = ahead + f, *sine = cosine + turns->n_pairs;
        *cosine = *sine = 0;
        for (k = 0; k < RKVI_OFFSETS; k++) {
            float s, c;
            rkvi_sincos(rkvi_angle(turns, f, 1u << k), &s, &c);
            *sine += s;
            *cosine += c;
        }
        *sine /= RKVI_OFFSETS;
        *cosine /= RKVI_OFFSETS;
    }
}

/* (a, b) turned by an angle, as complex numbers. */
static void rkvi_turn(float a, float b, float cosine, float sine, float *x, float *y)
{
    *x = rkvi_fma(a, cosine, -(b * sine));
    *y = rkvi_fma(a, sine, b * cosine);
}

/* What all keys meet for a query head: u, and behind it the weights of the pairs' lengths. Pairs
 * that no rotation touches are as E[q'] is. */
static void rkvi_expected_query(const rkvi_head *h, int head, float *row)
{
    const int dim = h->keys->dim, query_heads = h->plan->kv_heads * h->group;
    const rkvi_turns *turns = &h->plan->turns;
    const float *mean = h->layer->query_means + (size_t)head * (size_t)dim;
    const float *lengths = h->layer->query_means + rkvi_lengths_at(query_heads, head, dim);
    float *weights = row + rkvi_round_up((size_t)dim, RKVI_LANES);
    uint32_t newest;
    int f;
    memset(row, 0, h->dim * sizeof *row);
    memcpy(row, mean, (size_t)dim * sizeof *row);
    if (turns->n_pairs == 0) return;
    newest = (uint32_t)h->positions[h->n_tokens - 1];
    h->kernels->pair_lengths(weights, mean, turns);
    for (f = 0; f < turns->n_pairs; f++) {
        const float *ahead = h->plan->ahead + f;
        size_t b, a = rkvi_pair_at(turns, f, &b);
        float sine, cosine;
        rkvi_sincos(rkvi_angle(turns, f, newest), &sine, &cosine);
        rkvi_turn(ahead[0], ahead[turns->n_pairs], cosine, sine, &cosine, &sine);
        rkvi_turn(mean[a], mean[b], cosine, sine, row + a, row + b);
        weights[f] = lengths[f] - weights[f];
    }
}

static rkv_status rkvi_pack_expected(const rkvi_head *h, rkvi_scratch *s)
{
    float square[RKVI_CHUNK];
    int g, r, n;
    rkvi_clear_panel(s->panel, h->group, h->dim);
    for (g = 0; g < h->group; g += n) {
        n = rkvi_min(h->group - g, RKVI_CHUNK);
        for (r = 0; r < n; r++)
            rkvi_expected_query(h, h->index * h->group + g + r, s->rows + (size_t)r * h->dim);
        rkvi_dot_rows_with(h, rkvi_staged(h, s->rows), n, NULL, square, NULL, NULL);
        for (r = 0; r < n; r++)
            if (!(square[r] <= RKVI_MAX_SQUARE))
                return rkvi_nonfinite(s, h, RKVI_RULE_MEANS, h->index * h->group + g + r, -1);
        rkvi_pack(h, s->panel, h->group, g, rkvi_staged(h, s->rows), n);
    }
    return RKV_OK;
}

/* mean += (x - mean) / count */
static void rkvi_update_mean(float *mean, const float *x, int n, float share)
{
    int i;
    for (i = 0; i < n; i++) mean[i] = rkvi_fma(share, x[i] - mean[i], mean[i]);
}

/* The sum of x[n], or of its squares. x is followed by zeros up to a whole register. */
static double rkvi_sum(const rkvi_head *h, rkvi_scratch *s, const float *x, int n, int squares)
{
    double sum = 0;
    int i;
    for (i = 0; i < n; i += RKVI_SUM_ROWS) {
        rkvi_dot_rows dots;
        float part = 0;
        memset(&dots, 0, sizeof dots);
        dots.rows = x + i;
        dots.dim = rkvi_round_up((size_t)rkvi_min(n - i, RKVI_SUM_ROWS), RKVI_LANES);
        dots.n_rows = 1;
        dots.with[0] = squares ? NULL : s->ones;
        dots.out[0] = &part;
        h->kernels->dot_rows(&dots);
        sum += (double)part;
    }
    return sum;
}

/* scores = max(scores, z-score of x) over the candidates. x is overwritten. */
static void rkvi_max_z_score(const rkvi_head *h, rkvi_scratch *s, float *x)
{
    const int n = h->n_candidates;
    const size_t padded = rkvi_round_up((size_t)n, RKVI_LANES);
    double variance;
    float mean;
    int i;
    memset(x + n, 0, (padded - (size_t)n) * sizeof *x);
    mean = (float)(rkvi_sum(h, s, x, n, 0) / n);
    for (i = 0; i < n; i++) x[i] -= mean;
    variance = rkvi_sum(h, s, x, n, 1) / n;
    h->kernels->max_into(h->scores, x, variance > 0 ? 1.0f / sqrtf((float)variance) : 0, padded);
}

static rkv_status rkvi_score_triattention(const rkvi_head *h, rkvi_scratch *s)
{
    const size_t stride = rkvi_padded((size_t)h->n_tokens);
    const size_t lengths_at = rkvi_round_up((size_t)h->keys->dim, RKVI_LANES);
    int first, i, g, r;
    rkv_status status = rkvi_pack_expected(h, s);
    for (first = 0; status == RKV_OK && first < h->n_tokens; first += RKVI_CHUNK) {
        rkvi_rows rows = rkvi_key_chunk(h, first, s->rows);
        status = rkvi_chunk_norms(h, s, rows, first, NULL, NULL);
        for (r = 0; h->plan->turns.n_pairs && r < RKVI_CHUNK; r++)
            h->kernels->pair_lengths(s->rows + (size_t)r * h->dim + lengths_at,
                                     rows.data + (size_t)r * rows.stride, &h->plan->turns);
        rkvi_chunk_dots(h, s, rows, first, s->panel, h->group);
        rkvi_chunk_logits(h, s, first, 1, h->group);
    }
    if (status != RKV_OK) return status;
    for (i = 0; i < (int)stride; i++) h->scores[i] = -FLT_MAX;
    for (i = 0; i < RKVI_SUM_ROWS; i++) s->ones[i] = 1;
    for (g = 0; g < h->group; g++) rkvi_max_z_score(h, s, s->logits + (size_t)g * stride);
    return RKV_OK;
}

/* ---- Policies that look at nothing, and the door to all ---- */

/* The finaliser of splitmix64 (Steele, Lea and Flood, 2014). */
static float rkvi_hash(uint32_t seed, int layer, int head, int32_t position)
{
    uint64_t x = (uint64_t)seed * 0x9e3779b97f4a7c15u;
    x += (uint64_t)layer << 40 ^ (uint64_t)head << 32;
    x ^= (uint64_t)(uint32_t)position;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return (float)(x >> 40) * (1.0f / 16777216.0f);
}

static void rkvi_score_random(const rkvi_head *h)
{
    int i;
    for (i = 0; i < h->n_candidates; i++)
        h->scores[i] = rkvi_hash(h->config->seed, h->layer_index, h->index, h->positions[i]);
}

static rkv_status rkvi_add_bias(const rkvi_head *h, rkvi_scratch *s)
{
    const float *bias = h->layer->bias;
    int i;
    if (!bias) return RKV_OK;
    bias += (size_t)h->index * rkvi_row_stride(h->layer);
    for (i = 0; i < h->n_candidates; i++) {
        h->scores[i] += bias[i];
        if (h->scores[i] != h->scores[i]) return rkvi_nonfinite(s, h, RKVI_RULE_BIAS, h->index, i);
    }
    return RKV_OK;
}

/* One KV head, by the policy of the config. */
static rkv_status rkvi_score_head(const rkvi_head *h, rkvi_scratch *s)
{
    rkv_status status = RKV_OK;
    s->missing = -1;
    memset(h->scores, 0, rkvi_padded((size_t)h->n_tokens) * sizeof *h->scores);
    switch (h->config->policy) {
    case RKV_POLICY_RKV: status = rkvi_score_rkv(h, s); break;
    case RKV_POLICY_MEMORY_TRACES:
    case RKV_POLICY_MEMORY_PROSE: status = rkvi_score_memory(h, s); break;
    case RKV_POLICY_H2O: status = rkvi_score_h2o(h, s); break;
    case RKV_POLICY_TRIATTENTION: status = rkvi_score_triattention(h, s); break;
    case RKV_POLICY_RANDOM: rkvi_score_random(h); break;
    case RKV_POLICY_OWN_SCORE: break;
    }
    return status == RKV_OK ? rkvi_add_bias(h, s) : status;
}

/* ==== 17. Selection =========================================================================
 * In: the scores of one set's candidates.  Out: the kept list.
 * Knows nothing of keys or attention. Equal scores: the more recent token stays. */

/* Unsigned integers that compare as the floats do; -0 and +0 are equal. */
static uint32_t rkvi_rank(float score)
{
    uint32_t bits = rkvi_bits_from_float(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The rank of the n_keep-th largest of n ranks, by radix: 11 bits at a time from the highest bit
 * that differs, until a bin is kept whole. *n_ties is how many of that very rank are kept. */
static uint32_t rkvi_cut(const uint32_t *ranks, int n, int n_keep, int32_t *histogram, int *n_ties)
{
    uint32_t same = 0xffffffffu, any = 0, prefix, mask;
    int shift = 0, i;
    for (i = 0; i < n; i++) {
        same &= ranks[i];
        any |= ranks[i];
    }
    for (i = 0; i < 32; i++)
        if ((same ^ any) >> i & 1) shift = i + 1;
    for (mask = shift < 32 ? 0xffffffffu << shift : 0, prefix = any & mask; mask != 0xffffffffu;) {
        uint32_t bin = RKVI_RADIX - 1;
        shift = shift > RKVI_RADIX_BITS ? shift - RKVI_RADIX_BITS : 0;
        memset(histogram, 0, RKVI_RADIX * sizeof *histogram);
        for (i = 0; i < n; i++)
            if ((ranks[i] & mask) == prefix) histogram[ranks[i] >> shift & (RKVI_RADIX - 1)]++;
        for (; histogram[bin] < n_keep; bin--) n_keep -= histogram[bin];
        mask = 0xffffffffu << shift;
        prefix |= bin << shift;
        if (histogram[bin] == n_keep && prefix > 0) { /* keep all ranks above prefix - 1 */
            *n_ties = 0;
            return prefix - 1;
        }
    }
    *n_ties = n_keep;
    return prefix;
}

/* The rows [0, n) sorted by x, ascending; of two equal ones the more recent comes later. Radix sort
 * from the lowest digit, which keeps the order of equals. */
static const int *rkvi_sort_rows(const float *x, int n, rkvi_scratch *s)
{
    int *from = s->order, *to = s->order + rkvi_padded((size_t)n), *other, shift, i;
    for (i = 0; i < n; i++) {
        s->ranks[i] = rkvi_rank(x[i]);
        from[i] = i;
    }
    for (shift = 0; shift < 32; shift += RKVI_RADIX_BITS) {
        int32_t before = 0;
        memset(s->slots, 0, RKVI_RADIX * sizeof *s->slots);
        for (i = 0; i < n; i++) s->slots[s->ranks[i] >> shift & (RKVI_RADIX - 1)]++;
        if (s->slots[s->ranks[0] >> shift & (RKVI_RADIX - 1)] == n) continue; /* all digits equal */
        for (i = 0; i < RKVI_RADIX; i++) {
            int32_t count = s->slots[i];
            s->slots[i] = before;
            before += count;
        }
        for (i = 0; i < n; i++)
            to[s->slots[s->ranks[from[i]] >> shift & (RKVI_RADIX - 1)]++] = from[i];
        other = from;
        from = to;
        to = other;
    }
    return from;
}

/* The rank of candidates that rkv_layer.pins names: above every score. */
#define RKVI_PINNED_RANK 0xffffffffu

/* Keeps the pinned tokens, the best candidates and the protected tokens. pins: NULL, or a byte per
 * row; fewer candidates are pinned than can be kept. */
static void rkvi_choose(const rkv_config *config, const float *scores, const uint8_t *pins,
                        int n_tokens, rkvi_scratch *s, int32_t *kept)
{
    const int first = config->pinned, end = n_tokens - config->protect;
    const int n_keep = config->budget - config->protect - config->pinned;
    int i, n_ties, at = first + n_keep;
    uint32_t cut;
    for (i = 0; i < first; i++) kept[i] = i;
    for (i = 0; i < config->protect; i++) kept[at + i] = end + i;
    if (n_keep == 0) return;
    for (i = first; i < end; i++)
        s->ranks[i] = pins && pins[i] ? RKVI_PINNED_RANK : rkvi_rank(scores[i]);
    cut = rkvi_cut(s->ranks + first, end - first, n_keep, s->slots, &n_ties);
    for (i = end - 1; at > first; i--) { /* from the newest: it wins a tie */
        kept[at - 1] = i;
        at -= s->ranks[i] > cut || (s->ranks[i] == cut && n_ties-- > 0);
    }
}

/* ==== 18. Compaction ========================================================================
 * In: kept lists, ascending.  Out: the kept rows at the front, in cache order. In place. Every list
 * has been checked, so nothing here can fail half way. */

/* A row is one piece, or, in a transposed view, dim pieces of one element. */
typedef struct rkvi_pieces {
    int n;
    size_t bytes;
} rkvi_pieces;

static rkvi_pieces rkvi_pieces_of(const rkvi_view *view)
{
    rkvi_pieces pieces = { 1, 0 };
    pieces.bytes = view->n_elements * view->element;
    if (view->dim_stride == view->element) return pieces;
    pieces.n = (int)view->n_elements;
    pieces.bytes = view->element;
    return pieces;
}

/* How many of the rows kept[from ...] are adjacent. */
static int rkvi_run_length(const int32_t *kept, int from, int n_kept)
{
    int n = 1;
    while (from + n < n_kept && kept[from + n] == kept[from] + n) n++;
    return n;
}

/* Every row moves down or not at all, so going front to back loses nothing. */
static void rkvi_move_rows(const rkvi_view *view, int head, const int32_t *kept, int pinned,
                           int n_kept)
{
    rkvi_pieces pieces = rkvi_pieces_of(view);
    int adjacent = !view->table && view->token_stride == pieces.bytes;
    int piece, dst, i, n;
    for (piece = 0; piece < pieces.n; piece++) {
        size_t at = (size_t)piece * view->dim_stride;
        for (dst = pinned; dst < n_kept; dst += n) {
            n = rkvi_run_length(kept, dst, n_kept);
            if (kept[dst] == dst) continue;
            if (adjacent) {
                memmove(rkvi_row(view, head, dst) + at, rkvi_row(view, head, kept[dst]) + at,
                        (size_t)n * pieces.bytes);
                continue;
            }
            for (i = 0; i < n; i++)
                memcpy(rkvi_row(view, head, dst + i) + at, rkvi_row(view, head, kept[dst + i]) + at,
                       pieces.bytes);
        }
    }
}

/* ==== 19. CPU backends ======================================================================
 * In: checked arguments.  Out: rkv_backend, for each table of kernels. Spreads the (layer, KV head)
 * pairs over the caller's threads. Checks what needs the caller's data (block tables, lists, pins)
 * before the first byte is written. */

/* A phase does something for every item (KV head or set) of every layer that loses rows. */
typedef void (*rkvi_item)(const rkvi_job *job, rkvi_scratch *s, int layer, int index);
typedef enum rkvi_per { RKVI_HEADS, RKVI_SETS, RKVI_OWNERS } rkvi_per;
typedef struct rkvi_phase {
    const rkvi_job *job;
    rkvi_item item;
    rkvi_per per;
} rkvi_phase;

static int rkvi_n_items(const rkvi_phase *phase, const rkvi_plan *plan)
{
    if (plan->n_tokens == plan->n_kept) return 0;
    return phase->per == RKVI_HEADS  ? plan->kv_heads
           : phase->per == RKVI_SETS ? plan->sets
                                     : plan->sets > 0;
}

/* Worker w takes items w, w + n_workers, ...: neighbours cost alike, so the shares are even. */
static void rkvi_work(void *arg, int worker)
{
    const rkvi_phase *phase = (const rkvi_phase *)arg;
    const rkvi_job *job = phase->job;
    int l, i, turn = 0;
    for (l = 0; l < job->n_layers; l++) {
        int n_items = rkvi_n_items(phase, &job->plans[l]);
        for (i = 0; i < n_items; i++) {
            if (turn == worker) phase->item(job, &job->scratches[worker], l, i);
            if (++turn == job->n_workers) turn = 0;
        }
    }
}

/* rkvi_work on a thread that the caller lends. */
static void rkvi_task(void *arg, int worker)
{
    const rkvi_float_mode saved = rkvi_enter_float_mode();
    rkvi_work(arg, worker);
    rkvi_leave_float_mode(saved);
}

static void rkvi_run(const rkvi_job *job, rkvi_item item, rkvi_per per)
{
    rkvi_phase phase;
    phase.job = job;
    phase.item = item;
    phase.per = per;
    if (job->n_workers == 1)
        rkvi_work(&phase, 0);
    else
        job->config->parallel_for(job->config->pool_handle, job->n_workers, rkvi_task, &phase);
}

/* Entries per set of positions and pins, and per plane of state and bias. */
static size_t rkvi_row_stride(const rkv_layer *layer)
{
    return (size_t)(layer->row_stride > 0 ? layer->row_stride : layer->keys.tokens);
}

/* The positions of this head's rows, which the owner of its set has, or NULL. */
static const int32_t *rkvi_positions_of(const rkvi_job *job, int l, int head)
{
    const rkv_layer *owner = &job->layers[job->plans[l].owner];
    size_t set = job->config->scope == RKV_PER_HEAD ? (size_t)head : 0;
    return owner->positions ? owner->positions + set * rkvi_row_stride(owner) : NULL;
}

static rkvi_head rkvi_head_of(const rkvi_job *job, rkvi_scratch *s, int l, int index)
{
    const rkvi_plan *plan = &job->plans[l];
    const rkv_config *config = job->config;
    rkvi_head h;
    h.kernels = job->kernels;
    h.config = config;
    h.layer = &job->layers[l];
    h.plan = plan;
    h.keys = &plan->keys;
    h.queries = &plan->queries;
    h.positions = rkvi_positions_of(job, l, index);
    h.layer_index = l;
    h.index = index;
    h.group = plan->group;
    h.n_tokens = plan->n_tokens;
    h.n_candidates = plan->n_tokens - config->window;
    h.n_span = config->variant == RKV_PUBLISHED ? h.n_tokens : h.n_candidates;
    h.votes = rkvi_has_state(config) ? rkvi_min(config->votes, h.layer->n_new) : config->votes;
    h.n_queries = rkvi_reads_queries(config) ? plan->group * h.votes : 0;
    h.wants_redundancy = config->policy == RKV_POLICY_RKV && config->lambda < 1;
    h.n_spare = h.wants_redundancy ? rkvi_min(rkvi_spare_vectors(h.n_queries), h.n_span) : 0;
    h.n_newest = h.n_spare ? h.n_spare : rkvi_min(RKVI_NEWEST, h.n_span);
    h.scale = plan->scale;
    h.softcap = config->policy == RKV_POLICY_TRIATTENTION ? 0 : h.layer->softcap;
    h.dim = rkvi_row_floats(config, h.layer);
    h.scores = plan->scores + (size_t)index * plan->score_stride;
    h.missing = &s->missing;
    return h;
}

static void rkvi_score_item(const rkvi_job *job, rkvi_scratch *s, int l, int index)
{
    rkvi_head h;
    if (!job->plans[l].scored || s->error.status != RKV_OK) return;
    h = rkvi_head_of(job, s, l, index);
    if (rkvi_score_head(&h, s) != RKV_OK) s->error.layer = l;
}

/* For each set: the sum over its layers of the mean over their heads. */
static void rkvi_share_item(const rkvi_job *job, rkvi_scratch *s, int l, int index)
{
    rkvi_plan *plan = &job->plans[l];
    size_t n = plan->score_stride;
    int member, head;
    (void)index;
    (void)s;
    if (!plan->scored) return;
    memset(plan->shared, 0, n * sizeof *plan->shared);
    for (member = l; member < job->n_layers && job->plans[member].owner == l; member++) {
        const rkvi_plan *from = &job->plans[member];
        const float share = 1.0f / (float)from->kv_heads;
        for (head = 0; head < from->kv_heads; head++)
            job->kernels->add_rows(plan->shared, from->scores + (size_t)head * n, n, &share, 1, n);
    }
}

static const uint8_t *rkvi_pins_of(const rkvi_job *job, int l, int set)
{
    const rkv_layer *layer = &job->layers[l];
    return layer->pins ? layer->pins + (size_t)set * rkvi_row_stride(layer) : NULL;
}

static void rkvi_select_item(const rkvi_job *job, rkvi_scratch *s, int l, int index)
{
    const rkvi_plan *plan = &job->plans[l];
    const float *scores = NULL;
    if (plan->scored)
        scores = job->config->scope == RKV_PER_HEAD
                     ? plan->scores + (size_t)index * plan->score_stride
                     : plan->shared;
    rkvi_choose(job->config, scores, rkvi_pins_of(job, l, index), plan->n_tokens, s,
                plan->kept + (size_t)index * (size_t)job->config->budget);
}

/* A per-row array of the caller's as a view of `sets` heads. */
static rkvi_view rkvi_array_view(const rkv_layer *layer, void *array, size_t element)
{
    rkvi_view view;
    memset(&view, 0, sizeof view);
    view.data = (unsigned char *)array;
    view.n_elements = 1;
    view.element = view.dim_stride = view.token_stride = element;
    view.head_stride = rkvi_row_stride(layer) * element;
    return view;
}

static void rkvi_compact_item(const rkvi_job *job, rkvi_scratch *s, int l, int index)
{
    const rkvi_plan *plan = &job->plans[l];
    const rkv_layer *layer = &job->layers[l];
    const int pinned = job->config->pinned, n_kept = plan->n_kept;
    int set = job->config->scope == RKV_PER_HEAD ? index : 0, plane;
    const int32_t *kept = job->plans[plan->owner].kept + (size_t)set * (size_t)job->config->budget;
    rkvi_view array;
    (void)s;
    rkvi_move_rows(&plan->keys, index, kept, pinned, n_kept);
    if (plan->values.data) rkvi_move_rows(&plan->values, index, kept, pinned, n_kept);
    if (layer->state) {
        array = rkvi_array_view(layer, layer->state, sizeof *layer->state);
        for (plane = 0; plane < plan->n_floats; plane++)
            rkvi_move_rows(&array, index * plan->n_floats + plane, kept, pinned, n_kept);
    }
    if (layer->bias) {
        array = rkvi_array_view(layer, layer->bias, sizeof *layer->bias);
        rkvi_move_rows(&array, index, kept, pinned, n_kept);
    }
    if (index >= plan->sets) return;
    if (layer->positions) {
        array = rkvi_array_view(layer, layer->positions, sizeof *layer->positions);
        rkvi_move_rows(&array, index, kept, pinned, n_kept);
    }
    if (layer->pins) {
        array = rkvi_array_view(layer, layer->pins, sizeof *layer->pins);
        rkvi_move_rows(&array, index, kept, pinned, n_kept);
    }
}

static void rkvi_copy_scores_out(const rkvi_job *job)
{
    int l, head;
    for (l = 0; l < job->n_layers; l++) {
        const rkvi_plan *plan = &job->plans[l];
        const rkv_layer *layer = &job->layers[l];
        size_t n = (size_t)(plan->n_tokens - job->config->window);
        if (!plan->scored) continue;
        for (head = 0; layer->scores && head < plan->kv_heads; head++)
            memcpy(layer->scores + (size_t)head * n,
                   plan->scores + (size_t)head * plan->score_stride, n * sizeof(float));
        if (layer->shared_scores && plan->sets && job->config->scope != RKV_PER_HEAD)
            memcpy(layer->shared_scores, plan->shared, n * sizeof(float));
    }
}

/* The state of rows that were scored becomes the caller's. Rows that nothing scored, because there
 * was nothing to choose, start at 0. */
static void rkvi_commit_state(const rkvi_job *job, int was_scored)
{
    int l, plane;
    for (l = 0; l < job->n_layers; l++) {
        const rkvi_plan *plan = &job->plans[l];
        rkv_layer *layer = &job->layers[l];
        const size_t stride = rkvi_row_stride(layer), n = (size_t)plan->n_tokens;
        const size_t fresh = (size_t)layer->n_new;
        if (plan->n_floats == 0 || plan->n_tokens == plan->n_kept) continue;
        if (was_scored && !plan->scored) continue;
        for (plane = 0; plane < plan->kv_heads * plan->n_floats; plane++) {
            float *state = layer->state + (size_t)plane * stride;
            if (was_scored)
                memcpy(state, plan->state + (size_t)plane * plan->score_stride, n * sizeof *state);
            else
                memset(state + (n - fresh), 0, fresh * sizeof *state);
        }
        layer->n_new = 0;
    }
}

/* Kept lists of layers that keep every row. */
static void rkvi_keep_all(const rkvi_job *job)
{
    int l, set, i;
    for (l = 0; l < job->n_layers; l++) {
        const rkvi_plan *plan = &job->plans[l];
        if (plan->n_tokens > plan->n_kept || !job->layers[l].kept) continue;
        for (set = 0; set < plan->sets; set++)
            for (i = 0; i < plan->n_kept; i++)
                plan->kept[(size_t)set * (size_t)job->config->budget + (size_t)i] = i;
    }
}

/* The first row of the first block that is negative or used twice; -1: there is none. `set` is an
 * open-addressed hash set of 2 n slots. */
static int rkvi_bad_block(const rkv_tensor *tensor, int n_tokens, int32_t *set)
{
    size_t n = rkvi_n_blocks(tensor, n_tokens), i, slot;
    for (i = 0; i < 2 * n; i++) set[i] = -1;
    for (i = 0; i < n; i++) {
        int32_t block = tensor->block_table[i];
        int row = (int)i * tensor->block_tokens;
        if (block < 0) return row;
        slot = (size_t)((uint32_t)block * 2654435761u) % (2 * n);
        for (; set[slot] >= 0; slot = slot + 1 < 2 * n ? slot + 1 : 0)
            if (set[slot] == block) return row;
        set[slot] = block;
    }
    return -1;
}

static rkv_status rkvi_check_blocks(const rkvi_job *job)
{
    int l, bad;
    for (l = 0; l < job->n_layers; l++) {
        const rkv_layer *layer = &job->layers[l];
        const char *rule = RKVI_RULE_KEY_BLOCKS;
        int n_tokens = job->plans[l].n_tokens;
        int32_t *set = job->scratches[0].blocks;
        if (n_tokens == job->plans[l].n_kept) continue;
        bad = rkvi_bad_block(&layer->keys, n_tokens, set);
        if (bad < 0 && layer->values.data) {
            rule = RKVI_RULE_VALUE_BLOCKS;
            bad = rkvi_bad_block(&layer->values, n_tokens, set);
        }
        if (bad < 0 && job->plans[l].scored && rkvi_reads_queries(job->config)) {
            rule = RKVI_RULE_QUERY_BLOCKS;
            bad = rkvi_bad_block(&layer->queries, job->config->votes, set);
        }
        if (bad >= 0) return rkvi_refuse(job->config, RKV_ERROR_ARGUMENT, rule, l, -1, bad);
    }
    return RKV_OK;
}

/* Refuses sets whose pins leave no candidate to choose. Where the config leaves none, no candidate
 * can be pinned. */
static rkv_status rkvi_check_pins(const rkvi_job *job)
{
    const rkv_config *config = job->config;
    const int n_keep = config->budget - config->protect - config->pinned;
    const int most = n_keep > 0 ? n_keep - 1 : 0;
    int l, set, i;
    for (l = 0; l < job->n_layers; l++) {
        const rkvi_plan *plan = &job->plans[l];
        if (plan->n_tokens == plan->n_kept || !job->layers[l].pins) continue;
        for (set = 0; set < plan->sets; set++) {
            const uint8_t *pins = rkvi_pins_of(job, l, set);
            int n_pins = 0;
            for (i = config->pinned; i < plan->n_tokens - config->protect; i++)
                n_pins += pins[i] != 0;
            if (n_pins > most)
                return rkvi_refuse(config, RKV_ERROR_ARGUMENT, RKVI_RULE_PINS, l, set, -1);
        }
    }
    return RKV_OK;
}

/* The rule that a kept list breaks, or NULL; *at gets the entry, or the row, at fault. */
static const char *rkvi_list_rule(const rkv_config *config, const int32_t *kept, int n_kept,
                                  int n_tokens, const uint8_t *pins, int *at)
{
    int i, row = 0;
    for (i = 0; i < n_kept; i++) {
        *at = i;
        if (kept[i] < 0 || kept[i] >= n_tokens) return RKVI_RULE_KEPT_RANGE;
        if (i > 0 && kept[i] <= kept[i - 1]) return RKVI_RULE_KEPT_ORDER;
        if (i < config->pinned && kept[i] != i) return RKVI_RULE_KEPT_PINNED;
    }
    for (i = 0; pins && row < n_tokens; row++) {
        *at = row;
        if (i < n_kept && kept[i] == row)
            i++;
        else if (pins[row])
            return RKVI_RULE_KEPT_PINS;
    }
    return NULL;
}

/* Lists given to rkv_compact: n_kept rows, not necessarily those that rkv_select chose. */
static rkv_status rkvi_check_lists(const rkvi_job *job)
{
    const rkv_config *config = job->config;
    int l, set, at;
    for (l = 0; l < job->n_layers; l++) {
        rkvi_plan *plan = &job->plans[l];
        if (plan->n_tokens == plan->n_kept) continue;
        plan->n_kept = job->layers[plan->owner].n_kept;
        for (set = 0; set < plan->sets; set++) {
            const int32_t *kept = plan->kept + (size_t)set * (size_t)config->budget;
            const char *rule = rkvi_list_rule(config, kept, plan->n_kept, plan->n_tokens,
                                              rkvi_pins_of(job, l, set), &at);
            if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, l, set, at);
        }
    }
    return RKV_OK;
}

/* Scores given to rkv_select: copied into the plan, refused when one is NaN. */
static rkv_status rkvi_take_scores(const rkvi_job *job)
{
    int l, shared = job->config->scope != RKV_PER_HEAD;
    size_t i, n;
    for (l = 0; l < job->n_layers; l++) {
        const rkvi_plan *plan = &job->plans[l];
        const float *from = shared ? job->layers[l].shared_scores : job->layers[l].scores;
        int set;
        n = (size_t)(plan->n_tokens - job->config->window);
        for (set = 0; plan->scored && set < plan->sets; set++, from += n) {
            float *to = shared ? plan->shared : plan->scores + (size_t)set * plan->score_stride;
            for (i = 0; i < n; i++)
                if (from[i] != from[i])
                    return rkvi_refuse(job->config, RKV_ERROR_NONFINITE, RKVI_RULE_SCORE, l, set,
                                       (int)i);
            memcpy(to, from, n * sizeof *to);
        }
    }
    return RKV_OK;
}

/* The earliest error that any worker met. Workers take their items in ascending order, so it is the
 * same one for any number of threads. */
static rkv_status rkvi_first_error(const rkvi_job *job)
{
    const rkvi_scratch *first = NULL;
    int w;
    for (w = 0; w < job->n_workers; w++) {
        const rkvi_scratch *s = &job->scratches[w];
        if (s->error.status == RKV_OK) continue;
        if (!first || s->error.layer < first->error.layer ||
            (s->error.layer == first->error.layer && s->error_kv_head < first->error_kv_head))
            first = s;
    }
    if (!first) return RKV_OK;
    return rkvi_refuse(job->config, RKV_ERROR_NONFINITE, first->error.rule, first->error.layer,
                       first->error.head, first->error.token);
}

static rkv_status rkvi_cpu_workspace_size(const rkv_backend *self, const rkv_config *config,
                                          const rkv_layer *layers, int n_layers, size_t *bytes)
{
    rkvi_arena arena = { NULL, 0, 0 };
    (void)self;
    rkvi_carve(&arena, config, layers, n_layers, NULL);
    if (arena.overflow || arena.used > PTRDIFF_MAX - RKVI_ALIGN)
        return rkvi_refuse(config, RKV_ERROR_ARGUMENT, RKVI_RULE_TOO_LARGE, -1, -1, -1);
    *bytes = arena.used + RKVI_ALIGN;
    return RKV_OK;
}

/* Lays the job out in the workspace. */
static rkv_status rkvi_open_job(rkvi_job *job, const rkv_backend *self, const rkv_call *call)
{
    rkvi_arena arena = { NULL, 0, 0 };
    size_t needed = 0;
    rkv_status status =
        rkvi_cpu_workspace_size(self, call->config, call->layers, call->n_layers, &needed);
    int w, l;
    if (status != RKV_OK) return status;
    if (!call->workspace)
        return rkvi_refuse(call->config, RKV_ERROR_WORKSPACE, RKVI_RULE_WORKSPACE_NULL, -1, -1, -1);
    if (call->bytes < needed)
        return rkvi_refuse(call->config, RKV_ERROR_WORKSPACE, RKVI_RULE_WORKSPACE_SIZE, -1, -1, -1);
    arena.base = (unsigned char *)call->workspace +
                 (RKVI_ALIGN - (uintptr_t)call->workspace % RKVI_ALIGN) % RKVI_ALIGN;
    job->kernels = (const rkvi_kernels *)self->context;
    job->config = call->config;
    job->layers = call->layers;
    job->n_layers = call->n_layers;
    rkvi_carve(&arena, call->config, call->layers, call->n_layers, job);
    for (w = 0; w < job->n_workers; w++) job->scratches[w].error = rkvi_no_error;
    for (l = 0; l < job->n_layers; l++) {
        rkvi_plan *plan = &job->plans[l];
        const rkv_layer *layer = &call->layers[l];
        int bad = rkvi_fill_turns(&layer->rope, layer->keys.dim, plan->turn_words, &plan->turns);
        if (bad >= 0)
            return rkvi_refuse(call->config, RKV_ERROR_ARGUMENT, RKVI_RULE_FREQUENCY, l, -1, bad);
        if (plan->ahead) rkvi_fill_ahead(&plan->turns, plan->ahead);
    }
    return RKV_OK;
}

static rkv_status rkvi_run_score(const rkvi_job *job)
{
    rkv_status status = rkvi_check_blocks(job);
    if (status != RKV_OK) return status;
    rkvi_run(job, rkvi_score_item, RKVI_HEADS);
    status = rkvi_first_error(job);
    if (status != RKV_OK) return status;
    if (job->config->scope != RKV_PER_HEAD) rkvi_run(job, rkvi_share_item, RKVI_OWNERS);
    rkvi_copy_scores_out(job);
    rkvi_commit_state(job, 1);
    return RKV_OK;
}

static void rkvi_run_select(const rkvi_job *job)
{
    int l;
    rkvi_keep_all(job);
    rkvi_run(job, rkvi_select_item, RKVI_SETS);
    for (l = 0; l < job->n_layers; l++) job->layers[l].n_kept = job->plans[l].n_kept;
}

static void rkvi_run_compact(const rkvi_job *job)
{
    int l;
    rkvi_commit_state(job, 0);
    rkvi_run(job, rkvi_compact_item, RKVI_HEADS);
    for (l = 0; l < job->n_layers; l++)
        job->layers[l].n_kept = job->layers[l].n_tokens = job->plans[l].n_kept;
}

/* Every check comes before the first write to a caller's buffer. */
static rkv_status rkvi_cpu_run(const rkv_backend *self, const rkv_call *call)
{
    rkvi_job job;
    rkv_status status = rkvi_open_job(&job, self, call);
    if (status != RKV_OK) return status;
    switch (call->stage) {
    case RKV_SCORE: return rkvi_run_score(&job);
    case RKV_SELECT:
        status = rkvi_check_pins(&job);
        if (status == RKV_OK) status = rkvi_take_scores(&job);
        if (status == RKV_OK) rkvi_run_select(&job);
        return status;
    case RKV_COMPACT:
        status = rkvi_check_blocks(&job);
        if (status == RKV_OK) status = rkvi_check_lists(&job);
        if (status == RKV_OK) rkvi_run_compact(&job);
        return status;
    case RKV_COMPRESS:
        status = rkvi_check_pins(&job);
        if (status == RKV_OK) status = rkvi_run_score(&job);
        if (status != RKV_OK) return status;
        rkvi_run_select(&job);
        rkvi_run_compact(&job);
        return RKV_OK;
    }
    return RKV_ERROR_UNSUPPORTED;
}

#ifndef RKV_NO_CACHE
static void *rkvi_cpu_alloc(const rkv_backend *self, size_t bytes)
{
    (void)self;
    return malloc(bytes ? bytes : 1);
}

static void rkvi_cpu_free(const rkv_backend *self, void *memory)
{
    (void)self;
    free(memory);
}
#endif

static rkv_status rkvi_cpu_copy(const rkv_backend *self, void *dst, const void *src, size_t bytes)
{
    (void)self;
    if (bytes) memcpy(dst, src, bytes);
    return RKV_OK;
}

static rkv_status rkvi_cpu_copy_rows(const rkv_backend *self, const rkv_tensor *dst, int dst_token,
                                     const rkv_tensor *src, int src_token, int n_tokens)
{
    rkvi_view to = rkvi_view_of(dst), from = rkvi_view_of(src);
    rkvi_pieces pieces = rkvi_pieces_of(&to);
    int head, token, piece;
    (void)self;
    for (token = src_token; from.table && token < src->tokens; token++)
        if (from.table[token / from.block_tokens] < 0) return RKV_ERROR_ARGUMENT;
    if (from.dim_stride != from.element) pieces = rkvi_pieces_of(&from);
    for (head = 0; head < dst->heads; head++)
        for (token = 0; token < n_tokens; token++) {
            unsigned char *to_row = rkvi_row(&to, head, dst_token + token);
            const unsigned char *from_row = rkvi_row(&from, head, src_token + token);
            for (piece = 0; piece < pieces.n; piece++)
                memcpy(to_row + (size_t)piece * to.dim_stride,
                       from_row + (size_t)piece * from.dim_stride, pieces.bytes);
        }
    return RKV_OK;
}

static rkv_status rkvi_cpu_fill_positions(const rkv_backend *self, int32_t *positions, int n_sets,
                                          int stride, int row, int first, int n)
{
    int set, i;
    (void)self;
    for (set = 0; set < n_sets; set++)
        for (i = 0; i < n; i++)
            positions[(size_t)set * (size_t)stride + (size_t)(row + i)] = first + i;
    return RKV_OK;
}

static rkv_status rkvi_cpu_synchronize(const rkv_backend *self)
{
    (void)self;
    return RKV_OK;
}

/* One query as f32, in the room behind the means; 0 if the row loader does not give it, or it is
 * not finite. */
static int rkvi_load_query(const rkvi_kernels *k, const rkv_means_call *call, int head, int slot,
                           float *row)
{
    const size_t padded = rkvi_round_up((size_t)call->queries->dim, RKVI_LANES);
    rkvi_view view = rkvi_view_of(call->queries);
    rkvi_dot_rows dots;
    float square = 0;
    memset(row, 0, padded * sizeof *row);
    if (view.dtype == RKV_OPAQUE) {
        rkv_rows rows;
        memset(&rows, 0, sizeof rows);
        rows.data = rkvi_row(&view, head, slot);
        rows.head = head;
        rows.token = slot;
        rows.n_rows = 1;
        rows.dim = view.dim;
        if (view.load(view.load_user, &rows, row) != 1) return 0;
    } else
        rkvi_load(k, view.dtype, row, rkvi_row(&view, head, slot), (size_t)view.dim);
    memset(&dots, 0, sizeof dots);
    dots.rows = row;
    dots.dim = padded;
    dots.n_rows = 1;
    dots.out[0] = &square;
    k->dot_rows(&dots);
    return square <= RKVI_MAX_SQUARE;
}

/* Looks at all queries before the first mean changes. */
static rkv_status rkvi_cpu_update_means(const rkv_backend *self, const rkv_means_call *call)
{
    const rkvi_kernels *k = (const rkvi_kernels *)self->context;
    const int dim = call->queries->dim, heads = call->queries->heads;
    const size_t padded = rkvi_round_up((size_t)dim, RKVI_LANES);
    float *count = call->means + rkvi_count_at(heads, dim), *row = count + 1;
    float *back = row + padded, *lengths = back + padded;
    rkvi_turns turns;
    int i, h;
    /* Floats and words are of the same size and alignment, and nothing else uses this room. */
    int bad = rkvi_fill_turns(&call->rope, dim, (uint32_t *)(void *)(lengths + padded), &turns);
    if (bad >= 0)
        return rkvi_refuse(call->config, RKV_ERROR_ARGUMENT, RKVI_RULE_FREQUENCY, -1, -1, bad);
    for (i = 0; i < call->n; i++)
        for (h = 0; h < heads; h++)
            if (!rkvi_load_query(k, call, h, call->slot + i, row))
                return rkvi_refuse(call->config, RKV_ERROR_NONFINITE, RKVI_RULE_QUERY, -1, h,
                                   call->slot + i);
    for (i = 0; i < call->n; i++) {
        *count += 1;
        for (h = 0; h < heads; h++) {
            (void)rkvi_load_query(k, call, h, call->slot + i, row);
            memcpy(back, row, padded * sizeof *back);
            if (turns.n_pairs) k->unrotate(back, row, &turns, (uint32_t)(call->position + i));
            k->pair_lengths(lengths, row, &turns);
            rkvi_update_mean(call->means + (size_t)h * (size_t)dim, back, dim, 1.0f / *count);
            rkvi_update_mean(call->means + rkvi_lengths_at(heads, h, dim), lengths, turns.n_pairs,
                             1.0f / *count);
        }
    }
    return RKV_OK;
}

#ifdef RKV_NO_CACHE
#define RKVI_CPU_ALLOC NULL, NULL
#else
#define RKVI_CPU_ALLOC rkvi_cpu_alloc, rkvi_cpu_free
#endif
#define RKVI_CPU_BACKEND(name, kernels)                                                         \
    {                                                                                           \
        name, &(kernels), rkvi_cpu_workspace_size, rkvi_cpu_run, RKVI_CPU_ALLOC, rkvi_cpu_copy, \
            rkvi_cpu_copy_rows, rkvi_cpu_fill_positions, rkvi_cpu_synchronize,                  \
            rkvi_cpu_update_means                                                               \
    }

static const rkv_backend rkvi_cpu_backends[] = {
    /* worst first */
    RKVI_CPU_BACKEND("scalar", rkvi_kernels_scalar),
#ifdef RKVI_NEON
    RKVI_CPU_BACKEND("neon", rkvi_kernels_neon),
#endif
#if defined(RKVI_X86) && !defined(RKV_NO_AVX2)
    RKVI_CPU_BACKEND("avx2", rkvi_kernels_avx2),
#endif
#if defined(RKVI_X86) && !defined(RKV_NO_AVX512)
    RKVI_CPU_BACKEND("avx512", rkvi_kernels_avx512),
#endif
};
#define RKVI_N_CPU_BACKENDS ((int)(sizeof rkvi_cpu_backends / sizeof *rkvi_cpu_backends))

/* The globals of this file: the registry, and which CPU path is the best, once that is known. */
#define RKVI_MAX_REGISTERED 16
static const rkv_backend *rkvi_registered[RKVI_MAX_REGISTERED];
static const rkv_backend *rkvi_best_cpu;

static int rkvi_cpu_is_usable(int i)
{
    return ((const rkvi_kernels *)rkvi_cpu_backends[i].context)->usable();
}

/* Asking the CPU takes up to 50 us in a virtual machine: once. Threads that ask at the same time
 * store the same answer. */
static const rkv_backend *rkvi_best(void)
{
    const rkv_backend *best = RKVI_ATOMIC_LOAD(&rkvi_best_cpu);
    int i = RKVI_N_CPU_BACKENDS - 1;
    if (best) return best;
    while (!rkvi_cpu_is_usable(i)) i--; /* "scalar", the first, always is */
    RKVI_ATOMIC_STORE(&rkvi_best_cpu, &rkvi_cpu_backends[i]);
    return &rkvi_cpu_backends[i];
}

RKV_API const rkv_backend *rkv_backend_find(const char *name)
{
    int i;
    if (!name) return rkvi_best();
    for (i = 0; i < RKVI_N_CPU_BACKENDS; i++)
        if (strcmp(name, rkvi_cpu_backends[i].name) == 0)
            return rkvi_cpu_is_usable(i) ? &rkvi_cpu_backends[i] : NULL;
    for (i = 0; i < RKVI_MAX_REGISTERED && rkvi_registered[i]; i++)
        if (strcmp(name, rkvi_registered[i]->name) == 0) return rkvi_registered[i];
    return NULL;
}

/* The rule that a backend breaks, or NULL. */
static const char *rkvi_backend_rule(const rkv_backend *b)
{
    if (!b) return "backend: is NULL";
    if (!b->name || !b->name[0]) return "backend.name: must not be empty";
    if (!b->workspace_size) return "backend.workspace_size: is NULL";
    if (!b->run) return "backend.run: is NULL";
    return NULL;
}

RKV_API rkv_status rkv_backend_register(const rkv_backend *backend, rkv_error *error)
{
    const char *rule = rkvi_backend_rule(backend);
    int i;
    for (i = 0; !rule && i < RKVI_N_CPU_BACKENDS; i++)
        if (strcmp(backend->name, rkvi_cpu_backends[i].name) == 0)
            rule = "backend.name: is that of a built-in backend";
    if (rule) return rkvi_record(error, RKV_ERROR_ARGUMENT, rule, -1, -1, -1);
    for (i = 0; i < RKVI_MAX_REGISTERED; i++)
        if (!rkvi_registered[i] || strcmp(rkvi_registered[i]->name, backend->name) == 0) {
            rkvi_registered[i] = backend;
            return rkvi_record(error, RKV_OK, NULL, -1, -1, -1);
        }
    return rkvi_record(error, RKV_ERROR_MEMORY, "backend: 16 are registered already", -1, -1, -1);
}

/* ==== 20. Validation ========================================================================
 * In: whatever a caller passes.  Out: the rule that it breaks, as a text that names the field, or
 * NULL. Looks at the description only: backends check the data (texts in room 6). A function that
 * checks rules returns the text of the first that is broken, or NULL. */

static int rkvi_tail_of(const rkv_config *c)
{
    int window = c->window ? c->window : 8;
    return c->protect > window ? c->protect : window;
}

#define RKVI_DECAY 0.995f

static rkv_config rkvi_resolve(const rkv_config *given)
{
    rkv_config config = *given;
    if (config.window == 0) config.window = 8;
    if (config.pool == 0) config.pool = 7;
    if (config.recent == 0) config.recent = 1;
    if (config.votes == 0) config.votes = config.window;
    if (!(config.decay > 0)) config.decay = RKVI_DECAY;
    config.protect = rkvi_tail_of(given);
    if (config.n_threads < 1 || !config.parallel_for) config.n_threads = 1;
    return config;
}

static const char *rkvi_config_rule(const rkv_config *c)
{
    if (c->budget < 1) return "config.budget: must be at least 1";
    if (c->pinned < 0) return "config.pinned: must not be negative";
    if (c->n_threads < 0) return "config.n_threads: must not be negative";
    if (c->window < 0) return "config.window: must not be negative";
    if (c->protect < 0) return "config.protect: must not be negative";
    if (c->pool < 0) return "config.pool: must not be negative";
    if (c->recent < 0) return "config.recent: must not be negative";
    if (c->pinned > c->budget || rkvi_tail_of(c) > c->budget - c->pinned)
        return "config.budget: must hold pinned + window, or pinned + protect if that is more";
    if (!(c->lambda >= 0 && c->lambda <= 1)) return "config.lambda: must be in [0, 1]";
    if (!(c->threshold >= -1 && c->threshold <= 1)) return "config.threshold: must be in [-1, 1]";
    if ((unsigned)c->scope > RKV_PER_SEQUENCE) return "config.scope: no such scope";
    if ((unsigned)c->variant > RKV_PAPER) return "config.variant: no such variant";
    if ((unsigned)c->policy > RKV_POLICY_OWN_SCORE) return "config.policy: no such policy";
    if (c->votes < 0) return "config.votes: must not be negative";
    if (c->policy == RKV_POLICY_RKV && c->votes > c->budget)
        return "config.votes: must not be above budget (RKV_POLICY_RKV)";
    if (!(c->decay >= 0 && c->decay <= 1)) return "config.decay: must be in [0, 1]";
    return NULL;
}

/* *bytes grows by n - 1 steps of `stride`; 0 if that overflows. */
static int rkvi_add_steps(size_t *bytes, size_t n, size_t stride)
{
    size_t reach;
    return rkvi_mul_size(n - 1, stride, &reach) && rkvi_add_size(*bytes, reach, bytes) &&
           *bytes <= PTRDIFF_MAX;
}

/* One axis of a view: how many steps of how many elements. */
typedef struct rkvi_axis {
    size_t n, stride;
} rkvi_axis;

enum { RKVI_AXES = 4 };

/* The axes of a view from the tightest to the widest, without those of a single step. */
static int rkvi_axes_of(const rkv_tensor *t, const rkvi_view *view, rkvi_axis axes[RKVI_AXES])
{
    rkvi_axis all[RKVI_AXES];
    int i, at, n = 0;
    all[0].n = view->n_elements;
    all[0].stride = view->dim_stride;
    all[1].n = (size_t)(t->block_table ? t->block_tokens : t->tokens);
    all[1].stride = view->token_stride;
    all[2].n = (size_t)t->heads;
    all[2].stride = view->head_stride;
    all[3].n = t->block_table ? rkvi_n_blocks(t, t->tokens) : 1;
    all[3].stride = view->block_stride;
    for (i = 0; i < RKVI_AXES; i++) {
        if (all[i].n < 2) continue;
        for (at = n++; at > 0 && axes[at - 1].stride > all[i].stride; at--) axes[at] = axes[at - 1];
        axes[at] = all[i];
    }
    return n;
}

/* Strides nest if each is wider than all that lies below it: then no two rows share a byte. */
static int rkvi_rows_nest(const rkv_tensor *t)
{
    rkvi_view view = rkvi_view_in_elements(t);
    rkvi_axis axes[RKVI_AXES];
    size_t below = 1;
    int i, n = rkvi_axes_of(t, &view, axes);
    for (i = 0; i < n; i++) {
        if (axes[i].stride < below) return 0;
        if (!rkvi_add_steps(&below, axes[i].n, axes[i].stride)) return 0;
    }
    return 1;
}

static int rkvi_has_contiguous_size(const rkv_tensor *t)
{
    size_t n = rkvi_row_elements(t), rows = (size_t)(t->block_table ? t->block_tokens : t->tokens);
    return rkvi_mul_size(n, rows, &n) && rkvi_mul_size(n, (size_t)t->heads, &n) &&
           n <= PTRDIFF_MAX / 8;
}

/* Bytes that a view spans, 0 if they overflow. Paged: of as many blocks as the table has. */
static size_t rkvi_extent(const rkv_tensor *t)
{
    rkvi_view view = rkvi_view_in_elements(t);
    rkvi_axis axes[RKVI_AXES];
    size_t bytes = 1;
    int i, n = rkvi_axes_of(t, &view, axes);
    for (i = 0; i < n; i++)
        if (!rkvi_add_steps(&bytes, axes[i].n, axes[i].stride)) return 0;
    return rkvi_mul_size(bytes, view.element, &bytes) && bytes <= PTRDIFF_MAX ? bytes : 0;
}

/* The rules for one view: its own, then those that depend on what it is for. */
typedef enum rkvi_view_rule {
    RKVI_DATA,
    RKVI_DTYPE,
    RKVI_ELEMENT_BYTES,
    RKVI_ROW_BYTES,
    RKVI_LOADER,
    RKVI_SPLIT_DIM,
    RKVI_SPLIT_STRIDE,
    RKVI_HEADS_RANGE,
    RKVI_TOKENS_RANGE,
    RKVI_DIM,
    RKVI_HEAD_STRIDE,
    RKVI_TOKEN_STRIDE,
    RKVI_DIM_STRIDE,
    RKVI_BLOCK_STRIDE,
    RKVI_BLOCK_TOKENS,
    RKVI_SIZE,
    RKVI_NOT_READABLE,
    RKVI_NOT_THE_DTYPE,
    RKVI_NO_LOADER,
    RKVI_TOO_FEW_TOKENS,
    RKVI_OVERLAP,
    RKVI_OTHER_DTYPE,
    RKVI_OTHER_HEADS,
    RKVI_OTHER_DIM,
    RKVI_N_VIEW_RULES,
    RKVI_SOUND = RKVI_N_VIEW_RULES
} rkvi_view_rule;

#define RKVI_VIEW_RULES(view)                                                                 \
    {                                                                                         \
        view ": it or its data is NULL", view ".dtype: no such type",                         \
            view ".element_bytes: must not be negative",                                      \
            view ".element_bytes: must be the bytes of a row (RKV_OPAQUE)",                   \
            view ".load: is for RKV_OPAQUE only",                                             \
            view ".dim: must be a multiple of 32 (RKV_Q8_0)",                                 \
            view ": its strides must be multiples of 32 (RKV_Q8_0)",                          \
            view ".heads: must be at least 1", view ".tokens: must not be negative",          \
            view ".dim: must be at least 1",                                                  \
            view ".head_stride: negative, a broadcast, or above PTRDIFF_MAX",                 \
            view ".token_stride: negative, a broadcast, or above PTRDIFF_MAX",                \
            view ".dim_stride: negative, a broadcast, or above PTRDIFF_MAX",                  \
            view ".block_stride: negative, a broadcast, or above PTRDIFF_MAX",                \
            view ".block_tokens: must be at least 1 with a block table",                      \
            view ": its size overflows",                                                      \
            view ".dim_stride: must be 0 or 1, the elements of a row must be adjacent",       \
            view ".element_bytes: must be 0 or the dtype's",                                  \
            view ".load: RKV_OPAQUE needs a row loader", view ".tokens: fewer than n_tokens", \
            view ": rows overlap, a stride is too small", view ".dtype: not the cache's",     \
            view ".heads: not the cache's", view ".dim: not the cache's"                      \
    }
enum { RKVI_KEYS, RKVI_VALUES, RKVI_QUERIES, RKVI_APPENDED, RKVI_N_VIEWS = 2 * RKVI_APPENDED };
static const char *const rkvi_view_rules[RKVI_N_VIEWS][RKVI_N_VIEW_RULES] = {
    RKVI_VIEW_RULES("layer.keys"),    RKVI_VIEW_RULES("layer.values"),
    RKVI_VIEW_RULES("layer.queries"), RKVI_VIEW_RULES("keys"),
    RKVI_VIEW_RULES("values"),        RKVI_VIEW_RULES("queries")
};

static int rkvi_stride_is_sane(int64_t stride)
{
    return stride >= 0 && (uint64_t)stride <= PTRDIFF_MAX;
}

static int rkvi_has_own_elements(const rkv_tensor *t)
{
    return t->element_bytes == 0 || (size_t)t->element_bytes == rkvi_dtype_bytes(t->dtype);
}

/* What holds for keys, values and queries alike. */
static rkvi_view_rule rkvi_tensor_rule(const rkv_tensor *t)
{
    if ((unsigned)t->dtype > RKV_Q8_0) return RKVI_DTYPE;
    if (t->element_bytes < 0) return RKVI_ELEMENT_BYTES;
    if (t->dtype == RKV_OPAQUE && t->element_bytes == 0) return RKVI_ROW_BYTES;
    if (t->dtype != RKV_OPAQUE && t->load) return RKVI_LOADER;
    if (t->heads < 1) return RKVI_HEADS_RANGE;
    if (t->tokens < 0) return RKVI_TOKENS_RANGE;
    if (t->dim < 1) return RKVI_DIM;
    if (!rkvi_stride_is_sane(t->head_stride)) return RKVI_HEAD_STRIDE;
    if (!rkvi_stride_is_sane(t->token_stride)) return RKVI_TOKEN_STRIDE;
    if (!rkvi_stride_is_sane(t->dim_stride)) return RKVI_DIM_STRIDE;
    if (!rkvi_stride_is_sane(t->block_stride)) return RKVI_BLOCK_STRIDE;
    if ((t->dtype == RKV_OPAQUE || t->dtype == RKV_Q8_0) && t->dim_stride > 1)
        return RKVI_NOT_READABLE;
    if (t->dtype == RKV_Q8_0) {
        if (t->dim % RKVI_Q8_0_DIMS != 0) return RKVI_SPLIT_DIM;
        if (t->token_stride % RKVI_Q8_0_DIMS != 0 || t->head_stride % RKVI_Q8_0_DIMS != 0 ||
            t->block_stride % RKVI_Q8_0_DIMS != 0)
            return RKVI_SPLIT_STRIDE;
        if (!rkvi_has_own_elements(t)) return RKVI_NOT_THE_DTYPE;
    }
    if (t->block_table && t->block_tokens < 1) return RKVI_BLOCK_TOKENS;
    if (!rkvi_has_contiguous_size(t) || rkvi_extent(t) == 0) return RKVI_SIZE;
    return RKVI_SOUND;
}

/* What holds for a view whose numbers are read. */
static rkvi_view_rule rkvi_readable_rule(const rkv_tensor *t)
{
    rkvi_view_rule rule = rkvi_tensor_rule(t);
    if (rule != RKVI_SOUND) return rule;
    if (t->dim_stride > 1) return RKVI_NOT_READABLE;
    if (t->dtype == RKV_OPAQUE) return t->load ? RKVI_SOUND : RKVI_NO_LOADER;
    return rkvi_has_own_elements(t) ? RKVI_SOUND : RKVI_NOT_THE_DTYPE;
}

/* What holds for a view whose first n_tokens rows are moved. */
static rkvi_view_rule rkvi_movable_rule(const rkv_tensor *t, int n_tokens)
{
    if (t->tokens < n_tokens) return RKVI_TOO_FEW_TOKENS;
    return rkvi_rows_nest(t) ? RKVI_SOUND : RKVI_OVERLAP;
}

static const char *rkvi_keys_rule(const rkv_layer *layer)
{
    rkvi_view_rule rule = rkvi_readable_rule(&layer->keys);
    if (layer->n_tokens < 0) return "layer.n_tokens: must not be negative";
    if (layer->n_tokens > INT_MAX / 2) return "layer.n_tokens: must be below 2^30";
    if (rule == RKVI_SOUND) rule = rkvi_movable_rule(&layer->keys, layer->n_tokens);
    return rule == RKVI_SOUND ? NULL : rkvi_view_rules[RKVI_KEYS][rule];
}

static const char *rkvi_values_rule(const rkv_layer *layer)
{
    const rkv_tensor *values = &layer->values;
    rkvi_view_rule rule;
    if (!values->data && values->dim == 0) return NULL; /* no values */
    rule = rkvi_tensor_rule(values);
    if (rule == RKVI_SOUND) rule = rkvi_movable_rule(values, layer->n_tokens);
    if (rule != RKVI_SOUND) return rkvi_view_rules[RKVI_VALUES][rule];
    if (values->heads != layer->keys.heads) return "layer.values.heads: must equal keys.heads";
    return NULL;
}

static int rkvi_needs_queries(const rkv_config *config, const rkv_layer *layer)
{
    return rkvi_is_scored(config, layer->n_tokens) && rkvi_reads_queries(config);
}

static const char *rkvi_query_heads_rule(const rkv_layer *layer)
{
    const int heads = layer->queries.heads;
    return heads < 1 || heads % layer->keys.heads != 0
               ? "layer.queries.heads: must be a multiple of keys.heads"
               : NULL;
}

static const char *rkvi_queries_rule(const rkv_config *config, const rkv_layer *layer)
{
    const rkv_tensor *queries = &layer->queries;
    rkvi_view_rule rule = rkvi_readable_rule(queries);
    if (rule != RKVI_SOUND) return rkvi_view_rules[RKVI_QUERIES][rule];
    if (queries->dim != layer->keys.dim) return "layer.queries.dim: must equal keys.dim";
    if (rkvi_query_heads_rule(layer)) return rkvi_query_heads_rule(layer);
    if (queries->tokens != config->votes)
        return "layer.queries.tokens: must equal config.votes, or window if that is 0";
    if (layer->first_query < 0 || layer->first_query >= config->votes)
        return "layer.first_query: must be in [0, votes)";
    return NULL;
}

/* The rotary embedding of a view of rows of `dim` numbers. */
static const char *rkvi_rope_rule(const rkv_rope *rope, int dim)
{
    if ((unsigned)rope->pairing > RKV_ROPE_ADJACENT) return "rope.pairing: no such pairing";
    if (rope->pairing == RKV_ROPE_UNKNOWN)
        return "rope.pairing: is needed by this policy, also if it is RKV_ROPE_NONE";
    if (rope->dims < 0 || rope->dims % 2 != 0 || rope->dims > dim)
        return "rope.dims: must be even and not above head_dim";
    if (rope->dims == 0 && dim % 2 != 0 && rope->pairing != RKV_ROPE_NONE)
        return "rope.dims: must be given where head_dim is odd";
    if (!(rope->base >= 0 && rope->base <= FLT_MAX)) return "rope.base: must be positive, or 0";
    return NULL;
}

/* What policies beside R-KV need in a layer in which something is to be chosen. */
static const char *rkvi_policy_rule(const rkv_config *config, const rkv_layer *layer)
{
    const char *rule = NULL;
    if (rkvi_has_state(config) && layer->n_new < 0) return "layer.n_new: must not be negative";
    if (rkvi_has_state(config) && layer->n_new > layer->n_tokens)
        return "layer.n_new: more than n_tokens";
    if (!rkvi_is_scored(config, layer->n_tokens)) return NULL;
    if (rkvi_needs_rope(config)) rule = rkvi_rope_rule(&layer->rope, layer->keys.dim);
    if (!rule && config->policy == RKV_POLICY_TRIATTENTION) rule = rkvi_query_heads_rule(layer);
    return rule;
}

/* Positions are the owner's. */
static const char *rkvi_positions_rule(const rkv_config *config, const rkv_layer *layer,
                                       const rkv_layer *owner)
{
    const int turned = rkvi_needs_rope(config) && layer->rope.pairing != RKV_ROPE_NONE;
    if (!rkvi_is_scored(config, layer->n_tokens) || owner->positions) return NULL;
    return turned || config->policy == RKV_POLICY_RANDOM
               ? "layer.positions: this policy needs the true positions of rows"
               : NULL;
}

static const char *rkvi_layer_rule(const rkv_config *config, const rkv_layer *layer, int is_owner)
{
    const char *rule = rkvi_keys_rule(layer);
    if (!rule) rule = rkvi_values_rule(layer);
    if (!rule && rkvi_needs_queries(config, layer)) rule = rkvi_queries_rule(config, layer);
    if (!rule) rule = rkvi_policy_rule(config, layer);
    if (rule) return rule;
    if (!(layer->scale >= 0 && layer->scale <= 100)) return "layer.scale: must be in [0, 100]";
    if (!(layer->softcap >= 0 && layer->softcap <= 1e6f))
        return "layer.softcap: must be in [0, 1e6]";
    if ((layer->positions || layer->pins || layer->state || layer->bias) &&
        layer->row_stride != 0 && layer->row_stride < layer->n_tokens)
        return "layer.row_stride: must be 0 or at least n_tokens";
    if (is_owner) return NULL;
    if (layer->kept) return "layer.kept: only in the first layer of a sequence";
    if (layer->positions) return "layer.positions: only in the first layer of a sequence";
    if (layer->pins) return "layer.pins: only in the first layer of a sequence";
    if (layer->shared_scores) return "layer.shared_scores: only in the first layer of a sequence";
    return NULL;
}

/* A range of bytes that a call reads or writes. If a view spans it: that view, the stride of its
 * widest axis, and the bytes of one step of it. */
typedef struct rkvi_range {
    uintptr_t begin;
    size_t bytes;
    const rkv_tensor *view;
    size_t stride, step;
} rkvi_range;

static rkvi_range rkvi_range_of(const void *data, size_t bytes)
{
    rkvi_range range;
    memset(&range, 0, sizeof range);
    range.begin = (uintptr_t)data;
    range.bytes = data ? bytes : 0;
    return range;
}

/* The bytes of a view: from `begin`, n steps along each axis; strides in bytes, the widest last. */
typedef struct rkvi_grid {
    uintptr_t begin;
    size_t bytes; /* of the whole span */
    int n_axes;
    rkvi_axis axes[RKVI_AXES];
} rkvi_grid;

static rkvi_grid rkvi_grid_of(const rkvi_range *range)
{
    rkvi_view view = rkvi_view_in_elements(range->view);
    rkvi_grid grid;
    int i;
    grid.begin = range->begin;
    grid.bytes = range->bytes;
    grid.n_axes = rkvi_axes_of(range->view, &view, grid.axes);
    for (i = 0; i < grid.n_axes; i++) grid.axes[i].stride *= view.element;
    return grid;
}

/* Only its table knows where a paged view ends: an empty range, which overlaps nothing. */
static rkvi_range rkvi_range_of_view(const rkv_tensor *t)
{
    rkvi_range range = rkvi_range_of(t->block_table ? NULL : t->data, rkvi_extent(t));
    rkvi_grid grid;
    const rkvi_axis *widest;
    range.view = t;
    if (!range.bytes) return range;
    grid = rkvi_grid_of(&range);
    if (!grid.n_axes) return range;
    widest = &grid.axes[grid.n_axes - 1];
    range.stride = widest->stride;
    range.step = range.bytes - (widest->n - 1) * widest->stride;
    return range;
}

/* How far after a step of a the next step of b begins, for equal strides. */
static size_t rkvi_apart(uintptr_t a, uintptr_t b, size_t stride)
{
    size_t apart = b >= a ? b - a : a - b;
    if (apart >= stride) apart %= stride; /* rarely: divisions are slow */
    return b >= a || apart == 0 ? apart : stride - apart;
}

/* Two views that interleave (K and V of one buffer, say) overlap as ranges without sharing a byte.
 * Where their widest strides are equal it is enough to compare one step of b with the two steps of
 * a next to it: b begins `apart` bytes after the one and `stride - apart` before the other. */
static int rkvi_grids_overlap(rkvi_grid a, rkvi_grid b)
{
    size_t apart, stride;
    if (a.begin + a.bytes <= b.begin || b.begin + b.bytes <= a.begin) return 0;
    if (!a.n_axes || !b.n_axes) return 1;
    stride = a.axes[--a.n_axes].stride;
    if (stride != b.axes[--b.n_axes].stride) return 1;
    a.bytes -= (a.axes[a.n_axes].n - 1) * stride;
    b.bytes -= (b.axes[b.n_axes].n - 1) * stride;
    if (a.bytes > stride || b.bytes > stride) return 1; /* rows of queries may overlap */
    apart = rkvi_apart(a.begin, b.begin, stride);
    a.begin = stride;
    b.begin = stride + apart;
    if (rkvi_grids_overlap(a, b)) return 1;
    b.begin = apart;
    return rkvi_grids_overlap(a, b);
}

static int rkvi_ranges_overlap(const rkvi_range *a, const rkvi_range *b)
{
    if (!a->bytes || !b->bytes) return 0;
    if (a->begin + a->bytes <= b->begin || b->begin + b->bytes <= a->begin) return 0;
    if (!a->view || !b->view) return 1;
    if (a->stride && a->stride == b->stride) { /* [token][layer]: many pairs, decided quickly */
        size_t apart = rkvi_apart(a->begin, b->begin, a->stride);
        if (apart >= a->step && apart + b->step <= a->stride) return 0;
    }
    return rkvi_grids_overlap(rkvi_grid_of(a), rkvi_grid_of(b));
}

/* keys, values, kept, positions, scores, shared scores, pins, state, bias; what is only read:
 * queries, query means */
enum { RKVI_BUFFERS = 11, RKVI_BUFFER_QUERIES = 9, RKVI_BUFFER_MEANS = 10 };
typedef struct rkvi_buffers {
    rkvi_range of[RKVI_BUFFERS];
} rkvi_buffers;

static rkvi_buffers rkvi_buffers_of(const rkv_config *config, const rkv_layer *layer, int is_owner)
{
    size_t sets = (size_t)rkvi_sets(config, layer, is_owner);
    size_t n = layer->n_tokens > config->window ? (size_t)(layer->n_tokens - config->window) : 0;
    size_t stride = rkvi_row_stride(layer), floats;
    rkvi_buffers buffers;
    memset(&buffers, 0, sizeof buffers);
    buffers.of[0] = rkvi_range_of_view(&layer->keys);
    if (layer->values.data) buffers.of[1] = rkvi_range_of_view(&layer->values);
    buffers.of[2] = rkvi_range_of(layer->kept, sets * (size_t)config->budget * sizeof(int32_t));
    buffers.of[3] = rkvi_range_of(layer->positions, sets * stride * sizeof(int32_t));
    buffers.of[4] = rkvi_range_of(layer->scores, (size_t)layer->keys.heads * n * sizeof(float));
    buffers.of[5] = rkvi_range_of(layer->shared_scores, n * sizeof(float));
    buffers.of[6] = rkvi_range_of(layer->pins, sets * stride * sizeof *layer->pins);
    floats = (size_t)layer->keys.heads * stride * sizeof(float);
    buffers.of[7] = rkvi_range_of(layer->state, floats * (size_t)rkvi_state_floats(config));
    buffers.of[8] = rkvi_range_of(layer->bias, floats);
    if (rkvi_needs_queries(config, layer))
        buffers.of[RKVI_BUFFER_QUERIES] = rkvi_range_of_view(&layer->queries);
    if (config->policy == RKV_POLICY_TRIATTENTION)
        buffers.of[RKVI_BUFFER_MEANS] =
            rkvi_range_of(layer->query_means,
                          sizeof(float) * rkvi_count_at(layer->queries.heads, layer->keys.dim));
    return buffers;
}

/* Does anything of `mine` overlap one of the `n` layers of `others`? `hulls` are ranges around all
 * buffers of a kind in `others`, or more: what lies outside of them overlaps none. */
static int rkvi_overlaps_any(const rkvi_buffers *mine, const rkvi_buffers *others, int n,
                             const rkvi_buffers *hulls)
{
    int i, j, m;
    for (i = 0; i < RKVI_BUFFERS; i++) {
        for (j = 0; mine->of[i].bytes && j < RKVI_BUFFERS; j++) {
            if (i >= RKVI_BUFFER_QUERIES && j >= RKVI_BUFFER_QUERIES) continue;
            if (!rkvi_ranges_overlap(&mine->of[i], &hulls->of[j])) continue;
            for (m = 0; m < n; m++)
                if (rkvi_ranges_overlap(&mine->of[i], &others[m].of[j])) return 1;
        }
    }
    return 0;
}

static void rkvi_widen(rkvi_range *hull, const rkvi_range *by)
{
    uintptr_t begin = hull->begin, end = begin + hull->bytes;
    if (!by->bytes) return;
    if (!hull->bytes || by->begin < begin) begin = by->begin;
    if (by->begin + by->bytes > end) end = by->begin + by->bytes;
    hull->begin = begin;
    hull->bytes = end - begin;
}

#define RKVI_NEIGHBOURS 64

/* Every layer against itself and the 64 before it: all of one sequence's, at a cost linear in the
 * number of layers. Caches that lie in memory in layer order, as most do, lie outside of the hulls
 * of those before. */
static const char *rkvi_check_overlap(const rkv_config *config, const rkv_layer *layers,
                                      int n_layers, int *layer)
{
    rkvi_buffers recent[RKVI_NEIGHBOURS], hulls, mine;
    int l, i, j, owner = 0;
    memset(&hulls, 0, sizeof hulls);
    for (l = 0; l < n_layers; l++) {
        *layer = l;
        owner = rkvi_owner(config, layers, l, owner);
        mine = rkvi_buffers_of(config, &layers[l], owner == l);
        for (i = 0; i < RKVI_BUFFERS; i++)
            for (j = 0; mine.of[i].bytes && j < i; j++)
                if (rkvi_ranges_overlap(&mine.of[i], &mine.of[j]))
                    return "layer: two of its buffers overlap";
        if (rkvi_overlaps_any(&mine, recent, rkvi_min(l, RKVI_NEIGHBOURS), &hulls))
            return "layer: one of its buffers overlaps one of an earlier layer";
        recent[l % RKVI_NEIGHBOURS] = mine;
        for (i = 0; i < RKVI_BUFFERS; i++) rkvi_widen(&hulls.of[i], &mine.of[i]);
    }
    return NULL;
}

/* Rules for calls that read the data: rkv_workspace_size does not check them. */
static const char *rkvi_data_rule(const rkv_config *config, const rkv_layer *layers, int n_layers,
                                  int *layer)
{
    int l;
    for (l = 0; l < n_layers; l++) {
        *layer = l;
        if (!layers[l].keys.data) return rkvi_view_rules[RKVI_KEYS][RKVI_DATA];
        if (rkvi_needs_queries(config, &layers[l]) && !layers[l].queries.data)
            return rkvi_view_rules[RKVI_QUERIES][RKVI_DATA];
        if (rkvi_has_state(config) && layers[l].n_tokens > config->budget && !layers[l].state)
            return "layer.state: is NULL";
        if (config->policy == RKV_POLICY_TRIATTENTION &&
            rkvi_is_scored(config, layers[l].n_tokens) && !layers[l].query_means)
            return "layer.query_means: is NULL";
    }
    return rkvi_check_overlap(config, layers, n_layers, layer);
}

/* Does layer l, which opens a set, use the number of an earlier sequence? The layers of a sequence
 * must be adjacent. A number above the highest so far needs no search. */
static int rkvi_reopens(const rkv_config *config, const rkv_layer *layers, int l, int *highest)
{
    int i, sequence = layers[l].sequence;
    if (config->scope != RKV_PER_SEQUENCE) return 0;
    if (l == 0 || sequence > *highest) {
        *highest = sequence;
        return 0;
    }
    for (i = 0; i < l; i++)
        if (layers[i].sequence == sequence) return 1;
    return 0;
}

/* The rule that a config and its layers break; *layer gets the layer at fault, -1 for none. */
static const char *rkvi_validate(const rkv_config *given, const rkv_layer *layers, int n_layers,
                                 int with_data, int *layer)
{
    const char *rule;
    rkv_config config;
    int l, owner = 0, highest = 0;
    *layer = -1;
    if (n_layers < 0) return "n_layers: must not be negative";
    if (n_layers > 0 && !layers) return "layers: is NULL";
    rule = rkvi_config_rule(given);
    if (rule) return rule;
    config = rkvi_resolve(given);
    for (l = 0; l < n_layers; l++) {
        *layer = l;
        owner = rkvi_owner(&config, layers, l, owner);
        rule = rkvi_layer_rule(&config, &layers[l], owner == l);
        if (rule) return rule;
        rule = rkvi_positions_rule(&config, &layers[l], &layers[owner]);
        if (rule) return rule;
        if (layers[l].n_tokens != layers[owner].n_tokens)
            return "layer.n_tokens: must be equal in all layers of a sequence";
        if (owner == l && rkvi_reopens(&config, layers, l, &highest))
            return "layer.sequence: the layers of a sequence must be adjacent";
    }
    return with_data ? rkvi_data_rule(&config, layers, n_layers, layer) : NULL;
}

/* What one stage needs of one layer. */
static const char *rkvi_stage_rule(const rkv_config *config, const rkv_layer *layer, int is_owner,
                                   rkv_stage stage)
{
    const int scored = rkvi_is_scored(config, layer->n_tokens);
    const int shared = config->scope != RKV_PER_HEAD;
    if ((stage == RKV_SCORE || stage == RKV_COMPRESS) && scored && rkvi_has_state(config) &&
        layer->n_new < 1)
        return "layer.n_new: must be at least 1, the tokens since the last round";
    if ((stage == RKV_SCORE || stage == RKV_SELECT) && scored) {
        if (shared && is_owner && !layer->shared_scores) return "layer.shared_scores: is NULL";
        if (!shared && !layer->scores) return "layer.scores: is NULL";
    }
    if (!is_owner || (stage != RKV_SELECT && stage != RKV_COMPACT)) return NULL;
    if (!layer->kept) return "layer.kept: is NULL";
    if (stage == RKV_SELECT || layer->n_tokens <= config->budget) return NULL;
    if (layer->n_kept < 1) return "layer.n_kept: must be at least 1, the rows of the kept list";
    if (layer->n_kept > config->budget) return "layer.n_kept: more than config.budget";
    if (layer->n_kept < config->pinned) return "layer.n_kept: fewer than config.pinned";
    return NULL;
}

static int rkvi_workspace_overlaps(const rkv_config *config, const rkv_layer *layer, int is_owner,
                                   const rkv_call *call)
{
    const rkvi_range workspace = rkvi_range_of(call->workspace, call->bytes);
    const rkvi_buffers buffers = rkvi_buffers_of(config, layer, is_owner);
    int i;
    for (i = 0; i < RKVI_BUFFERS; i++)
        if (rkvi_ranges_overlap(&buffers.of[i], &workspace)) return 1;
    return 0;
}

/* The rules of one stage, for a description that is valid. */
static const char *rkvi_call_rule(const rkv_call *call, int *layer)
{
    int l, owner = 0;
    for (l = 0; l < call->n_layers; l++) {
        const char *rule;
        *layer = l;
        owner = rkvi_owner(call->config, call->layers, l, owner);
        rule = rkvi_stage_rule(call->config, &call->layers[l], owner == l, call->stage);
        if (rule) return rule;
        if (rkvi_workspace_overlaps(call->config, &call->layers[l], owner == l, call))
            return "workspace: overlaps a buffer of this layer";
    }
    return NULL;
}

/* ==== 21. Public functions ==================================================================
 * In: whatever a caller passes.  Out: checked arguments for a backend, or a status and a record of
 * what is wrong. */

/* text[*at ...] gets `part`, as far as it fits with the final zero. */
static void rkvi_put_text(char *text, size_t size, size_t *at, const char *part)
{
    for (; *part && *at + 1 < size; part++) text[(*at)++] = *part;
    if (size > 0) text[*at] = '\0';
}

/* "name number, ", unless the number does not apply. */
static void rkvi_put_place(char *text, size_t size, size_t *at, const char *name, int32_t number)
{
    char digits[12], *first = digits + sizeof digits - 1;
    if (number < 0) return;
    *first = '\0';
    do *--first = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    if (*at > 0) rkvi_put_text(text, size, at, ", ");
    rkvi_put_text(text, size, at, name);
    rkvi_put_text(text, size, at, first);
}

RKV_API const char *rkv_explain(const rkv_error *error, char *text, size_t size)
{
    size_t at = 0;
    if (!text || size == 0) return "";
    text[0] = '\0';
    if (!error) error = &rkvi_no_error;
    if (error->rule) { /* without one, as in a record that is all zeros, there is no place */
        rkvi_put_place(text, size, &at, "layer ", error->layer);
        rkvi_put_place(text, size, &at, "head ", error->head);
        rkvi_put_place(text, size, &at, "token ", error->token);
    }
    if (at > 0) rkvi_put_text(text, size, &at, ": ");
    rkvi_put_text(text, size, &at,
                  error->rule ? error->rule : rkv_status_string((rkv_status)error->status));
    return text;
}

RKV_API const char *rkv_status_string(rkv_status status)
{
    switch (status) {
    case RKV_OK: return "ok";
    case RKV_ERROR_NULL: return "config, cache or the pointer for the result is NULL";
    case RKV_ERROR_ARGUMENT: return "bad argument: rkv_explain says which";
    case RKV_ERROR_WORKSPACE: return "workspace missing or too small";
    case RKV_ERROR_NONFINITE: return "a key, query or score is not finite";
    case RKV_ERROR_UNSUPPORTED: return "not supported by this backend";
    case RKV_ERROR_MEMORY: return "out of memory";
    case RKV_ERROR_DEVICE: return "the device refused a launch or a copy";
    }
    return "unknown status";
}

RKV_API rkv_config rkv_config_default(int budget)
{
    rkv_config config = RKV_INIT;
    config.budget = budget;
    config.window = 8;
    config.pool = 7;
    config.recent = 1;
    config.lambda = 0.1f;
    config.threshold = 0.5f;
    config.n_threads = 1;
    return config;
}

RKV_API rkv_config rkv_config_paper(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.scope = RKV_PER_LAYER;
    config.variant = RKV_PAPER;
    return config;
}

RKV_API rkv_config rkv_config_wide(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.lambda = 0.5f;
    config.votes = rkvi_min(64, budget);
    config.pool = 5;
    config.mean_pool = 1;
    return config;
}

RKV_API rkv_config rkv_config_snapkv(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.lambda = 1;
    return config;
}

static rkv_config rkvi_preset(rkv_policy policy, int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.policy = policy;
    config.decay = RKVI_DECAY;
    return config;
}

RKV_API rkv_config rkv_config_memory_traces(int budget)
{
    rkv_config config = rkvi_preset(RKV_POLICY_MEMORY_TRACES, budget);
    config.lambda = 0.5f;
    config.votes = 32;
    return config;
}

RKV_API rkv_config rkv_config_memory_prose(int budget)
{
    rkv_config config = rkvi_preset(RKV_POLICY_MEMORY_PROSE, budget);
    config.lambda = 0.3f;
    config.votes = 32;
    return config;
}

RKV_API rkv_config rkv_config_memory_wide(int budget)
{
    rkv_config config = rkv_config_memory_prose(budget);
    config.votes = 128;
    config.protect = budget / 4;
    return config;
}

RKV_API rkv_config rkv_config_h2o(int budget)
{
    rkv_config config = rkvi_preset(RKV_POLICY_H2O, budget);
    config.window = budget / 2;
    config.votes = 128;
    return config;
}

RKV_API rkv_config rkv_config_triattention(int budget)
{
    rkv_config config = rkvi_preset(RKV_POLICY_TRIATTENTION, budget);
    config.pinned = budget > 12 ? 4 : 0;
    return config;
}

RKV_API rkv_config rkv_config_random(int budget, uint32_t seed)
{
    rkv_config config = rkvi_preset(RKV_POLICY_RANDOM, budget);
    config.seed = seed;
    return config;
}

RKV_API int rkv_state_floats(const rkv_config *config)
{
    return config ? rkvi_state_floats(config) : 0;
}

RKV_API size_t rkv_query_means_floats(int query_heads, int head_dim)
{
    return query_heads > 0 && head_dim > 0 ? rkvi_means_floats(query_heads, head_dim) : 0;
}

RKV_API rkv_config rkv_config_streaming(int budget)
{
    rkv_config config = rkv_config_default(budget);
    config.pinned = budget > 4 ? 4 : 0;
    config.window = budget - config.pinned;
    return config;
}

RKV_API rkv_tensor rkv_tensor_make(void *data, rkv_dtype dtype, int heads, int tokens, int dim)
{
    rkv_tensor tensor = RKV_INIT;
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.heads = heads;
    tensor.tokens = tokens;
    tensor.dim = dim;
    return tensor;
}

/* Stride 0 of an axis with steps becomes negative, which validation refuses. */
static int64_t rkvi_literal_stride(int64_t stride, int n)
{
    return n < 2 ? 0 : stride == 0 ? -1 : stride;
}

RKV_API rkv_tensor rkv_tensor_strided(void *data, rkv_dtype dtype, int heads, int tokens, int dim,
                                      int64_t head_stride, int64_t token_stride, int64_t dim_stride)
{
    rkv_tensor tensor = rkv_tensor_make(data, dtype, heads, tokens, dim);
    tensor.head_stride = rkvi_literal_stride(head_stride, heads);
    tensor.token_stride = rkvi_literal_stride(token_stride, tokens);
    tensor.dim_stride = rkvi_literal_stride(dim_stride, dim);
    return tensor;
}

static rkv_status rkvi_measure(const rkv_backend *backend, const rkv_config *config,
                               const rkv_layer *layers, int n_layers, size_t *bytes)
{
    rkv_config resolved;
    const char *rule;
    int layer;
    rule = rkvi_validate(config, layers, n_layers, 0, &layer);
    if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, layer, -1, -1);
    if (!backend) backend = rkvi_best();
    rule = rkvi_backend_rule(backend);
    if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, -1, -1, -1);
    resolved = rkvi_resolve(config);
    rkvi_clear_error(config);
    return backend->workspace_size(backend, &resolved, layers, n_layers, bytes);
}

RKV_API rkv_status rkv_workspace_size(const rkv_backend *backend, const rkv_config *config,
                                      const rkv_layer *layers, int n_layers, size_t *bytes)
{
    rkvi_float_mode saved;
    rkv_status status;
    if (!config) return RKV_ERROR_NULL;
    if (!bytes) return rkvi_refuse(config, RKV_ERROR_NULL, "bytes: is NULL", -1, -1, -1);
    saved = rkvi_enter_float_mode();
    status = rkvi_measure(backend, config, layers, n_layers, bytes);
    rkvi_leave_float_mode(saved);
    return status;
}

static rkv_status rkvi_check_and_run(rkv_stage stage, const rkv_backend *backend,
                                     const rkv_config *config, rkv_layer *layers, int n_layers,
                                     void *workspace, size_t bytes)
{
    rkv_config resolved;
    rkv_call call;
    const char *rule;
    int layer;
    rule = rkvi_validate(config, layers, n_layers, 1, &layer);
    if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, layer, -1, -1);
    if (!backend) backend = rkvi_best();
    rule = rkvi_backend_rule(backend);
    if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, -1, -1, -1);
    resolved = rkvi_resolve(config);
    call.config = &resolved;
    call.layers = layers;
    call.n_layers = n_layers;
    call.stage = stage;
    call.workspace = workspace;
    call.bytes = bytes;
    rule = rkvi_call_rule(&call, &layer);
    if (rule) return rkvi_refuse(config, RKV_ERROR_ARGUMENT, rule, layer, -1, -1);
    rkvi_clear_error(config);
    return backend->run(backend, &call);
}

static rkv_status rkvi_run_stage(rkv_stage stage, const rkv_backend *backend,
                                 const rkv_config *config, rkv_layer *layers, int n_layers,
                                 void *workspace, size_t bytes)
{
    rkvi_float_mode saved;
    rkv_status status;
    if (!config) return RKV_ERROR_NULL;
    saved = rkvi_enter_float_mode();
    status = rkvi_check_and_run(stage, backend, config, layers, n_layers, workspace, bytes);
    rkvi_leave_float_mode(saved);
    return status;
}

RKV_API rkv_status rkv_compress(const rkv_backend *backend, const rkv_config *config,
                                rkv_layer *layers, int n_layers, void *workspace, size_t bytes)
{
    return rkvi_run_stage(RKV_COMPRESS, backend, config, layers, n_layers, workspace, bytes);
}

RKV_API rkv_status rkv_score(const rkv_backend *backend, const rkv_config *config,
                             rkv_layer *layers, int n_layers, void *workspace, size_t bytes)
{
    return rkvi_run_stage(RKV_SCORE, backend, config, layers, n_layers, workspace, bytes);
}

RKV_API rkv_status rkv_select(const rkv_backend *backend, const rkv_config *config,
                              rkv_layer *layers, int n_layers, void *workspace, size_t bytes)
{
    return rkvi_run_stage(RKV_SELECT, backend, config, layers, n_layers, workspace, bytes);
}

RKV_API rkv_status rkv_compact(const rkv_backend *backend, const rkv_config *config,
                               rkv_layer *layers, int n_layers, void *workspace, size_t bytes)
{
    return rkvi_run_stage(RKV_COMPACT, backend, config, layers, n_layers, workspace, bytes);
}

#define RKVI_SKIPPED 4 /* first positions that enter no mean: attention sinks */

/* The rule that a call of rkv_query_means_update breaks, or NULL. */
static const char *rkvi_means_rule(const rkv_means_call *call)
{
    const rkv_tensor *queries = call->queries;
    rkvi_view_rule rule = !queries || !queries->data ? RKVI_DATA : rkvi_readable_rule(queries);
    if (rule != RKVI_SOUND) return rkvi_view_rules[RKVI_APPENDED + RKVI_QUERIES][rule];
    if (!call->means) return "means: is NULL";
    if (call->n < 0 || call->slot < 0 || call->slot > queries->tokens - call->n)
        return "slot, n: they leave the rows of the view";
    if (call->position < 0 || call->position > INT32_MAX - call->n)
        return "position: negative or too large";
    return rkvi_rope_rule(&call->rope, queries->dim);
}

static rkv_status rkvi_update_means(const rkv_backend *backend, rkv_means_call *call)
{
    const char *rule = rkvi_means_rule(call);
    const int skipped = call->position < RKVI_SKIPPED ? RKVI_SKIPPED - call->position : 0;
    if (rule) return rkvi_refuse(call->config, RKV_ERROR_ARGUMENT, rule, -1, -1, -1);
    if (!backend) backend = rkvi_best();
    if (!backend->update_means)
        return rkvi_refuse(call->config, RKV_ERROR_UNSUPPORTED,
                           "backend.update_means: this backend has none", -1, -1, -1);
    rkvi_clear_error(call->config);
    if (call->n <= skipped) return RKV_OK;
    call->slot += skipped;
    call->position += skipped;
    call->n -= skipped;
    return backend->update_means(backend, call);
}

RKV_API rkv_status rkv_query_means_update(const rkv_backend *backend, const rkv_config *config,
                                          const rkv_rope *rope, const rkv_tensor *queries, int slot,
                                          int n, int position, float *means)
{
    rkv_means_call call;
    rkvi_float_mode saved;
    rkv_status status;
    if (!config) return RKV_ERROR_NULL;
    if (!rope) return rkvi_refuse(config, RKV_ERROR_NULL, "rope: is NULL", -1, -1, -1);
    call.config = config;
    call.rope = *rope;
    call.queries = queries;
    call.slot = slot;
    call.n = n;
    call.position = position;
    call.means = means;
    saved = rkvi_enter_float_mode();
    status = rkvi_update_means(backend, &call);
    rkvi_leave_float_mode(saved);
    return status;
}

/* Does a kept list ascend, within [0, n_tokens)? */
static int rkvi_list_is_sound(const int32_t *kept, int n_kept, int n_tokens)
{
    int i;
    if (n_kept < 0 || (n_kept > 0 && !kept)) return 0;
    for (i = 0; i < n_kept; i++)
        if (kept[i] < (i > 0 ? kept[i - 1] + 1 : 0) || kept[i] >= n_tokens) return 0;
    return 1;
}

RKV_API int rkv_apply_kept(void *array, size_t element_bytes, const int32_t *kept, int n_kept)
{
    unsigned char *rows = (unsigned char *)array;
    int i;
    if (!rkvi_list_is_sound(kept, n_kept, INT32_MAX) || (n_kept > 0 && !array)) return -1;
    for (i = 0; i < n_kept; i++)
        if (kept[i] != i)
            memcpy(rows + (size_t)i * element_bytes, rows + (size_t)kept[i] * element_bytes,
                   element_bytes);
    return n_kept;
}

RKV_API int rkv_moves(const int32_t *kept, int n_kept, rkv_move *moves, int max_moves)
{
    int dst, count, n = 0;
    if (!rkvi_list_is_sound(kept, n_kept, INT32_MAX)) return -1;
    for (dst = 0; dst < n_kept; dst += count) {
        count = rkvi_run_length(kept, dst, n_kept);
        if (kept[dst] == dst) continue;
        if (n < max_moves) {
            moves[n].dst = dst;
            moves[n].src = kept[dst];
            moves[n].count = count;
        }
        n++;
    }
    return n;
}

RKV_API int rkv_evicted_runs(const int32_t *kept, int n_kept, int n_tokens,
                             const int32_t *positions, rkv_run *runs, int max_runs)
{
    int i, row = 0, n = 0;
    if (!rkvi_list_is_sound(kept, n_kept, n_tokens)) return -1;
    for (i = 1; positions && i < n_tokens; i++)
        if (positions[i] <= positions[i - 1]) return -1;
    if (positions && n_tokens > 0 && positions[n_tokens - 1] == INT32_MAX) return -1;
    for (i = 0; i <= n_kept; i++) { /* the rows between two kept ones */
        int next = i < n_kept ? kept[i] : n_tokens;
        if (row < next) {
            if (n < max_runs) {
                runs[n].begin = positions ? positions[row] : row;
                runs[n].end = (positions ? positions[next - 1] : next - 1) + 1;
            }
            n++;
        }
        row = next + 1;
    }
    return n;
}

/* ==== 22. Managed cache =====================================================================
 * In: new rows of keys, values and queries, layer by layer.  Out: views that attention can read.
 * Knows nothing of scores: it lays out memory, counts rows and calls rkv_compress.
 *
 * The host knows where every row lies, because a round always keeps min(n_tokens, budget) rows. It
 * reads back from the backend's memory only to see whether a round succeeded.
 *
 * One block of the backend's memory, capacity rows per layer and KV head:
 *     keys       [layer][kv_head][capacity][head_dim]
 *     values     [layer][kv_head][capacity][value_dim]
 *     queries    [layer][query_head][votes][head_dim]    ring: slot = position % votes
 *     state      [layer][kv_head][float][capacity]       what MEMORY and H2O carry
 *     means      [layer][rkv_query_means_floats]         of the queries, for TRIATTENTION; up to
 *                                                        the count, behind which is room to work
 *     positions  [set][capacity]                         a set per layer and KV head, per layer,
 *                                                        or one, as the scope says
 *     error      one rkv_error                           where a device reports a fault
 *
 * Let evicted be the tokens that every head has dropped so far, and fixed = budget - protect once a
 * round has evicted, 0 before (protect >= window, the newest tokens that a round keeps). Then in
 * every head of every layer
 *     row r >= fixed holds the token of position r + evicted.                             (1)
 * A round keeps the newest `protect` tokens as its last rows, in cache order, so (1) holds after
 * it; appending continues it; truncation only drops rows from the end. Hence the next position is
 * rows + evicted, truncation down to row `fixed` reads nothing back and moves nothing, and a
 * snapshot needs the positions of the first `fixed` rows only.
 *
 * State: rows [0, settled) were part of a round. Their state is what that round left; the others,
 * of which there are n_new = rows - settled, have none yet. A round settles all rows that it keeps;
 * truncation to `rows` makes it min(settled, rows), which is the same for all layers. Without
 * state it stays 0. A round of more rows than the budget always has new ones: settled <= budget.
 *
 * The ring: n_queries counts the newest tokens whose queries it still holds. Appending n makes it
 * min(votes, n_queries + n); truncating n makes it max(0, n_queries - n): the slots of truncated
 * tokens are stale until the tokens that replace them overwrite them. A round needs n_queries ==
 * votes, or with state only n_queries >= min(votes, n_new); else `missing` = votes - n_queries
 * tokens must come first. There is always room for them:
 *     rows + missing <= capacity.                                                         (2)
 * Without state: votes <= budget. Let `most` be the largest number of rows since the last round, of
 * all tokens if there was none, and behind = most - rows. The updates keep n_queries >= min(votes,
 * most) - behind, for a round leaves n_queries == votes. So rows + missing <= max(most, votes).
 * There the voter of n tokens ago is also row rows - n, which says what it has seen: by (1) that is
 * so if n <= rows - fixed. So votes > rows - fixed are too many, too, and missing = votes - (rows -
 * fixed) if that is more. It is not above buffer + protect - (rows - fixed) = budget + buffer -
 * rows: rkv_cache_create makes sure that votes <= buffer + protect. (And before the first round
 * rows - fixed is rows, at least n_queries.)
 * With state: let `most` be the largest number of rows since n_new was last 0. The updates keep
 * n_queries >= min(votes, most - settled) - behind. If votes >= most - settled, this is n_queries
 * >= n_new, and nothing is missing. Else missing <= behind, and rows + missing <= most.
 * Where capacity is budget + buffer, rkv_cache_step is due at the largest possible number of rows;
 * there behind is 0, rows - fixed = buffer + protect, and nothing is missing. Tokens can be missing
 * only with a larger capacity, or when a round is forced. rkv_cache_load checks (2); nothing else
 * can break it. */
#ifndef RKV_NO_CACHE
#define RKVI_CACHE_ALIGN  ((size_t)256) /* of each part: the alignment of cudaMalloc */
#define RKVI_CACHE_BUFFER 128           /* published: a round every 128 new tokens */

typedef struct rkvi_cache_plan {
    size_t key_bytes, value_bytes, query_bytes; /* of one layer; query_bytes 0: no ring */
    size_t state_bytes, mean_bytes;             /* likewise; 0: the policy has none */
    int n_planes;                               /* floats of state per row and KV head */
    int n_sets;                                 /* sets of positions, all layers */
    size_t keys, values, queries, state, means; /* offsets of the parts in the block */
    size_t positions, error;
    size_t total; /* bytes of the block */
} rkvi_cache_plan;

struct rkv_cache {
    rkv_cache_config config; /* zeros resolved */
    rkvi_cache_plan plan;
    rkv_layer *layers;     /* [n_layers]; n_tokens is the one count of the rows in use */
    int *n_queries;        /* [n_layers]: newest tokens whose queries the ring holds */
    unsigned char *memory; /* the block; the backend's */
    int32_t *positions;    /* in it */
    void *workspace;       /* the backend's; for a round of capacity rows */
    size_t workspace_bytes;
    int evicted; /* tokens dropped so far by every head */
    int settled; /* with state: the first rows, which were part of a round */
    int64_t rounds;
    rkv_error error; /* where config.compress.error points, unless the caller has one */
};

/* What the last call found, for rkv_cache_error. cache may be const, the record is not. */
static rkv_status rkvi_cache_refuse(const rkv_cache *cache, rkv_status status, const char *rule,
                                    int layer)
{
    return rkvi_refuse(&cache->config.compress, status, rule, layer, -1, -1);
}

/* The same for what a memory function of the backend returned; RKV_OK clears the record. */
static rkv_status rkvi_cache_result(const rkv_cache *cache, rkv_status status, const char *rule,
                                    int layer)
{
    return rkvi_cache_refuse(cache, status, status == RKV_OK ? NULL : rule,
                             status == RKV_OK ? -1 : layer);
}

/* ---- Creation ---- */

static void *rkvi_cache_malloc(void *user, size_t bytes)
{
    (void)user;
    return malloc(bytes);
}

static void rkvi_cache_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

static int rkvi_cache_has_memory_functions(const rkv_backend *backend)
{
    return backend->alloc && backend->free && backend->copy && backend->copy_rows &&
           backend->fill_positions && backend->synchronize;
}

/* The rule that a config breaks, or NULL: its zeros are then filled in. */
static const char *rkvi_cache_config_rule(rkv_cache_config *config)
{
    rkv_config *compress = &config->compress;
    const char *rule = rkvi_config_rule(compress);
    if (rule) return rule;
    if (config->n_layers < 1) return "cache.n_layers: must be at least 1";
    if (config->kv_heads < 1) return "cache.kv_heads: must be at least 1";
    if (config->query_heads < 1) return "cache.query_heads: must be at least 1";
    if (config->query_heads % config->kv_heads != 0)
        return "cache.query_heads: must be a multiple of kv_heads";
    if (config->head_dim < 1) return "cache.head_dim: must be at least 1";
    if (config->value_dim < 0) return "cache.value_dim: must not be negative";
    if (config->dtype == RKV_OPAQUE) return "cache.dtype: a cache does not hold RKV_OPAQUE";
    if ((unsigned)config->dtype > RKV_Q8_0) return "cache.dtype: no such type";
    if (config->head_dim % rkvi_element_dims(config->dtype) != 0)
        return "cache.head_dim: must be a multiple of 32 (RKV_Q8_0)";
    if (config->value_dim % rkvi_element_dims(config->dtype) != 0)
        return "cache.value_dim: must be a multiple of 32 (RKV_Q8_0)";
    if (config->buffer < 0) return "cache.buffer: must not be negative";
    if (config->capacity < 0) return "cache.capacity: must not be negative";
    if (!config->alloc != !config->free) return "cache.alloc, cache.free: give both or none";
    if (config->value_dim == 0) config->value_dim = config->head_dim;
    if (config->buffer == 0) config->buffer = RKVI_CACHE_BUFFER;
    if (config->alloc == NULL) {
        config->alloc = rkvi_cache_malloc;
        config->free = rkvi_cache_free;
    }
    *compress = rkvi_resolve(compress);
    if (compress->budget > INT32_MAX - config->buffer)
        return "cache.buffer: budget + buffer overflows";
    if (config->capacity == 0) config->capacity = compress->budget + config->buffer;
    if (config->capacity < compress->budget + config->buffer)
        return "cache.capacity: must be 0 or at least budget + buffer";
    if (rkvi_is_scored(compress, config->capacity) && rkvi_reads_queries(compress) &&
        !rkvi_has_state(compress) && compress->votes > config->buffer + compress->protect)
        return "cache.buffer: with RKV_POLICY_RKV, buffer + the larger of window and protect must "
               "be at least votes";
    return NULL;
}

static rkv_dtype rkvi_cache_query_dtype(const rkv_cache_config *config)
{
    return config->dtype > RKV_BF16 ? RKV_F32 : config->dtype;
}

/* out = bytes of [heads][rows][dim]; 0 when that overflows */
static int rkvi_cache_rows_bytes(rkv_dtype dtype, int heads, int rows, int dim, size_t *out)
{
    size_t bytes = rkvi_dtype_bytes(dtype);
    return rkvi_mul_size(bytes, (size_t)heads, &bytes) &&
           rkvi_mul_size(bytes, (size_t)rows, &bytes) &&
           rkvi_mul_size(bytes, (size_t)(dim / rkvi_element_dims(dtype)), out);
}

/* Appends a part of `bytes` bytes, times `count`, to the block of memory; 0 on overflow. */
static int rkvi_cache_add_part(size_t *total, size_t bytes, int count, size_t *offset)
{
    *offset = *total;
    if (!rkvi_mul_size(bytes, (size_t)count, &bytes) || !rkvi_add_size(*total, bytes, total) ||
        !rkvi_add_size(*total, RKVI_CACHE_ALIGN - 1, total))
        return 0;
    *total -= *total % RKVI_CACHE_ALIGN;
    return 1;
}

/* Bytes of a layer's means; 0 when they overflow: each term of their sum is below a third of the
 * bytes that are tried first, or small. */
static int rkvi_cache_means_bytes(const rkv_cache_config *config, size_t *bytes)
{
    if (!rkvi_cache_rows_bytes(RKV_F32, config->query_heads, 8, config->head_dim, bytes)) return 0;
    *bytes = sizeof(float) * rkv_query_means_floats(config->query_heads, config->head_dim);
    return 1;
}

/* What the policy needs beside keys and values, per layer; 0 when a size overflows. State that is
 * never scored is moved all the same. */
static int rkvi_cache_measure_policy(const rkv_cache_config *config, rkvi_cache_plan *plan)
{
    const rkv_config *compress = &config->compress;
    const int scored = rkvi_is_scored(compress, config->capacity);
    plan->n_planes = rkvi_state_floats(compress);
    plan->query_bytes = plan->mean_bytes = 0;
    if (scored && rkvi_reads_queries(compress) &&
        !rkvi_cache_rows_bytes(rkvi_cache_query_dtype(config), config->query_heads, compress->votes,
                               config->head_dim, &plan->query_bytes))
        return 0;
    if (scored && compress->policy == RKV_POLICY_TRIATTENTION &&
        !rkvi_cache_means_bytes(config, &plan->mean_bytes))
        return 0;
    return rkvi_cache_rows_bytes(RKV_F32, config->kv_heads, config->capacity, plan->n_planes,
                                 &plan->state_bytes);
}

/* 0 when a size overflows. */
static int rkvi_cache_measure(const rkv_cache_config *config, rkvi_cache_plan *plan)
{
    const rkv_config *compress = &config->compress;
    const int n_layers = config->n_layers, capacity = config->capacity;
    size_t n_sets = compress->scope == RKV_PER_SEQUENCE ? 1 : (size_t)n_layers, set_bytes;
    if (compress->scope == RKV_PER_HEAD &&
        !rkvi_mul_size(n_sets, (size_t)config->kv_heads, &n_sets))
        return 0;
    if (n_sets > (size_t)INT32_MAX) return 0;
    plan->n_sets = (int)n_sets;
    plan->total = 0;
    return rkvi_cache_measure_policy(config, plan) &&
           rkvi_cache_rows_bytes(config->dtype, config->kv_heads, capacity, config->head_dim,
                                 &plan->key_bytes) &&
           rkvi_cache_rows_bytes(config->dtype, config->kv_heads, capacity, config->value_dim,
                                 &plan->value_bytes) &&
           rkvi_mul_size(sizeof(int32_t), (size_t)capacity, &set_bytes) &&
           rkvi_cache_add_part(&plan->total, plan->key_bytes, n_layers, &plan->keys) &&
           rkvi_cache_add_part(&plan->total, plan->value_bytes, n_layers, &plan->values) &&
           rkvi_cache_add_part(&plan->total, plan->query_bytes, n_layers, &plan->queries) &&
           rkvi_cache_add_part(&plan->total, plan->state_bytes, n_layers, &plan->state) &&
           rkvi_cache_add_part(&plan->total, plan->mean_bytes, n_layers, &plan->means) &&
           rkvi_cache_add_part(&plan->total, set_bytes, plan->n_sets, &plan->positions) &&
           rkvi_cache_add_part(&plan->total, sizeof(rkv_error), 1, &plan->error);
}

/* The set of positions that this KV head of this layer shares or owns. */
static int32_t *rkvi_cache_set(const rkv_cache *cache, int layer, int head)
{
    size_t set = 0;
    if (cache->config.compress.scope == RKV_PER_LAYER) set = (size_t)layer;
    if (cache->config.compress.scope == RKV_PER_HEAD)
        set = (size_t)layer * (size_t)cache->config.kv_heads + (size_t)head;
    return cache->positions + set * (size_t)cache->config.capacity;
}

/* A layer's piece of a part of the block; NULL where the part is empty. */
static void *rkvi_cache_piece(const rkv_cache *cache, size_t part, size_t bytes, int layer)
{
    return bytes > 0 ? cache->memory + part + (size_t)layer * bytes : NULL;
}

/* Does a round leave state behind? */
static int rkvi_cache_carries_state(const rkv_cache *cache)
{
    return cache->plan.n_planes > 0 && cache->plan.query_bytes > 0;
}

static float *rkvi_cache_means(const rkv_cache *cache, int layer)
{
    return (float *)rkvi_cache_piece(cache, cache->plan.means, cache->plan.mean_bytes, layer);
}

static void rkvi_cache_describe_layer(rkv_cache *cache, int index)
{
    const rkv_cache_config *config = &cache->config;
    const rkvi_cache_plan *plan = &cache->plan;
    rkv_layer *layer = &cache->layers[index];
    layer->keys =
        rkv_tensor_make(rkvi_cache_piece(cache, plan->keys, plan->key_bytes, index), config->dtype,
                        config->kv_heads, config->capacity, config->head_dim);
    layer->values =
        rkv_tensor_make(rkvi_cache_piece(cache, plan->values, plan->value_bytes, index),
                        config->dtype, config->kv_heads, config->capacity, config->value_dim);
    layer->queries =
        rkv_tensor_make(rkvi_cache_piece(cache, plan->queries, plan->query_bytes, index),
                        rkvi_cache_query_dtype(config), config->query_heads, config->compress.votes,
                        config->head_dim);
    layer->state = (float *)rkvi_cache_piece(cache, plan->state, plan->state_bytes, index);
    layer->query_means = rkvi_cache_means(cache, index);
    layer->rope = config->rope;
    layer->scale = config->scale;
    layer->softcap = config->softcap;
    layer->row_stride = config->capacity;
    if (index == 0 || config->compress.scope != RKV_PER_SEQUENCE)
        layer->positions = rkvi_cache_set(cache, index, 0);
}

/* The cache's own device record; NULL if the caller gave one, and so reads it himself. */
static rkv_error *rkvi_cache_device_error(const rkv_cache *cache)
{
    rkv_error *own = (rkv_error *)(void *)(cache->memory + cache->plan.error);
    return cache->config.compress.device_error == own ? own : NULL;
}

static void rkvi_cache_empty(rkv_cache *cache)
{
    int l;
    for (l = 0; l < cache->config.n_layers; l++) {
        cache->layers[l].n_tokens = 0;
        cache->n_queries[l] = 0;
    }
    cache->evicted = 0;
    cache->settled = 0;
    cache->rounds = 0;
}

/* A frequency out of range would fail every round. */
static rkv_status rkvi_cache_check_frequencies(const rkv_cache *cache)
{
    const rkv_cache_config *config = &cache->config;
    const rkv_backend *backend = config->backend;
    const int turned =
        rkvi_needs_rope(&config->compress) && rkvi_is_scored(&config->compress, config->capacity);
    const size_t pairs = turned ? (size_t)rkvi_pairs(&config->rope, config->head_dim) : 0;
    rkv_rope rope = config->rope;
    rkvi_turns turns;
    rkvi_float_mode saved;
    rkv_status status = RKV_OK;
    uint32_t *words; /* [2][pairs], then the table */
    int bad = -1;
    if (pairs == 0) return RKV_OK;
    words = (uint32_t *)(config->alloc)(config->user, 3 * pairs * sizeof *words);
    if (words == NULL)
        return rkvi_cache_refuse(cache, RKV_ERROR_MEMORY, "cache: no memory for frequencies", -1);
    if (rope.frequencies) {
        rope.frequencies = (const float *)(const void *)(words + 2 * pairs);
        status = backend->copy(backend, words + 2 * pairs, config->rope.frequencies,
                               pairs * sizeof *rope.frequencies);
    }
    saved = rkvi_enter_float_mode();
    if (status == RKV_OK) bad = rkvi_fill_turns(&rope, config->head_dim, words, &turns);
    rkvi_leave_float_mode(saved);
    (config->free)(config->user, words);
    if (bad >= 0)
        return rkvi_refuse(&config->compress, RKV_ERROR_ARGUMENT, RKVI_RULE_FREQUENCY, -1, -1, bad);
    return rkvi_cache_result(cache, status, "cache: the device refused a copy", -1);
}

/* Takes the backend's memory and describes it. On an error, what it took is in `cache`. */
static rkv_status rkvi_cache_reserve(rkv_cache *cache)
{
    rkv_cache_config *config = &cache->config;
    const rkv_backend *backend = config->backend;
    rkv_status status;
    int l;
    /* In brackets, here and below: a debugging heap may make macros of these names. */
    cache->memory = (unsigned char *)(backend->alloc)(backend, cache->plan.total);
    if (cache->memory == NULL)
        return rkvi_cache_refuse(cache, RKV_ERROR_MEMORY, "cache: no memory for its rows", -1);
    cache->positions = (int32_t *)(void *)(cache->memory + cache->plan.positions);
    for (l = 0; l < config->n_layers; l++) {
        rkvi_cache_describe_layer(cache, l);
        cache->layers[l].n_tokens = config->capacity; /* the largest round, to be sized for */
        cache->layers[l].n_new = config->capacity;
    }
    status = rkv_workspace_size(backend, &config->compress, cache->layers, config->n_layers,
                                &cache->workspace_bytes);
    if (status != RKV_OK) return status;
    cache->workspace = (backend->alloc)(backend, cache->workspace_bytes);
    if (cache->workspace == NULL)
        return rkvi_cache_refuse(cache, RKV_ERROR_MEMORY, "cache: no memory for the workspace", -1);
    if (config->compress.device_error == NULL) {
        config->compress.device_error = (rkv_error *)(void *)(cache->memory + cache->plan.error);
        status = backend->copy(backend, config->compress.device_error, &rkvi_no_error,
                               sizeof rkvi_no_error);
    }
    rkvi_cache_empty(cache);
    return rkvi_cache_result(cache, status, "cache: the device refused a copy", -1);
}

/* The host's records in one allocation, the strictest alignment first: the cache, its layers, their
 * counters. */
static rkv_cache *rkvi_cache_new_record(const rkv_cache_config *config, const rkvi_cache_plan *plan)
{
    const size_t n_layers = (size_t)config->n_layers;
    size_t bytes;
    rkv_cache *cache;
    if (!rkvi_mul_size(n_layers, sizeof(rkv_layer) + sizeof(int), &bytes) ||
        !rkvi_add_size(bytes, sizeof(rkv_cache), &bytes))
        return NULL;
    cache = (rkv_cache *)(config->alloc)(config->user, bytes);
    if (cache == NULL) return NULL;
    memset(cache, 0, bytes);
    cache->config = *config;
    cache->plan = *plan;
    cache->layers = (rkv_layer *)(void *)(cache + 1);
    cache->n_queries = (int *)(void *)(cache->layers + n_layers);
    if (cache->config.compress.error == NULL) cache->config.compress.error = &cache->error;
    cache->error = rkvi_no_error;
    return cache;
}

RKV_API rkv_status rkv_cache_create(rkv_cache **out, const rkv_cache_config *config)
{
    rkv_cache_config resolved;
    rkvi_cache_plan plan;
    rkv_cache *cache;
    const char *rule;
    rkvi_float_mode saved;
    rkv_status status;
    if (config != NULL && out == NULL)
        return rkvi_refuse(&config->compress, RKV_ERROR_NULL, "out: is NULL", -1, -1, -1);
    if (out == NULL) return RKV_ERROR_NULL;
    *out = NULL;
    if (config == NULL) return RKV_ERROR_NULL;
    resolved = *config;
    saved = rkvi_enter_float_mode();
    rule = rkvi_cache_config_rule(&resolved);
    if (!rule && !rkvi_cache_measure(&resolved, &plan)) rule = "cache: its size overflows";
    rkvi_leave_float_mode(saved); /* both compare lambda, which may be subnormal */
    if (rule) return rkvi_refuse(&config->compress, RKV_ERROR_ARGUMENT, rule, -1, -1, -1);
    if (resolved.backend == NULL) resolved.backend = rkvi_best();
    if (!rkvi_cache_has_memory_functions(resolved.backend))
        return rkvi_refuse(&config->compress, RKV_ERROR_UNSUPPORTED,
                           "cache.backend: has no memory functions", -1, -1, -1);
    if (plan.mean_bytes > 0 && !resolved.backend->update_means)
        return rkvi_refuse(&config->compress, RKV_ERROR_UNSUPPORTED,
                           "cache.backend: has no update_means, which TRIATTENTION needs", -1, -1,
                           -1);
    cache = rkvi_cache_new_record(&resolved, &plan);
    if (cache == NULL)
        return rkvi_refuse(&config->compress, RKV_ERROR_MEMORY, "cache: no memory for its records",
                           -1, -1, -1);
    status = rkvi_cache_reserve(cache);
    if (status == RKV_OK) status = rkvi_cache_check_frequencies(cache);
    if (status != RKV_OK) {
        rkv_cache_destroy(cache);
        return status;
    }
    *out = cache;
    return RKV_OK;
}

RKV_API const rkv_error *rkv_cache_error(const rkv_cache *cache)
{
    static const rkv_error is_null = { "cache: is NULL", RKV_ERROR_NULL, -1, -1, -1 };
    return cache ? cache->config.compress.error : &is_null;
}

RKV_API void rkv_cache_destroy(rkv_cache *cache)
{
    const rkv_backend *backend;
    if (cache == NULL) return;
    backend = cache->config.backend;
    if (cache->workspace != NULL) (backend->free)(backend, cache->workspace);
    if (cache->memory != NULL) (backend->free)(backend, cache->memory);
    (cache->config.free)(cache->config.user, cache);
}

/* ---- Counters and views ---- */

static int rkvi_cache_has_layer(const rkv_cache *cache, int layer)
{
    return cache != NULL && layer >= 0 && layer < cache->config.n_layers;
}

/* Rows of the longest layer: during a forward pass the first layers are ahead. */
static int rkvi_cache_most_rows(const rkv_cache *cache)
{
    int l, most = 0;
    for (l = 0; l < cache->config.n_layers; l++)
        if (cache->layers[l].n_tokens > most) most = cache->layers[l].n_tokens;
    return most;
}

/* Rows below this one differ from head to head: see (1) above. */
static int rkvi_cache_fixed_rows(const rkv_cache_config *config, int evicted)
{
    return evicted > 0 ? config->compress.budget - config->compress.protect : 0;
}

/* The position of the first row that truncation can drop. */
static int rkvi_cache_first_position(const rkv_cache *cache)
{
    return cache->evicted + rkvi_cache_fixed_rows(&cache->config, cache->evicted);
}

/* A view of the rows in use; its head stride no longer follows from `tokens`. */
static rkv_tensor rkvi_cache_view(const rkv_layer *layer, const rkv_tensor *reserved)
{
    rkv_tensor view = *reserved;
    view.token_stride = view.dim;
    view.head_stride = (int64_t)view.tokens * view.dim;
    view.tokens = layer->n_tokens;
    return view;
}

RKV_API rkv_tensor rkv_cache_keys(const rkv_cache *cache, int layer)
{
    const rkv_tensor none = RKV_INIT;
    if (!rkvi_cache_has_layer(cache, layer)) return none;
    return rkvi_cache_view(&cache->layers[layer], &cache->layers[layer].keys);
}

RKV_API rkv_tensor rkv_cache_values(const rkv_cache *cache, int layer)
{
    const rkv_tensor none = RKV_INIT;
    if (!rkvi_cache_has_layer(cache, layer)) return none;
    return rkvi_cache_view(&cache->layers[layer], &cache->layers[layer].values);
}

RKV_API int rkv_cache_rows(const rkv_cache *cache, int layer)
{
    return rkvi_cache_has_layer(cache, layer) ? cache->layers[layer].n_tokens : 0;
}

RKV_API int rkv_cache_position(const rkv_cache *cache, int layer)
{
    return rkvi_cache_has_layer(cache, layer) ? cache->layers[layer].n_tokens + cache->evicted : 0;
}

RKV_API int rkv_cache_room(const rkv_cache *cache, int layer)
{
    int rows, positions;
    if (!rkvi_cache_has_layer(cache, layer)) return 0;
    rows = cache->config.capacity - cache->layers[layer].n_tokens;
    positions = INT32_MAX - rkv_cache_position(cache, layer);
    return rows < positions ? rows : positions;
}

RKV_API const int32_t *rkv_cache_positions(const rkv_cache *cache, int layer, int head)
{
    if (!rkvi_cache_has_layer(cache, layer)) return NULL;
    if (head < 0 || head >= cache->config.kv_heads) return NULL;
    return rkvi_cache_set(cache, layer, head);
}

/* Key and value of one token in all heads of one layer. */
static size_t rkvi_cache_token_bytes(const rkv_cache *cache)
{
    return (cache->plan.key_bytes + cache->plan.value_bytes) / (size_t)cache->config.capacity;
}

RKV_API rkv_cache_stats rkv_cache_get_stats(const rkv_cache *cache)
{
    rkv_cache_stats stats = RKV_INIT;
    size_t token_bytes;
    int l;
    if (cache == NULL) return stats;
    stats.bytes_held = (cache->plan.key_bytes + cache->plan.value_bytes + cache->plan.query_bytes +
                        cache->plan.state_bytes + cache->plan.mean_bytes) *
                       (size_t)cache->config.n_layers;
    token_bytes = rkvi_cache_token_bytes(cache);
    for (l = 0; l < cache->config.n_layers; l++)
        stats.bytes_full += token_bytes * (size_t)rkv_cache_position(cache, l);
    stats.rounds = cache->rounds;
    stats.n_evicted = cache->evicted;
    return stats;
}

/* ---- Append ---- */

/* The rule that a view given to append breaks; `which` is one of RKVI_KEYS, ... */
static const char *rkvi_cache_view_rule(const rkv_cache *cache, const rkv_tensor *view, int which,
                                        int n_tokens)
{
    const rkv_cache_config *config = &cache->config;
    const int heads = which == RKVI_QUERIES ? config->query_heads : config->kv_heads;
    const int dim = which == RKVI_VALUES ? config->value_dim : config->head_dim;
    const rkv_dtype dtype = which == RKVI_QUERIES ? rkvi_cache_query_dtype(config) : config->dtype;
    rkvi_view_rule rule = RKVI_DATA;
    if (view != NULL && view->data != NULL) rule = rkvi_tensor_rule(view);
    if (rule == RKVI_SOUND) {
        if (view->tokens < n_tokens) rule = RKVI_TOO_FEW_TOKENS;
        if (!rkvi_has_own_elements(view)) rule = RKVI_NOT_THE_DTYPE;
        if (view->dtype != dtype) rule = RKVI_OTHER_DTYPE;
        if (view->heads != heads) rule = RKVI_OTHER_HEADS;
        if (view->dim != dim) rule = RKVI_OTHER_DIM;
    }
    return rule == RKVI_SOUND ? NULL : rkvi_view_rules[RKVI_APPENDED + which][rule];
}

/* Writes the positions of rows [row, row + n), which follow from (1), to the sets of `layer`. */
static rkv_status rkvi_cache_fill(const rkv_cache *cache, int layer, int row, int n)
{
    const rkv_cache_config *config = &cache->config;
    const int n_sets = config->compress.scope == RKV_PER_HEAD ? config->kv_heads : 1;
    if (n < 1) return RKV_OK;
    return config->backend->fill_positions(config->backend, rkvi_cache_set(cache, layer, 0), n_sets,
                                           config->capacity, row, row + cache->evicted, n);
}

/* Copies the newest min(n_tokens, votes) queries into the ring; two copies if they wrap. They
 * replace the oldest queries, which a failed copy leaves undefined. The first copy finds a negative
 * block, before it writes. */
static rkv_status rkvi_cache_push_queries(rkv_cache *cache, int layer, int n_tokens,
                                          const rkv_tensor *queries)
{
    const rkv_backend *backend = cache->config.backend;
    const rkv_tensor *ring = &cache->layers[layer].queries;
    const int votes = cache->config.compress.votes;
    const int n = rkvi_min(n_tokens, votes);
    const int skipped = n_tokens - n;
    const int slot = (rkv_cache_position(cache, layer) + skipped) % votes;
    const int n_first = n < votes - slot ? n : votes - slot;
    int *n_queries = &cache->n_queries[layer];
    rkv_status status = backend->copy_rows(backend, ring, slot, queries, skipped, n_first);
    if (status == RKV_OK && n > n_first)
        status = backend->copy_rows(backend, ring, 0, queries, skipped + n_first, n - n_first);
    if (status == RKV_ERROR_ARGUMENT) return status;
    if (*n_queries > votes - n) *n_queries = votes - n;
    if (status == RKV_OK) *n_queries += n;
    return status;
}

/* The rows that append reads. A table may be shorter than `tokens` says. */
static rkv_tensor rkvi_cache_new_rows(const rkv_tensor *view, int n_tokens)
{
    rkv_tensor rows = *view;
    if (rows.block_table) rows.tokens = n_tokens;
    return rows;
}

/* Rows from n_tokens on are unused until the count grows. The ring comes last, because its slots
 * still belong to older tokens. */
static rkv_status rkvi_cache_copy_in(rkv_cache *cache, int layer, int n_tokens,
                                     const rkv_tensor *keys, const rkv_tensor *values,
                                     const rkv_tensor *queries)
{
    const rkv_backend *backend = cache->config.backend;
    const rkv_layer *held = &cache->layers[layer];
    const rkv_tensor new_keys = rkvi_cache_new_rows(keys, n_tokens);
    const rkv_tensor new_values = rkvi_cache_new_rows(values, n_tokens);
    rkv_tensor new_queries;
    const int row = held->n_tokens;
    const int fills = cache->config.compress.scope != RKV_PER_SEQUENCE ||
                      row + n_tokens > rkvi_cache_most_rows(cache); /* else done already */
    rkv_status status = backend->copy_rows(backend, &held->keys, row, &new_keys, 0, n_tokens);
    if (status == RKV_OK)
        status = backend->copy_rows(backend, &held->values, row, &new_values, 0, n_tokens);
    if (status == RKV_OK && fills) status = rkvi_cache_fill(cache, layer, row, n_tokens);
    if (status != RKV_OK || cache->plan.query_bytes == 0) return status;
    new_queries = rkvi_cache_new_rows(queries, n_tokens);
    return rkvi_cache_push_queries(cache, layer, n_tokens, &new_queries);
}

/* Makes the means of a layer those of no token. */
static rkv_status rkvi_cache_clear_means(const rkv_cache *cache, int layer)
{
    static const unsigned char zeros[1024] = { 0 };
    const rkv_backend *backend = cache->config.backend;
    unsigned char *means = (unsigned char *)rkvi_cache_means(cache, layer);
    size_t left = cache->plan.mean_bytes, part;
    rkv_status status = RKV_OK;
    for (; left > 0 && status == RKV_OK; left -= part, means += part) {
        part = left < sizeof zeros ? left : sizeof zeros;
        status = backend->copy(backend, means, zeros, part);
    }
    return status;
}

/* The queries of new tokens enter the means of their layer. Nothing can undo that: it comes after
 * all that can fail. Until a layer has its first tokens, its means are undefined. */
static rkv_status rkvi_cache_add_to_means(const rkv_cache *cache, int layer, int n_tokens,
                                          const rkv_tensor *queries)
{
    const rkv_cache_config *config = &cache->config;
    const rkv_tensor new_queries = rkvi_cache_new_rows(queries, n_tokens);
    const int position = rkv_cache_position(cache, layer);
    rkv_status status = RKV_OK;
    if (position == 0) status = rkvi_cache_clear_means(cache, layer);
    if (status != RKV_OK)
        return rkvi_cache_result(cache, status, "cache: the device refused a copy", layer);
    status = rkv_query_means_update(config->backend, &config->compress, &config->rope, &new_queries,
                                    0, n_tokens, position, rkvi_cache_means(cache, layer));
    if (status != RKV_OK) config->compress.error->layer = layer;
    return status;
}

RKV_API rkv_status rkv_cache_append(rkv_cache *cache, int layer, int n_tokens,
                                    const rkv_tensor *keys, const rkv_tensor *values,
                                    const rkv_tensor *queries)
{
    const char *rule = NULL;
    rkv_status status;
    if (cache == NULL) return RKV_ERROR_NULL;
    if (!rkvi_cache_has_layer(cache, layer))
        return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT, "layer: must be in [0, n_layers)", -1);
    if (n_tokens < 0)
        rule = "n_tokens: must not be negative";
    else if (n_tokens > rkv_cache_room(cache, layer))
        rule = "n_tokens: more than rkv_cache_room";
    if (!rule && n_tokens > 0) {
        rule = rkvi_cache_view_rule(cache, keys, RKVI_KEYS, n_tokens);
        if (!rule) rule = rkvi_cache_view_rule(cache, values, RKVI_VALUES, n_tokens);
        if (!rule && (cache->plan.query_bytes > 0 || cache->plan.mean_bytes > 0))
            rule = rkvi_cache_view_rule(cache, queries, RKVI_QUERIES, n_tokens);
    }
    if (rule) return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT, rule, layer);
    status =
        n_tokens == 0 ? RKV_OK : rkvi_cache_copy_in(cache, layer, n_tokens, keys, values, queries);
    status = rkvi_cache_result(cache, status,
                               status == RKV_ERROR_ARGUMENT
                                   ? "keys, values, queries: a block table has a negative block"
                                   : "cache: the device refused a copy",
                               layer);
    if (status == RKV_OK && n_tokens > 0 && cache->plan.mean_bytes > 0)
        status = rkvi_cache_add_to_means(cache, layer, n_tokens, queries);
    if (status == RKV_OK) cache->layers[layer].n_tokens += n_tokens;
    return status;
}

/* ---- Compression and rollback ---- */

static int rkvi_cache_layers_equal(const rkv_cache *cache)
{
    int l;
    for (l = 1; l < cache->config.n_layers; l++)
        if (cache->layers[l].n_tokens != cache->layers[0].n_tokens) return 0;
    return 1;
}

/* Tokens that a layer lacks for a round, because the ring does not hold the queries that vote, or
 * the token of a query that does has no row. n_whole: the newest rows that no round has thinned. */
static int rkvi_cache_missing(const rkv_cache *cache, int n_queries, int n_new, int n_whole)
{
    const int votes = cache->config.compress.votes;
    if (cache->plan.query_bytes == 0) return 0;
    if (rkvi_cache_carries_state(cache)) return n_queries >= n_new ? 0 : votes - n_queries;
    return votes - rkvi_min(n_queries, n_whole);
}

static int rkvi_cache_votes_whole(const rkv_cache *cache)
{
    const int fixed = rkvi_cache_fixed_rows(&cache->config, cache->evicted);
    int l;
    for (l = 0; l < cache->config.n_layers; l++) {
        const int rows = cache->layers[l].n_tokens;
        if (rkvi_cache_missing(cache, cache->n_queries[l], rows - cache->settled, rows - fixed) > 0)
            return 0;
    }
    return 1;
}

/* Waits for the round and returns what the device found. */
static rkv_status rkvi_cache_look(rkv_cache *cache)
{
    const rkv_backend *backend = cache->config.backend;
    rkv_error *own = rkvi_cache_device_error(cache), found;
    rkv_status status;
    if (own == NULL) return RKV_OK;
    status = backend->copy(backend, &found, own, sizeof found);
    if (status != RKV_OK) { /* have the rows moved or not? */
        rkvi_cache_empty(cache);
        return rkvi_cache_refuse(cache, status,
                                 "cache: the device did not answer, the cache is empty now", -1);
    }
    return rkvi_record(cache->config.compress.error, (rkv_status)found.status, found.rule,
                       found.layer, found.head, found.token);
}

/* R-KV takes its votes in any order if they are those of the window. They keep that of the slots,
 * so that an engine's own ring which does not tell first_query gives the same bits. */
static void rkvi_cache_describe_round(rkv_cache *cache)
{
    const rkv_config *compress = &cache->config.compress;
    const int ordered = rkvi_cache_carries_state(cache) || compress->votes > compress->window;
    int l;
    for (l = 0; l < cache->config.n_layers; l++) {
        rkv_layer *layer = &cache->layers[l];
        layer->n_new = layer->n_tokens - cache->settled;
        layer->first_query = ordered ? rkv_cache_position(cache, l) % compress->votes : 0;
    }
}

static rkv_status rkvi_cache_round(rkv_cache *cache, int *n_evicted)
{
    const rkv_cache_config *config = &cache->config;
    const int budget = config->compress.budget, rows = cache->layers[0].n_tokens;
    rkv_status status;
    int l;
    rkvi_cache_describe_round(cache);
    status = rkv_compress(config->backend, &config->compress, cache->layers, config->n_layers,
                          cache->workspace, cache->workspace_bytes);
    if (status == RKV_OK) {
        for (l = 0; l < config->n_layers; l++) cache->layers[l].n_tokens = rows; /* until we know */
        status = rkvi_cache_look(cache);
    }
    if (status != RKV_OK) return status;
    for (l = 0; l < config->n_layers; l++) cache->layers[l].n_tokens = budget;
    cache->evicted += rows - budget;
    cache->settled = rkvi_cache_carries_state(cache) ? budget : 0;
    cache->rounds++;
    if (n_evicted != NULL) *n_evicted = rows - budget;
    return RKV_OK;
}

/* Is a round due? If not, *status says whether that is an error. */
static int rkvi_cache_is_due(const rkv_cache *cache, int more_rows_than, int *n_evicted,
                             rkv_status *status)
{
    if (n_evicted != NULL) *n_evicted = 0;
    if (cache == NULL) {
        *status = RKV_ERROR_NULL;
        return 0;
    }
    *status = RKV_OK;
    if (!rkvi_cache_layers_equal(cache))
        *status = rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT,
                                    "cache: its layers have different numbers of rows", -1);
    else
        rkvi_clear_error(&cache->config.compress);
    return *status == RKV_OK && cache->layers[0].n_tokens > more_rows_than;
}

RKV_API rkv_status rkv_cache_step(rkv_cache *cache, int *n_evicted)
{
    rkv_status status;
    const int full = cache == NULL ? 0 : cache->config.compress.budget + cache->config.buffer;
    if (!rkvi_cache_is_due(cache, full - 1, n_evicted, &status)) return status;
    if (!rkvi_cache_votes_whole(cache)) return RKV_OK; /* due once they are whole again */
    return rkvi_cache_round(cache, n_evicted);
}

RKV_API rkv_status rkv_cache_compress(rkv_cache *cache, int *n_evicted)
{
    rkv_status status;
    const int budget = cache == NULL ? 0 : cache->config.compress.budget;
    if (!rkvi_cache_is_due(cache, budget, n_evicted, &status)) return status;
    if (!rkvi_cache_votes_whole(cache))
        return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT,
                                 "cache: queries that vote are missing, append more tokens", -1);
    return rkvi_cache_round(cache, n_evicted);
}

/* Every row that a round has kept was finite, so a key that is not comes after them, in order. (A
 * round that reads no keys finds none; one that reads those of candidates only keeps the others in
 * order.) The token of a query is the newest with its slot in the ring; without a ring it was
 * refused by append, and is not in the cache. Means are of all tokens. */
RKV_API int rkv_cache_error_position(const rkv_cache *cache)
{
    const rkv_error *error = rkv_cache_error(cache);
    int position, last, votes;
    if (cache == NULL || error->status != RKV_ERROR_NONFINITE) return -1;
    if (strcmp(error->rule, RKVI_RULE_MEANS) == 0) return 0;
    if (error->token < 0) return -1;
    position = error->token + cache->evicted;
    if (strcmp(error->rule, RKVI_RULE_QUERY) == 0) {
        if (cache->plan.query_bytes == 0) return -1;
        votes = cache->config.compress.votes;
        last = rkv_cache_position(cache, 0) - 1;
        position = last - (last - error->token % votes + votes) % votes;
    }
    return position < rkvi_cache_first_position(cache) ? 0 : position;
}

RKV_API rkv_status rkv_cache_truncate(rkv_cache *cache, int position)
{
    int l, rows;
    if (cache == NULL) return RKV_ERROR_NULL;
    rkvi_clear_error(&cache->config.compress);
    if (position == 0) {
        rkvi_cache_empty(cache);
        return RKV_OK;
    }
    if (position < rkvi_cache_first_position(cache))
        return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT,
                                 "position: further back than truncation reaches", -1);
    rows = position - cache->evicted;
    cache->settled = rkvi_min(cache->settled, rows);
    for (l = 0; l < cache->config.n_layers; l++) {
        const int n_dropped = cache->layers[l].n_tokens - rows;
        if (n_dropped <= 0) continue;
        cache->layers[l].n_tokens = rows;
        cache->n_queries[l] -= n_dropped < cache->n_queries[l] ? n_dropped : cache->n_queries[l];
    }
    return RKV_OK;
}

/* ---- Fork ---- */

/* All sets of positions as a tensor of 4-byte elements, to be copied like any other. */
static rkv_tensor rkvi_cache_position_view(const rkv_cache *cache)
{
    return rkv_tensor_make(cache->positions, RKV_F32, cache->plan.n_sets, cache->config.capacity,
                           1);
}

/* The carried state of a layer as a tensor: a row's floats lie `capacity` apart. */
static rkv_tensor rkvi_cache_state_view(const rkv_cache *cache, int layer)
{
    const int capacity = cache->config.capacity, n_planes = cache->plan.n_planes;
    rkv_tensor view = rkv_tensor_make(cache->layers[layer].state, RKV_F32, cache->config.kv_heads,
                                      capacity, n_planes);
    view.head_stride = (int64_t)n_planes * capacity;
    view.token_stride = 1;
    view.dim_stride = capacity;
    return view;
}

/* What a policy carries beside the rows. */
static rkv_status rkvi_cache_copy_carried(const rkv_cache *dst, const rkv_cache *src, int layer)
{
    const rkv_backend *backend = src->config.backend;
    rkv_status status = RKV_OK;
    if (src->plan.query_bytes > 0)
        status = backend->copy_rows(backend, &dst->layers[layer].queries, 0,
                                    &src->layers[layer].queries, 0, src->config.compress.votes);
    if (status == RKV_OK && src->settled > 0) {
        const rkv_tensor to = rkvi_cache_state_view(dst, layer);
        const rkv_tensor from = rkvi_cache_state_view(src, layer);
        status = backend->copy_rows(backend, &to, 0, &from, 0, src->settled);
    }
    if (status == RKV_OK && src->plan.mean_bytes > 0)
        status = backend->copy(backend, rkvi_cache_means(dst, layer), rkvi_cache_means(src, layer),
                               src->plan.mean_bytes);
    return status;
}

static rkv_status rkvi_cache_copy_layer(const rkv_cache *dst, const rkv_cache *src, int layer)
{
    const rkv_backend *backend = src->config.backend;
    const rkv_layer *to = &dst->layers[layer], *from = &src->layers[layer];
    rkv_status status = RKV_OK;
    if (from->n_tokens > 0)
        status = backend->copy_rows(backend, &to->keys, 0, &from->keys, 0, from->n_tokens);
    if (status == RKV_OK && from->n_tokens > 0)
        status = backend->copy_rows(backend, &to->values, 0, &from->values, 0, from->n_tokens);
    return status == RKV_OK ? rkvi_cache_copy_carried(dst, src, layer) : status;
}

RKV_API rkv_status rkv_cache_fork(const rkv_cache *cache, rkv_cache **out)
{
    rkv_cache_config config;
    rkv_cache *fork;
    rkv_tensor to, from;
    rkv_status status;
    int l, n_rows;
    if (cache != NULL && out == NULL)
        return rkvi_cache_refuse(cache, RKV_ERROR_NULL, "out: is NULL", -1);
    if (out == NULL) return RKV_ERROR_NULL;
    *out = NULL;
    if (cache == NULL) return RKV_ERROR_NULL;
    config = cache->config;
    if (rkvi_cache_device_error(cache) != NULL) config.compress.device_error = NULL;
    status = rkv_cache_create(&fork, &config); /* writes errors to the parent's record */
    if (status != RKV_OK) return status;
    if (config.compress.error == &cache->error) fork->config.compress.error = &fork->error;
    to = rkvi_cache_position_view(fork);
    from = rkvi_cache_position_view(cache);
    n_rows = rkvi_cache_most_rows(cache);
    if (n_rows > 0)
        status = cache->config.backend->copy_rows(cache->config.backend, &to, 0, &from, 0, n_rows);
    for (l = 0; l < cache->config.n_layers && status == RKV_OK; l++) {
        status = rkvi_cache_copy_layer(fork, cache, l);
        fork->layers[l].n_tokens = cache->layers[l].n_tokens;
        fork->n_queries[l] = cache->n_queries[l];
    }
    if (status != RKV_OK) {
        rkv_cache_destroy(fork);
        return rkvi_cache_refuse(cache, status, "cache: the device refused a copy", -1);
    }
    fork->evicted = cache->evicted;
    fork->settled = cache->settled;
    fork->rounds = cache->rounds;
    *out = fork;
    return RKV_OK;
}

/* ---- Save and load ----
 * The image, every number little-endian, no padding:
 *     "RKVCACHE"                                                      8 bytes
 *     shape: version, layers, ... see rkvi_image_shape                RKVI_IMAGE_SHAPE x u32
 *     rounds, evicted, settled                                        3 x u64
 *     rows, n_queries                                                 [layer] 2 x u32
 *     positions of the first `fixed` rows                             [set][fixed] u32
 *     state of the settled rows                         [layer][kv_head][float][settled] f32
 *     means of the queries (zero in a layer without tokens)           [layer][floats] f32
 *     keys, values, query ring (stale slots zero)                     [layer], rows in use
 *     checksum of all bytes before                                    u64 */

#define RKVI_IMAGE_VERSION 3
#define RKVI_IMAGE_SHAPE   15
#define RKVI_IMAGE_COUNTS  (8 + 4 * RKVI_IMAGE_SHAPE) /* where rounds, evicted and settled lie */
#define RKVI_IMAGE_LAYERS  (RKVI_IMAGE_COUNTS + 24)   /* where the layers' counters lie */

static void rkvi_image_put(unsigned char *image, uint64_t value, int n_bytes)
{
    int i;
    for (i = 0; i < n_bytes; i++) image[i] = (unsigned char)(value >> (8 * i) & 0xff);
}

static uint64_t rkvi_image_get(const unsigned char *image, int n_bytes)
{
    uint64_t value = 0;
    int i;
    for (i = 0; i < n_bytes; i++) value |= (uint64_t)image[i] << (8 * i);
    return value;
}

static int rkvi_host_is_little_endian(void)
{
    const uint16_t one = 1;
    return *(const unsigned char *)&one == 1;
}

/* For a given word a bijection of the sum, for a given sum one of the word. */
static uint64_t rkvi_checksum_step(uint64_t sum, uint64_t word)
{
    sum ^= word;
    return (sum << 29 | sum >> 35) * UINT64_C(0x9e3779b97f4a7c15);
}

/* Four sums over 8-byte words in turn, at the speed of memory, then one over these and the rest.
 * All steps are bijections, so any single damaged word is noticed. */
static uint64_t rkvi_image_checksum(const unsigned char *image, size_t bytes)
{
    uint64_t sum[4] = { 1, 2, 3, 4 }, word, total = bytes;
    size_t at = 0;
    int i;
    for (; bytes - at >= 32; at += 32)
        for (i = 0; i < 4; i++) {
            memcpy(&word, image + at + 8 * i, 8);
            if (!rkvi_host_is_little_endian()) word = rkvi_image_get(image + at + 8 * i, 8);
            sum[i] = rkvi_checksum_step(sum[i], word);
        }
    for (i = 0; i < 4; i++) total = rkvi_checksum_step(total, sum[i]);
    for (; at < bytes; at++) total = rkvi_checksum_step(total, image[at]);
    return total;
}

/* What must be equal in the image and in the cache that loads it. */
static void rkvi_image_shape(const rkv_cache *cache, uint32_t shape[RKVI_IMAGE_SHAPE])
{
    const rkv_cache_config *config = &cache->config;
    shape[0] = RKVI_IMAGE_VERSION;
    shape[1] = (uint32_t)config->n_layers;
    shape[2] = (uint32_t)config->kv_heads;
    shape[3] = (uint32_t)config->query_heads;
    shape[4] = (uint32_t)config->head_dim;
    shape[5] = (uint32_t)config->value_dim;
    shape[6] = (uint32_t)config->dtype;
    shape[7] = (uint32_t)config->compress.budget;
    shape[8] = (uint32_t)config->compress.window;
    shape[9] = (uint32_t)config->compress.pinned;
    shape[10] = (uint32_t)config->compress.scope;
    shape[11] = (uint32_t)config->compress.protect;
    shape[12] = cache->plan.query_bytes > 0;
    shape[13] = (uint32_t)config->compress.policy;
    shape[14] = (uint32_t)config->compress.votes;
}

static size_t rkvi_image_header_bytes(const rkv_cache *cache)
{
    return RKVI_IMAGE_LAYERS + 8 * (size_t)cache->config.n_layers;
}

/* The counters of an image, and what follows from them. */
typedef struct rkvi_image_counts {
    int64_t rounds;
    int evicted, settled, fixed_rows;
    size_t total_rows; /* of all layers */
} rkvi_image_counts;

/* Floats of a layer's means that last: up to the count. */
static size_t rkvi_image_means(const rkv_cache *cache)
{
    if (cache->plan.mean_bytes == 0) return 0;
    return rkvi_count_at(cache->config.query_heads, cache->config.head_dim) + 1;
}

static size_t rkvi_image_positions_bytes(const rkv_cache *cache, const rkvi_image_counts *counts)
{
    return 4 * (size_t)cache->plan.n_sets * (size_t)counts->fixed_rows;
}

/* Of all layers. */
static size_t rkvi_image_state_bytes(const rkv_cache *cache, const rkvi_image_counts *counts)
{
    return (size_t)cache->config.n_layers * (size_t)cache->config.kv_heads *
           (size_t)cache->plan.n_planes * (size_t)counts->settled * sizeof(float);
}

/* No part is larger than the memory it is copied from, so no sum overflows. */
static size_t rkvi_image_size(const rkv_cache *cache, const rkvi_image_counts *counts)
{
    const size_t n_layers = (size_t)cache->config.n_layers;
    return rkvi_image_header_bytes(cache) + rkvi_image_positions_bytes(cache, counts) +
           rkvi_image_state_bytes(cache, counts) +
           n_layers * sizeof(float) * rkvi_image_means(cache) +
           counts->total_rows * rkvi_cache_token_bytes(cache) + n_layers * cache->plan.query_bytes +
           8;
}

RKV_API size_t rkv_cache_save_size(const rkv_cache *cache)
{
    rkvi_image_counts counts;
    int l;
    if (cache == NULL) return 0;
    counts.rounds = cache->rounds;
    counts.evicted = cache->evicted;
    counts.fixed_rows = rkvi_cache_fixed_rows(&cache->config, cache->evicted);
    counts.settled = cache->settled;
    counts.total_rows = 0;
    for (l = 0; l < cache->config.n_layers; l++)
        counts.total_rows += (size_t)cache->layers[l].n_tokens;
    return rkvi_image_size(cache, &counts);
}

static void rkvi_image_write_header(const rkv_cache *cache, unsigned char *image)
{
    uint32_t shape[RKVI_IMAGE_SHAPE];
    int i;
    memcpy(image, "RKVCACHE", 8);
    rkvi_image_shape(cache, shape);
    for (i = 0; i < RKVI_IMAGE_SHAPE; i++) rkvi_image_put(image + 8 + 4 * i, shape[i], 4);
    rkvi_image_put(image + RKVI_IMAGE_COUNTS, (uint64_t)cache->rounds, 8);
    rkvi_image_put(image + RKVI_IMAGE_COUNTS + 8, (uint64_t)cache->evicted, 8);
    rkvi_image_put(image + RKVI_IMAGE_COUNTS + 16, (uint64_t)cache->settled, 8);
    image += RKVI_IMAGE_LAYERS;
    for (i = 0; i < cache->config.n_layers; i++, image += 8) {
        rkvi_image_put(image, (uint64_t)cache->layers[i].n_tokens, 4);
        rkvi_image_put(image + 4, (uint64_t)cache->n_queries[i], 4);
    }
}

/* The position of a transfer: `out` when saving, `in` when loading; the other is NULL. */
typedef struct rkvi_image_cursor {
    unsigned char *out;
    const unsigned char *in;
} rkvi_image_cursor;

/* Swaps the bytes of each number; of q8_0 the scale alone has two. */
static void rkvi_image_swap(unsigned char *rows, size_t bytes, rkv_dtype dtype)
{
    const size_t element = rkvi_dtype_bytes(dtype), number = dtype == RKV_Q8_0 ? 2 : element;
    size_t at, i;
    for (at = 0; at < bytes; at += element)
        for (i = 0; i < number / 2; i++) {
            const unsigned char low = rows[at + i];
            rows[at + i] = rows[at + number - 1 - i];
            rows[at + number - 1 - i] = low;
        }
}

/* Big-endian hosts: swaps through a small buffer, which holds whole elements of any type. */
static rkv_status rkvi_image_load_swapped(const rkv_backend *backend, unsigned char *rows,
                                          const unsigned char *image, size_t bytes, rkv_dtype dtype)
{
    unsigned char swapped[4 * RKVI_Q8_0_BYTES * 8];
    while (bytes > 0) {
        const size_t part = bytes < sizeof(swapped) ? bytes : sizeof(swapped);
        rkv_status status;
        memcpy(swapped, image, part);
        rkvi_image_swap(swapped, part, dtype);
        status = backend->copy(backend, rows, swapped, part);
        if (status != RKV_OK) return status;
        rows += part;
        image += part;
        bytes -= part;
    }
    return RKV_OK;
}

/* Copies `bytes` bytes of the backend's memory to or from the image and advances the cursor. */
static rkv_status rkvi_image_transfer(const rkv_backend *backend, rkvi_image_cursor *cursor,
                                      void *rows, size_t bytes, rkv_dtype dtype)
{
    rkv_status status;
    if (bytes == 0) return RKV_OK;
    if (cursor->in != NULL) {
        const unsigned char *image = cursor->in;
        cursor->in += bytes;
        if (rkvi_host_is_little_endian()) return backend->copy(backend, rows, image, bytes);
        return rkvi_image_load_swapped(backend, (unsigned char *)rows, image, bytes, dtype);
    }
    status = backend->copy(backend, cursor->out, rows, bytes);
    if (status == RKV_OK && !rkvi_host_is_little_endian())
        rkvi_image_swap(cursor->out, bytes, dtype);
    cursor->out += bytes;
    return status;
}

/* The rows in use of every head of keys or values. */
static rkv_status rkvi_image_transfer_rows(const rkv_backend *backend, rkvi_image_cursor *cursor,
                                           const rkv_tensor *reserved, int n_tokens)
{
    const size_t row_bytes = rkvi_dtype_bytes(reserved->dtype) * rkvi_row_elements(reserved);
    unsigned char *head = (unsigned char *)reserved->data;
    int h;
    for (h = 0; h < reserved->heads; h++, head += row_bytes * (size_t)reserved->tokens) {
        rkv_status status = rkvi_image_transfer(backend, cursor, head, row_bytes * (size_t)n_tokens,
                                                reserved->dtype);
        if (status != RKV_OK) return status;
    }
    return RKV_OK;
}

/* Writes zeros over ring slots that are not in use, so that no stray memory gets into a file and
 * equal caches make equal images. `ring` is the layer's ring in the image. */
static void rkvi_image_blank_stale(const rkv_cache *cache, int layer, unsigned char *ring)
{
    const int votes = cache->config.compress.votes;
    const int n_stale = votes - cache->n_queries[layer];
    const int next = rkv_cache_position(cache, layer) % votes; /* the oldest slot */
    const size_t row_bytes =
        cache->plan.query_bytes / (size_t)cache->config.query_heads / (size_t)votes;
    int h, i;
    for (h = 0; h < cache->config.query_heads; h++, ring += row_bytes * (size_t)votes)
        for (i = 0; i < n_stale; i++) {
            const int slot = i < votes - next ? next + i : next + i - votes;
            memset(ring + row_bytes * (size_t)slot, 0, row_bytes);
        }
}

static rkv_status rkvi_image_transfer_ring(const rkv_cache *cache, rkvi_image_cursor *cursor,
                                           int layer)
{
    const rkv_backend *backend = cache->config.backend;
    unsigned char *out = cursor->out;
    rkv_status status =
        rkvi_image_transfer(backend, cursor, cache->layers[layer].queries.data,
                            cache->plan.query_bytes, rkvi_cache_query_dtype(&cache->config));
    if (status == RKV_OK && out != NULL && cache->plan.query_bytes > 0)
        rkvi_image_blank_stale(cache, layer, out);
    return status;
}

/* The first n of every `capacity` numbers of 4 bytes each, n_sets times. */
static rkv_status rkvi_image_transfer_sets(const rkv_cache *cache, rkvi_image_cursor *cursor,
                                           void *sets, size_t n_sets, int n)
{
    unsigned char *set = (unsigned char *)sets;
    rkv_status status = RKV_OK;
    for (; n_sets > 0 && status == RKV_OK; n_sets--, set += 4 * (size_t)cache->config.capacity)
        status = rkvi_image_transfer(cache->config.backend, cursor, set, 4 * (size_t)n, RKV_F32);
    return status;
}

/* The means of a layer that never had a token are undefined; the first append clears them. */
static rkv_status rkvi_image_transfer_means(const rkv_cache *cache, rkvi_image_cursor *cursor,
                                            int layer)
{
    const size_t bytes = sizeof(float) * rkvi_image_means(cache);
    if (bytes > 0 && cursor->out != NULL && rkv_cache_position(cache, layer) == 0) {
        memset(cursor->out, 0, bytes);
        cursor->out += bytes;
        return RKV_OK;
    }
    return rkvi_image_transfer(cache->config.backend, cursor, rkvi_cache_means(cache, layer), bytes,
                               RKV_F32);
}

/* Everything between the counters and the checksum. */
static rkv_status rkvi_image_transfer_body(const rkv_cache *cache, rkvi_image_cursor *cursor)
{
    const rkv_backend *backend = cache->config.backend;
    const size_t n_planes = (size_t)cache->config.kv_heads * (size_t)cache->plan.n_planes;
    const int fixed_rows = rkvi_cache_fixed_rows(&cache->config, cache->evicted);
    rkv_status status = rkvi_image_transfer_sets(cache, cursor, cache->positions,
                                                 (size_t)cache->plan.n_sets, fixed_rows);
    int l;
    for (l = 0; l < cache->config.n_layers && status == RKV_OK; l++)
        status = rkvi_image_transfer_sets(cache, cursor, cache->layers[l].state, n_planes,
                                          cache->settled);
    for (l = 0; l < cache->config.n_layers && status == RKV_OK; l++)
        status = rkvi_image_transfer_means(cache, cursor, l);
    for (l = 0; l < cache->config.n_layers && status == RKV_OK; l++) {
        const rkv_layer *layer = &cache->layers[l];
        status = rkvi_image_transfer_rows(backend, cursor, &layer->keys, layer->n_tokens);
        if (status == RKV_OK)
            status = rkvi_image_transfer_rows(backend, cursor, &layer->values, layer->n_tokens);
        if (status == RKV_OK) status = rkvi_image_transfer_ring(cache, cursor, l);
    }
    return status == RKV_OK ? backend->synchronize(backend) : status;
}

RKV_API rkv_status rkv_cache_save(const rkv_cache *cache, void *memory, size_t bytes)
{
    rkvi_image_cursor cursor;
    unsigned char *image = (unsigned char *)memory;
    const size_t size = rkv_cache_save_size(cache);
    rkv_status status;
    if (cache == NULL) return RKV_ERROR_NULL;
    if (memory == NULL) return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT, "memory: is NULL", -1);
    if (bytes < size)
        return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT, "bytes: less than rkv_cache_save_size",
                                 -1);
    rkvi_image_write_header(cache, image);
    cursor.in = NULL;
    cursor.out = image + rkvi_image_header_bytes(cache);
    status = rkvi_image_transfer_body(cache, &cursor);
    if (status == RKV_OK) rkvi_image_put(cursor.out, rkvi_image_checksum(image, size - 8), 8);
    return rkvi_cache_result(cache, status, "cache: the device refused a copy", -1);
}

/* The rule for each number of rkvi_image_shape. */
static const char *const rkvi_image_shape_rules[RKVI_IMAGE_SHAPE] = {
    "memory: a snapshot of another version of rkv.h",
    "memory: a snapshot of a cache with another number of layers",
    "memory: a snapshot of a cache with another number of KV heads",
    "memory: a snapshot of a cache with another number of query heads",
    "memory: a snapshot of a cache with another head dim",
    "memory: a snapshot of a cache with another value dim",
    "memory: a snapshot of a cache with another dtype",
    "memory: a snapshot of a cache with another budget",
    "memory: a snapshot of a cache with another window",
    "memory: a snapshot of a cache with another number of pinned tokens",
    "memory: a snapshot of a cache with another scope",
    "memory: a snapshot of a cache with another number of protected tokens",
    "memory: a snapshot of a cache that keeps queries, or does not",
    "memory: a snapshot of a cache with another policy",
    "memory: a snapshot of a cache with another number of votes"
};

static const char *rkvi_image_shape_rule(const rkv_cache *cache, const unsigned char *image)
{
    uint32_t shape[RKVI_IMAGE_SHAPE];
    int i;
    if (memcmp(image, "RKVCACHE", 8) != 0) return "memory: no snapshot of rkv_cache_save";
    rkvi_image_shape(cache, shape);
    for (i = 0; i < RKVI_IMAGE_SHAPE; i++)
        if (rkvi_image_get(image + 8 + 4 * i, 4) != shape[i]) return rkvi_image_shape_rules[i];
    return NULL;
}

/* Can these rows have been settled? *counts holds the other counters already. */
static int rkvi_image_can_settle(const rkv_cache *cache, const rkvi_image_counts *counts,
                                 uint64_t settled)
{
    if (!rkvi_cache_carries_state(cache) || counts->rounds == 0) return settled == 0;
    return settled >= (uint64_t)counts->fixed_rows &&
           settled <= (uint64_t)cache->config.compress.budget;
}

/* The rule that the counters of one layer break. */
static const char *rkvi_image_layer_rule(const rkv_cache *cache, const unsigned char *image,
                                         const rkvi_image_counts *counts)
{
    const uint64_t rows = rkvi_image_get(image, 4), n_queries = rkvi_image_get(image + 4, 4);
    const int votes = cache->plan.query_bytes > 0 ? cache->config.compress.votes : 0;
    if (rows + (uint64_t)counts->evicted > INT32_MAX || rows < (uint64_t)counts->fixed_rows ||
        rows < (uint64_t)counts->settled || n_queries > (uint64_t)votes ||
        n_queries > rows + (uint64_t)counts->evicted)
        return "memory: a damaged snapshot, its counters are impossible";
    if (rows > (uint64_t)cache->config.capacity)
        return "memory: a snapshot of more rows than the cache's capacity";
    if (rkvi_cache_missing(cache, (int)n_queries, (int)rows - counts->settled,
                           (int)rows - counts->fixed_rows) > cache->config.capacity - (int)rows)
        return "memory: no room for the queries that the snapshot still lacks";
    return NULL;
}

static const char *rkvi_image_counts_rule(const rkv_cache *cache, const unsigned char *image,
                                          rkvi_image_counts *counts)
{
    const uint64_t rounds = rkvi_image_get(image + RKVI_IMAGE_COUNTS, 8);
    const uint64_t evicted = rkvi_image_get(image + RKVI_IMAGE_COUNTS + 8, 8);
    const uint64_t settled = rkvi_image_get(image + RKVI_IMAGE_COUNTS + 16, 8);
    int l;
    if (evicted > INT32_MAX || rounds > evicted || (rounds == 0) != (evicted == 0))
        return "memory: a damaged snapshot, its rounds are impossible";
    counts->rounds = (int64_t)rounds;
    counts->evicted = (int)evicted;
    counts->fixed_rows = rkvi_cache_fixed_rows(&cache->config, counts->evicted);
    counts->total_rows = 0;
    if (!rkvi_image_can_settle(cache, counts, settled))
        return "memory: a damaged snapshot, its settled rows are impossible";
    counts->settled = (int)settled;
    image += RKVI_IMAGE_LAYERS;
    for (l = 0; l < cache->config.n_layers; l++, image += 8) {
        const char *rule = rkvi_image_layer_rule(cache, image, counts);
        if (rule) return rule;
        counts->total_rows += (size_t)rkvi_image_get(image, 4);
    }
    return NULL;
}

/* The first fixed rows of every set: pinned ones in their places, ascending, all older than the
 * protected tokens of the last round. */
static const char *rkvi_image_positions_rule(const rkv_cache *cache, const unsigned char *image,
                                             const rkvi_image_counts *counts)
{
    const int64_t end = (int64_t)counts->evicted + counts->fixed_rows;
    int s, row;
    for (s = 0; s < cache->plan.n_sets; s++) {
        int64_t before = -1;
        for (row = 0; row < counts->fixed_rows; row++, image += 4) {
            const int64_t position = (int64_t)rkvi_image_get(image, 4);
            if (position >= end || position <= before ||
                (row < cache->config.compress.pinned && position != row))
                return "memory: a damaged snapshot, its positions are impossible";
            before = position;
        }
    }
    return NULL;
}

/* Are these n floats finite, of at most this magnitude, and, where asked for, not negative? */
static int rkvi_image_floats_are_sound(const unsigned char *image, size_t n, float most,
                                       int is_signed)
{
    const uint32_t most_bits = rkvi_bits_from_float(most), sign = 0x80000000u;
    for (; n > 0; n--, image += 4) {
        const uint32_t bits = (uint32_t)rkvi_image_get(image, 4);
        if ((bits & ~sign) > most_bits || (!is_signed && bits > sign)) return 0;
    }
    return 1;
}

/* The state and the means, which lie together. Numbers that no round can leave would make later
 * ones fail, and no truncation would help. A mean is no larger than the largest query. */
static const char *rkvi_image_carried_rule(const rkv_cache *cache, const unsigned char *image,
                                           const rkvi_image_counts *counts)
{
    const size_t state_bytes = rkvi_image_state_bytes(cache, counts);
    const size_t n_means = rkvi_image_means(cache);
    int l;
    if (!rkvi_image_floats_are_sound(image, state_bytes / sizeof(float), FLT_MAX, 0))
        return "memory: a damaged snapshot, its state is impossible";
    image += state_bytes;
    for (l = 0; l < cache->config.n_layers && n_means > 0; l++, image += 4 * n_means)
        if (!rkvi_image_floats_are_sound(image, n_means, 1.001e18f, 1) ||
            !rkvi_image_floats_are_sound(image + 4 * (n_means - 1), 1, FLT_MAX, 0))
            return "memory: a damaged snapshot, its means are impossible";
    return NULL;
}

static const char *rkvi_image_rule(const rkv_cache *cache, const unsigned char *image, size_t bytes,
                                   rkvi_image_counts *counts)
{
    const size_t header_bytes = rkvi_image_header_bytes(cache);
    const char *rule;
    if (image == NULL) return "memory: is NULL";
    if (bytes < 8 + 4 * RKVI_IMAGE_SHAPE) return "bytes: too few for a snapshot";
    rule = rkvi_image_shape_rule(cache, image);
    if (rule) return rule;
    if (bytes < header_bytes + 8) return "bytes: too few for a snapshot of this cache";
    rule = rkvi_image_counts_rule(cache, image, counts);
    if (rule) return rule;
    if (bytes != rkvi_image_size(cache, counts)) return "bytes: not the size of this snapshot";
    if (rkvi_image_get(image + bytes - 8, 8) != rkvi_image_checksum(image, bytes - 8))
        return "memory: a damaged snapshot, its checksum differs";
    image += header_bytes;
    rule = rkvi_image_positions_rule(cache, image, counts);
    if (rule) return rule;
    return rkvi_image_carried_rule(cache, image + rkvi_image_positions_bytes(cache, counts),
                                   counts);
}

static void rkvi_image_apply_counts(rkv_cache *cache, const unsigned char *image,
                                    const rkvi_image_counts *counts)
{
    int l;
    cache->rounds = counts->rounds;
    cache->evicted = counts->evicted;
    cache->settled = counts->settled;
    image += RKVI_IMAGE_LAYERS;
    for (l = 0; l < cache->config.n_layers; l++, image += 8) {
        cache->layers[l].n_tokens = (int)rkvi_image_get(image, 4);
        cache->n_queries[l] = (int)rkvi_image_get(image + 4, 4);
    }
}

RKV_API rkv_status rkv_cache_load(rkv_cache *cache, const void *memory, size_t bytes)
{
    const unsigned char *image = (const unsigned char *)memory;
    rkvi_image_counts counts;
    rkvi_image_cursor cursor;
    rkv_status status = RKV_OK;
    const char *rule;
    int l;
    if (cache == NULL) return RKV_ERROR_NULL;
    rule = rkvi_image_rule(cache, image, bytes, &counts);
    if (rule) return rkvi_cache_refuse(cache, RKV_ERROR_ARGUMENT, rule, -1);
    rkvi_image_apply_counts(cache, image, &counts);
    for (l = 0; l < cache->config.n_layers && status == RKV_OK; l++)
        status = rkvi_cache_fill(cache, l, counts.fixed_rows,
                                 cache->layers[l].n_tokens - counts.fixed_rows);
    cursor.out = NULL;
    cursor.in = image + rkvi_image_header_bytes(cache);
    if (status == RKV_OK) status = rkvi_image_transfer_body(cache, &cursor);
    if (status != RKV_OK) rkvi_cache_empty(cache); /* half of the old rows are overwritten */
    return rkvi_cache_result(cache, status, "cache: the device refused a copy", -1);
}
#endif /* RKV_NO_CACHE */

/* ==== 23. Thread pool =======================================================================
 * In: a task and a count.  Out: every index done once.  Knows nothing of caches.
 * Workers sleep until a call offers indices; the caller takes indices too. A task is a whole KV
 * head, so a lock per task costs nothing, and C99 has no atomics. */
#ifdef RKV_PTHREADS
struct rkv_threads {
    pthread_mutex_t turn;  /* held for a whole call: calls from several threads queue */
    pthread_mutex_t mutex; /* guards all that follows */
    pthread_cond_t wake;   /* there are indices to take, or it is time to stop */
    pthread_cond_t done;   /* n_unfinished has become 0 */
    void (*task)(void *arg, int index);
    void *arg;
    int next, n_tasks, n_unfinished;
    int stop;
    int n_workers;      /* the caller is one thread more */
    pthread_t *workers; /* [n_workers] */
    pid_t process;      /* of the workers: a child of fork() has none of them */
};

/* Runs tasks until no index is left. The mutex is held on entry and on return. */
static void rkvi_threads_run(rkv_threads *threads)
{
    while (threads->next < threads->n_tasks) {
        void (*task)(void *, int) = threads->task;
        void *arg = threads->arg;
        const int index = threads->next++;
        pthread_mutex_unlock(&threads->mutex);
        task(arg, index);
        pthread_mutex_lock(&threads->mutex);
        if (--threads->n_unfinished == 0) pthread_cond_signal(&threads->done);
    }
}

static void *rkvi_threads_worker(void *handle)
{
    rkv_threads *threads = (rkv_threads *)handle;
    pthread_mutex_lock(&threads->mutex);
    while (!threads->stop) {
        rkvi_threads_run(threads);
        if (!threads->stop) pthread_cond_wait(&threads->wake, &threads->mutex);
    }
    pthread_mutex_unlock(&threads->mutex);
    return NULL;
}

static void rkvi_threads_for(void *handle, int n_tasks, void (*task)(void *arg, int index),
                             void *arg)
{
    rkv_threads *threads = (rkv_threads *)handle;
    if (n_tasks < 1) return;
    pthread_mutex_lock(&threads->turn);
    pthread_mutex_lock(&threads->mutex);
    threads->task = task;
    threads->arg = arg;
    threads->next = 0;
    threads->n_tasks = threads->n_unfinished = n_tasks;
    if (n_tasks > 1) pthread_cond_broadcast(&threads->wake);
    rkvi_threads_run(threads);
    while (threads->n_unfinished > 0) pthread_cond_wait(&threads->done, &threads->mutex);
    pthread_mutex_unlock(&threads->mutex);
    pthread_mutex_unlock(&threads->turn);
}

/* Initialises all four; on a failure destroys those that it has made. */
static int rkvi_threads_init_locks(rkv_threads *threads)
{
    if (pthread_mutex_init(&threads->turn, NULL) != 0) return 0;
    if (pthread_mutex_init(&threads->mutex, NULL) == 0) {
        if (pthread_cond_init(&threads->wake, NULL) == 0) {
            if (pthread_cond_init(&threads->done, NULL) == 0) return 1;
            pthread_cond_destroy(&threads->wake);
        }
        pthread_mutex_destroy(&threads->mutex);
    }
    pthread_mutex_destroy(&threads->turn);
    return 0;
}

RKV_API rkv_status rkv_threads_create(rkv_threads **out, int n_threads)
{
    rkv_threads *threads;
    size_t bytes;
    if (out == NULL) return RKV_ERROR_NULL;
    *out = NULL;
    if (n_threads < 1) n_threads = 1;
    if (!rkvi_mul_size((size_t)n_threads, sizeof(pthread_t), &bytes) ||
        !rkvi_add_size(bytes, sizeof(rkv_threads), &bytes))
        return RKV_ERROR_MEMORY;
    threads = (rkv_threads *)calloc(1, bytes);
    if (threads == NULL) return RKV_ERROR_MEMORY;
    if (!rkvi_threads_init_locks(threads)) {
        free(threads);
        return RKV_ERROR_MEMORY;
    }
    threads->process = getpid();
    threads->workers = (pthread_t *)(void *)(threads + 1); /* room for n_threads - 1, and more */
    while (threads->n_workers < n_threads - 1) {
        pthread_t *worker = &threads->workers[threads->n_workers];
        if (pthread_create(worker, NULL, rkvi_threads_worker, threads) != 0) {
            rkv_threads_destroy(threads);
            return RKV_ERROR_MEMORY;
        }
        threads->n_workers++;
    }
    *out = threads;
    return RKV_OK;
}

RKV_API void rkv_threads_destroy(rkv_threads *threads)
{
    int i;
    if (threads == NULL) return;
    if (threads->process != getpid()) {
        free(threads);
        return;
    }
    pthread_mutex_lock(&threads->mutex);
    threads->stop = 1;
    pthread_cond_broadcast(&threads->wake);
    pthread_mutex_unlock(&threads->mutex);
    for (i = 0; i < threads->n_workers; i++) pthread_join(threads->workers[i], NULL);
    pthread_cond_destroy(&threads->done);
    pthread_cond_destroy(&threads->wake);
    pthread_mutex_destroy(&threads->mutex);
    pthread_mutex_destroy(&threads->turn);
    free(threads);
}

RKV_API void rkv_threads_use(rkv_threads *threads, rkv_config *config)
{
    if (config == NULL) return;
    config->n_threads = threads == NULL ? 1 : threads->n_workers + 1;
    config->parallel_for = threads == NULL ? NULL : rkvi_threads_for;
    config->pool_handle = threads;
}
#endif /* RKV_PTHREADS */

#ifdef RKVI_FLOAT_CONTROL
#pragma float_control(pop)
#endif
#endif /* RKV_IMPLEMENTED */
#endif /* RKV_IMPLEMENTATION */

/* ==== 24. Licence ============================================================================
 * rkv is available under either of the two licences below, whichever you prefer.
 *
 * ------------------------------------------------------------------------------
 * Alternative A - MIT License
 *
 * Copyright (c) 2026 rkv authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of
 * this software and associated documentation files (the "Software"), to deal in
 * the Software without restriction, including without limitation the rights to
 * use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
 * of the Software, and to permit persons to whom the Software is furnished to do
 * so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 *
 * ------------------------------------------------------------------------------
 * Alternative B - Public Domain (www.unlicense.org)
 *
 * This is free and unencumbered software released into the public domain.
 *
 * Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
 * software, either in source code form or as a compiled binary, for any purpose,
 * commercial or non-commercial, and by any means.
 *
 * In jurisdictions that recognize copyright laws, the author or authors of this
 * software dedicate any and all copyright interest in the software to the public
 * domain. We make this dedication for the benefit of the public at large and to
 * the detriment of our heirs and successors. We intend this dedication to be an
 * overt act of relinquishment in perpetuity of all present and future rights to
 * this software under copyright law.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
 * ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
 * WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
