# Debian packages without installing them: found by apt in the suites this machine's own sources name, plus backports.
# To be sourced by bash after lib.sh.

# CODENAME of the release this machine runs; the packages must fit its libraries.
codename() {
    # shellcheck disable=SC1091
    (. /etc/os-release && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}")
}

# "URI SUITE" for every binary source of this machine's apt configuration, one-line and deb822 files alike.
sources() {
    local file files=()
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ ! -r "$file" ] || files+=("$file")
    done
    [ ${#files[@]} -gt 0 ] || return 0
    awk '
        function flush(    i, j) {
            if (types ~ /(^| )deb( |$)/ && enabled != "no")
                for (i = 1; i <= nu; i++) for (j = 1; j <= ns; j++) print uri[i], suite[j]
            types = ""; enabled = ""; nu = ns = 0; field = ""
        }
        function collect(text) {
            if (field == "uris") { n = split(text, w); for (k = 1; k <= n; k++) uri[++nu] = w[k] }
            if (field == "suites") { n = split(text, w); for (k = 1; k <= n; k++) suite[++ns] = w[k] }
            if (field == "types") types = types " " text
            if (field == "enabled") enabled = tolower(text)
            gsub(/ /, "", enabled)
        }
        FNR == 1 { flush() }
        /^[ \t]*#/ { next }
        FILENAME ~ /\.list$/ && $1 == "deb" { sub(/\[[^]]*\]/, ""); print $2, $3; next }
        FILENAME !~ /\.sources$/ { next }
        /^[ \t]*$/ { flush(); next }
        /^[A-Za-z-]+:/ { field = tolower($0); sub(/:.*/, "", field); sub(/^[^:]*:/, "") }
        { collect($0) }
        END { flush() }
    ' "${files[@]}"
}

# Writes $TESTBED/apt/sources.list: the suites of this release that this machine uses, and its backports.
write_sources() {
    local name=$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg signed="" mirror
    [ -e "$keyring" ] && signed="[signed-by=$keyring] "
    mirror=$(sources | awk -v s="$name" '$2 == s { print $1; exit }')
    [ -n "$mirror" ] || fail "no source for the suite '$name' in /etc/apt: the testbed takes its packages from there"
    mkdir -p "$TESTBED/apt/lists/partial" "$TESTBED/deb/partial"
    {
        sources | awk -v s="$name" '$2 == s || $2 == s "-updates" || $2 == s "-security"'
        echo "$mirror $name-backports"
    } | sort -u | sed "s|^|deb $signed|; s|\$| main|" >"$TESTBED/apt/sources.list"
}

# An apt tool with the testbed's lists and archive; what is installed is what this machine has installed.
apt_with() {
    local tool=$1
    shift
    "$tool" -qq -o Dir::Etc::sourcelist="$TESTBED/apt/sources.list" -o Dir::Etc::sourceparts=/nonexistent \
        -o Dir::State::lists="$TESTBED/apt/lists" -o Dir::Cache::archives="$TESTBED/deb" -o Dir::Cache::pkgcache= \
        -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@"
}

# The newest package whose whole name matches an extended regular expression.
newest() { # newest PREFIX REGEX
    local found
    found=$(apt_with apt-cache pkgnames "$1" | grep -Ex "$2" | sort -V | tail -n 1)
    [ -n "$found" ] || fail "no package like $2 in $(sed 's/.*\] *//' "$TESTBED/apt/sources.list" | tr '\n' ';')"
    echo "$found"
}

# Downloads packages (apt checks their digests); what is there already is not fetched again.
download() {
    (cd "$TESTBED/deb" && apt_with apt-get download "$@")
}

# Unpacks one downloaded package, the newest of that name, below a directory.
unpack() { # unpack PACKAGE DIRECTORY
    local file
    file=$(find "$TESTBED/deb" -maxdepth 1 -name "$1_*.deb" | sort -V | tail -n 1)
    [ -n "$file" ] || fail "the package $1 was not downloaded"
    mkdir -p "$2"
    dpkg-deb -x "$file" "$2"
}
