/* tokens.c - see tokens.h. Build: part of `make llama`. */
#include "tokens.h"
#include "../ponder/options.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void reserve(token_list *list, int n)
{
    if (n > INT_MAX / 2 - list->n) die("the text is too long");
    if (list->n + n <= list->room) return;
    list->room = 2 * (list->n + n);
    list->at = realloc(list->at, (size_t)list->room * sizeof *list->at);
    if (!list->at) die("out of memory");
}

void tokens_add(token_list *list, const llama_token *tokens, int n)
{
    reserve(list, n);
    if (n > 0) memcpy(list->at + list->n, tokens, (size_t)n * sizeof *tokens);
    list->n += n;
}

void tokens_add_text(token_list *list, const struct llama_vocab *vocab, const char *text,
                     int is_first, int has_markup)
{
    const size_t length = strlen(text);
    if (length > INT_MAX / 4) die("the text is too long");
    reserve(list, (int)length + 8);
    const int n = llama_tokenize(vocab, text, (int)length, list->at + list->n, list->room - list->n,
                                 is_first, has_markup);
    if (n < 0) die("the model's tokeniser refuses the text");
    list->n += n;
}

int token_text(const struct llama_vocab *vocab, llama_token token, char *out, int room)
{
    const int n = llama_token_to_piece(vocab, token, out, room, 0, 0);
    return n > 0 ? n : 0;
}

char *read_text(const char *path)
{
    char *text = NULL;
    size_t n = 0, room = 0;
    FILE *f = fopen(path, "rb");
    if (!f) die("cannot read %s", path);
    do {
        if (n + 1 >= room) {
            room = 2 * room + 65536;
            text = realloc(text, room);
            if (!text) die("out of memory");
        }
        n += fread(text + n, 1, room - n - 1, f);
    } while (!feof(f) && !ferror(f));
    if (ferror(f)) die("cannot read %s", path);
    fclose(f);
    if (memchr(text, 0, n)) die("%s: not a text", path);
    text[n] = 0;
    return text;
}
