#!/bin/sh
# Checks the dependencies by deny.toml. Advisories need their database, which is fetched from GitHub; without a network
# they are skipped, and the last line says so.
set -eu
cd "$(dirname "$0")/.."

if ! cargo deny --version >/dev/null 2>&1; then
    echo "Cannot check the dependencies: cargo-deny is not installed. Install it: cargo install --locked cargo-deny" >&2
    exit 2
fi
cargo deny --locked check --hide-inclusion-graph bans licenses sources
if why=$(timeout 120 cargo deny --locked fetch db 2>&1); then
    cargo deny --locked check --hide-inclusion-graph --disable-fetch advisories
else
    echo "$why" | tail -n 3 >&2
    echo "SKIPPED: advisories were not checked, because their database could not be fetched."
fi
