/* screen.h - text that streams, and a status line under it: on a terminal its last row stays in
 * place; otherwise the text goes to standard output and the status, from time to time, to standard
 * error.
 */
#ifndef SCREEN_H
#define SCREEN_H

#include <stddef.h>

void screen_open(void);
void screen_text(const char *text, size_t bytes);
int screen_is_due(void); /* whether it is time for a new status */
void screen_status(const char *text);
void screen_close(const char *text); /* with a last status, on a line of its own */

#endif
