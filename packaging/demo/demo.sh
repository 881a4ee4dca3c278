#!/bin/sh
# "make demo" and "make demo-stop": the whole agent on a machine without TPM, GPU or cloud.
set -eu
cd "$(dirname "$0")/../.."
case ${1:-start} in
start)
    echo "cgpu-agent demo: a software TPM with a recorded real boot, the daemon, a workload and a relying party,"
    echo "all on this machine. Installs what is missing, touches nothing outside this folder and one temporary one."
    echo
    sh packaging/bootstrap.sh demo
    exec .venv/bin/python packaging/demo/demo.py start
    ;;
stop)
    if [ -x .venv/bin/python ]; then
        exec .venv/bin/python packaging/demo/demo.py stop
    fi
    echo "the demo is not running"
    ;;
*)
    echo "usage: demo.sh [start|stop]" >&2
    exit 2
    ;;
esac
