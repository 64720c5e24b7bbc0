/* What every test shares: checks and counters, a seeded generator, number formats, guarded memory,
 * cache layouts, keys of many kinds, and jobs (one rkv_layer with all its buffers).
 * Linked into each test by `make test`; knows rkv.h's public half only. */
#ifndef RKV_TESTS_HARNESS_H
#define RKV_TESTS_HARNESS_H

#include <stddef.h>
#include <stdint.h>

#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "rkv.h"

/* ---- checks ---------------------------------------------------------------------------------
 * A case begins with a name that says how to run it again; it passes when no check in it failed.
 * Each check prints one line on failure (the first few of a case) and returns 1 when it held. */
void case_begin(const char *format, ...);
void case_end(void);
const char *case_text(void);             /* the name of the case under way */
void case_fail(const char *format, ...); /* what no expect_ can say */
int expect_true(const char *at, int holds);
int expect_int(const char *at, int i, int64_t got, int64_t want);
int expect_near(const char *at, int i, double got, double want, double tolerance);
int expect_bytes(const char *at, const void *got, const void *want, size_t bytes);
int expect_status(const char *at, rkv_status got, rkv_status want);
/* Every field, none of the padding. */
int expect_same_config(const char *at, const rkv_config *got, const rkv_config *want);
int expect_same_layer(const char *at, const rkv_layer *got, const rkv_layer *want);
void skip(const char *format, ...);
int cases_failed(void);
int close_tests(void); /* prints the closing line; returns the exit status */

/* Prints a skip for every CPU path that cannot run here, fails for those named in $EXPECT, and
 * lists the usable ones, the best first. */
enum { MAX_BACKENDS = 8 };
uint64_t wanted_cases(uint64_t usual); /* RKV_TEST_CASES, or else as usual */
int usable_backends(const rkv_backend *list[MAX_BACKENDS]);

/* ---- memory ---------------------------------------------------------------------------------
 * alloc_checked ends the program when memory is short. A block is `bytes` of memory between
 * guards, with a remembered image. With rear_guard 0 it ends where the allocation ends, so that
 * a sanitizer sees what lies behind it. */
void *alloc_checked(size_t bytes);
typedef struct block {
    unsigned char *base, *data, *image;
    size_t bytes, total;
} block;
void block_make(block *b, size_t bytes, size_t misalign, int rear_guard);
void block_free(block *b);
void block_remember(block *b);
void block_restore(block *b);
int block_unchanged(const char *at, const block *b); /* contents and guards as remembered */
int block_guards(const char *at, const block *b);

/* ---- random numbers ------------------------------------------------------------------------- */
typedef struct rng {
    uint64_t state;
} rng;
rng rng_seed(uint64_t seed);
uint64_t rng_next(rng *r);
int rng_below(rng *r, int n); /* 0 .. n - 1 */
int rng_pick(rng *r, const int *list, int n);
double rng_unit(rng *r); /* [0, 1) */
double rng_normal(rng *r);
#define RNG_PICK(r, list) rng_pick((r), (list), (int)(sizeof(list) / sizeof *(list)))

/* ---- number formats, exact, nearest even ---------------------------------------------------- */
uint16_t f16_from_float(float x);
float f16_to_float(uint16_t bits);
uint16_t bf16_from_float(float x);
float bf16_to_float(uint16_t bits);
unsigned char f8_from_float(rkv_dtype dtype, float x); /* too large: the largest finite number */
float f8_to_float(rkv_dtype dtype, unsigned char code);
const char *dtype_name(rkv_dtype dtype);
size_t dtype_bytes(rkv_dtype dtype); /* of an element; of RKV_Q8_0: a block of element_dims */
int element_dims(rkv_dtype dtype);
float round_to(rkv_dtype dtype, float x);
/* Rows of any type. RKV_OPAQUE: a type of these tests, which load_opaque reads; a row whose first
 * byte is damaged it does not give. */
size_t row_bytes(rkv_dtype dtype, int dim);
void encode_row(rkv_dtype dtype, const float *row, int dim, unsigned char *out);
void decode_row(rkv_dtype dtype, const unsigned char *in, int dim, float *row);
int load_opaque(void *user, const rkv_rows *rows, float *dst);

/* ---- keys ----------------------------------------------------------------------------------- */
typedef enum key_kind {
    KEYS_ISOTROPIC,
    KEYS_SHARED,  /* a shared direction; `strength` is the mean cosine */
    KEYS_REPEATS, /* a text that says its segments again, with noise */
    KEYS_EXACT,   /* the same without noise */
    KEYS_IDENTICAL,
    KEYS_ZERO,
    KEYS_ZERO_ROWS, /* isotropic, some rows zero */
    KEYS_OUTLIER,   /* one channel carries a large constant */
    KEYS_ROTARY,    /* low-rank repeated content under rotary embedding */
    KEYS_TINY,      /* norms around the 1e-8 of the normalisation */
    KEYS_HALF,      /* cosines of one half, up to rounding, or of one */
    N_KEY_KINDS
} key_kind;
const char *key_kind_name(key_kind kind);
void make_keys(rng *r, key_kind kind, double strength, float *keys, int heads, int n, int dim);

/* ---- views ---------------------------------------------------------------------------------- */
typedef enum layout {
    LAYOUT_CONTIGUOUS, /* strides 0 */
    LAYOUT_STRIDED,    /* [head][token][dim] with gaps, explicit strides */
    LAYOUT_TOKEN_MAJOR,
    LAYOUT_PAGED_NHD,
    LAYOUT_PAGED_HND,
    LAYOUT_ROW_LIST,
    N_KEY_LAYOUTS,
    LAYOUT_TRANSPOSED = N_KEY_LAYOUTS, /* values only, as the next */
    LAYOUT_PAGED_TRANSPOSED,
    N_LAYOUTS
} layout;
const char *layout_name(layout l);

typedef struct view {
    rkv_tensor tensor;
    block memory, table;
    size_t element; /* bytes of one */
    int n_elements; /* of a row */
} view;
/* element_bytes 0: dtype's own, or the row_bytes of RKV_OPAQUE. misalign: bytes. Memory is filled
 * with noise. */
void view_make(view *v, rng *r, layout l, rkv_dtype dtype, int element_bytes, int heads, int tokens,
               int dim, size_t misalign);
void view_free(view *v);
unsigned char *view_at(const view *v, int head, int token, int i);
void view_store(view *v, const float *values, int n_tokens); /* [heads][n_tokens][dim] */
void view_store_row(view *v, int head, int token, const float *row);
void view_load_row(const view *v, int head, int token, float *row);
void view_store_one(view *v, int head, int token, int i, float value);
void view_restore(view *v);
int view_unchanged(const char *at, const view *v);
/* Rows [0, n_kept) of each head are the remembered rows kept[head * kept_stride + ...]; every
 * other byte is as remembered. */
int view_gathered(const char *at, const view *v, const int32_t *kept, int kept_stride, int n_kept);

/* ---- jobs ----------------------------------------------------------------------------------- */
typedef struct shape {
    int kv_heads, group, head_dim, n_tokens;
    int capacity;        /* 0 means n_tokens */
    int value_dim;       /* 0 means head_dim */
    int value_bytes;     /* 0 means the dtype's */
    rkv_dtype dtype;     /* of all three */
    rkv_dtype key_dtype; /* of keys and values, where it is another; 0: dtype */
    layout keys, values, queries;
    key_kind kind;
    double strength;  /* of KEYS_SHARED */
    double sharpness; /* spread of the logits; 0 means 1 */
    int key_exponent; /* keys times 2^e, queries times 2^-e */
    size_t misalign;
    int row_stride; /* of positions and pins */
    int pins;       /* 0: none; else so many rows in a hundred */
    int sequence;
    int follower; /* RKV_PER_SEQUENCE: not the first layer of its sequence */
    /* For other policies than R-KV */
    int n_new;          /* with state; 0 means all rows */
    int first_query;    /* slot of the oldest query */
    int first_position; /* of row 0, more or less */
    int bias;           /* a score of the caller's own for every row */
    int tied;           /* state and bias in steps of an eighth, so that many are equal */
    rkv_pairing pairing;
    int rope_dims;
    float rope_base;
    int table; /* a table of frequencies instead of a base */
} shape;

/* One layer and all that it points to. keys_f32 [kv_heads][n][dim] and queries_f32
 * [kv_heads * group][votes][dim] hold the very numbers that the views encode. State of new rows,
 * and whatever lies beyond the rows in use, is NaN. */
typedef struct job {
    shape shape;
    int window, votes, sets, state_floats;
    float *keys_f32, *queries_f32;
    view keys, values, queries;
    block kept, positions, pins, scores, shared, bias, state, means, frequencies;
    rkv_layer layer, remembered;
} job;
rkv_dtype shape_key_dtype(const shape *s);
int config_window(const rkv_config *config);
int config_votes(const rkv_config *config);        /* rows of the queries */
int config_state_floats(const rkv_config *config); /* planes of the state */
int config_protect(const rkv_config *config);      /* newest tokens that are always kept */
void job_make(job *j, rng *r, const rkv_config *config, const shape *s);
/* The same from given numbers instead of generated ones. */
void job_make_from(job *j, rng *r, const rkv_config *config, const shape *s, const float *keys,
                   const float *queries);
void job_free(job *j);
void job_restore(job *j);                               /* every buffer and the layer as made */
int job_unchanged(const char *at, const job *j);        /* nothing at all was written */
int job_inputs_unchanged(const char *at, const job *j); /* all but state and results */
int job_guards(const char *at, const job *j);
/* After compaction: rows, positions, pins, bias and layer are what gathering by hand gives. `sets`
 * lists [sets][budget] as kept was. */
int job_compacted(const char *at, const job *j, const int32_t *sets, int budget, int n_kept);
/* The same of the state, from what it was before compaction, the bytes of j->state. Rows that are
 * in use no more may hold anything; those that never were are as made. */
int job_state_gathered(const char *at, const job *j, const float *before, const int32_t *sets,
                       int budget, int n_kept);
int job_row_stride(const job *j);
const int32_t *job_kept(const job *j);
const uint8_t *job_pins(const job *j, int set); /* as made; NULL without pins */
const float *job_scores(const job *j);
float *job_state(const job *j, int head, int plane); /* [row_stride]; NULL: no such plane */
const float *job_bias(const job *j, int head);       /* as made; NULL without bias */
const int32_t *job_positions(const job *j, int set); /* as made */
const float *job_shared(const job *j);

/* ---- floating-point modes -------------------------------------------------------------------
 * What a caller's thread may have set: rounding, FTZ and DAZ, traps. RKV_TEST_FLOAT names the mode
 * in which call_with calls the library; "mixed" takes another one for every call and every task of
 * reversed_for. A machine that lacks a mode uses the usual one. */
typedef enum float_mode {
    FLOAT_USUAL,
    FLOAT_DOWN,
    FLOAT_UP,
    FLOAT_ZERO,
    FLOAT_FTZ,
    FLOAT_DAZ,
    FLOAT_TRAPS, /* SIGFPE at an invalid operation, a division by zero or an overflow */
    N_FLOAT_MODES
} float_mode;
const char *float_mode_name(float_mode mode);
int float_mode_exists(float_mode mode);
void float_mode_of_calls(float_mode mode); /* without RKV_TEST_FLOAT: that of call_with */
void float_mode_enter(float_mode mode);    /* flags clear */
/* The mode is as entered, no flag is raised; then the usual mode again. */
int float_mode_leave(const char *at, float_mode mode);

/* ---- calls ---------------------------------------------------------------------------------- */
typedef rkv_status (*stage_function)(const rkv_backend *, const rkv_config *, rkv_layer *, int,
                                     void *, size_t);
/* Runs one call with this workspace. Layers are copied in from the jobs and back. */
rkv_status call_with(stage_function call, const rkv_backend *backend, const rkv_config *config,
                     job *jobs, int n_jobs, void *workspace, size_t bytes);
/* Runs one call with a workspace of exactly the size asked for, at an odd address, between
 * guards. */
rkv_status call_stage(stage_function call, const rkv_backend *backend, const rkv_config *config,
                      job *jobs, int n_jobs);
/* rkv_score, rkv_select, rkv_compact. */
rkv_status call_stages(const rkv_backend *backend, const rkv_config *config, job *jobs, int n_jobs);
/* A parallel_for that runs the last task first; in RKV_TEST_FLOAT=mixed each in another mode. */
void reversed_for(void *pool, int n_tasks, void (*task)(void *arg, int index), void *arg);

#endif
