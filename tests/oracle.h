/* The oracle: the method in double precision, naively and straight from its equations, every n x n
 * matrix in memory. Shares nothing with rkv.h but the config type. Linked in by `make test`. */
#ifndef RKV_TESTS_ORACLE_H
#define RKV_TESTS_ORACLE_H

#include "harness.h"

/* One kv head. Arrays of n_tokens entries; those that do not apply are 0. */
typedef struct oracle_head {
    int n_tokens, window, votes;
    double *importance; /* [n_tokens - window], after pooling */
    double *redundancy; /* [span] */
    double *score;      /* [n_tokens - window] */
    double margin;      /* smallest |cosine - threshold| among the cosines that decide which
                           entry is exempt: below rounding, the answer hangs on it */
    double logit_size;  /* largest sum |q_i k_i| * scale: what the error of a logit grows with */
    double importance_max, redundancy_max;
} oracle_head;

/* keys [n_tokens][dim], queries [group][votes][dim], the oldest first; scale 0 means
 * 1 / sqrt(dim). */
void oracle_score(oracle_head *out, const rkv_config *config, const float *keys,
                  const float *queries, int n_tokens, int dim, int group, float scale,
                  float softcap);
void oracle_free(oracle_head *head);

/* How far a float implementation's score of this head may be from score[]. */
double oracle_tolerance(const oracle_head *head, const rkv_config *config);

/* Keeps the pinned rows, the best of the candidates (those with a byte in pins first; ties: the
 * more recent) and the protected rows; pins may be NULL. Writes min(n_tokens, budget) rows and
 * returns their number. *gap: score of the last candidate kept minus that of the first dropped;
 * infinite when there is no choice. */
int oracle_select(const rkv_config *config, const double *score, const uint8_t *pins, int n_tokens,
                  int32_t *kept, double *gap);

/* The summed per-layer means of several layers: sum[j] += mean over heads of score[j]. */
void oracle_add_layer(double *sum, const oracle_head *heads, int n_heads);

/* For the golden runs' multi-round form: everything of one job at once. */
oracle_head *oracle_score_job(const job *j, const rkv_config *config);
void oracle_free_job(oracle_head *heads, const job *j);

#endif
