#!/bin/sh
# Make the Debian package from this source tree:  build.sh OUT [WORK]
# The same source and pins give the same bytes, whoever makes it, wherever and whenever. For the distribution that it runs
# on, since compiled modules fit one minor version of Python. Prints the path of the package.
set -eu
umask 022
export LC_ALL=C TZ=UTC
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
python=/usr/bin/python3
[ "$($python -c 'import sys; print(*sys.version_info[:2])')" = "3 11" ] || {
    echo "error: the package is for Debian 12, whose Python is 3.11, and has to be made there" >&2
    exit 1
}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
work=${2:-build/deb}
rm -rf "$work"
mkdir -p "$work/source" "$work/stage/DEBIAN"
work=$(cd "$work" && pwd)
stage=$work/stage
library=$stage/usr/lib/cgpu-agent
pip="$work/venv/bin/python -m pip -qq --disable-pip-version-check"

# Built in a copy: setuptools would leave its traces in the tree, and pack what earlier builds left there.
cp -r agent pyproject.toml README.md LICENSE "$work/source"
find "$work/source" \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
$python -m venv "$work/venv"
$pip install --require-hashes --only-binary :all: --no-deps -r packaging/deb/build.txt

# tpm2-pytss is the one that comes as source. FAPI is kept from it: it would bring curl and more into the agent, unused.
# Debugging information would name the place of the build.
mkdir "$work/pkgconfig"
for name in esys mu rc sys tctildr; do
    cp "$(pkg-config --variable=pcfiledir tss2-$name)/tss2-$name.pc" "$work/pkgconfig"
done
grep '^tpm2-pytss==' packaging/deb/requirements.txt >"$work/sdist.txt"
grep -v '^tpm2-pytss==' packaging/deb/requirements.txt >"$work/wheels.txt"
CFLAGS=-g0 PKG_CONFIG_LIBDIR=$work/pkgconfig $pip wheel --no-cache-dir --no-build-isolation --require-hashes --no-deps \
    --wheel-dir "$work" -r "$work/sdist.txt"

$pip install --target "$library" --no-compile --require-hashes --only-binary :all: --no-deps -r "$work/wheels.txt"
$pip install --target "$library" --no-compile --no-build-isolation --no-deps "$work"/tpm2_pytss-*.whl "$work/source"
# Traces of where and how it was installed.
rm -rf "${library:?}/bin"
find "$library" \( -name RECORD -o -name INSTALLER -o -name REQUESTED -o -name direct_url.json \) -path '*.dist-info/*' -delete
strip --strip-unneeded "$library"/tpm2_pytss/*.so
# Never looked at again: the sandboxed agent could not write newer ones, and no time stamp is in them.
$python -m compileall -qq --invalidation-mode unchecked-hash -s "$stage" -p / "$library"

make --silent install-vm DESTDIR="$stage"
for command in cgpu-agent:daemon.__main__ cgpuctl:cli.main cgpu-ready:ready.__main__ cgpu-egress:egress.__main__; do
    launcher=$stage/usr/bin/${command%%:*}
    mkdir -p "$stage/usr/bin"
    sed "s/@MODULE@/cgpu_agent.${command#*:}/" packaging/deb/launcher.in >"$launcher"
    chmod 755 "$launcher"
done
gzip -9n "$stage"/usr/share/man/man?/*
for shell in bash:bash-completion/completions/cgpuctl zsh:zsh/vendor-completions/_cgpuctl \
    fish:fish/vendor_completions.d/cgpuctl.fish; do
    mkdir -p "$(dirname "$stage/usr/share/${shell#*:}")"
    PYTHONPATH=$library $python -m cgpu_agent.cli.main completion "${shell%%:*}" >"$stage/usr/share/${shell#*:}"
done
install -D -m 644 packaging/deb/copyright "$stage/usr/share/doc/cgpu-agent/copyright"
gzip -9nc CHANGELOG.md >"$stage/usr/share/doc/cgpu-agent/changelog.gz"

# What compiled modules need of the system, by their symbols.
mkdir "$work/debian"
printf 'Source: cgpu-agent\n\nPackage: cgpu-agent\nArchitecture: any\n' >"$work/debian/control"
(cd "$work" && find "$library" -name '*.so' -exec dpkg-shlibdeps -O --warnings=0 {} + >shlibs)
units=$(cd "$stage/usr/lib/systemd/system" && echo cgpu-*.socket cgpu-*.service)
for script in postinst prerm postrm; do
    sed "s/@UNITS@/$units/" "packaging/deb/$script" >"$stage/DEBIAN/$script"
    chmod 755 "$stage/DEBIAN/$script"
done
(cd "$stage" && find etc -type f | sort | sed 's|^|/|') >"$stage/DEBIAN/conffiles"
(cd "$stage" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$stage/DEBIAN/md5sums"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' agent/cgpu_agent/__init__.py)
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$(dpkg --print-architecture)/" \
    -e "s/@SIZE@/$(find "$stage" -type f -printf '%s\n' | awk '{ total += int(($1 + 1023) / 1024) } END { print total }')/" \
    -e "s/@SHLIBS@/$(sed -n 's/^shlibs:Depends=//p' "$work/shlibs")/" packaging/deb/control >"$stage/DEBIAN/control"

chmod -R u=rwX,go=rX "$stage"
find "$stage" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
# One thread: how many there are could be seen in the result.
deb=$out/cgpu-agent_${version}_$(dpkg --print-architecture).deb
dpkg-deb --root-owner-group -Zzstd --threads-max=1 --build "$stage" "$deb" >/dev/null
echo "$deb"
