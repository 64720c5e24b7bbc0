/* policy.h - the cache policies that the demo and the study compare, by name. */
#ifndef POLICY_H
#define POLICY_H

#include "rkv.h"

typedef struct policy {
    const char *name;
    int keeps_all; /* the full cache                                                        */
    rkv_config config;
    int buffer;       /* tokens between two compressions                                       */
    int keeps_prompt; /* the prompt is never evicted: see policy_for_prompt                    */
} policy;

/* 1 = done, 0 = no policy of that name. */
int policy_make(policy *out, const char *name, int budget, int buffer);
/* The policy with a prompt's length put in, where it keeps the prompt. */
policy policy_for_prompt(const policy *p, int n_prompt);
const char *policy_name(int i); /* the i-th name, NULL behind the last */
const char *policy_about(int i);

#endif
