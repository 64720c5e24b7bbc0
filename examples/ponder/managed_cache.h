/* managed_cache.h - the other way to use the library: rkv_cache holds the rows, the engine has no
 * cache of its own. Everything that it takes to decode with it is in managed_cache.c.
 */
#ifndef MANAGED_CACHE_H
#define MANAGED_CACHE_H

#include "model.h"
#include "policy.h"

typedef struct managed_cache {
    rkv_cache *rows;
    rkv_error error; /* what the last call found wrong */
    rkv_status status;
    model_shape shape;
    float *weights; /* of attention, one for each row the cache can hold */
} managed_cache;

/* longest_prompt: tokens that arrive at once. On an error, c->error says why. */
rkv_status managed_cache_create(managed_cache *c, const model_shape *s, const policy *p,
                                int longest_prompt);
void managed_cache_destroy(managed_cache *c);

/* A model_attend: n tokens of one sequence. `user` is the managed_cache. It cannot return a status:
 * managed_cache_step, to be called after each model_forward, returns that of the first error. */
void managed_cache_attend(void *user, int layer, int n, const float *q, const float *k,
                          const float *v, float *out);
rkv_status managed_cache_step(managed_cache *c, int *n_evicted);

#endif
