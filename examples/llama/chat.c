/* chat.c - see chat.h. Build: part of `make llama`. */
#include "chat.h"
#include "../ponder/options.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

void chat_tokens(token_list *out, const struct llama_model *model, const char *prompt,
                 const settings *s)
{
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    const char *template = s->raw ? NULL : llama_model_chat_template(model, NULL);
    const struct llama_chat_message message = { "user", prompt };
    const size_t room = 2 * strlen(prompt) + 4096;
    if (room > INT_MAX) die("the prompt is too long");
    char *text = allocate(room, 1);
    int n = template ? llama_chat_apply_template(template, &message, 1, 1, text, (int)room) : -1;
    if (n < 0 || (size_t)n >= room)
        tokens_add_text(out, vocab, prompt, 1, 0);
    else
        tokens_add_text(out, vocab, text, 1, 1);
    free(text);
    if (out->n == 0) die("the prompt is empty");
}

struct llama_sampler *chat_sampler(const settings *s)
{
    struct llama_sampler *chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (s->temperature <= 0.0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return chain;
    }
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(40));
    llama_sampler_chain_add(chain, llama_sampler_init_top_p((float)s->top_p, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp((float)s->temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist((uint32_t)s->seed));
    return chain;
}

void chat_ends(token_list *out, const struct llama_vocab *vocab)
{
    for (llama_token t = 0; t < llama_vocab_n_tokens(vocab); t++)
        if (llama_vocab_is_eog(vocab, t)) tokens_add(out, &t, 1);
}
