#!/bin/sh
# Sources keep the house's form, and static analysers have nothing to say.
# make lint      (a tool that is not installed is named and skipped)
set -u
failed=0
sources=$(find . -path ./build -prune -o \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o \
    -name '*.cc' \) -print | sort)
c_sources=$(echo "$sources" | sed -n 's|^\./\(.*\.c\)$|\1|p')

report() { # what was looked at, output that ought to be empty
    if [ -z "$2" ]; then
        echo "ok    $1"
    else
        failed=1
        printf 'FAIL  %s\n%s\n' "$1" "$2" | head -n 60
    fi
}

# shellcheck disable=SC2086
report 'ASCII, no tabs, no trailing blanks' "$(LC_ALL=C grep -nE \
    "$(printf '[^ -~]|[ \t]$')" $sources | head -n 20)"
# shellcheck disable=SC2086
report '100 columns' "$(awk 'length > 100 { print FILENAME ":" FNR }' $sources)"

# Releases of clang-format differ in small ways; 14 decides.
format=$(command -v clang-format-14 || command -v clang-format || echo none)
if [ "$format" != none ] && "$format" --version | grep -q 'version 14\.'; then
    # shellcheck disable=SC2086
    report 'clang-format' "$("$format" --dry-run -Werror $sources 2>&1 | grep 'error:')"
else
    echo 'skip  clang-format: no version 14'
fi

mkdir -p "${BUILD:-build}"
whole=${BUILD:-build}/lint.c
printf '#define RKV_IMPLEMENTATION\n#define RKV_PTHREADS\n#include "rkv.h"\n' >"$whole"

# Suppressed for the examples: what 2.10 cannot see (values that another function sets, a NULL that
# needs no free, a stream that is either read or written).
if command -v cppcheck >/dev/null 2>&1; then
    report 'cppcheck' "$(for source in "$whole" $c_sources; do
        cppcheck --quiet --std=c99 --language=c --inline-suppr -I. -Itests --max-configs=1 \
            --enable=warning,performance,portability --suppress=missingIncludeSystem \
            '--suppress=uninitvar:examples/*' '--suppress=IOWithoutPositioning:examples/*' \
            '--suppress=seekOnAppendedFile:examples/*' '--suppress=memleak:examples/*' \
            -D__x86_64__ -D__GNUC__=12 "$source" 2>&1
    done)"
else
    echo 'skip  cppcheck: not installed'
fi

# The product only: for the programs around it there are the sanitizers.
if command -v clang-tidy >/dev/null 2>&1; then
    # Without the checks that quarrel with the house's form, and with indices that are ints.
    checks='-*,clang-analyzer-*,bugprone-*'
    for off in clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling \
        clang-analyzer-optin.performance.Padding bugprone-easily-swappable-parameters \
        bugprone-macro-parentheses bugprone-implicit-widening-of-multiplication-result \
        bugprone-misplaced-widening-cast bugprone-reserved-identifier \
        bugprone-suspicious-string-compare bugprone-not-null-terminated-result; do
        checks="$checks,-$off"
    done
    report 'clang-tidy' "$(clang-tidy --quiet --checks="$checks" --header-filter='.*' \
        "$whole" -- -std=c99 -I. 2>/dev/null | grep -E 'warning:|error:')"
else
    echo 'skip  clang-tidy: not installed'
fi
exit $failed
