/* settings.h - the command line of rkv-llama. */
#ifndef SETTINGS_H
#define SETTINGS_H

#include <stdint.h>

typedef enum command { COMMAND_RUN = 1, COMMAND_COMPARE = 2, COMMAND_EVAL = 4 } command;

enum { MAX_TEXTS = 16, MAX_BUDGETS = 8 };

typedef struct settings {
    const char *model, *prompt, *policy, *pins, *kv, *flash, *csv, *svg;
    const char *texts[MAX_TEXTS];
    int budgets[MAX_BUDGETS];
    int n_texts, n_budgets; /* run and compare take one budget */
    int buffer, n_threads, n_tokens, every, from;
    int n_documents, facts, minutes, n_jobs;
    int no_pin, raw, ignore_end;
    double temperature, top_p;
    int64_t seed;
} settings;

/* Dies, with one line, where the line makes no sense. --help ends the program with status 0. */
command settings_read(settings *out, int argc, char **argv);

#endif
