/* mind.h - the project's own engine behind a few calls, for a test that also includes llama.h (the
 * engine's gguf.h cannot stand beside it). Linked in by `make test-llama`. */
#ifndef MIND_H
#define MIND_H

typedef struct mind mind;

mind *mind_open(const char *path); /* NULL: the file cannot be loaded */
void mind_close(mind *m);
void mind_forget(mind *m);
/* Thinks n more tokens, every one kept in the cache; returns the most likely next one. */
int mind_step(mind *m, const int *tokens, int n);

#endif
