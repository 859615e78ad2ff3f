#!/bin/sh
# Makes the virtual environment .venv in the repository root and installs the pinned packages of this machine:
#
#   make setup          (or: sh requirements/install.sh)
#
# PYTHON names the interpreter (default python3); ACCELERATOR is cpu or gpu (default: gpu where nvidia-smi lists one).
# .venv/installed holds the checksum of what was installed, written last: a second call installs nothing, and an
# interrupted one is repeated.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
stamp=$venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    echo "setup: $*" >&2
    exit 1
}

accelerator=${ACCELERATOR:-}
if [ -z "$accelerator" ]; then
    accelerator=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        accelerator=gpu
    fi
fi

platform=$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
lock=requirements/$platform-$accelerator.txt
if [ ! -f "$lock" ]; then
    fail "no pinned packages for $platform with ACCELERATOR=$accelerator: expected $lock, found:" requirements/*-?pu.txt
fi

# The place counts too: an editable install and the scripts of a virtual environment hold absolute paths.
checksum=$( (pwd && cat "$lock" pyproject.toml requirements/install.sh) | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$lock $checksum" ] && [ -x "$venv/bin/python" ]; then
    exit 0
fi

command -v "$python" >/dev/null 2>&1 || fail "no '$python' found: install Python 3.11, 3.12 or 3.13, or name one with PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12 | 3.13) ;;
    *) fail "Python 3.11, 3.12 or 3.13 expected, found $version ($python): name another one with PYTHON=..." ;;
esac

rm -f "$stamp"
if [ "$("$venv/bin/python" -m pip --version 2>/dev/null | sed -n 's/.*(python \(.*\))$/\1/p')" != "$version" ]; then
    echo "setup: making $venv with Python $version"
    "$python" -m venv --clear "$venv" || fail "'$python -m venv' failed (on Debian and Ubuntu it needs the package python3-venv)"
fi

pip() {
    "$venv/bin/python" -m pip install --quiet --quiet --no-deps "$@" # errors only
}

echo "setup: installing $(grep -c '==' "$lock") pinned packages from $lock; this takes some minutes"
# The CPU build of torch is not on the package index. Where pip's own configuration does not find it, uv does.
torch=$(grep '^torch==.*+cpu$' "$lock" || true)
if [ -n "$torch" ] && ! pip_says=$(pip "$torch" 2>&1); then
    echo "setup: pip does not find $torch; asking uv for it"
    pip "$(grep '^uv==' "$lock")"
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --torch-backend cpu "$torch" || {
        echo "$pip_says" >&2
        fail "neither pip nor uv could install $torch"
    }
fi
# Without dependencies: the lock is complete, and what it leaves out on purpose must stay out.
pip -r "$lock"
pip --no-build-isolation -e .

echo "$lock $checksum" >"$stamp.partial"
mv "$stamp.partial" "$stamp"
echo "setup: done"
