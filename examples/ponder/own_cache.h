/* own_cache.h - a cache such as an engine has already, [token][head][dim] per layer, kept at a
 * fixed size by rkv_compress on the engine's own buffers, with its own positions.
 */
#ifndef OWN_CACHE_H
#define OWN_CACHE_H

#include "policy.h"
#include "shape.h"

typedef struct own_cache {
    model_shape shape;
    policy policy;
    const rkv_backend *backend; /* looked up once, at the start */
    int capacity;         /* rows per layer                                                     */
    int n_rows;           /* in use: the physical length                                        */
    int position;         /* of the next token: the logical length                              */
    int votes;            /* rows of `queries`, a ring                                          */
    int n_new;            /* rows since the last round                                          */
    float *keys, *values; /* [layers][capacity][kv heads][head_dim]                       */
    float *queries;       /* [layers][votes][heads][head_dim]                             */
    int32_t *positions;   /* [layers][kv heads][capacity]; of a set that several heads
                                  share: in the first of them                              */
    float *state;         /* [layers][kv heads][floats of the policy][capacity]           */
    float *means;         /* [layers][n_means]: what TriAttention knows of the queries    */
    size_t n_means;       /* 0: the policy needs none                                           */
    int32_t *kept;        /* [layers][kv heads][budget]                                   */
    float *weights;       /* [capacity]                                                   */
    rkv_layer *layers;
    rkv_status status; /* of the library's calls outside of rounds */
    rkv_error error;   /* what the last call found wrong                                       */
    void *workspace;
    size_t workspace_bytes;
    double seconds; /* spent in compression so far                                  */
    int n_rounds, peak_rows;
} own_cache;

/* max_tokens: the longest sequence where the policy keeps all, else the longest prompt. NULL when
 * out of memory or when the policy's config is not valid; *why then tells which. */
own_cache *own_cache_create(const model_shape *s, const policy *p, int max_tokens,
                            const char **why);
void own_cache_destroy(own_cache *c);
void own_cache_reset(own_cache *c, uint64_t seed);

/* Stores one layer's share of a new token and attends. `ahead` counts the new tokens before it,
 * 0 in decoding. own_cache_advance, behind the last layer, makes n new tokens part of the cache
 * and compresses when the buffer is full. */
void own_cache_attend(own_cache *c, int layer, int ahead, const float *q, const float *k,
                      const float *v, float *out);
rkv_status own_cache_advance(own_cache *c, int n);

size_t own_cache_bytes(const own_cache *c, int n_rows); /* keys and values of that many rows */

#endif
