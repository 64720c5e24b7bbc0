/* The policies beside R-KV in double precision, naively and straight from the definitions in the
 * comments of rkv_policy and rkv_layer. Shares nothing with rkv.h but the types. Linked in by
 * `make test`. */
#ifndef RKV_TESTS_ORACLE_POLICIES_H
#define RKV_TESTS_ORACLE_POLICIES_H

#include "oracle.h"

/* What one round of one KV head sees. Rows in cache order. */
typedef struct oracle_input {
    const rkv_config *config;
    int n_tokens, n_new, dim, group, first_query, layer, head;
    const float *keys;         /* [n_tokens][dim] */
    const float *queries;      /* [group][votes][dim], slots of the ring; NULL where none is read */
    const int32_t *positions;  /* [n_tokens] */
    const double *importance;  /* carried I of the rows that are not new; NULL without state */
    const double *later_copy;  /* carried D, the same */
    const float *mean_queries; /* TRIATTENTION: [group][dim] E[q'], [group][dim / 2] E|q'_f| */
    const float *mean_sizes;
    const float *bias; /* [n_tokens] or NULL */
    rkv_rope rope;
    float scale, softcap;
} oracle_input;

/* Its results. tolerance[i]: how far a float implementation's score[i] may be, places in a ranking
 * that rounding may turn included; infinite where rounding may decide anything. */
typedef struct oracle_round {
    int n_tokens, n_candidates;
    double *importance;        /* [n_tokens] I, carried from here on; 0 where it does not apply */
    double *later_copy;        /* [n_tokens] D, the same */
    double *score, *tolerance; /* [n_candidates] */
    double importance_error;   /* of importance[], relative */
    int near_threshold;        /* R-KV: rounding decides which entry is exempt */
} oracle_round;

/* How far a float implementation's later_copy may be. */
#define ORACLE_COSINE_ERROR 4e-6

void oracle_play(oracle_round *out, const oracle_input *in);
void oracle_round_free(oracle_round *round);

/* The score that a state gives: rank and mix, from the carried I and D as they are. For rkv's own
 * state, whose ranks are exact. D may be NULL (H2O). */
void oracle_state_score(const rkv_config *config, const float *importance, const float *later_copy,
                        const float *bias, int n_candidates, double *score);

/* [kv_heads] rounds of a job from its buffers as made. layer: its index in the call; positions
 * [sets][stride]: those of the set's first layer. */
oracle_round *oracle_play_job(const job *j, const rkv_config *config, int layer,
                              const int32_t *positions, int stride);
void oracle_free_rounds(oracle_round *rounds, const job *j);

/* What must happen to each row whatever rounding does: 1 it is kept, -1 dropped, 0 either. */
void oracle_fates(const rkv_config *config, const double *score, const double *tolerance,
                  const uint8_t *pins, int n_tokens, signed char *fates);

/* The key or query before rotary embedding; and a mean query after it. */
void oracle_unrotate(double *out, const float *row, const rkv_rope *rope, int dim, int position);
void oracle_rotate(double *out, const float *row, const rkv_rope *rope, int dim, int position);
int oracle_rope_dims(const rkv_rope *rope, int dim);
/* The two numbers of pair f. */
void oracle_pair(const rkv_rope *rope, int dim, int f, int *x, int *y);

#endif
