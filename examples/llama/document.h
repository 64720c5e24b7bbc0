/* document.h - texts with facts in them, and questions about the facts at the end. */
#ifndef DOCUMENT_H
#define DOCUMENT_H

#include "tokens.h"
#include "../ponder/prng.h"

/* Where the answer to a question stands. */
typedef enum probe_kind {
    PROBE_PROMPT,   /* in the prompt                                                          */
    PROBE_MIDDLE,   /* once in the text, at 35 to 55 % of it                                  */
    PROBE_RESTATED, /* at 65 to 80 %, after another value at 10 to 25 %                       */
    N_PROBE_KINDS
} probe_kind;

enum { MAX_PROBES = 24 };

typedef struct probe {
    probe_kind kind;
    int first, n; /* the answer's tokens */
} probe;

/* The prompt with its facts, the text with more of them, the questions with their answers. */
typedef struct document {
    token_list tokens;
    int n_prompt;
    unsigned char *is_prose; /* [tokens.n] a token of the text, not of a fact or question */
    probe probes[MAX_PROBES];
    int n_probes;
} document;

/* n_facts[kind] facts of each kind, MAX_PROBES in all at most. Free the document with
 * document_free. */
void document_make(document *out, const struct llama_vocab *vocab, const llama_token *text,
                   int n_text, const int n_facts[N_PROBE_KINDS], prng *random);
void document_free(document *d);

#endif
