# Shared by the scripts of the testbed: where it is, and how they end. To be sourced by bash.

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
REPOSITORY=$(readlink -f "$HERE/../..")
# Several checkouts may share one testbed: TESTBED_DIR says where it is.
TESTBED=${TESTBED_DIR:-$REPOSITORY/target/testbed}

fail() {
    echo "testbed: $*" >&2
    exit 1
}

# QEMU of the testbed, with the libraries and firmware that came with it.
qemu() {
    LD_LIBRARY_PATH=$TESTBED/qemu/usr/lib/x86_64-linux-gnu "$TESTBED/qemu/usr/bin/qemu-system-x86_64" \
        -L "$TESTBED/qemu/usr/share/qemu" -L "$TESTBED/qemu/usr/share/seabios" "$@"
}
