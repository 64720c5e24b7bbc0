/* rkv-llama.c - R-KV in llama.cpp, on any GGUF model: generates, compares, evaluates.
 * Build: make llama        Run: build/rkv-llama --help
 */
#include "commands.h"
#include "../ponder/options.h"

const char program_name[] = "rkv-llama";

int main(int argc, char **argv)
{
    settings s;
    switch (settings_read(&s, argc, argv)) {
    case COMMAND_RUN: return command_run(&s);
    case COMMAND_COMPARE: return command_compare(&s);
    case COMMAND_EVAL: return command_eval(&s);
    }
    return 1;
}
