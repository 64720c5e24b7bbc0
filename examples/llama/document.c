/* document.c - see document.h. Build: part of `make llama`. */
#include "document.h"
#include "../ponder/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const places[MAX_PROBES] = {
    "harbour", "bridge", "tower",   "garden", "library", "station", "museum", "market",
    "castle",  "chapel", "factory", "school", "theatre", "airport", "prison", "hotel",
    "bakery",  "forest", "island",  "valley", "stadium", "bank",    "farm",   "mine"
};

typedef struct fact {
    probe_kind kind;
    const char *place;
    int code, old_code; /* the old one where it is restated */
} fact;

static int draw_code(prng *random)
{
    return 1000 + prng_below(random, 9000);
}

static int draw_facts(fact *facts, const int n_facts[N_PROBE_KINDS], prng *random)
{
    const char *free_places[MAX_PROBES];
    int n = 0, n_free = MAX_PROBES;
    memcpy(free_places, places, sizeof places);
    for (int kind = 0; kind < N_PROBE_KINDS; kind++)
        for (int i = 0; i < n_facts[kind] && n_free > 0; i++) {
            const int at = prng_below(random, n_free);
            fact *f = &facts[n++];
            f->kind = (probe_kind)kind;
            f->place = free_places[at];
            f->code = draw_code(random);
            do f->old_code = draw_code(random);
            while (f->old_code == f->code);
            free_places[at] = free_places[--n_free];
        }
    return n;
}

static void shuffle(fact *facts, int n, prng *random)
{
    for (int i = n - 1; i > 0; i--) {
        const int at = prng_below(random, i + 1);
        const fact f = facts[i];
        facts[i] = facts[at];
        facts[at] = f;
    }
}

static void state(document *d, const struct llama_vocab *vocab, const char *before,
                  const char *place, int code)
{
    char line[128];
    snprintf(line, sizeof line, "%sThe code of the %s is %d.\n", before, place, code);
    tokens_add_text(&d->tokens, vocab, line, 0, 0);
}

/* The text up to `end`, of which *at tokens are there already. */
static void go_on(document *d, const llama_token *text, int *at, int end)
{
    if (end <= *at) return;
    const int from = d->tokens.n;
    tokens_add(&d->tokens, text + *at, end - *at);
    d->is_prose = realloc(d->is_prose, (size_t)d->tokens.n);
    if (!d->is_prose) die("out of memory");
    memset(d->is_prose + from, 1, (size_t)(end - *at));
    *at = end;
}

/* All tokens since the text was last gone on with are no prose. */
static void mark(document *d, int from)
{
    d->is_prose = realloc(d->is_prose, (size_t)d->tokens.n);
    if (!d->is_prose) die("out of memory");
    memset(d->is_prose + from, 0, (size_t)(d->tokens.n - from));
}

/* Facts of one kind, evenly over [begin, end) of the text, in percent. */
static void spread(document *d, const struct llama_vocab *vocab, const llama_token *text,
                   int n_text, int *at, const fact *facts, int n, probe_kind kind, int is_old,
                   int begin, int end)
{
    int total = 0, seen = 0;
    for (int i = 0; i < n; i++) total += facts[i].kind == kind;
    for (int i = 0; i < n; i++) {
        if (facts[i].kind != kind) continue;
        const double share = (begin + (end - begin) * (seen++ + 0.5) / total) / 100.0;
        go_on(d, text, at, (int)(share * n_text));
        const int from = d->tokens.n;
        state(d, vocab, "\n", facts[i].place, is_old ? facts[i].old_code : facts[i].code);
        mark(d, from);
    }
}

static void ask(document *d, const struct llama_vocab *vocab, const fact *f)
{
    char line[128];
    probe *p = &d->probes[d->n_probes++];
    snprintf(line, sizeof line, "The code of the %s is", f->place);
    tokens_add_text(&d->tokens, vocab, line, 0, 0);
    snprintf(line, sizeof line, " %d", f->code);
    p->kind = f->kind;
    p->first = d->tokens.n;
    tokens_add_text(&d->tokens, vocab, line, 0, 0);
    p->n = d->tokens.n - p->first;
    tokens_add_text(&d->tokens, vocab, ".\n", 0, 0);
}

void document_make(document *d, const struct llama_vocab *vocab, const llama_token *text,
                   int n_text, const int n_facts[N_PROBE_KINDS], prng *random)
{
    fact facts[MAX_PROBES];
    int at = 0;
    memset(d, 0, sizeof *d);
    const int n = draw_facts(facts, n_facts, random);
    tokens_add_text(&d->tokens, vocab, "Remember these codes.\n", 1, 0);
    for (int i = 0; i < n; i++)
        if (facts[i].kind == PROBE_PROMPT) state(d, vocab, "", facts[i].place, facts[i].code);
    d->n_prompt = d->tokens.n;
    tokens_add_text(&d->tokens, vocab, "\n", 0, 0);
    mark(d, 0);
    spread(d, vocab, text, n_text, &at, facts, n, PROBE_RESTATED, 1, 10, 25);
    spread(d, vocab, text, n_text, &at, facts, n, PROBE_MIDDLE, 0, 35, 55);
    spread(d, vocab, text, n_text, &at, facts, n, PROBE_RESTATED, 0, 65, 80);
    go_on(d, text, &at, n_text);
    const int from = d->tokens.n;
    tokens_add_text(&d->tokens, vocab, "\n\n", 0, 0);
    shuffle(facts, n, random);
    for (int i = 0; i < n; i++) ask(d, vocab, &facts[i]);
    mark(d, from);
}

void document_free(document *d)
{
    free(d->tokens.at);
    free(d->is_prose);
    memset(d, 0, sizeof *d);
}
