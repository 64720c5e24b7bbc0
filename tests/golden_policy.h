/* Reads one golden file of a policy: see tests/golden/README.md. Part of test_policies:
 * make test. */
#ifndef RKV_TESTS_GOLDEN_POLICY_H
#define RKV_TESTS_GOLDEN_POLICY_H

#include <stddef.h>
#include <stdint.h>

#ifndef RKV_PTHREADS
#define RKV_PTHREADS
#endif
#include "rkv.h"

/* Little endian on disk, numbers of this machine here; keys and queries decoded. Rows of results
 * are those of the cache before the round: golden_policy_rows of them. */
typedef struct golden_policy_round {
    int appended, first_query;
    float *queries;     /* [kv_heads * group][votes][dim], slots; NULL: the policy reads none */
    float *keys;        /* [kv_heads][appended][dim] */
    int32_t *positions; /* [appended] */
    float *bias;        /* [kv_heads][appended] or NULL */
    float *state;       /* [kv_heads][floats][rows], after the round, before compaction */
    float *score;       /* [kv_heads][rows - window] */
    int32_t *kept;      /* [sets][budget] */
} golden_policy_round;

enum { GOLDEN_POLICY_ROUNDS = 8 };
typedef struct golden_policy {
    unsigned char *bytes;
    size_t size, at;
    rkv_config config;
    int kv_heads, group, dim, n_tokens, rounds, layer, sets, floats, has_bias;
    rkv_dtype dtype;
    rkv_rope rope;
    float *frequencies;
    float scale, softcap;
    int n_stream;  /* TRIATTENTION: tokens at positions 0, 1, ... whose queries are averaged */
    float *stream; /* [kv_heads * group][n_stream][dim] */
    float *means;  /* as rkv_query_means_update leaves them */
    golden_policy_round round[GOLDEN_POLICY_ROUNDS];
} golden_policy;

/* Reads directory/name.rkvp; returns 1 if it is a whole file and nothing more.
 * golden_policy_free either way. */
int golden_policy_read(golden_policy *g, const char *directory, const char *name);
void golden_policy_free(golden_policy *g);
int golden_policy_rows(const golden_policy *g, int r); /* rows of the cache before round r */

extern const char *const golden_policy_names[];
extern const int n_golden_policies;

#endif
