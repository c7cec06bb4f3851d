#!/bin/bash
# Builds the testbed from this machine's Debian mirror, unless it is built and nothing it is made from has changed.
# Needs no root rights when the tools setup.sh asks for are there. What comes out, in target/testbed/:
#   qemu/                        QEMU 10 of the backports
#   l1/{vmlinux,initrd.cpio}     the kernel of the host under test (L1) and its modules
#   guest/{vmlinuz,initrd}-*     stock Debian cloud kernels for guests, and initrds with busybox and their modules
set -euo pipefail
# shellcheck source=tests/testbed/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"
# shellcheck source=tests/testbed/packages.sh
. "$HERE/packages.sh"
# shellcheck source=tests/testbed/kernels.sh
. "$HERE/kernels.sh"
export PATH=$PATH:/usr/sbin:/sbin

# L1: a host with SVM, CXL and persistent memory, disks, networks, and ways to see the outer host's files.
L1_MODULES="virtio_pci virtio_console virtio_blk virtio_net virtio_rng 9p 9pnet_virtio ext4 erofs squashfs overlay loop
    kvm-amd vhost_vsock vhost_net tun bridge veth dummy msr
    cxl_acpi cxl_pci cxl_mem cxl_port dax_cxl dax_hmem device_dax kmem nfit nd_e820 nd_pmem dax_pmem virtio_pmem
    rdma_rxe ib_uverbs crc32_generic"
# Guests: what a virtio machine has; serial ports, virtio itself and VMGenID are built into these kernels.
GUEST_MODULES="virtio_mmio virtio_pci virtio_blk virtio_net virtio-rng virtio_balloon virtio_console virtio_pmem nd_virtio
    nd_pmem vmw_vsock_virtio_transport ext4 erofs squashfs overlay button"

# What the testbed is made from: its own scripts, and where the packages come from.
inputs() {
    cat "$HERE"/{build.sh,lib.sh,packages.sh,kernels.sh,l1-init,far-memory,guest-init}
    sources
}

build() {
    local name l1 new old
    name=$(codename)
    [ "$name" = bookworm ] || fail "the testbed is built from the packages of Debian 12 (bookworm); this machine runs ${name:-something else}"
    rm -rf "$TESTBED/"{stamp,qemu,l1,guest,work}
    mkdir -p "$TESTBED/work"
    write_sources "$name"
    echo "testbed: asking $(grep -c . "$TESTBED/apt/sources.list") suites for their newest packages"
    apt_with apt-get update || fail "the package lists cannot be read from $(sed 's/.*\] *//' "$TESTBED/apt/sources.list" | tr '\n' ';')"
    l1=$(newest linux-image-6.12. 'linux-image-6\.12\.[0-9]+\+deb[0-9.]+-amd64')
    new=$(newest linux-image-6.12. 'linux-image-6\.12\.[0-9]+\+deb[0-9.]+-cloud-amd64')
    old=$(newest linux-image-6.1.0- 'linux-image-6\.1\.0-[0-9]+-cloud-amd64')
    echo "testbed: downloading $l1, $new, $old, QEMU"
    download "$l1" "$new" "$old" busybox-static
    unpack_qemu "$name-backports"
    echo "testbed: packing kernels, modules and initrds"
    unpack busybox-static "$TESTBED/work/busybox"
    # Three kernels, unpacked side by side; wait tells of the first that failed.
    local jobs=()
    build_l1 "$l1" & jobs+=($!)
    build_guest 6.12 "$new" & jobs+=($!)
    build_guest 6.1 "$old" & jobs+=($!)
    for job in "${jobs[@]}"; do wait "$job"; done
    rm -rf "$TESTBED/work"
}

# QEMU, and those libraries of it this machine lacks: what installing it would bring is fetched and unpacked only.
unpack_qemu() {
    local suite=$1 package file missing
    local packages=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
    local install=(install -y --no-install-recommends -t "$suite" qemu-system-x86)
    download "${packages[@]/%//$suite}"
    missing=$(apt_with apt-get --print-uris "${install[@]}" | awk '{ print $2 }')
    apt_with apt-get --download-only "${install[@]}" >/dev/null
    for file in $missing; do dpkg-deb -x "$TESTBED/deb/$file" "$TESTBED/qemu"; done
    for package in "${packages[@]}"; do unpack "$package" "$TESTBED/qemu"; done
    qemu --version >/dev/null || fail "QEMU does not start"
}

build_l1() {
    local tree=$TESTBED/work/l1
    unpack "$1" "$tree"
    mkdir -p "$TESTBED/l1"
    extract_vmlinux "$tree"/boot/vmlinuz-* "$TESTBED/l1/vmlinux"
    # shellcheck disable=SC2086 # one word per module
    pack_initrd "$tree" "$HERE/l1-init" "$TESTBED/l1/initrd.cpio" $L1_MODULES
}

build_guest() {
    local tree=$TESTBED/work/guest-$1
    unpack "$2" "$tree"
    mkdir -p "$TESTBED/guest"
    cp "$tree"/boot/vmlinuz-* "$TESTBED/guest/vmlinuz-$1"
    # shellcheck disable=SC2086 # one word per module
    pack_initrd "$tree" "$HERE/guest-init" "$TESTBED/guest/initrd-$1.cpio" $GUEST_MODULES
}

"$HERE/setup.sh"
mkdir -p "$TESTBED"
exec 9>"$TESTBED/lock"
flock 9
stamp=$(inputs | sha256sum)
if [ "$(cat "$TESTBED/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
build
echo "$stamp" >"$TESTBED/stamp"
echo "testbed: built in $TESTBED in $SECONDS s"
