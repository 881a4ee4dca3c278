#!/bin/sh
# Make a Debian 12 root tree with systemd and what the package depends on, for a container or a virtual machine; or, by
# SUITE, one of another release of Debian ("trixie") or Ubuntu ("jammy"):
#   tree.sh DIR [PACKAGE...]
# Packages are added to the tree's own. A tree that was made from the same list is left as it is: never write into it,
# run on a copy or an overlay. Needs root, mmdebstrap and debian-archive-keyring; for Ubuntu its archive's keyring.
set -eu
tree=$1
shift
suite=${SUITE:-bookworm}
# On Ubuntu some are in another component.
case $suite in bookworm | trixie | forky | sid) components=main ;; *) components=main,universe ;; esac
# The last line is what the package depends on; tests/systemd installs it without a network.
packages="systemd systemd-sysv dbus libpam-systemd udev iproute2 $*
python3 procps tpm-udev libtss2-esys-3.0.2-0 libtss2-rc0 libtss2-tctildr0 libstdc++6"
# shellcheck disable=SC2086 # a list of words
list=$(printf '%s\n' $packages | LC_ALL=C sort -u)
made_of=$(printf '%s\n' "$suite" "$list")
[ "$(cat "$tree.packages" 2>/dev/null)" != "$made_of" ] || exit 0

rm -rf "$tree" "$tree.packages"
mkdir -p "$(dirname "$tree")"
trap 'rm -rf "$tree"' EXIT
# shellcheck disable=SC2086
mmdebstrap --quiet --variant=minbase --components="$components" --include="$(printf '%s,' $list)" \
    --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$tree"
# Nothing that waits for a network or a terminal.
systemctl --quiet --root="$tree" mask apt-daily.timer apt-daily-upgrade.timer getty.target console-getty.service
: >"$tree/etc/machine-id"
printf '%s\n' "$made_of" >"$tree.packages"
trap - EXIT
