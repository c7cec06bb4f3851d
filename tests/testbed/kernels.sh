# Kernels and initrds out of unpacked Debian kernel packages. To be sourced by bash after lib.sh.

# A little-endian 32-bit number in a file.
word_at() { # word_at FILE OFFSET
    od -An -t u4 -j "$2" -N 4 "$1" | tr -d ' '
}

# The ELF image inside a bzImage, for QEMU's PVH loader: unpacking it inside, under TCG, would take seconds.
# Offsets: Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length; the last four bytes of the
# payload are its unpacked size).
extract_vmlinux() { # extract_vmlinux BZIMAGE OUT
    local image=$1 sectors offset length unpack
    sectors=$(od -An -t u1 -j 497 -N 1 "$image" | tr -d ' ')
    [ "$sectors" -ne 0 ] || sectors=4
    offset=$(((sectors + 1) * 512 + $(word_at "$image" 584)))
    length=$(($(word_at "$image" 588) - 4))
    case $(od -An -t x1 -j "$offset" -N 4 "$image" | tr -d ' ') in
    28b52ffd) unpack="zstd -dc" ;;
    fd377a58) unpack="xz -dc" ;;
    1f8b08*) unpack="gzip -dc" ;;
    *) fail "$image is compressed in a way this script does not know" ;;
    esac
    dd if="$image" iflag=skip_bytes,count_bytes skip="$offset" count="$length" bs=1M status=none | $unpack >"$2"
    [ "$(od -An -t x1 -N 4 "$2" | tr -d ' ')" = 7f454c46 ] || fail "$image does not hold an ELF image"
}

# Copies modules and what they depend on, uncompressed and without debug information.
copy_modules() { # copy_modules TREE VERSION OUT MODULE...
    local tree=$1 version=$2 out=$3/lib/modules/$2 module file to
    shift 3
    depmod -b "$tree" "$version"
    mkdir -p "$out"
    cp "$tree/lib/modules/$version/"modules.{builtin,builtin.modinfo,order} "$out/"
    for module in "$@"; do
        modprobe -d "$tree" -S "$version" -D --ignore-install "$module" ||
            fail "the kernel $version has no module $module"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r file; do
        to=$out/${file#*/lib/modules/"$version"/}
        mkdir -p "$(dirname "$to")"
        case $file in
        *.xz) xz -dc "$file" >"${to%.xz}" ;;
        *.zst) zstd -qdc "$file" >"${to%.zst}" ;;
        *) cp "$file" "$to" ;;
        esac
    done
    find "$out" -name '*.ko' -exec strip --strip-debug {} +
    depmod -b "${out%/lib/modules/*}" "$version"
}

# An initrd with busybox, modules, and an init script; not compressed, because unpacking it under TCG costs more than
# loading it.
pack_initrd() { # pack_initrd TREE INIT OUT MODULE...
    local tree=$1 init=$2 out=$3 root=$1.initrd version applet busybox
    shift 3
    version=$(basename "$tree"/lib/modules/*)
    busybox=$(find "$TESTBED/work/busybox" -type f -perm -u+x -name busybox)
    mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,run,mnt,etc,root,host}
    cp "$busybox" "$root/bin/busybox"
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    # The kernel asks for modules by this name.
    ln -s ../bin/busybox "$root/sbin/modprobe"
    cp "$init" "$root/init"
    cp "$HERE/far-memory" "$root/bin/far-memory"
    chmod +x "$root/init" "$root/bin/far-memory"
    copy_modules "$tree" "$version" "$root" "$@"
    (cd "$root" && find . | sort | cpio -o -H newc -R 0:0 --quiet) >"$out.new"
    mv "$out.new" "$out"
}
