#!/bin/sh
# rkv.h compiles without a warning in every language, compiler and configuration it promises.
# make test-std      (a compiler that is not installed is named and skipped)
set -u
out=${BUILD:-build}/std
mkdir -p "$out"
warnings='-Wall -Wextra -Wconversion -Wshadow -Werror'
variants='- -DRKV_STATIC -DRKV_NO_CACHE -DRKV_NO_AVX512 -DRKV_NO_AVX2,-DRKV_NO_AVX512,-DRKV_NO_NEON
          -DRKV_PTHREADS -DRKV_STATIC,-DRKV_NO_CACHE,-DRKV_PTHREADS'
passed=0 failed=0 skipped=0

printf '#define RKV_IMPLEMENTATION\n#include "rkv.h"\n' >"$out/whole.c"
printf '#include "rkv.h"\nint rkv_user;\n' >"$out/public.c"

compile() { # compiler, language, standard, source, flags
    # shellcheck disable=SC2086
    if "$1" -x "$2" -std="$3" -pedantic $warnings -I. $5 -c "$out/$4.c" -o "$out/$4.o"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL  $1 -std=$3 $5 ($4)"
    fi
}

language() { # compiler, language, standard
    if ! command -v "$1" >/dev/null 2>&1; then
        skipped=$((skipped + 1))
        echo "skip  $1 -std=$3: not installed"
        return
    fi
    compile "$1" "$2" "$3" public ''
    compile "$1" "$2" "$3" whole -O2
    for variant in $variants; do
        [ "$variant" = - ] && variant=
        compile "$1" "$2" "$3" whole "-O0 $(echo "$variant" | tr ',' ' ')"
    done
    echo "      $1 -std=$3"
}

for standard in c99 c11; do
    for compiler in gcc clang aarch64-linux-gnu-gcc s390x-linux-gnu-gcc x86_64-w64-mingw32-gcc; do
        language "$compiler" c "$standard"
    done
done
for standard in c++11 c++17; do
    for compiler in g++ clang++ aarch64-linux-gnu-g++; do
        language "$compiler" c++ "$standard"
    done
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
