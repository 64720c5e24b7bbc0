/* screen.c - see screen.h. Build: part of `make llama`. */
#define _DEFAULT_SOURCE
#include "screen.h"
#include "../ponder/seconds.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int n_rows, n_columns; /* of the terminal; no rows: there is none */
static double last;

/* Gives the last row back: also where the program dies. */
static void release(void)
{
    if (n_rows == 0) return;
    printf("\0337\033[r\033[%d;1H\033[2K\0338", n_rows);
    fflush(stdout);
    n_rows = 0;
}

void screen_open(void)
{
    struct winsize size;
    last = seconds();
    if (!isatty(1) || !isatty(2) || ioctl(1, TIOCGWINSZ, &size) != 0 || size.ws_row < 4) return;
    n_rows = size.ws_row;
    n_columns = size.ws_col;
    atexit(release);
    /* A line feed makes room; setting the rows that scroll moves the cursor, so it is saved. */
    printf("\n\033[1A\0337\033[1;%dr\0338", n_rows - 1);
}

void screen_text(const char *text, size_t bytes)
{
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

int screen_is_due(void)
{
    return seconds() - last >= (n_rows > 0 ? 0.2 : 10.0);
}

void screen_status(const char *text)
{
    last = seconds();
    if (n_rows == 0) {
        fprintf(stderr, "%s\n", text);
        return;
    }
    printf("\0337\033[%d;1H\033[2K\033[7m%.*s\033[0m\0338", n_rows, n_columns, text);
    fflush(stdout);
}

void screen_close(const char *text)
{
    release();
    printf("\n");
    fflush(stdout);
    fprintf(stderr, "%s\n", text);
}
