/* task.h - the problems: a few variables defined in shuffled order, each as the one before it plus
 * a number or an earlier variable, modulo 10. "A c 4" says that upon a follows c, which is a plus
 * 4; "C d #a" that upon c follows d, which is c plus the value of a. The first variable builds on
 * start, which is 0. The chain of thought resolves them one after another and rechecks every step.
 * It is a function of the prompt, so that an answer can be marked right or wrong.
 *
 *   <s> A c 4 ; start a 5 ; C d #a ? think                   the prompt; ? marks what is asked
 *   now start a 5 : the 5 + 0 so #a 5 ;    a step: definition, values of its operands, the result
 *   wait .. let .. me .. check .. yes start a 5 : the 5 + 0 so #a 5 ;     a check; .. is 7 dots
 *   now A c 4 : the 4 + 5 so #c 9 ;
 *   ...
 *   now C d #a ? #a 5 + 9 so #d 4 ;
 *   ...  so the answer is 4 </s>
 *
 * Problems of the two tasks: "ponder" has 6 variables and 3 checks with dots, "brief" has 8
 * variables and 3 checks without.
 */
#ifndef TASK_H
#define TASK_H

#include "prng.h"

enum { TASK_MAX_VARIABLES = 8, TASK_MAX_CHECKS = 3, TASK_MAX_TOKENS = 1024 };

typedef struct task {
    const char *name;
    int n_variables, n_checks; /* of a full problem                                            */
    int n_dots;                /* after each of a check's words; 0: one word a check           */
} task;

/* Training draws from SPLIT_TRAIN alone; choices are made on SPLIT_VALIDATION, results reported
 * on SPLIT_TEST. A problem belongs to exactly one split, by a hash of its prompt. */
typedef enum task_split { SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_TEST } task_split;

typedef struct problem {
    int tokens[TASK_MAX_TOKENS]; /* prompt, chain of thought, answer, </s>                     */
    int n_prompt, n_tokens;
    int answer; /* token */
} problem;

const task *task_find(const char *name); /* NULL: no such task */

/* A problem with the given number of variables (2 .. TASK_MAX_VARIABLES) and checks. */
void task_generate(const task *t, int n_variables, int n_checks, task_split split, prng *r,
                   problem *out);
void task_generate_full(const task *t, task_split split, prng *r, problem *out);

int task_vocabulary(void);
const char *task_word(int token);
int task_token(const char *word); /* -1: no such word */
int task_is_end(int token);       /* </s> */

/* The answer that a generated chain of thought gives: the token behind its last "answer is";
 * -1 if there is none. */
int task_answer(const int *tokens, int n_tokens);

#endif
