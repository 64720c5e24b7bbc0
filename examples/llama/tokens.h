/* tokens.h - lists of tokens, and text to and from them. */
#ifndef TOKENS_H
#define TOKENS_H

#include "llama.h"

typedef struct token_list {
    llama_token *at; /* free() it */
    int n, room;
} token_list;

void tokens_add(token_list *list, const llama_token *tokens, int n);
/* Tokens of a text. is_first: with the model's token for a beginning, if it has one. has_markup:
 * <|im_start|> and the like are tokens, not text. */
void tokens_add_text(token_list *list, const struct llama_vocab *vocab, const char *text,
                     int is_first, int has_markup);
/* Writes a token's text, as far as it has one, to out, and returns its bytes (no zero is added). */
int token_text(const struct llama_vocab *vocab, llama_token token, char *out, int room);

char *read_text(const char *path); /* a whole file, with a zero; dies where that is not possible */

#endif
