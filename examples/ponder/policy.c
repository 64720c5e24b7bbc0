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

/* Half of the budget for the tokens most attended to so far, half for the newest, as in H2O. */
static rkv_config half_recent(int budget)
{
    rkv_config c = rkv_config_snapkv(budget);
    c.pool = 1;
    c.window = budget / 2 > 0 ? budget / 2 : 1;
    return c;
}

static const struct {
    const char *name, *about;
    policy_kind kind;
    rkv_config (*config)(int budget);
    int keeps_prompt;
} policies[] = {
    { "full", "every token is kept", POLICY_FULL, rkv_config_default, 0 },
    { "rkv", "R-KV without pooling", POLICY_CONFIG, unpooled, 0 },
    { "rkv-pool7", "R-KV, rkv_config_default: as published", POLICY_CONFIG, rkv_config_default, 0 },
    { "rkv-paper", "R-KV, rkv_config_paper", POLICY_CONFIG, rkv_config_paper, 0 },
    { "rkv-paper-pool1", "R-KV, rkv_config_paper, without pooling", POLICY_CONFIG, paper_unpooled,
      0 },
    { "snapkv", "SnapKV, rkv_config_snapkv", POLICY_CONFIG, rkv_config_snapkv, 0 },
    { "h2o", "H2O: summed attention, half of the budget for the newest", POLICY_SUMS, half_recent,
      0 },
    { "streaming", "StreamingLLM, rkv_config_streaming", POLICY_CONFIG, rkv_config_streaming, 0 },
    { "random", "random tokens and the window", POLICY_RANDOM, rkv_config_default, 0 },
    { "rkv+prompt", "R-KV without pooling, prompt pinned", POLICY_CONFIG, unpooled, 1 },
    { "snapkv+prompt", "SnapKV, prompt pinned", POLICY_CONFIG, rkv_config_snapkv, 1 },
    { "h2o+prompt", "H2O: summed attention, prompt pinned", POLICY_SUMS, half_recent, 1 },
    { "random+prompt", "random tokens, prompt pinned", POLICY_RANDOM, rkv_config_default, 1 },
};
enum { N_POLICIES = sizeof policies / sizeof *policies };

int policy_make(policy *out, const char *name, int budget, int buffer)
{
    for (int i = 0; i < N_POLICIES; i++)
        if (strcmp(policies[i].name, name) == 0) {
            out->name = policies[i].name;
            out->kind = policies[i].kind;
            out->config = policies[i].config(budget);
            out->buffer = buffer;
            out->keeps_prompt = policies[i].keeps_prompt;
            return 1;
        }
    return 0;
}

policy policy_for_prompt(const policy *p, int n_prompt)
{
    policy out = *p;
    if (!p->keeps_prompt) return out;
    out.config.pinned = n_prompt;
    if (p->kind == POLICY_SUMS && n_prompt < p->config.budget)
        out.config.window = (p->config.budget - n_prompt + 1) / 2; /* half of what is left */
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
