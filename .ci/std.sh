#!/bin/sh
# rkv.h compiles without a warning in every language, compiler and configuration it promises.
# make test-std      (a compiler that is not installed is named and skipped)
set -u
out=${BUILD:-build}/std
mkdir -p "$out"
warnings='-Wall -Wextra -Wconversion -Wshadow -Werror'
variants='- -DRKV_STATIC -DRKV_NO_CACHE -DRKV_NO_AVX512 -DRKV_NO_AVX2 -DRKV_NO_AVX2,-DRKV_NO_AVX512,-DRKV_NO_NEON
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

# Flags that give up IEEE arithmetic are refused.
for compiler in gcc clang; do
    command -v "$compiler" >/dev/null 2>&1 || continue
    for flag in -ffast-math -ffinite-math-only; do
        if "$compiler" -std=c99 -I. "$flag" -c "$out/whole.c" -o "$out/whole.o" 2>/dev/null; then
            failed=$((failed + 1))
            echo "FAIL  $compiler $flag compiles"
        else
            passed=$((passed + 1))
        fi
    done
done

# What clang sees when it stands in for MSVC, over as much of a C library as the header calls. Only
# the syntax: nothing is linked.
windows="$out/windows"
mkdir -p "$windows"
for name in math stdlib string; do
    { echo '#include <stddef.h>'; echo '#ifdef __cplusplus'; echo 'extern "C" {'; echo '#endif'
      case $name in
      math) echo 'float sqrtf(float), fabsf(float), fmaf(float, float, float);' ;;
      stdlib) echo 'void *malloc(size_t), free(void *);' ;;
      string) echo 'void *memcpy(void *, const void *, size_t), *memset(void *, int, size_t),'
              echo '    *memmove(void *, const void *, size_t);'
              echo 'int memcmp(const void *, const void *, size_t);'
              echo 'int strcmp(const char *, const char *);' ;;
      esac
      echo '#ifdef __cplusplus'; echo '}'; echo '#endif'; } >"$windows/$name.h"
done
echo 'typedef int jmp_buf[64];' >"$windows/setjmp.h"
if command -v clang >/dev/null 2>&1; then
    for target in x86_64 aarch64; do
        for variant in - -DRKV_NO_AVX2 -DRKV_NO_AVX512 -DRKV_NO_AVX2,-DRKV_NO_AVX512; do
            [ "$variant" = - ] && variant=
            for language in c,c99 c++,c++17; do
                # shellcheck disable=SC2046,SC2086
                if clang -x "${language%,*}" -std="${language#*,}" --target=$target-pc-windows-msvc \
                    -fms-compatibility -fms-extensions -D__MM_MALLOC_H -isystem "$windows" \
                    $warnings -I. $(echo "$variant" | tr ',' ' ') -fsyntax-only "$out/whole.c"; then
                    passed=$((passed + 1))
                else
                    failed=$((failed + 1))
                    echo "FAIL  clang for $target-pc-windows-msvc, ${language#*,} $variant"
                fi
            done
        done
        echo "      clang for $target-pc-windows-msvc"
    done
else
    skipped=$((skipped + 1))
    echo 'skip  clang in the place of MSVC: not installed'
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
