#!/bin/bash
# Builds a small Linux kernel for microVMs from Debian's sources: tinyconfig and the fragments in kernel/. What comes out,
# in target/linux/ (LINUX_DIR):
#   vmlinux    the ELF image, with a PVH note: boots fastest
#   bzImage    the same, packed
#   config     the whole configuration
# Takes about five minutes on two cores and 3 GB of disk meanwhile. It is built again when the fragments, the scripts or the
# apt sources change; to ask for newer sources, delete target/linux/kernel.stamp. JOBS: how many compilers at once.
set -euo pipefail
# shellcheck source=resources/linux/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

VERSION=6.12
FRAGMENTS=("$HERE"/kernel/{base,filesystems,virtio,guest,acpi,smp}.config)
WORK=$LINUX/kernel-work

# Every line of the fragments must have survived: an option whose dependencies are missing vanishes without a word.
check_config() { # check_config CONFIG
    local line option lost=()
    while read -r line; do
        case $line in
        "# CONFIG_"*" is not set")
            option=${line#\# }
            option=${option%% *}
            ! grep -q "^$option=" "$1" || lost+=("$option should be off")
            ;;
        CONFIG_*) grep -qxF "$line" "$1" || lost+=("$line") ;;
        esac
    done < <(cat "${FRAGMENTS[@]}")
    [ ${#lost[@]} -eq 0 ] || fail "the kernel configuration cannot have: $(printf '%s; ' "${lost[@]}")"
}

build() {
    local tree make
    install flock:util-linux gcc:gcc make:make flex:flex bison:bison bc:bc xz:xz-utils lz4:lz4 strip:binutils \
        /usr/include/libelf.h:libelf-dev
    rm -rf "$WORK"
    mkdir -p "$WORK/out"
    package_lists
    echo "linux: downloading linux-source-$VERSION"
    download "linux-source-$VERSION"
    unpack "linux-source-$VERSION" "$WORK/package"
    echo "linux: unpacking the sources"
    tar -C "$WORK" -xJf "$WORK/package/usr/src/linux-source-$VERSION.tar.xz"
    rm -rf "$WORK/package"
    tree=$WORK/linux-source-$VERSION
    make=(make -s -C "$tree" O="$WORK/out" ARCH=x86_64)
    "${make[@]}" tinyconfig >/dev/null
    (cd "$WORK/out" && "$tree/scripts/kconfig/merge_config.sh" -m -O . .config "${FRAGMENTS[@]}" >merge.log) ||
        fail "the fragments cannot be merged: see $WORK/out/merge.log"
    "${make[@]}" olddefconfig >/dev/null
    check_config "$WORK/out/.config"
    echo "linux: compiling $("${make[@]}" kernelversion), about five minutes"
    nice -n 15 "${make[@]}" -j"${JOBS:-$(nproc)}" KBUILD_BUILD_TIMESTAMP=@1 KBUILD_BUILD_USER=tvmm \
        KBUILD_BUILD_HOST=tvmm vmlinux bzImage >"$WORK/out/build.log" 2>&1 ||
        fail "the kernel does not compile: $(tail -n 5 "$WORK/out/build.log")"
    strip -o "$LINUX/vmlinux" "$WORK/out/vmlinux"
    cp "$WORK/out/arch/x86/boot/bzImage" "$LINUX/bzImage"
    cp "$WORK/out/.config" "$LINUX/config"
    rm -rf "$WORK"
}

stamp=$({
    cat "${FRAGMENTS[@]}" "$HERE"/{build-kernel,lib}.sh "$PACKAGES"
    sources
} | sha256sum)
unless_built kernel "$stamp"
build
echo "$stamp" >"$LINUX/kernel.stamp"
echo "linux: built $LINUX/vmlinux and bzImage in $SECONDS s"
