#!/bin/sh
# Installs what a plain Debian with Rust lacks to build and test tvmm, and says what. Asks for nothing that is there.
set -eu

missing=
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need cc gcc
need make make
# The tests make taps and bridges, in network namespaces of their own.
need ip iproute2
# Static linking needs the archives of the C library.
[ -e "$(cc -print-file-name=libc.a 2>/dev/null || echo /nonexistent)" ] || missing="$missing libc6-dev"

# The userfaultfd crate generates its bindings with libclang.
ls /usr/lib/llvm-*/lib/libclang.so* /usr/lib/*/libclang-[0-9]*.so* 2>/dev/null | grep -q . || missing="$missing libclang-dev"

if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: missing:$missing" >&2
        echo "setup: install them with: sudo apt-get install$missing" >&2
        exit 1
    fi
    echo "setup: installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086 # one word per package
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo is missing: install Rust 1.95 or newer (https://rustup.rs)" >&2
    exit 1
fi
# The testbed emulates a host with KVM: building for it asks for none here.
[ "${1:-}" != --build-only ] || exit 0
if [ ! -e /dev/kvm ]; then
    echo "setup: /dev/kvm is missing: load kvm_intel or kvm_amd; inside a VM its host must allow nested virtualisation" >&2
    exit 1
fi
if [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; then
    echo "setup: /dev/kvm is not accessible for $(id -un): add the user to the group kvm, or run as root" >&2
    exit 1
fi
