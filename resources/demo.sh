#!/bin/sh
# The main job in half a minute: boot a guest, let it work, snapshot it, restore it by each policy, show the times.
set -eu
tvmm=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
dir=$(mktemp -d "${TMPDIR:-/var/tmp}/tvmm-demo.XXXXXX")
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null; rm -rf "$dir"' EXIT INT TERM

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { echo "demo: $*" >&2; cat "$dir/out" >&2; exit 1; }
# Waits until the guest's output has a line that begins with $1, and prints that line.
await() {
    for _ in $(seq 600); do
        grep -m1 "^$1" "$dir/out" && return
        kill -0 "$pid" 2>/dev/null || fail "tvmm has ended"
        sleep 0.05
    done
    fail "the guest did not answer: $1"
}

say "1. Boot the built-in guest: 1 vCPU, 512 MiB ($here/vm.json)"
mkfifo "$dir/in"
"$tvmm" --config "$here/vm.json" --api-sock "$dir/api.sock" <"$dir/in" >"$dir/out" &
pid=$!
exec 3>"$dir/in"
await ready

say "2. Let it work: fill 64 MiB, then digest them"
echo "run 1 fill pages=16384 seed=1" >&3
await "ok 1"
echo "run 2 check" >&3
await "ok 2"
before=$(grep -m1 '^ok 2' "$dir/out" | cut -d' ' -f3)

say "3. Snapshot it; it runs on"
"$tvmm" snapshot --api-sock "$dir/api.sock" --out "$dir/snapshot" --resume
kill "$pid"
wait "$pid" || true
pid=
"$tvmm" inspect "$dir/snapshot"

say "4. Restore it in new processes and compare the digest"
for policy in eager firecracker; do
    answer=$("$tvmm" restore --snapshot "$dir/snapshot" --policy "$policy" --run check)
    after=$(echo "$answer" | cut -d' ' -f3)
    [ "$before" = "$after" ] || { echo "demo: $policy: digest $after, not $before" >&2; exit 1; }
    echo "$policy: $answer (the same)"
done

say "5. Where the time of a restore goes"
"$tvmm" bench restore --snapshot "$dir/snapshot" --run hello --runs 20
"$tvmm" bench restore --snapshot "$dir/snapshot" --run check --runs 20
