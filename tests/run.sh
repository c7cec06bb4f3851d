#!/usr/bin/env bash
# Runs tests and closes with one line that counts them over all runs: `N passed, N failed, N skipped: KIND N, …`.
#
# A test that fails is run once more, by itself. If it passes then, it is flaky: its name stands at the end, its first
# output in target/tests/log, and the test or the code has a race to mend. More than three failures are not tried again.
#
# usage: tests/run.sh RUN... [-- FILTER...]
#   debug     every test, on the debug build (with overflow checks)
#   release   the integration tests, on the binary that ships (TVMM_BINARY, which `make build` makes)
#   guest     the guest's own tests
#   features  the tests of the optional features that FEATURES names
# FILTER: words of cargo's test filter.
#
# A test that skips says so in the file that TVMM_SKIPS names (tests/integration/support/skip.rs). libtest counts it as
# passed, the closing line as skipped. TVMM_REQUIRE=KIND,... (or `all`) makes skips of those kinds failures.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

runs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    runs+=("$1")
    shift
done
[ ${#runs[@]} -gt 0 ] || { sed -n '/^# usage/,/^# FILTER/s/^# //p' "$0" >&2 && exit 2; }
shift $(($# > 0))
rm -rf target/tests
mkdir -p target/tests
log=target/tests/log failed=target/tests/failed flaky=target/tests/flaky
export TVMM_SKIPS=$PWD/target/tests/skips
touch "$log" "$failed" "$flaky" "$TVMM_SKIPS"
status=0

failed_in() { # failed_in FILE: the names of tests
    sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$1"
}

total() { # total passed|failed FILE
    sed -n "s/^test result: .* \([0-9]*\) $1;.*/\1/p" "$2" | awk '{ sum += $1 } END { print sum + 0 }'
}

run() { # run LABEL COMMAND...
    local label=$1 name names=()
    shift
    echo "== $label: $* -- ${filter[*]}"
    if ! TVMM_TEST_RUN=$label "$@" -- "${filter[@]}" 2>&1 | tee "$log.$label"; then
        mapfile -t names < <(failed_in "$log.$label")
        # A run that a signal ended, or that did not begin, is a failure whatever its tests say.
        [ ${#names[@]} = "$(total failed "$log.$label")" ] && ! grep -q "didn't exit successfully.*(signal: " "$log.$label" || status=1
        [ ${#names[@]} != 0 ] || status=1
    fi
    cat "$log.$label" >>"$log"
    for name in "${names[@]}"; do
        if [ ${#names[@]} -le 3 ] && again "$label" "$name" "$@"; then
            printf '%s\t%s\n' "$label" "$name" >>"$flaky"
        else
            printf '%s\t%s\n' "$label" "$name" >>"$failed"
            status=1
        fi
    done
}

again() { # again LABEL TEST COMMAND...: succeeds if the test passes by itself
    local label=$1 name=$2
    shift 2
    echo "== $label, once more: $name"
    TVMM_TEST_RUN=$label "$@" -- --exact "$name" 2>&1 | tee "$log.again" && [ "$(total passed "$log.again")" = 1 ]
}

for each in "${runs[@]}"; do
    filter=("$@")
    case $each in
    debug) run debug env -u TVMM_BINARY cargo test --locked --no-fail-fast ;;
    release) run release env TVMM_BINARY="${TVMM_BINARY:?}" cargo test --locked --test integration ;;
    guest)
        run guest cargo test --locked --lib --features functions --manifest-path resources/guest/Cargo.toml \
            --target-dir target/guest-tests
        ;;
    features)
        [ $# -gt 0 ] || filter=(object_store otlp tls)
        run features cargo test --locked --no-fail-fast --features "${FEATURES:?}" --lib --test integration
        ;;
    *) echo "tests/run.sh: unknown run $each" >&2 && exit 2 ;;
    esac
done

# A test counts once in each run: as skipped by its first reason, or as failed if it fails all the same.
skips=$(sort -u "$TVMM_SKIPS" |
    awk -F '\t' 'pass == 1 { seen[$1, $2] = 1; next } !seen[$1, $2]++' pass=1 "$failed" pass=2 -)
counted() { cut -f"$1" <<<"$skips" | grep . | sort | uniq -c | sort -k1,1nr -k2; }
unstable=$(grep -c . "$flaky")
passed=$(($(total passed "$log") + unstable)) failures=$(($(total failed "$log") - unstable)) skipped=$(grep -c . <<<"$skips")
kinds=$(counted 3 | awk '{ printf "%s%s %s", n++ ? ", " : ": ", $2, $1 }')
[ "$skipped" = 0 ] || printf '\nSkipped, by reason:\n%s\n' "$(counted 3,4 | sed 's/\t/: /')"
# A run that ended without a result (a build error, a signal) is a failure that no count shows.
[ "$status" = 0 ] || [ "$failures" != 0 ] || echo "A run ended before it counted its tests; see $log."
[ "$unstable" = 0 ] || printf '\nFlaky, passed by themselves only:\n%s\n' "$(sed 's/^/  /; s/\t/: /' "$flaky")"
echo "$((passed - skipped)) passed, $failures failed, $skipped skipped$kinds"
exit "$status"
