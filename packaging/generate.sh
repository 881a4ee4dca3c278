#!/bin/sh
# Generate the gRPC stubs with the oldest supported tools, so that one committed result runs on a wide range of
# grpcio and protobuf. "generate.sh --check" fails when the committed stubs are stale.
set -eu
cd "$(dirname "$0")/.."
venv=build/generate-venv
out=agent
if [ ! -x "$venv/bin/protoc-gen-mypy" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet 'grpcio-tools==1.76.0' 'mypy-protobuf==5.1.0' 'setuptools<81'
fi
[ "${1:-}" = --check ] && out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
    protos/cgpu_agent/api/v1/*.proto
if [ "${1:-}" = --check ]; then
    diff -r --exclude=__pycache__ --exclude=__init__.py "$out/cgpu_agent/api/v1" agent/cgpu_agent/api/v1 || {
        echo 'the committed stubs are stale: run "make generate"' >&2
        exit 1
    }
fi
