#!/bin/bash
# How long our Linux guest takes from process start to its first answer: booted by tvmm, booted by QEMU's microvm machine
# (same kernel, same image, same command line), restored by tvmm, with a function of the agent's own (hello) and one in Python
# that is warm in the snapshot (json). They take turns. Runs inside L1, or on any host with
# KVM, the testbed's QEMU and a Linux guest: linux-times.sh BINARY [ROUNDS]
set -euo pipefail
# shellcheck source=tests/testbed/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"
[ $# -gt 0 ] || fail "usage: linux-times.sh BINARY [ROUNDS]"
binary=$1
rounds=${2:-5}
linux=${TVMM_LINUX_DIR:-$REPOSITORY/target/linux}
[ -e "$linux/vmlinux" ] && [ -e "$linux/rootfs.erofs" ] || fail "no Linux guest in $linux: make linux-kernel linux-rootfs"

dir=$(mktemp -d)
vm=
trap '[ -z "$vm" ] || kill "$vm" 2>/dev/null || :; rm -rf "$dir"' EXIT
# Everything comes from the same place, which is not a file system over a slow line.
cp "$binary" "$dir/tvmm"
cp "$linux/vmlinux" "$linux/rootfs.erofs" "$dir"
cp -r "$TESTBED/qemu" "$dir/qemu"
binary=$dir/tvmm
words="console=ttyS0 quiet reboot=t panic=-1 tvmm.console=agent"
cat >"$dir/vm.json" <<JSON
{ "boot-source": { "kernel_image_path": "$dir/vmlinux", "boot_args": "$words" },
  "drives": [{ "drive_id": "root", "path_on_host": "$dir/rootfs.erofs", "is_root_device": true, "is_read_only": true }],
  "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 } }
JSON

# Milliseconds since the value START of $EPOCHREALTIME; no process is started for it.
since() { # since START
    elapsed=$(((${EPOCHREALTIME/./} - ${1/./}) / 1000))
}

# Waits for a line of the guest's that begins with WORD.
wait_for() { # wait_for WORD
    local line
    while read -r -t 300 line <&"${guest[0]}"; do
        case $line in "$1"*) return 0 ;; esac
    done
    fail "the guest never said '$1': $(tail -n 3 "$dir/errors")"
}

# Starts a monitor and asks its guest: "MS-to-user-space MS-to-answer MS-to-answer-in-Python". The monitor runs on, as
# process $vm.
boot() { # boot COMMAND ARGUMENT...
    local start=$EPOCHREALTIME
    coproc guest { exec "$@" 2>"$dir/errors"; }
    # shellcheck disable=SC2154 # coproc sets it
    vm=$guest_PID
    wait_for "guest: up"
    since "$start"
    times=$elapsed
    wait_for ready
    echo "run 1 hello" >&"${guest[1]}"
    wait_for "ok 1"
    since "$start"
    times="$times $elapsed"
    echo "run 2 json records=10" >&"${guest[1]}"
    wait_for "ok 2"
    since "$start"
    times="$times $elapsed"
}

end() {
    kill "$vm" 2>/dev/null || :
    wait "$vm" 2>/dev/null || :
    vm=
}

# Asks the guest of a snapshot, leaving the milliseconds in $elapsed. Tearing down comes after the answer and does not count.
restore() { # restore POLICY FUNCTION
    local start=$EPOCHREALTIME
    coproc guest { exec "$binary" restore --snapshot "$dir/snapshot" --policy "$1" --run "$2" 2>"$dir/errors"; }
    vm=$guest_PID
    wait_for "ok run-"
    since "$start"
    wait "$vm"
    vm=
}

median() {
    sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

microvm=(env LD_LIBRARY_PATH="$dir/qemu/usr/lib/x86_64-linux-gnu" "$dir/qemu/usr/bin/qemu-system-x86_64"
    -L "$dir/qemu/usr/share/qemu" -L "$dir/qemu/usr/share/seabios"
    -M microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off -accel kvm -cpu host -smp 1 -m 256
    -nodefaults -no-user-config -no-reboot -display none -serial stdio -kernel "$dir/vmlinux"
    -append "$words root=/dev/vda ro"
    -drive "file=$dir/rootfs.erofs,format=raw,if=none,id=root,read-only=on" -device virtio-blk-device,drive=root)

boot "$binary" --config "$dir/vm.json" --api-sock "$dir/api.sock"
# Every function's Python has started before the snapshot: what is restored is a guest at rest.
for name in matmul compress memory; do
    echo "run 3 $name" >&"${guest[1]}"
    wait_for "ok 3"
done
"$binary" snapshot --api-sock "$dir/api.sock" --out "$dir/snapshot"
end
# Once before it counts, as tvmm just was.
boot "${microvm[@]}"
end
restore firecracker hello
for ((round = 0; round < rounds; round++)); do
    boot "$binary" --config "$dir/vm.json"
    echo "$times" >>"$dir/boot-tvmm"
    end
    boot "${microvm[@]}"
    echo "$times" >>"$dir/boot-microvm"
    end
    for policy in firecracker trenv; do
        restore $policy hello
        hello=$elapsed
        restore $policy "json records=10"
        echo "- $hello $elapsed" >>"$dir/restore-$policy"
    done
done
echo "medians of $rounds, ms from process start to: user space, hello, json"
for name in boot-tvmm boot-microvm restore-firecracker restore-trenv; do
    printf '%s' "$name"
    for column in 1 2 3; do printf ' %s' "$(cut -d' ' -f$column "$dir/$name" | median)"; done
    echo
done
