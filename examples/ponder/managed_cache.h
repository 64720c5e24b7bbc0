/* managed_cache.h - the other way to use the library: rkv_cache holds the rows, the engine has no
 * cache of its own. Everything that it takes to decode with it is in managed_cache.c.
 */
#ifndef MANAGED_CACHE_H
#define MANAGED_CACHE_H

#include "model.h"
#include "policy.h"

typedef struct managed_cache {
    rkv_cache *rows;
    model_shape shape;
    float *weights; /* of attention, one for each row the cache can hold */
} managed_cache;

/* longest_prompt: tokens that arrive at once. */
rkv_status managed_cache_create(managed_cache *c, const model_shape *s, const policy *p,
                                int longest_prompt);
void managed_cache_destroy(managed_cache *c);

/* A model_attend: n tokens of one sequence. `user` is the managed_cache; call rkv_cache_step
 * behind each model_forward. The first error stays in rkv_cache_step's status. */
void managed_cache_attend(void *user, int layer, int n, const float *q, const float *k,
                          const float *v, float *out);

#endif
