/* chat.h - from a prompt to tokens, and from logits to the next token. */
#ifndef CHAT_H
#define CHAT_H

#include "settings.h"
#include "tokens.h"

/* The prompt under the model's chat template, if it has one that llama.cpp knows and --raw does
 * not say otherwise. */
void chat_tokens(token_list *out, const struct llama_model *model, const char *prompt,
                 const settings *s);

struct llama_sampler *chat_sampler(const settings *s); /* llama_sampler_free it */

/* The tokens that end an answer. */
void chat_ends(token_list *out, const struct llama_vocab *vocab);

#endif
