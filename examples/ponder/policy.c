/* policy.c - see policy.h. Build: part of `make demo` and `make eval`. */
#include "policy.h"

#include <string.h>

static rkv_config unpooled(int budget)
{
    rkv_config c = rkv_config_default(budget);
    c.pool = 1;
    return c;
}

static rkv_config paper_unpooled(int budget)
{
    rkv_config c = rkv_config_paper(budget);
    c.pool = 1;
    return c;
}

static rkv_config random_rows(int budget)
{
    return rkv_config_random(budget, 0); /* own_cache_reset gives the seed */
}

static const struct {
    const char *name, *about;
    rkv_config (*config)(int budget);
    int keeps_prompt;
} policies[] = {
    { "full", "every token is kept", rkv_config_default, 0 },
    { "rkv", "R-KV without pooling", unpooled, 0 },
    { "rkv-pool7", "R-KV, rkv_config_default: as published", rkv_config_default, 0 },
    { "rkv-paper", "R-KV, rkv_config_paper", rkv_config_paper, 0 },
    { "rkv-paper-pool1", "R-KV, rkv_config_paper, without pooling", paper_unpooled, 0 },
    { "rkv-wide", "R-KV, rkv_config_wide", rkv_config_wide, 0 },
    { "snapkv", "SnapKV, rkv_config_snapkv", rkv_config_snapkv, 0 },
    { "memory-traces", "rkv_config_memory_traces", rkv_config_memory_traces, 0 },
    { "memory-prose", "rkv_config_memory_prose", rkv_config_memory_prose, 0 },
    { "memory-wide", "rkv_config_memory_wide", rkv_config_memory_wide, 0 },
    { "h2o", "H2O, rkv_config_h2o: all queries vote", rkv_config_h2o, 0 },
    { "triattention", "TriAttention, rkv_config_triattention", rkv_config_triattention, 0 },
    { "streaming", "StreamingLLM, rkv_config_streaming", rkv_config_streaming, 0 },
    { "random", "random tokens and the window", random_rows, 0 },
    { "rkv+prompt", "R-KV without pooling, prompt pinned", unpooled, 1 },
    { "snapkv+prompt", "SnapKV, prompt pinned", rkv_config_snapkv, 1 },
    { "memory-traces+prompt", "memory_traces, prompt pinned", rkv_config_memory_traces, 1 },
    { "memory-prose+prompt", "memory_prose, prompt pinned", rkv_config_memory_prose, 1 },
    { "memory-wide+prompt", "memory_wide, prompt pinned", rkv_config_memory_wide, 1 },
    { "h2o+prompt", "H2O, prompt pinned", rkv_config_h2o, 1 },
    { "triattention+prompt", "TriAttention, prompt pinned", rkv_config_triattention, 1 },
    { "streaming+prompt", "StreamingLLM, prompt pinned", rkv_config_streaming, 1 },
    { "random+prompt", "random tokens, prompt pinned", random_rows, 1 },
};
enum { N_POLICIES = sizeof policies / sizeof *policies };

int policy_make(policy *out, const char *name, int budget, int buffer)
{
    for (int i = 0; i < N_POLICIES; i++)
        if (strcmp(policies[i].name, name) == 0) {
            out->name = policies[i].name;
            out->keeps_all = i == 0;
            rkv_config *const c = &out->config;
            *c = policies[i].config(budget);
            if (c->policy == RKV_POLICY_H2O) c->votes = budget + buffer;
            if (c->policy == RKV_POLICY_MEMORY_PROSE && c->votes > buffer) c->votes = buffer;
            if (c->policy == RKV_POLICY_RKV && c->votes > buffer + c->window)
                c->votes = buffer + c->window; /* older tokens may have lost their rows */
            out->buffer = buffer;
            out->keeps_prompt = policies[i].keeps_prompt;
            return 1;
        }
    return 0;
}

policy policy_for_prompt(const policy *p, int n_prompt)
{
    policy out = *p;
    rkv_config *c = &out.config;
    const int left = c->budget - n_prompt;
    if (!p->keeps_prompt) return out;
    c->pinned = n_prompt;
    if (left < 1) return out; /* refused, with a sentence */
    if (c->policy == RKV_POLICY_H2O) c->window = (left + 1) / 2;
    if (strncmp(p->name, "streaming", 9) == 0) c->window = left;
    return out;
}

const char *policy_name(int i)
{
    return i < N_POLICIES ? policies[i].name : NULL;
}

const char *policy_about(int i)
{
    return i < N_POLICIES ? policies[i].about : NULL;
}
