#!/bin/bash -eu
# OSS-Fuzz: every tests/fuzz_*.c becomes a program in $OUT, with its options beside it.
# `make test-install` runs this with clang's own libFuzzer.
cd "$SRC/rkv"

# The flags are words. The engine is C++, so a C++ compiler links.
# shellcheck disable=SC2086
for source in tests/rkv_impl.c tests/fuzz_*.c; do
    $CC $CFLAGS -std=c99 -I. -Itests -c "$source" -o "$WORK/$(basename "$source" .c).o"
done
for source in tests/fuzz_*.c; do
    name=$(basename "$source" .c)
    # shellcheck disable=SC2086
    $CXX $CXXFLAGS "$WORK/$name.o" "$WORK/rkv_impl.o" $LIB_FUZZING_ENGINE -lm -pthread \
        -o "$OUT/$name"
    printf '[libfuzzer]\nmax_len = 512\nlen_control = 0\ntimeout = 20\n' >"$OUT/$name.options"
done
