#!/bin/sh
# Installs what building and running the testbed needs from this machine, and says what. Asks for nothing that is there.
set -eu

missing=
need() { # need COMMAND PACKAGE
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need apt-get apt
need cpio cpio
need depmod kmod
need flock util-linux
need mkfs.ext4 e2fsprogs
need rdma iproute2
need strip binutils
need xz xz-utils
need zstd zstd
# What tvmm loads when it uses RDMA, and the driver of soft-RoCE: L1 sees this machine's libraries.
need_library() { # need_library PATH PACKAGE
    # shellcheck disable=SC2086 # a pattern
    ls /usr/lib/*/$1 >/dev/null 2>&1 || missing="$missing $2"
}
need_library libibverbs.so.1 libibverbs1
need_library 'libibverbs/librxe-rdmav*.so' ibverbs-providers

if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "testbed: missing:$missing" >&2
        echo "testbed: install them with: sudo apt-get install$missing" >&2
        exit 1
    fi
    echo "testbed: installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086 # one word per package
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
fi
