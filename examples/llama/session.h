/* session.h - a llama.cpp context whose cache follows a policy. Whatever fails ends the program. */
#ifndef SESSION_H
#define SESSION_H

#include "rkv_llama.h"
#include "settings.h"
#include "tokens.h"

typedef struct policy {
    const char *name, *about;
    rkv_config (*config)(int budget); /* NULL: every token is kept, by llama.cpp alone */
} policy;

/* The first keeps every token. find dies where there is none of that name, of n characters. */
enum { N_POLICIES = 13 };
extern const policy policies[N_POLICIES];
const policy *policy_find(const char *name, size_t n);

/* Loads a model. From then on llama.cpp's log is silent. */
struct llama_model *model_open(const char *path);

typedef struct session {
    struct llama_context *context;
    rkv_llama *adapter; /* NULL: every token is kept */
    llama_batch batch;
    int position;        /* of the next token */
    int n_batch, n_room; /* tokens: of a call of llama_decode; of batch */
} session;

enum { PIN_NONE = 0, PIN_PROMPT = -1 };

/* n_cells: where every token is kept, which a budget of -1 says too: the adapter is there then, but
 * makes no rounds. Otherwise there are budget + buffer. n_pinned: that many first tokens are never
 * evicted; PIN_PROMPT: those of the first call of session_decode, up to half of the budget. */
void session_open(session *out, struct llama_model *model, const settings *s, const policy *p,
                  int budget, int n_cells, int n_pinned);
void session_close(session *s);

/* Decodes tokens behind those that are there, with the logits of those whose byte in `wanted` is
 * not 0; NULL: of the last one. */
void session_decode(session *s, const llama_token *tokens, int n, const unsigned char *wanted);
/* Logits of token i of the last call, [n_vocab]; -1: of the last one. */
float *session_logits(session *s, int i);

int session_live(const session *s);              /* tokens held */
int session_cells(const session *s);             /* cells reserved */
rkv_llama_counters session_counters(session *s); /* zeros where every token is kept */

#endif
