/* options.c - see options.h. Build: part of `make demo`, `make train` and `make eval`. */
#include "options.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

void *allocate(size_t n, size_t size)
{
    void *memory = calloc(n, size);
    if (!memory) die("out of memory");
    return memory;
}

void check_writable(const char *path)
{
    FILE *f = fopen(path, "ab");
    if (!f) die("cannot write %s", path);
    fseek(f, 0, SEEK_END);
    const int is_new = ftell(f) == 0;
    fclose(f);
    if (is_new) remove(path);
}

double option_number(const char *name, const char *text, double low, double high)
{
    char *end;
    const double v = strtod(text, &end);
    if (*text == 0 || *end != 0) die("%s: '%s' is not a number", name, text);
    if (!(v >= low && v <= high)) die("%s: %s is out of range, %g to %g", name, text, low, high);
    return v;
}

int64_t option_whole(const char *name, const char *text, int64_t low, int64_t high)
{
    char *end;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    if (*text == 0 || *end != 0) die("%s: '%s' is not a whole number", name, text);
    if (errno != 0 || v < low || v > high)
        die("%s: %s is out of range, %lld to %lld", name, text, (long long)low, (long long)high);
    return v;
}
