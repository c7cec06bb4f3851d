#!/usr/bin/env bash
# Runs every fuzz target, or those that are named, for so many seconds each, and closes with one line that counts. Exits
# with 1 if an input made a target panic, hang or use too much memory; the input is in fuzz/artifacts/TARGET/ then.
#
# usage: fuzz/run.sh SECONDS [TARGET...]
#
# Inputs that a run finds go to fuzz/target/corpus/TARGET, so that runs go on from where the last one stopped and the
# corpora under version control stay as they are. FUZZ_SEED makes the choices of a run repeatable. FUZZ_NO_BUILD=1 takes
# the targets as they were built last.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

[ $# -gt 0 ] && [ "$1" -gt 0 ] 2>/dev/null || { sed -n '/^# usage/s/^# //p' "$0" >&2 && exit 2; }
seconds=$1
shift
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "Cannot run the fuzz targets: cargo-fuzz is not installed. Install it: cargo install --locked cargo-fuzz" >&2
    exit 2
fi
if ! rustc +nightly --version >/dev/null 2>&1; then
    echo "Cannot run the fuzz targets: there is no nightly toolchain. Install it: rustup toolchain install nightly" >&2
    exit 2
fi
host=x86_64-unknown-linux-gnu
if [ -z "${FUZZ_NO_BUILD-}" ]; then
    cargo +nightly fuzz build --fuzz-dir fuzz --target "$host" || exit 2
fi
known=$(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' fuzz/Cargo.toml)
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets <<<"$known"

total=0 findings=0
printf '%-14s %12s %10s %8s %8s  %s\n' target executions per-second inputs edges finding
for target in "${targets[@]}"; do
    binary=fuzz/target/$host/release/$target
    if ! grep -qx -- "$target" <<<"$known" || [ ! -x "$binary" ]; then
        echo "Cannot run $target: there is no such target. Known:" $known >&2
        exit 2
    fi
    found=fuzz/target/corpus/$target log=fuzz/target/$target.log
    mkdir -p "$found" "fuzz/artifacts/$target"
    folders=("$found" "fuzz/corpus/$target")
    [ ! -d "fuzz/regressions/$target" ] || folders+=("fuzz/regressions/$target")
    dictionary=fuzz/dictionaries/$target.dict
    [ -e "$dictionary" ] && dictionary=-dict=$dictionary || dictionary=
    # Leaks are not looked for at the end of each input, which would take most of the time, but at the end of the run.
    ASAN_OPTIONS=detect_odr_violation=0:allocator_may_return_null=1 "$binary" \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -malloc_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/" ${FUZZ_SEED:+-seed="$FUZZ_SEED"} $dictionary \
        "${folders[@]}" >"$log" 2>&1
    status=$?
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -n 1; }
    executions=$(stat number_of_executed_units)
    finding=none
    if [ "$status" != 0 ]; then
        finding=$(sed -n 's/^Test unit written to //p' "$log" | tail -n 1)
        finding=${finding:-"exit code $status, see $log"}
        findings=$((findings + 1))
    fi
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    total=$((total + ${executions:-0}))
    printf '%-14s %12s %10s %8s %8s  %s\n' "$target" "${executions:-0}" "$(stat average_exec_per_sec)" \
        "$(find "$found" -type f | wc -l)" "${edges:-?}" "$finding"
done
echo "${#targets[@]} targets, $seconds s each: $total executions, $findings findings"
[ "$findings" = 0 ]
