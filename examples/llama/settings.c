/* settings.c - see settings.h. Build: part of `make llama`. */
#include "settings.h"
#include "../ponder/options.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "rkv-llama: R-KV in llama.cpp. A cache of --budget tokens, however long the text gets.\n"
    "\n"
    "rkv-llama run -m MODEL.gguf -p TEXT     answers, in bounded memory\n"
    "  -n N               stop after N tokens; 0, the default: at the answer's end only\n"
    "  --ignore-end       go on behind the answer's end; without -n, until interrupted\n"
    "  --policy NAME      rkv (default), rkv-pool1 (without pooling), paper, wide, snapkv,\n"
    "                     memory_traces, memory_prose, memory_wide, h2o, triattention, streaming,\n"
    "                     random, full\n"
    "  --temp X --top-p X --seed N   sampling: 0.8, 0.95, 1; --temp 0 is greedy\n"
    "  --raw              the prompt as it is, without the model's chat template\n"
    "  --no-pin           the prompt may be evicted too\n"
    "rkv-llama compare -m MODEL.gguf         full cache and R-KV side by side, same tokens;\n"
    "                     --policy full: the callback alone, nothing evicted\n"
    "  --tokens N         length, 3000\n"
    "  --every N          a row every N tokens, 500\n"
    "  --text FILE --from N          both begin with the first N tokens of FILE, untimed\n"
    "  -p, --policy, --temp, --top-p, --seed, --raw, --no-pin   as above\n"
    "  --csv FILE --svg NAME         also writes FILE, NAME-speed.svg and NAME-memory.svg\n"
    "rkv-llama eval -m MODEL.gguf --text FILE [--text FILE ..]     what eviction costs\n"
    "  --policy NAME[,NAME..]        these and rkv; all of them where it is not given\n"
    "  --pins on|off|both            the prompt pinned, not, or each in turn (default)\n"
    "  --budget N[,N..]   128,256\n"
    "  --documents N      8; of --tokens N tokens of text each, 1024\n"
    "  --facts N          questions of each kind in a document, 4 (8 at most)\n"
    "  --minutes N        no new document after N minutes\n"
    "  -j N               documents at a time, 1; each has -t threads\n"
    "  --seed N           of the facts, 1\n"
    "  --csv FILE --svg NAME         also writes FILE, NAME-loss.svg and NAME-recall.svg\n"
    "All of them:\n"
    "  --budget N         tokens kept, 1024\n"
    "  --buffer N         tokens between two rounds, 128\n"
    "  -t N               threads, 1\n"
    "  --kv TYPE          of cached keys and values: f16 (default), f32, bf16, q8_0, q4_0, ...\n"
    "  --flash on|off     flash attention, on";

typedef enum kind { TEXT, TEXTS, WHOLE, WHOLES, WHOLE64, NUMBER, FLAG } kind;

enum { RUN = COMMAND_RUN, COMPARE = COMMAND_COMPARE, EVAL = COMMAND_EVAL, ALL = 7 };

/* clang-format off */
static const struct option {
    const char *name;
    int commands;
    kind kind;
    double low, high;
    size_t at;
} table[] = {
    { "-m",           ALL,           TEXT,    0, 0,         offsetof(settings, model)       },
    { "-p",           RUN | COMPARE, TEXT,    0, 0,         offsetof(settings, prompt)      },
    { "-t",           ALL,           WHOLE,   1, 512,       offsetof(settings, n_threads)   },
    { "-n",           RUN,           WHOLE,   0, 1 << 30,   offsetof(settings, n_tokens)    },
    { "--budget",     ALL,           WHOLES,  2, 1 << 20,   offsetof(settings, budgets)     },
    { "--buffer",     ALL,           WHOLE,   1, 1 << 16,   offsetof(settings, buffer)      },
    { "--policy",     ALL,           TEXT,    0, 0,         offsetof(settings, policy)      },
    { "--pins",       EVAL,          TEXT,    0, 0,         offsetof(settings, pins)        },
    { "--kv",         ALL,           TEXT,    0, 0,         offsetof(settings, kv)          },
    { "--flash",      ALL,           TEXT,    0, 0,         offsetof(settings, flash)       },
    { "--temp",       RUN | COMPARE, NUMBER,  0, 100,       offsetof(settings, temperature) },
    { "--top-p",      RUN | COMPARE, NUMBER,  0, 1,         offsetof(settings, top_p)       },
    { "--seed",       ALL,           WHOLE64, 0, INT32_MAX, offsetof(settings, seed)        },
    { "--raw",        RUN | COMPARE, FLAG,    0, 0,         offsetof(settings, raw)         },
    { "--no-pin",     RUN | COMPARE, FLAG,    0, 0,         offsetof(settings, no_pin)      },
    { "--ignore-end", RUN,           FLAG,    0, 0,         offsetof(settings, ignore_end)  },
    { "--tokens",     COMPARE | EVAL, WHOLE,  32, 1 << 20,  offsetof(settings, n_tokens)    },
    { "--every",      COMPARE,       WHOLE,   16, 1 << 20,  offsetof(settings, every)       },
    { "--from",       COMPARE,       WHOLE,   0, 1 << 20,   offsetof(settings, from)        },
    { "--text",       COMPARE | EVAL, TEXTS,  0, 0,         offsetof(settings, texts)       },
    { "--documents",  EVAL,          WHOLE,   2, 1000,      offsetof(settings, n_documents) },
    { "--facts",      EVAL,          WHOLE,   1, 8,         offsetof(settings, facts)       },
    { "--minutes",    EVAL,          WHOLE,   1, 100000,    offsetof(settings, minutes)     },
    { "-j",           EVAL,          WHOLE,   1, 256,       offsetof(settings, n_jobs)      },
    { "--csv",        COMPARE | EVAL, TEXT,   0, 0,         offsetof(settings, csv)         },
    { "--svg",        COMPARE | EVAL, TEXT,   0, 0,         offsetof(settings, svg)         },
};
/* clang-format on */

static command find_command(const char *name)
{
    if (strcmp(name, "run") == 0) return COMMAND_RUN;
    if (strcmp(name, "compare") == 0) return COMMAND_COMPARE;
    if (strcmp(name, "eval") == 0) return COMMAND_EVAL;
    die("no command %s; there are run, compare and eval; --help says more", name);
}

static void read_budgets(settings *s, const struct option *o, const char *text, int most)
{
    char number[32];
    s->n_budgets = 0;
    for (const char *end = text; *end; text = end + 1) {
        end = text + strcspn(text, ",");
        if (s->n_budgets == most)
            die("%s: at most %d number%s", o->name, most, most > 1 ? "s" : "");
        snprintf(number, sizeof number, "%.*s", (int)(end - text), text);
        s->budgets[s->n_budgets++] =
            (int)option_whole(o->name, number, (int64_t)o->low, (int64_t)o->high);
    }
    if (s->n_budgets == 0) die("%s: '%s' is not a whole number", o->name, text);
}

static void set(settings *s, const struct option *o, const char *text, command c)
{
    void *at = (char *)s + o->at;
    switch (o->kind) {
    case TEXT: *(const char **)at = text; break;
    case TEXTS:
        if (s->n_texts == MAX_TEXTS) die("%s: at most %d files", o->name, MAX_TEXTS);
        s->texts[s->n_texts++] = text;
        break;
    case WHOLE:
        *(int *)at = (int)option_whole(o->name, text, (int64_t)o->low, (int64_t)o->high);
        break;
    case WHOLES: read_budgets(s, o, text, c == COMMAND_EVAL ? MAX_BUDGETS : 1); break;
    case WHOLE64:
        *(int64_t *)at = option_whole(o->name, text, (int64_t)o->low, (int64_t)o->high);
        break;
    case NUMBER: *(double *)at = option_number(o->name, text, o->low, o->high); break;
    case FLAG: *(int *)at = 1; break;
    }
}

static void fill(settings *s, command c)
{
    memset(s, 0, sizeof *s);
    s->policy = c == COMMAND_EVAL ? "" : "rkv";
    s->pins = "both";
    s->kv = "f16";
    s->flash = "on";
    s->budgets[0] = c == COMMAND_EVAL ? 128 : 1024;
    s->budgets[1] = 256;
    s->n_budgets = c == COMMAND_EVAL ? 2 : 1;
    s->buffer = 128;
    s->n_threads = 1;
    s->n_tokens = c == COMMAND_RUN ? 0 : c == COMMAND_COMPARE ? 3000 : 1024;
    s->every = 500;
    s->n_documents = 8;
    s->facts = 4;
    s->n_jobs = 1;
    s->temperature = 0.8;
    s->top_p = 0.95;
    s->seed = 1;
}

command settings_read(settings *out, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0) {
            puts(usage);
            exit(0);
        }
    if (argc < 2) die("a command is needed: run, compare or eval; --help says more");
    const command c = find_command(argv[1]);
    fill(out, c);
    for (int i = 2; i < argc; i++) {
        const struct option *o = NULL;
        for (size_t k = 0; k < sizeof table / sizeof *table; k++)
            if (strcmp(table[k].name, argv[i]) == 0 && (table[k].commands & (int)c)) o = &table[k];
        if (!o) die("%s has no option %s; --help lists the options", argv[1], argv[i]);
        if (o->kind != FLAG && i + 1 == argc) die("%s needs a value", o->name);
        set(out, o, o->kind == FLAG ? NULL : argv[++i], c);
    }
    if (!out->model) die("-m MODEL.gguf is needed; --help says more");
    if (c == COMMAND_RUN && !out->prompt) die("-p TEXT is needed; --help says more");
    if (c == COMMAND_EVAL && out->n_texts == 0) die("--text FILE is needed; --help says more");
    if (c == COMMAND_COMPARE && (out->n_texts > 0) != (out->from > 0))
        die("--text and --from go together");
    return c;
}
