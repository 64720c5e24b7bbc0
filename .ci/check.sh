#!/bin/sh
# What the documents say agrees with the header: programs, versions, licence.
# make check
set -u
out=${BUILD:-build}/check
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

# The C blocks of README.md: those with a main() are programs, one file each; the others together
# are one file after #include "rkv.h".
rm -f "$out"/*.c
awk -v out="$out" '
    /^```c$/ { block = ""; inside = 1; next }
    /^```$/ && inside {
        inside = 0
        if (block ~ /int main\(/) printf "%s", block > (out "/program" ++programs ".c")
        else snippets = snippets block
        next
    }
    inside { block = block $0 "\n" }
    END { printf "#include \"rkv.h\"\n%s", snippets > (out "/snippets.c") }' README.md
report 'README.md: the first program is examples/hello.c' \
    "$(diff "$out/program1.c" examples/hello.c)"
for source in "$out"/*.c; do
    # shellcheck disable=SC2086
    report "README.md: $(basename "$source") compiles" \
        "$($cc $flags -c "$source" -o "$out/readme.o" 2>&1)"
done

# shellcheck disable=SC2086
report 'README.md: its engine runs' \
    "$($cc $flags -O2 -DREADME_SNIPPETS="\"$out/snippets.c\"" tests/readme_engine.c \
        -o "$out/readme_engine" -lm 2>&1 && "$out/readme_engine" || echo "status $?")"

# The short program of the usage room: code up to the first gap of two blanks, the rest is prose.
{
    printf '#include "rkv.h"\n#include <stdlib.h>\nint rkv_usage(void *, void *, void *);\n'
    printf 'enum { kv_heads = 8, query_heads = 32, capacity = 1152, head_dim = 128 };\n'
    printf 'int rkv_usage(void *k, void *v, void *q)\n{\n    size_t bytes;\n'
    sed -n '/^ \* The smallest whole/,/^ \* Three numbers/s/^ \*     \([a-z].*\)/\1/p' rkv.h |
        sed 's/;  .*/;/'
    printf '    return layer.n_tokens;\n}\n'
} >"$out/usage.c"
# shellcheck disable=SC2086
report 'rkv.h: the program of the usage room compiles' \
    "$($cc $flags -c "$out/usage.c" -o "$out/usage.o" 2>&1)"

version=$(awk '/define RKV_VERSION_M|define RKV_VERSION_P/ { v = v s $3; s = "." }
    END { print v }' rkv.h)
report "version $version: title of rkv.h" \
    "$(head -n 1 rkv.h | grep -qF "v$version " || head -n 1 rkv.h)"
report "version $version: CHANGELOG.md" \
    "$(grep -m 1 '^## ' CHANGELOG.md | grep -qF "$version" || grep -m 1 '^## ' CHANGELOG.md)"

# Both licence texts stand at the end of rkv.h, whatever its comment puts around them.
flat() { tr -cs 'A-Za-z0-9(),."' ' '; }
body=$(sed -n '/^Alternative A/,$p' LICENSE | flat)
report 'LICENSE stands at the end of rkv.h' \
    "$(flat <rkv.h | grep -qF "$body" || echo 'not word for word')"
exit $failed
