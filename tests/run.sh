#!/bin/sh
# Runs test programs, as many at a time as there are CPUs (JOBS=1: one after another), and adds up
# their closing lines: sh tests/run.sh PROGRAM...
# A program that ends without its closing line, or with a wrong exit status, is a failure.
set -u
passed=0 failed=0 skipped=0 n=0
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' HUP INT TERM

# shellcheck disable=SC2016 # the inner shell expands
for program in "$@"; do
    n=$((n + 1))
    printf '%s\n%s\n' "$dir/$n" "$program"
done | xargs -n 2 -P "$jobs" sh -c '
    start=$(date +%s)
    "$1" >"$0.out"
    echo $? $(($(date +%s) - start)) >"$0.status"'

n=0
for program in "$@"; do
    n=$((n + 1))
    out=$dir/$n.out
    read -r status seconds <"$dir/$n.status"
    closing=$(tail -n 1 "$out" | tr -d '\r' | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$')
    if [ -z "$closing" ]; then
        cat "$out"
        echo "FAIL  $program: ended with status $status and no closing line"
        failed=$((failed + 1))
        continue
    fi
    sed '$d' "$out"
    echo "      $(basename "$program"): $closing, $seconds s"
    # shellcheck disable=SC2086 # split into "P passed, F failed, S skipped"
    set -- $closing "$@"
    passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
    if [ "$status" -ne 0 ] && [ "$3" -eq 0 ]; then
        echo "FAIL  $program: ended with status $status"
        failed=$((failed + 1))
    fi
    shift 6
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
