#!/bin/sh
# What the compiled header brings into a program: only names with the prefix, no function of libc
# beyond memory copies and libm, one variable. Usage: sh tests/symbols.sh (from the top; CC, NM)
set -u
cc=${CC:-cc}
nm=${NM:-nm}
passed=0 failed=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT

# $1: what must be empty; $2: the list that should be
expect_none() {
    if [ -z "$2" ]; then
        passed=$((passed + 1))
    else
        echo "FAIL  $1: $(echo "$2" | tr '\n' ' ')"
        failed=$((failed + 1))
    fi
}

# $1: flags. Compiles the implementation and lists its symbols as "name type".
symbols() {
    compiled=
    # shellcheck disable=SC2086 # flags are words
    if printf '#define RKV_IMPLEMENTATION\n#include "rkv.h"\n' |
        $cc -O2 -I. $1 -x c -c - -o "$dir/rkv.o"; then
        $nm -P "$dir/rkv.o" | sed 's/^_rkv/rkv/' >"$dir/symbols" && compiled=yes
    fi
    expect_none "compile with '$1'" "$([ "$compiled" ] || echo 'no object')"
}

# Memory copies, fused multiply-add and square root, the floating-point environment where no
# instruction is known for it, what compilers call by themselves.
allowed='^(mem(cpy|move|set|cmp)|str(cmp|len)|fe[gs]etenv|fmaf|sqrtf|fabsf|pow|_GLOBAL_OFFSET_TABLE_|__stack_chk_.*)$'
cache='^(malloc|calloc|realloc|free)$'
threads='^(pthread_(create|join|(mutex|cond)_[a-z]+)|getpid)$'

undefined() { awk '$2 == "U" { print $1 }' "$dir/symbols" | sed 's/^_\([a-z]\)/\1/'; }
external() { awk '$2 ~ /^[A-TV-Z]$/ { print $1 }' "$dir/symbols"; }

symbols '-DRKV_PTHREADS'
expect_none 'whole header, external names without the prefix' "$(external | grep -v '^rkv_')"
expect_none 'whole header, calls' \
    "$(undefined | grep -Ev "$allowed" | grep -Ev "$cache" | grep -Ev "$threads")"
expect_none 'whole header, variables besides the registry and the best CPU path' \
    "$(awk '$2 ~ /^[bBC]$/ { print $1 }' "$dir/symbols" | grep -Ev '^rkvi_(registered|best_cpu)$')"

symbols '-DRKV_NO_CACHE'
expect_none 'without cache and threads: allocations and other calls' \
    "$(undefined | grep -Ev "$allowed")"

symbols '-DRKV_NO_CACHE -DRKV_NO_AVX2 -DRKV_NO_AVX512 -DRKV_NO_NEON'
expect_none 'without vector paths, calls' "$(undefined | grep -Ev "$allowed")"
expect_none 'without vector paths, their code' "$(grep -E 'avx2|avx512|neon' "$dir/symbols")"

symbols '-DRKV_STATIC -DRKV_PTHREADS -Wno-unused-function'
expect_none 'RKV_STATIC, external names' "$(external)"

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
