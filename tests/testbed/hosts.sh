#!/bin/bash
# Two hosts on one pool: hosts.sh BINARY, the static one. What has to hold is said before it is tried; ends with the first
# that does not.
set -euo pipefail
# shellcheck source=tests/testbed/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"
[ $# = 1 ] || fail "usage: tests/testbed/hosts.sh BINARY"
BINARY=$(readlink -f "$1")
[ -x "$BINARY" ] || fail "no binary at $1: make build"
[ -e "$TESTBED/stamp" ] || fail "the testbed is not built: make testbed-build"
# shellcheck source=tests/testbed/two-hosts.sh
. "$HERE/two-hosts.sh"
pool=/dev/dax0.0

says() { echo "hosts: $SECONDS s: $*"; }

# What a host says must have a text, or be it.
expect() { # expect TEXT HOST COMMANDS
    local said
    said=$(on "$2" "$3") || :
    [[ $said == *"$1"* ]] || fail "host $2: $3: it says '$said', and not '$1'"
}
same() { # same TEXT HOST COMMANDS
    local said
    said=$(on "$2" "$3") || fail "host $2: $3: $said"
    [ "$said" = "$1" ] || fail "host $2: $3: it says '$said', and not '$1'"
}

# A snapshot made on A and added; B gets what a restore from a pool needs. Sets digest.
make() { # make NAME PAGES SEED
    digest=$(on a "snapshot $1 $2 $3") || fail "no snapshot: $digest"
    cp -r "$HOSTS/a/$1" "$HOSTS/b/$1"
}
add() { # add NAME PAGES SEED
    make "$@"
    on a "\$TVMM pool add $pool $1" >/dev/null
}
restore() { # restore VM NAME: on B
    on b "start $1 restore --snapshot \$out/$2 --policy trenv --pool $pool"
}
# gc on A must free, or hold, so many snapshots.
collect() { # collect freed|held COUNT [EXPIRY]
    local key='"snapshots"'
    [ "$1" = freed ] || key='"held"'
    expect "$key: $2" a "\$TVMM pool gc $pool --lease-expiry ${3:-600} --json"
}
# A adds a snapshot, and stops while it has the right to write.
stop_in_the_middle() { # stop_in_the_middle NAME
    local busy=
    on a "\$TVMM pool add $pool $1 >add.out 2>&1 & writer=\$!"
    for _ in {1..100}; do
        on a 'sleep 0.2; kill -STOP $writer' || fail "A has added too soon: $(on a "cat add.out")"
        busy=$(on b "\$TVMM pool rm $pool nosuch" || :)
        [[ $busy == *"is being changed"* ]] && break
        on a 'kill -CONT $writer'
    done
    # By now it has the right for good.
    on a 'kill -CONT $writer; sleep 0.4; kill -STOP $writer' || fail "A has added too soon: $(on a "cat add.out")"
}
fsck() { expect '"good": true' b "\$TVMM pool fsck $pool --json"; }

boot a 1 b
boot b 2 a
says "both are up"

says "B lists and restores what A has added"
on a "\$TVMM pool create --tier cxl --at $pool --format dax0.0" >/dev/null
add first 3000 7
first=$digest
expect first b "\$TVMM pool ls $pool"
restore one first
same "$first" b "ask one check"

says "A adds while a VM of B runs"
add second 8000 8
second=$digest
restore two second
same "$second" b "ask two check"
on b "ask two touch pages=2000 write=50 seed=3" >/dev/null
same "$first" b "ask one check"
restore again second
same "$second" b "ask again check"
on b "finish two TERM && finish again TERM"
fsck

says "what a VM of B maps is not freed, and nobody starts from it"
on a "\$TVMM pool rm $pool first" >/dev/null
collect held 1
expect '"this_host": false' a "\$TVMM pool show $pool --json"
expect "has no snapshot" b "\$TVMM restore --snapshot \$out/first --policy trenv --pool $pool --run check"
expect "1 VMs run from" a "\$TVMM pool create --tier cxl --at $pool --format dax0.0"
says "nor when the clock of B is two hours late, or early, and the expiry is short"
for clock in "-2 hours" "+4 hours"; do
    on b "date -s '$clock'" >/dev/null
    sleep 11 # It has to beat by the new clock.
    collect held 1 0
done
on b "date -s '-2 hours'" >/dev/null
same "$first" b "ask one check"
says "it is freed as soon as that VM has ended"
on b "finish one TERM"
collect freed 1

says "a VM of B that is killed holds its pages until its lease expires"
restore killed second
same "$second" b "ask killed check"
on b "finish killed KILL"
on a "\$TVMM pool rm $pool second" >/dev/null
collect held 1
sleep 12
collect freed 1 10

says "a VM of B that slept so long that its lease was ended must end when it wakes"
add third 3000 9
restore sleeper third
same "$digest" b "ask sleeper check"
on b 'kill -STOP ${pid[sleeper]}'
on a "\$TVMM pool rm $pool third" >/dev/null
collect freed 1 0
on b 'kill -CONT ${pid[sleeper]}'
expect "was ended by another host" b 'until_true 60 grep lease sleeper.errors; cat sleeper.errors; wait ${pid[sleeper]}'
expect "code 1" b 'wait ${pid[sleeper]}; echo "code $?"; exec {input[sleeper]}>&-'

says "one writer at a time: B is refused while A adds"
add fourth 3000 10
make fifth 10000 11
fifth=$digest
make sixth 500 12
stop_in_the_middle fifth
expect "is being changed by process" b "\$TVMM pool rm $pool fourth"
says "A goes on and is done"
same "" a 'kill -CONT $writer && wait $writer'
fsck
restore five fifth
same "$fifth" b "ask five check; finish five TERM"
says "a writer that was silent for too long is taken over from, and publishes nothing"
on a "\$TVMM pool rm $pool fifth && \$TVMM pool gc $pool" >/dev/null
stop_in_the_middle fifth
on b "date -s '+2 hours'" >/dev/null
expect "removed" b "\$TVMM pool rm $pool fourth"
expect "was taken over" a 'kill -CONT $writer; wait $writer; cat add.out'
on b "date -s '-2 hours'" >/dev/null
fsck
says "both write at once, five times: each says what it has done, and that is there"
for round in 1 2 3 4 5; do
    on a "\$TVMM pool add $pool sixth --name a$round && echo done" >"$HOSTS/said-a" 2>&1 &
    on b "\$TVMM pool gc $pool && echo done" >"$HOSTS/said-b" 2>&1 || :
    wait $! || :
    grep -q -e '^done' -e 'is being changed' "$HOSTS/said-a" || fail "A: $(cat "$HOSTS/said-a")"
    grep -q -e '^done' -e 'is being changed' "$HOSTS/said-b" || fail "B: $(cat "$HOSTS/said-b")"
    if grep -q '^done' "$HOSTS/said-a"; then
        expect "a$round" b "\$TVMM pool ls $pool"
        on a "\$TVMM pool rm $pool a$round" >/dev/null
    fi
done
fsck

says "pages come over the network, too"
on a "\$TVMM pool create --tier remote --at chunks && \$TVMM pool add chunks fifth" >/dev/null
on a '$TVMM serve-pages --dir chunks --listen tcp:10.9.0.1:7070 >served 2>&1 & until_true 60 grep tcp: served'
same "$fifth" b "start far restore --snapshot \$out/fifth --policy firecracker-uffd --cold tcp:10.9.0.1:7070 && ask far check"

says "the power of B fails: its leases expire"
add seventh 3000 13
restore lost seventh
same "$digest" b "ask lost check"
cut_power b
on a "\$TVMM pool rm $pool seventh" >/dev/null
collect held 1
sleep 12
collect freed 1 10
says "B comes back, and has the pool"
add eighth 3000 14
boot b 2 a
cp -r "$HOSTS/a/eighth" "$HOSTS/b/"
restore back eighth
same "$digest" b "ask back check"
fsck
says "all of it holds"
