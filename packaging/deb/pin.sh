#!/bin/sh
# Pin what the package is made of: every file by its digest, as the newest releases that pyproject.toml allows.
# "sh packaging/deb/pin.sh", on the distribution that the package is for; then "make deb test-systemd", and commit.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
/usr/bin/python3 -m venv "$work/venv"

pin() { # FILE WHY REQUIREMENT...
    file=packaging/deb/$1
    why=$2
    shift 2
    "$work/venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$work/report.json" "$@"
    {
        echo "# $why. Made by pin.sh."
        "$work/venv/bin/python" - "$work/report.json" <<'END'
import json
import sys

with open(sys.argv[1]) as report:
    found = json.load(report)["install"]
lines = []
for each in found:
    name = each["metadata"]["name"].lower().replace("_", "-")
    if name != "cgpu-agent":
        digest = each["download_info"]["archive_info"]["hash"].replace("=", ":", 1)
        lines.append(f"{name}=={each['metadata']['version']} --hash={digest}")
print(*sorted(lines), sep="\n")
END
    } >"$work/pinned"
    mv "$work/pinned" "$file"
}

pin requirements.txt "Inside the package" ".[daemon]"
# tpm2-pytss names the last three itself.
pin build.txt "Only used to make it" "setuptools>=77" wheel cffi setuptools_scm pkgconfig pycparser
