# Shared by the scripts that build a Linux guest: where it goes, and how they end. To be sourced by bash.

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
REPOSITORY=$(readlink -f "$HERE/../..")
# Several checkouts may share what is built: LINUX_DIR says where it is.
LINUX=${LINUX_DIR:-$REPOSITORY/target/linux}

fail() {
    echo "linux: $*" >&2
    exit 1
}

# The newest packages of this machine's own apt sources, downloaded and unpacked but not installed: the testbed's way, in
# a directory of our own.
TESTBED=$LINUX
PACKAGES=$REPOSITORY/tests/testbed/packages.sh
# shellcheck source=tests/testbed/packages.sh
. "$PACKAGES"

# Installs what is missing, when root, and says what: install COMMAND:PACKAGE or /FILE:PACKAGE...
install() {
    local pair missing=()
    for pair in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null 2>&1 || [ -f "${pair%%:*}" ] ||
            missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] || fail "missing: ${missing[*]}; install them with: sudo apt-get install ${missing[*]}"
    echo "linux: installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Waits for its turn; ends the script when NAME is built and what it is made from has not changed.
unless_built() { # unless_built NAME STAMP
    mkdir -p "$LINUX"
    exec 9>"$LINUX/lock"
    flock 9
    if [ "$(cat "$LINUX/$1.stamp" 2>/dev/null)" = "$2" ]; then
        exit 0
    fi
    rm -f "$LINUX/$1.stamp"
}

# Makes the package lists of this Debian release ready.
package_lists() {
    local name
    name=$(codename)
    [ -n "$name" ] || fail "this is built from Debian packages, and this machine does not run Debian"
    write_sources "$name"
    apt_with apt-get update || fail "the package lists cannot be read from $(sed 's/.*\] *//' "$LINUX/apt/sources.list" | tr '\n' ';')"
}
