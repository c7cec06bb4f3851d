#!/bin/bash
# Runs the tests of RDMA inside L1, on soft-RoCE: rdma.sh BINARY, which is built with --features rdma. First what one device
# can read of the other, then whole restores.
set -euo pipefail
# shellcheck source=tests/testbed/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"
[ $# = 1 ] || fail "usage: tests/testbed/rdma.sh BINARY"

cd "$REPOSITORY"
echo "testbed: building the unit tests"
built=$(cargo test --locked --features rdma --lib --no-run 2>&1) || fail "the tests do not build: $built"
tests=$(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' <<<"$built" | tail -n 1)
[ -n "$tests" ] || fail "cargo did not say where the tests are: $built"
"$HERE/run" -r -- "$(readlink -f "$tests")" backends::verbs
exec "$HERE/integration.sh" "$1" serve_pages_rdma::
