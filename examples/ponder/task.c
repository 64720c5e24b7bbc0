/* task.c - see task.h. Build: part of `make demo`, `make train` and `make eval`. */
#include "task.h"

#include <string.h>

static const char *const words[] = {
    "<s>",    "</s>",  "start",  "think", "?",    "is", "+",     ";",   ":",   ".",    "now",
    "so",     "the",   "answer", "wait",  "let",  "me", "check", "yes", "hmm", "once", "more",
    "verify", "right", "again",  "look",  "sure", "0",  "1",     "2",   "3",   "4",    "5",
    "6",      "7",     "8",      "9",     "a",    "b",  "c",     "d",   "e",   "f",    "g",
    "h",      "i",     "A",      "B",     "C",    "D",  "E",     "F",   "G",   "H",    "I",
    "#a",     "#b",    "#c",     "#d",    "#e",   "#f", "#g",    "#h",  "#i"
};
enum { N_WORDS = sizeof words / sizeof *words, N_LETTERS = 9, MODULUS = 10 };

/* What a check says before it restates the formula: four words, dots behind each, and the word
 * that leads in. Each check has its own, so that the text tells which one it is. */
enum { CHECK_WORDS = 5 };
static const char *const check_words[TASK_MAX_CHECKS][CHECK_WORDS] = {
    { "wait", "let", "me", "check", "yes" },
    { "hmm", "once", "more", "verify", "right" },
    { "again", "let", "me", "look", "sure" },
};

static const task tasks[] = {
    { "ponder", 6, 3, 7 },
    { "brief", 8, 3, 0 },
};

const task *task_find(const char *name)
{
    for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++)
        if (strcmp(tasks[i].name, name) == 0) return &tasks[i];
    return NULL;
}

int task_vocabulary(void)
{
    return N_WORDS;
}

const char *task_word(int token)
{
    return words[token];
}

int task_token(const char *word)
{
    for (int i = 0; i < N_WORDS; i++)
        if (strcmp(words[i], word) == 0) return i;
    return -1;
}

int task_is_end(int token)
{
    return strcmp(words[token], "</s>") == 0;
}

/* ---- one problem ---------------------------------------------------------------------------
 * Variable i is variable i-1 plus an operand: a number, or an earlier variable. The one before the
 * first is called start, and is 0. */
typedef struct definition {
    int letter;  /* 0 .. N_LETTERS - 1 */
    int operand; /* variable, or -1: the number operand_value */
    int first_value, operand_value, value;
} definition;

static void say(problem *p, const char *word)
{
    p->tokens[p->n_tokens++] = task_token(word);
}

static void say_nth(problem *p, const char *first, int n) /* the n-th word behind `first` */
{
    p->tokens[p->n_tokens++] = task_token(first) + n;
}

/* A c 4, that is: c is A plus 4 */
static void say_formula(problem *p, const definition *d, int i)
{
    if (i > 0)
        say_nth(p, "A", d[i - 1].letter);
    else
        say(p, "start");
    say_nth(p, "a", d[i].letter);
    if (d[i].operand >= 0)
        say_nth(p, "#a", d[d[i].operand].letter);
    else
        say_nth(p, "0", d[i].operand_value);
}

/* A c 4 : the 4 + 5 so #c 9 ;  or  C d #a : #a 5 + 9 so #d 4 ;  with ? for : when this is what was
 * asked. A value always follows its name, so that it is looked up as words are copied. */
static void say_statement(problem *p, const definition *d, int i, int n_variables)
{
    say_formula(p, d, i);
    say(p, i == n_variables - 1 ? "?" : ":");
    if (d[i].operand >= 0)
        say_nth(p, "#a", d[d[i].operand].letter);
    else
        say(p, "the");
    say_nth(p, "0", d[i].operand_value);
    say(p, "+");
    say_nth(p, "0", d[i].first_value);
    say(p, "so");
    say_nth(p, "#a", d[i].letter);
    say_nth(p, "0", d[i].value);
    say(p, ";");
}

static void say_check(problem *p, const task *t, int check)
{
    for (int i = 0; i < CHECK_WORDS - 1 && t->n_dots > 0; i++) {
        say(p, check_words[check][i]);
        for (int dot = 0; dot < t->n_dots; dot++) say(p, ".");
    }
    say(p, check_words[check][CHECK_WORDS - 1]);
}

static void shuffle(int *x, int n, prng *r)
{
    for (int i = n - 1; i > 0; i--) {
        int j = prng_below(r, i + 1), swap = x[i];
        x[i] = x[j];
        x[j] = swap;
    }
}

static void draw_definitions(definition *d, int n, prng *r)
{
    int letters[N_LETTERS];
    for (int i = 0; i < N_LETTERS; i++) letters[i] = i;
    shuffle(letters, N_LETTERS, r);
    for (int i = 0; i < n; i++) {
        d[i].letter = letters[i];
        d[i].operand = i >= 2 && prng_below(r, 3) > 0 ? prng_below(r, i - 1) : -1;
        d[i].first_value = i > 0 ? d[i - 1].value : 0;
        d[i].operand_value = d[i].operand >= 0 ? d[d[i].operand].value : prng_below(r, MODULUS);
        d[i].value = (d[i].first_value + d[i].operand_value) % MODULUS;
    }
}

static task_split split_of(const problem *p)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a over the prompt's tokens */
    for (int i = 0; i < p->n_prompt; i++) hash = (hash ^ (uint64_t)p->tokens[i]) * 1099511628211u;
    prng mixed = { hash };
    int slot = prng_below(&mixed, 16);
    return slot == 0 ? SPLIT_VALIDATION : slot == 1 ? SPLIT_TEST : SPLIT_TRAIN;
}

static void say_prompt(problem *p, const definition *d, int n_variables, prng *r)
{
    int order[TASK_MAX_VARIABLES];
    for (int i = 0; i < n_variables; i++) order[i] = i;
    shuffle(order, n_variables, r);
    p->n_tokens = 0;
    say(p, "<s>");
    for (int i = 0; i < n_variables; i++) {
        say_formula(p, d, order[i]);
        say(p, order[i] == n_variables - 1 ? "?" : ";");
    }
    say(p, "think");
    p->n_prompt = p->n_tokens;
}

void task_generate(const task *t, int n_variables, int n_checks, task_split split, prng *r,
                   problem *out)
{
    definition d[TASK_MAX_VARIABLES];
    do {
        draw_definitions(d, n_variables, r);
        say_prompt(out, d, n_variables, r);
    } while (split_of(out) != split);
    for (int i = 0; i < n_variables; i++) {
        say(out, "now");
        say_statement(out, d, i, n_variables);
        for (int check = 0; check < n_checks; check++) {
            say_check(out, t, check);
            say_statement(out, d, i, n_variables);
        }
    }
    say(out, "so");
    say(out, "the");
    say(out, "answer");
    say(out, "is");
    out->answer = task_token("0") + d[n_variables - 1].value;
    out->tokens[out->n_tokens++] = out->answer;
    say(out, "</s>");
}

void task_generate_full(const task *t, task_split split, prng *r, problem *out)
{
    task_generate(t, t->n_variables, t->n_checks, split, r, out);
}

int task_answer(const int *tokens, int n_tokens)
{
    for (int i = n_tokens - 1; i >= 2; i--)
        if (tokens[i - 2] == task_token("answer") && tokens[i - 1] == task_token("is"))
            return tokens[i];
    return -1;
}
