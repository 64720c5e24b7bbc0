#!/bin/sh
# Runs programs of examples/: each proves what it shows, and says so in a line or two.
#     make test        or: sh tests/test_examples.sh build/examples/hello ...
set -u
passed=0 failed=0 skipped=0
out=$(mktemp) || exit 1
trap 'rm -f "$out"' EXIT
trap 'exit 130' HUP INT TERM

for program in "$@"; do
    "$program" >"$out" 2>&1
    status=$?
    if [ "$status" -ne 0 ] || [ ! -s "$out" ]; then
        failed=$((failed + 1))
        echo "FAIL  $program: exit status $status"
        sed 's/^/      | /' "$out"
    elif grep '^skip  ' "$out"; then
        skipped=$((skipped + 1))
    else
        passed=$((passed + 1))
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
