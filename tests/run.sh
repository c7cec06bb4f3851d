#!/usr/bin/env bash
# Runs tests and closes with one line that counts them over all runs: `N passed, N failed, N skipped: KIND N, …`.
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
[ ${#runs[@]} -gt 0 ] || { sed -n '4,9s/^# //p' "$0" >&2 && exit 2; }
shift $(($# > 0))
rm -rf target/tests
mkdir -p target/tests
log=target/tests/log failed=target/tests/failed
export TVMM_SKIPS=$PWD/target/tests/skips
touch "$log" "$failed" "$TVMM_SKIPS"
status=0

run() { # run LABEL COMMAND...
    local label=$1
    shift
    echo "== $label: $*"
    TVMM_TEST_RUN=$label "$@" 2>&1 | tee "$log.$label" || status=1
    sed -n "s/^test \(.*\) \.\.\. FAILED\$/$label\t\1/p" "$log.$label" >>"$failed"
    cat "$log.$label" >>"$log"
}

for each in "${runs[@]}"; do
    case $each in
    debug) run debug env -u TVMM_BINARY cargo test --locked --no-fail-fast -- "$@" ;;
    release) run release env TVMM_BINARY="${TVMM_BINARY:?}" cargo test --locked --test integration -- "$@" ;;
    guest)
        run guest cargo test --locked --lib --features functions --manifest-path resources/guest/Cargo.toml \
            --target-dir target/guest-tests -- "$@"
        ;;
    features)
        filter=("$@")
        [ $# -gt 0 ] || filter=(object_store otlp)
        run features cargo test --locked --no-fail-fast --features "${FEATURES:?}" --lib --test integration -- \
            "${filter[@]}"
        ;;
    *) echo "tests/run.sh: unknown run $each" >&2 && exit 2 ;;
    esac
done

# A test counts once in each run: as skipped by its first reason, or as failed if it fails all the same.
skips=$(sort -u "$TVMM_SKIPS" |
    awk -F '\t' 'pass == 1 { seen[$1, $2] = 1; next } !seen[$1, $2]++' pass=1 "$failed" pass=2 -)
counted() { cut -f"$1" <<<"$skips" | grep . | sort | uniq -c | sort -k1,1nr -k2; }
total() { # total passed|failed
    sed -n "s/^test result: .* \([0-9]*\) $1;.*/\1/p" "$log" | awk '{ sum += $1 } END { print sum + 0 }'
}
passed=$(total passed) failures=$(total failed) skipped=$(grep -c . <<<"$skips")
kinds=$(counted 3 | awk '{ printf "%s%s %s", n++ ? ", " : ": ", $2, $1 }')
[ "$skipped" = 0 ] || printf '\nSkipped, by reason:\n%s\n' "$(counted 3,4 | sed 's/\t/: /')"
# A run that ended without a result (a build error, a signal) is a failure that no count shows.
[ "$status" = 0 ] || [ "$failures" != 0 ] || echo "A run ended before it counted its tests; see $log."
echo "$((passed - skipped)) passed, $failures failed, $skipped skipped$kinds"
exit "$status"
