/* mind.c - see mind.h. Build: part of `make test-llama`. */
#include "mind.h"
#include "model.h"
#include "own_cache.h"
#include "task.h"

#include <stdlib.h>

struct mind {
    model *m;
    model_scratch *scratch;
    own_cache *cache;
};

mind *mind_open(const char *path)
{
    mind *m = calloc(1, sizeof *m);
    gguf_error error;
    policy full;
    const char *why;
    if (!m) return NULL;
    policy_make(&full, "full", 1, 1);
    if (model_load(&m->m, path, &error)) {
        m->scratch = model_scratch_create(m->m, TASK_MAX_TOKENS);
        m->cache = own_cache_create(model_get_shape(m->m), &full, TASK_MAX_TOKENS, &why);
    }
    if (m->scratch && m->cache) return m;
    mind_close(m);
    return NULL;
}

void mind_close(mind *m)
{
    if (!m) return;
    own_cache_destroy(m->cache);
    model_scratch_destroy(m->scratch);
    model_free(m->m);
    free(m);
}

void mind_forget(mind *m)
{
    own_cache_reset(m->cache, 0);
}

static void attend(void *user, int layer, int n, const float *q, const float *k, const float *v,
                   float *out)
{
    mind *m = user;
    const model_shape *s = model_get_shape(m->m);
    const ptrdiff_t q_dim = shape_q_dim(s), kv_dim = shape_kv_dim(s);
    for (int i = 0; i < n; i++)
        own_cache_attend(m->cache, layer, i, q + i * q_dim, k + i * kv_dim, v + i * kv_dim,
                         out + i * q_dim);
}

int mind_step(mind *m, const int *tokens, int n)
{
    int positions[TASK_MAX_TOKENS];
    const int vocabulary = model_get_shape(m->m)->vocabulary;
    for (int i = 0; i < n; i++) positions[i] = m->cache->position + i;
    float *logits = model_forward(m->m, m->scratch, n, tokens, positions, attend, m);
    own_cache_advance(m->cache, n);
    return model_choose(logits + (ptrdiff_t)(n - 1) * vocabulary, vocabulary, 0.0f, NULL);
}
