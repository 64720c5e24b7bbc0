/* commands.h - the commands of rkv-llama. Each returns the program's exit status. */
#ifndef COMMANDS_H
#define COMMANDS_H

#include "settings.h"

int command_run(const settings *s);
int command_compare(const settings *s);
int command_eval(const settings *s);

#endif
