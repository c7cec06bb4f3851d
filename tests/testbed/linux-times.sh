#!/bin/bash
# How long our Linux guest takes from process start to its first answer: booted by tvmm, booted by QEMU's microvm machine
# (same kernel, same image, same command line), restored by tvmm. The three take turns. Runs inside L1, or on any host with
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
# Both monitors read the files from the same place, which is not a file system over a slow line.
cp "$linux/vmlinux" "$linux/rootfs.erofs" "$dir"
words="console=ttyS0 quiet reboot=t panic=-1 tvmm.console=agent"
cat >"$dir/vm.json" <<JSON
{ "boot-source": { "kernel_image_path": "$dir/vmlinux", "boot_args": "$words" },
  "drives": [{ "drive_id": "root", "path_on_host": "$dir/rootfs.erofs", "is_root_device": true, "is_read_only": true }],
  "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 } }
JSON

now() {
    date +%s%N
}

# Milliseconds since START in nanoseconds.
since() {
    echo $((($(now) - $1) / 1000000))
}

# Waits for a line of the guest's that begins with WORD.
wait_for() { # wait_for WORD
    local line
    while read -r -t 300 line <&"${guest[0]}"; do
        case $line in "$1"*) return 0 ;; esac
    done
    fail "the guest never said '$1'"
}

# Starts a monitor and asks its guest: "MS-to-user-space MS-to-answer". The monitor runs on, as process $vm.
boot() { # boot COMMAND ARGUMENT...
    local start up
    start=$(now)
    coproc guest { exec "$@" 2>"$dir/errors"; }
    # shellcheck disable=SC2154 # coproc sets it
    vm=$guest_PID
    wait_for "guest: up"
    up=$(since "$start")
    wait_for ready
    echo "run 1 hello" >&"${guest[1]}"
    wait_for "ok 1"
    times="$up $(since "$start")"
}

end() {
    kill "$vm" 2>/dev/null || :
    wait "$vm" 2>/dev/null || :
    vm=
}

restore() {
    local start
    start=$(now)
    "$binary" restore --snapshot "$dir/snapshot" --policy "$1" --run hello >"$dir/answer"
    times=$(since "$start")
    grep -q '^ok ' "$dir/answer" || fail "no answer after a restore: $(cat "$dir/answer")"
}

median() {
    sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

microvm=(env LD_LIBRARY_PATH="$TESTBED/qemu/usr/lib/x86_64-linux-gnu" "$TESTBED/qemu/usr/bin/qemu-system-x86_64"
    -L "$TESTBED/qemu/usr/share/qemu" -L "$TESTBED/qemu/usr/share/seabios"
    -M microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off -accel kvm -cpu host -smp 1 -m 256
    -nodefaults -no-user-config -no-reboot -display none -serial stdio -kernel "$dir/vmlinux"
    -append "$words root=/dev/vda ro"
    -drive "file=$dir/rootfs.erofs,format=raw,if=none,id=root,read-only=on" -device virtio-blk-device,drive=root)

boot "$binary" --config "$dir/vm.json" --api-sock "$dir/api.sock"
"$binary" snapshot --api-sock "$dir/api.sock" --out "$dir/snapshot" >/dev/null
end
# Once before it counts, as tvmm just was: its files come from far away.
boot "${microvm[@]}"
end
for ((round = 0; round < rounds; round++)); do
    boot "$binary" --config "$dir/vm.json"
    echo "$times" >>"$dir/tvmm"
    end
    boot "${microvm[@]}"
    echo "$times" >>"$dir/microvm"
    end
    for policy in firecracker trenv eager; do
        restore $policy
        echo "$times" >>"$dir/$policy"
    done
done
echo "medians of $rounds, ms from process start: to user space, to the first answer"
for name in tvmm microvm; do
    echo "boot $name: $(cut -d' ' -f1 "$dir/$name" | median) $(cut -d' ' -f2 "$dir/$name" | median)"
done
for policy in firecracker trenv eager; do
    echo "restore $policy: - $(median <"$dir/$policy")"
done
