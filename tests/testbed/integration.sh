#!/bin/bash
# Runs the repository's integration tests inside L1: integration.sh BINARY [FILTER]... (words of cargo's test filter).
set -euo pipefail
# shellcheck source=tests/testbed/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"
[ $# -gt 0 ] || fail "usage: tests/testbed/integration.sh BINARY [FILTER]..."
binary=$(readlink -f "$1")
shift
[ -x "$binary" ] || fail "no binary at $binary: make build"

cd "$REPOSITORY"
echo "testbed: building the integration tests"
built=$(cargo test --locked --test integration --no-run 2>&1) || fail "the tests do not build: $built"
tests=$(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' <<<"$built" | tail -n 1)
[ -n "$tests" ] || fail "cargo did not say where the tests are: $built"

agent=${TVMM_AGENT:-$REPOSITORY/target/agent/x86_64-unknown-linux-gnu/release/tvmm-agent}
[ -x "$agent" ] || fail "no agent at $agent: make agent"
guests=(TVMM_AGENT="$(readlink -f "$agent")" TVMM_LINUX_GUEST="$TESTBED/guest")
# Our own Linux guest, if it is built.
linux=${TVMM_LINUX_DIR:-$REPOSITORY/target/linux}
if [ -e "$linux/kernel.stamp" ] && [ -e "$linux/rootfs.stamp" ]; then
    guests+=(TVMM_LINUX_DIR="$(readlink -f "$linux")")
fi

# Everything is 10 to 50 times slower than on a host: what tests do many times they do here one time in TVMM_TEST_SHARE.
exec "$HERE/run" -r -t "${TESTBED_TIMEOUT:-1800}" -p 128 -- env TVMM_BINARY="$binary" TVMM_TEST_SHARE="${TVMM_TEST_SHARE:-20}" \
    "${guests[@]}" "$(readlink -f "$tests")" --test-threads 2 "$@"
