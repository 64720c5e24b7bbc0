/* options.h - what the example programs say when something is wrong, and how they read numbers.
 * Whatever is wrong with the input ends a program with one line on stderr and exit status 1.
 */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <stddef.h>
#include <stdint.h>

extern const char program_name[]; /* each program defines its own */

/* "name: message" as by printf, and the end. */
#ifdef __GNUC__
__attribute__((format(printf, 1, 2), noreturn))
#endif
void die(const char *format, ...);

void *allocate(size_t n, size_t size); /* zeros; free() them; dies when there is no memory */

/* Dies unless a file of that name can be written: told now, not after an hour's work. */
void check_writable(const char *path);

/* The value of option `name`; dies unless it is a number, and nothing else, within the limits. */
double option_number(const char *name, const char *text, double low, double high);
int64_t option_whole(const char *name, const char *text, int64_t low, int64_t high);

#endif
