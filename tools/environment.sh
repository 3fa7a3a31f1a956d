#!/bin/sh
# Makes .venv with this project and one of its extras in it, at the pinned versions.
# usage: tools/environment.sh demo|dev
#
# libp2p needs fastecdsa, which PyPI has as source only: gcc, the Python headers and GMP's headers
# must be there. On Debian and its kin they are installed when this runs as root; elsewhere they
# are named. Says what it does; safe to run again at any point.
set -eu
extra=$1
venv=.venv

say() { printf '==> %s\n' "$*"; }

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    say "no Python of at least 3.11 was found: install one, or name it: make PYTHON=/path/to/python" >&2
    exit 1
}

python=$(find_python)

# Debian's own Python splits venv and headers into packages of their own version's name.
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
missing=""
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
[ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    missing="$missing $version-dev"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing $version-venv"
echo '#include <gmp.h>' | cc -E -x c - >/dev/null 2>&1 || missing="$missing libgmp-dev"

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing system packages:$missing"
        apt-get update -qq
        # shellcheck disable=SC2086 # a list of packages
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
    else
        say "these system packages (by their Debian names) are needed first:$missing" >&2
        say "for example: sudo apt-get install$missing" >&2
        exit 1
    fi
fi

[ -x "$venv/bin/python" ] || {
    say "making $venv with $python"
    "$python" -m venv "$venv"
}
say "installing blyan-node[$extra] and its pinned dependencies (torch is the largest)"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[$extra]"
# trio-typing, which libp2p brings, carries stubs of trio 0.2x that hide trio's own types from mypy.
rm -rf "$venv"/lib/python3*/site-packages/trio-stubs
touch "$venv/installed-$extra"
say "ready: $venv/bin/blyan-node"
