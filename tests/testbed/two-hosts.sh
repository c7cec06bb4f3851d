# Two hosts (L1s) at once, with one far memory (/dev/dax0.0) and a network (10.9.0.1, 10.9.0.2) between them. To be sourced by
# bash after lib.sh; host-loop runs inside. Needs BINARY, the static one.

HOSTS=$(mktemp -d "${TMPDIR:-/tmp}/two-hosts.XXXXXX")
# Where other programs' memory is, if there is such a place: pages of a disk's file would be written out.
FAR=$(mktemp "$([ -w /dev/shm ] && echo /dev/shm || echo "$HOSTS")/two-hosts.XXXXXX")
declare -A booted
trap 'for host in "${!booted[@]}"; do cut_power "$host"; done; rm -rf "$HOSTS" "$FAR"' EXIT

# Boots a host and waits until it listens.
boot() { # boot HOST NUMBER OTHER
    local host=$1 number=$2 other=$3 dir=$HOSTS/$1
    mkdir -p "$dir"
    rm -f "$dir"/*.{do,out,code} "$HOSTS/$host.sock"
    local wire="local.type=unix,local.path=$HOSTS/$host.sock,remote.type=unix,remote.path=$HOSTS/$other.sock"
    # A session of its own: a signal finds all of it.
    TVMM=$BINARY setsid "$HERE/run" -t "${TESTBED_TIMEOUT:-1800}" -m 1024 -f 256 -S "$FAR" -s 2 -o "$dir" \
        -q "-netdev dgram,id=net,$wire -device virtio-net-pci,bus=pcie.0,netdev=net,mac=52:54:00:12:34:0$number" \
        -- env TVMM="$BINARY" "$HERE/host-loop" >"$dir/said" 2>&1 &
    booted[$host]=$!
    on "$host" "chroot /run/testbed/l1 /bin/modprobe virtio_net && ip address add 10.9.0.$number/24 dev eth0 &&
        ip link set eth0 up"
}

# Ends a host at once, as if its power were cut.
cut_power() { # cut_power HOST
    kill -KILL -- "-${booted[$1]}" 2>/dev/null || :
    # timeout(1) has made a process group of its own for QEMU.
    local group
    for group in $(ps -o pgid= --sid "${booted[$1]}" | sort -u); do kill -KILL -- "-$group" 2>/dev/null || :; done
    wait "${booted[$1]}" 2>/dev/null || :
    unset "booted[$1]"
}

# Has a host do something; prints what that says, and returns its exit code.
on() { # on HOST COMMANDS
    local dir=$HOSTS/$1 n=1 end=$((SECONDS + 300))
    while [ -e "$dir/$n.do" ]; do n=$((n + 1)); done
    echo "$2" >"$dir/$n.new-do"
    mv "$dir/$n.new-do" "$dir/$n.do"
    until [ -e "$dir/$n.code" ]; do
        [ $SECONDS -lt $end ] || fail "host $1 does not answer: $2: $(cat "$dir/said" "$dir/$n.out" 2>/dev/null)"
        sleep 0.05
    done
    cat "$dir/$n.out"
    return "$(cat "$dir/$n.code")"
}
