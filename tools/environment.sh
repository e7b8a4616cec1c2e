#!/bin/sh
# Makes .venv what requirements.txt and pyproject.toml ask for; does nothing, and needs no network, if it already is.

set -u
cd "$(dirname "$0")/.." || exit 1

REBUILD=3 # what environment.py answers when .venv cannot be repaired
venv=.venv/bin/python

version() {
    "$1" -c 'import sys; sys.version_info >= (3, 12) and print(sys.version.split()[0])' 2>/dev/null </dev/null
}

status=$REBUILD
python=
if [ -n "${PYTHON:-}" ]; then
    python=$(sh tools/find_python.sh) || exit 1
fi
have=$(version "$venv")
if [ -n "$have" ] && { [ -z "$python" ] || [ "$have" = "$(version "$python")" ]; }; then
    "$venv" tools/environment.py
    status=$?
fi
if [ "$status" -eq "$REBUILD" ]; then
    if [ -z "$python" ]; then
        python=$(sh tools/find_python.sh) || exit 1
    fi
    "$python" tools/environment.py rebuild
    status=$?
fi
if [ "$status" -ne 0 ]; then
    echo "The environment .venv is not ready; the reason is above. Running make again goes on from here." >&2
fi
exit "$status"
