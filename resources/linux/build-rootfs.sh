#!/bin/bash
# Builds a read-only root image with Python for microVMs from Debian packages, without installing any of them. What comes out,
# in target/linux/ (LINUX_DIR):
#   rootfs.erofs       or rootfs.squashfs with ROOTFS_FORMAT=squashfs
# In it: busybox (init, shell), the C library, Python 3 with its standard library, tvmm-agent, what is in rootfs/, and every
# file of ROOTFS_EXTRA, a directory of your own laid over all of it. Takes half a minute. It is built again when the
# scripts, the files, the agent or the apt sources change; to ask for newer packages, delete target/linux/rootfs.stamp.
set -euo pipefail
# shellcheck source=resources/linux/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

FORMAT=${ROOTFS_FORMAT:-erofs}
EXTRA=${ROOTFS_EXTRA:-}
AGENT=${TVMM_AGENT:-$REPOSITORY/target/agent/x86_64-unknown-linux-gnu/release/tvmm-agent}
PYTHON=python3.11 # of Debian 12
DEBS="busybox-static libc6 libgcc-s1 zlib1g $PYTHON-minimal lib$PYTHON-minimal lib$PYTHON-stdlib
    libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1"
# Never read by a function: documentation, character set converters, and extension modules whose libraries are left out.
LEFT_OUT="usr/share/doc usr/share/man usr/share/locale usr/share/lintian usr/share/bug usr/share/pixmaps
    usr/share/applications usr/share/binfmts usr/lib/x86_64-linux-gnu/gconv usr/lib/$PYTHON/pydoc_data
    usr/lib/$PYTHON/lib-dynload/{_test,_ctypes_test,_xxtest,xx,_curses,_dbm,_sqlite3,_crypt,nis,ossaudiodev,readline}*"
WORK=$LINUX/rootfs-work
ROOT=$WORK/root

install_busybox() {
    local busybox=$ROOT/usr/bin/busybox path
    for path in $("$busybox" --list-full); do
        [ -e "$ROOT/$path" ] || [ -L "$ROOT/$path" ] || ln -s /usr/bin/busybox "$ROOT/$path"
    done
}

# Python cannot write what it compiled into a read-only image: it is compiled here, by the image's own interpreter, and
# never compared with its source (all files have the same date).
compile_python() {
    local libraries=$ROOT/usr/lib/x86_64-linux-gnu
    ln -s "$PYTHON" "$ROOT/usr/bin/python3"
    PYTHONHOME=$ROOT/usr "$ROOT/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$ROOT/usr/bin/$PYTHON" -E \
        -m compileall -q -s "$ROOT" -p / --invalidation-mode unchecked-hash \
        "$ROOT/usr/lib/$PYTHON" || fail "the image's Python files do not compile"
}

# Unpacks the downloaded packages into a tree whose /bin, /sbin, /lib and /lib64 are links, which must stay.
lay_packages() {
    local package file
    for package in $DEBS; do
        file=$(find "$LINUX/deb" -maxdepth 1 -name "${package}_*.deb" | sort -V | tail -n 1)
        [ -n "$file" ] || fail "the package $package was not downloaded"
        dpkg-deb --fsys-tarfile "$file" | tar -x --keep-directory-symlink -C "$ROOT"
    done
}

fill_root() {
    local place
    mkdir -p "$ROOT"/{usr/bin,usr/sbin,usr/lib,usr/lib64,proc,sys,dev,run,tmp,mnt,var,root}
    for place in bin sbin lib lib64; do ln -s "usr/$place" "$ROOT/$place"; done
    ln -s ../run "$ROOT/var/run"
    lay_packages
    # shellcheck disable=SC2086 # one word per path
    (cd "$ROOT" && eval rm -rf $LEFT_OUT)
    install_busybox
    cp "$AGENT" "$ROOT/usr/bin/tvmm-agent"
    cp -r --no-preserve=ownership "$HERE/rootfs/." "$ROOT/"
    chmod +x "$ROOT"/etc/init.d/*
    [ -z "$EXTRA" ] || cp -r --no-preserve=ownership "$EXTRA/." "$ROOT/"
    compile_python
}

# One date and one id, so that equal files make an equal image.
pack_erofs() {
    # Not compressed and nothing inline: as a pmem device its pages are mapped where they lie (DAX).
    mkfs.erofs --quiet -T0 --all-root -E noinline_data -U 74766d6d-0000-4000-8000-000000000001 "$1" "$ROOT" >/dev/null
}

pack_squashfs() {
    mksquashfs "$ROOT" "$1" -quiet -no-progress -all-root -all-time 0 -mkfs-time 0 -comp zstd
}

build() {
    case $FORMAT in
    erofs) install flock:util-linux mkfs.erofs:erofs-utils ;;
    squashfs) install flock:util-linux mksquashfs:squashfs-tools ;;
    *) fail "ROOTFS_FORMAT is erofs or squashfs, not '$FORMAT'" ;;
    esac
    [ -z "$EXTRA" ] || [ -d "$EXTRA" ] || fail "ROOTFS_EXTRA names no directory: $EXTRA"
    [ "$(codename)" = bookworm ] || fail "the root image is built from the packages of Debian 12 (bookworm)"
    rm -rf "$WORK"
    mkdir -p "$WORK"
    package_lists
    echo "linux: downloading the packages of the root image"
    # shellcheck disable=SC2086 # one word per package
    download $DEBS
    fill_root
    rm -f "$LINUX"/rootfs.{new,erofs,squashfs}
    PATH=$PATH:/usr/sbin:/sbin "pack_$FORMAT" "$LINUX/rootfs.new"
    # A pmem device has whole blocks of 2 MiB.
    truncate -s %2M "$LINUX/rootfs.new"
    mv "$LINUX/rootfs.new" "$LINUX/rootfs.$FORMAT"
    rm -rf "$WORK"
}

[ -x "$AGENT" ] || fail "no agent at $AGENT: make agent"
stamp=$({
    echo "$FORMAT"
    cat "$HERE"/{build-rootfs,lib}.sh "$PACKAGES"
    [ -z "$EXTRA" ] || (cd "$EXTRA" && find . -type f -exec sha256sum {} + | sort)
    (cd "$HERE/rootfs" && find . -type f -exec sha256sum {} + | sort)
    sha256sum <"$AGENT"
    sources
} | sha256sum)
unless_built rootfs "$stamp"
build
echo "$stamp" >"$LINUX/rootfs.stamp"
echo "linux: built $LINUX/rootfs.$FORMAT ($(($(stat -c %s "$LINUX/rootfs.$FORMAT") >> 20)) MiB) in $SECONDS s"
