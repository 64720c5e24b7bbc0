#!/bin/sh
# What the documents say agrees with the header: programs, versions, licence.
# make check
set -u
build=${BUILD:-build}
out=$build/check
cc=${CC:-cc}
mkdir -p "$out"
flags='-std=c99 -pedantic -Wall -Wextra -Wconversion -Wshadow -Werror -I.'
failed=0

report() { # what was compared, output that ought to be empty
    if [ -z "$2" ]; then
        echo "ok    $1"
    else
        failed=1
        printf 'FAIL  %s\n%s\n' "$1" "$2"
    fi
}

# The C blocks of README.md. One with a main() is a program, a file of its own. One with a function
# or a type in it stands at file scope; these make one file. All others are statements: each is the
# body of a function. They may use the names below without declaring them.
rm -f "$out"/*.c
cat >"$out/names.h" <<'EOF'
#define RKV_PTHREADS
#define RKV_CUDA
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
extern rkv_config config;
extern rkv_error error;
extern rkv_layer layer, layers[32];
extern rkv_status status;
extern rkv_cache *cache;
extern rkv_cache_config cache_config;
extern rkv_threads *threads;
extern rkv_tensor keys, values, queries, key, value, query;
extern rkv_parallel_for my_parallel_for;
extern const rkv_backend *backend, *gpu;
extern int n_layers, kv_heads, query_heads, head_dim, window, budget, buffer, capacity;
extern int n_tokens, n_prompt, n_evicted, n_kept, l, rows, position;
extern int32_t *kept, *positions, *table;
extern void *k[32], *v[32], *q[32], *workspace, *stream, *my_pool, *memory;
extern size_t bytes;
extern char text[256];
EOF
awk -v out="$out" '
    /^```c$/ { block = ""; inside = 1; scope = 0; next }
    /^```$/ && inside {
        inside = 0
        if (block ~ /int main\(/) printf "%s", block > (out "/program" ++programs ".c")
        else if (scope) declared = declared block
        else {
            n++
            statements = statements "void snippet" n "(void);\nvoid snippet" n "(void)\n{\n" \
                block "}\n"
        }
        next
    }
    inside && /^([{]|static |enum |typedef |#|struct .*[{]$)/ { scope = 1 }
    inside { block = block $0 "\n" }
    END {
        if (declared) printf "#include \"rkv.h\"\n%s", declared > (out "/declared.c")
        if (statements) printf "#include \"names.h\"\n%s", statements > (out "/statements.c")
    }' README.md
if [ -e "$out/program1.c" ]; then
    report 'README.md: the first program is examples/hello.c' \
        "$(diff "$out/program1.c" examples/hello.c)"
fi
for source in "$out"/program*.c "$out/declared.c"; do
    [ -e "$source" ] || continue
    # shellcheck disable=SC2086
    report "README.md: $(basename "$source") compiles" \
        "$($cc $flags -c "$source" -o "$out/readme.o" 2>&1)"
done
if [ -e "$out/statements.c" ]; then
    # shellcheck disable=SC2086
    report 'README.md: its statements compile' \
        "$($cc $flags -Wno-shadow -Wno-unused -Wno-uninitialized -c "$out/statements.c" \
            -o "$out/readme.o" 2>&1)"
fi

# Each example is listed, says how it is built, and proves what it shows. make has built them.
for source in examples/*.c; do
    name=$(basename "$source")
    report "$source: is in examples/README.md, and says how it is built" "$(
        grep -qF "$name" examples/README.md || echo 'not in examples/README.md'
        head -n 6 "$source" | grep -qF "$source" || echo 'no command in its first comment')"
done
report 'examples/: each program runs' \
    "$("$build/tests/test_examples" >"$out/examples.txt" 2>&1 || cat "$out/examples.txt")"
# shellcheck disable=SC2086
report 'examples/cuda.c compiles' \
    "$($cc $flags -O2 -c examples/cuda.c -o "$out/cuda.o" 2>&1)"

# The decode loop of the usage room runs. Its code is what the comment indents by five blanks, up to
# a gap of two blanks after a ; or a brace: the rest of such a line is prose. There are two
# paragraphs of it, for the start and for the end of a token. One without a ; is a formula.
sed -n '/^ \* ==== 2\. Usage/,/^#ifndef RKV_H/p' rkv.h | awk -v out="$out" '
    !/^ \*     [^ ]/ && !/^ \*         [^ ]/ {
        if (paragraph ~ /;/) printf "%s", paragraph > (out "/usage" ++n ".h")
        paragraph = ""
        next
    }
    {
        line = substr($0, 8)
        if (match(line, /[;{}]  /)) line = substr(line, 1, RSTART)
        paragraph = paragraph line "\n"
    }'
cat >"$out/usage.c" <<'EOF'
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <stdio.h>
#include <stdlib.h>
enum { n_layers = 2, kv_heads = 2, query_heads = 4, capacity = 1152, head_dim = 32 };
static uint16_t keys[n_layers][kv_heads][capacity][head_dim];
static uint16_t values[n_layers][kv_heads][capacity][head_dim];
static uint16_t queries[n_layers][query_heads][8][head_dim];
static rkv_layer layers[n_layers];
static uint16_t noise(void) { return (uint16_t)(0x3800 | (rand() & 0x3ff) | (rand() & 32) << 10); }
int main(void)
{
    void *k[n_layers], *v[n_layers], *q[n_layers], *workspace;
    int l, t, h, i, rows = 0;
    size_t bytes;
    rkv_status status = RKV_OK;
    rkv_error error;
    char text[256];
    for (l = 0; l < n_layers; l++) {
        k[l] = keys[l];
        v[l] = values[l];
        q[l] = queries[l];
    }
#include "usage1.h"
    for (t = 0; t < capacity + 256; t++) {
        for (l = 0; l < n_layers; l++)
            for (i = 0; i < head_dim; i++) {
                for (h = 0; h < kv_heads; h++) keys[l][h][rows][i] = noise();
                for (h = 0; h < query_heads; h++) queries[l][h][t % 8][i] = noise();
            }
#include "usage2.h"
    }
    free(workspace);
    return status == RKV_OK && rows == 1024 ? 0 : 1;
}
EOF
# shellcheck disable=SC2086
report 'rkv.h: the decode loop of the usage room compiles and runs' \
    "$($cc $flags -O1 "$out/usage.c" -o "$out/usage" -lm 2>&1 && "$out/usage" ||
        echo "status $?")"

version=$(awk '/define RKV_VERSION_M|define RKV_VERSION_P/ { v = v s $3; s = "." }
    END { print v }' rkv.h)
report "version $version: title of rkv.h" \
    "$(head -n 1 rkv.h | grep -qF "v$version " || head -n 1 rkv.h)"
report "version $version: CHANGELOG.md" \
    "$(grep -m 1 '^## ' CHANGELOG.md | grep -qF "$version" || grep -m 1 '^## ' CHANGELOG.md)"

# Numbers of the README: the workspace, what hello.c asks for; the accuracies, each in the full
# tables; at most 200 lines.
# shellcheck disable=SC2086
$cc $flags -O2 examples/hello.c -o "$out/hello" -lm && workspace=$("$out/hello" |
    sed -n 's/.* \([0-9]*\) bytes of workspace.*/\1/p')
report 'README.md: the workspace is what hello.c asks for' \
    "$(grep -qF "Memory: $((${workspace:-0} / 1024)) KiB of workspace" README.md ||
        echo "hello: ${workspace:-?} bytes")"
report 'README.md: its accuracies stand in bench/results/README.md' \
    "$(grep -oE '[0-9.]+ \([0-9]+ to [0-9]+\)' README.md | while read -r number; do
        grep -qF "$number" bench/results/README.md || echo "$number"
    done)"
report 'README.md: at most 200 lines' "$(awk 'NR > 200 { print "more"; exit }' README.md)"

# Both licence texts stand at the end of rkv.h, whatever its comment puts around them.
flat() { tr -cs 'A-Za-z0-9(),."' ' '; }
body=$(sed -n '/^Alternative A/,$p' LICENSE | flat)
report 'LICENSE stands at the end of rkv.h' \
    "$(flat <rkv.h | grep -qF "$body" || echo 'not word for word')"
exit $failed
