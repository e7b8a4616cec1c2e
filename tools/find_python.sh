#!/bin/sh
# Prints the path of a Python that can make the project's environment: 3.12 if there is one, else the oldest newer one.
#
# Looks, in this order, at $PYTHON, at the names on PATH, at pyenv's versions and at uv's. Every candidate is run and
# asked for its version, because a name on PATH may be a shim that fails. If nothing fits, says what to install.

set -u

asks='import os, sys
if sys.version_info < (3, 12): sys.exit(1)
try: import ensurepip, venv
except ImportError: print("novenv " + sys.executable)
else: print("%d %s" % (sys.version_info[1], getattr(sys, "_base_executable", sys.executable)))'

best=
best_minor=
novenv=

# Notes $1 as the best so far if it runs and is older than the best so far.
consider() {
    answer=$("$1" -c "$asks" 2>/dev/null </dev/null) || return 0
    case $answer in
    novenv\ *) novenv=${answer#novenv } ;;
    [0-9]*\ *)
        minor=${answer%% *}
        if [ -z "$best" ] || [ "$minor" -lt "$best_minor" ]; then
            best=${answer#* }
            best_minor=$minor
        fi
        ;;
    esac
}

finish_if_found() {
    if [ -n "$best" ]; then
        printf '%s\n' "$best"
        exit 0
    fi
}

if [ -n "${PYTHON:-}" ]; then
    consider "$PYTHON"
    finish_if_found
    {
        echo "PYTHON=$PYTHON cannot be used: it must run, be Python 3.12 or newer, and have the modules venv and ensurepip."
        [ -z "$novenv" ] || echo "(It is new enough, but lacks venv or ensurepip; on Debian and Ubuntu: apt-get install python3-venv.)"
        echo "Give another, or leave PYTHON unset to have one searched for."
    } >&2
    exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    consider "$name"
done
finish_if_found

for python in "${PYENV_ROOT:-${HOME:-/}/.pyenv}"/versions/*/bin/python; do
    consider "$python"
done
finish_if_found

if uv --version >/dev/null 2>&1; then
    for version in 3.12 '>=3.12'; do
        python=$(uv python find --no-project --system "$version" 2>/dev/null </dev/null) && consider "$python"
    done
    finish_if_found
    echo "No Python 3.12 or newer on this machine; asking uv to install one." >&2
    if uv python install 3.12 >&2 </dev/null; then
        python=$(uv python find --no-project --system 3.12 2>/dev/null </dev/null) && consider "$python"
    fi
    finish_if_found
fi

{
    echo "No suitable Python was found: 3.12 or newer is needed, with venv and ensurepip."
    echo "Looked at PATH (python3.12, python3.13, python3.14, python3, python), at pyenv's versions and at uv."
    [ -z "$novenv" ] || echo "$novenv is new enough, but lacks venv or ensurepip."
    echo
    echo "Install one of these, then run make again:"
    echo "  Debian, Ubuntu   apt-get install python3.12 python3.12-venv    (or python3 and python3-venv, if 3.12 or newer)"
    echo "  Fedora           dnf install python3.12"
    echo "  macOS            brew install python@3.12"
    echo "  pyenv            pyenv install 3.12"
    echo "  uv               uv python install 3.12"
    echo "or name one that is elsewhere: make test PYTHON=/path/to/python3.12"
} >&2
exit 1
