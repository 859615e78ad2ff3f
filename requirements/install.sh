#!/bin/sh
# Makes the virtual environment .venv in the repository root and installs the pinned packages of this machine:
#
#   make setup          (or: sh requirements/install.sh)         what the run needs
#   make test           (or: sh requirements/install.sh test)    what the tests need beside it, too
#
# PYTHON names the interpreter (default python3); ACCELERATOR is cpu or gpu (default: gpu where nvidia-smi lists one).
# .venv/installed holds the checksum of what was installed, written last: a second call installs nothing, and an
# interrupted one is repeated. What was installed for the tests serves the run as well.
set -eu
cd "$(dirname "$0")/.."

wanted=${1:-run}
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    echo "setup: $*" >&2
    exit 1
}

case $wanted in
    run | test) ;;
    *) fail "expected run or test, got '$wanted'" ;;
esac

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

test_lock=${lock%.txt}-test.txt # only what the tests add

# The place counts too: an editable install and the scripts of a virtual environment hold absolute paths.
checksum=$( (pwd && cat "$lock" "$test_lock" pyproject.toml requirements/install.sh) | sha256sum)
installed=$(cat "$stamp" 2>/dev/null || true)
if [ -x "$venv/bin/python" ]; then
    case $installed in
        "$wanted $lock $checksum" | "test $lock $checksum") exit 0 ;;
    esac
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
    "$venv/bin/python" -m pip "$@"
}

# The lines of one package of a lock, with its hashes, as a lock of its own.
pinned() {
    sed -n "/^$1==/,/[^\\\\]\$/p" "$2" >"$venv/$1.txt"
}

# uv installs several times faster than pip. It reads none of pip's configuration, so it is told of pip's index and of the
# folders with wheels; pip's own variables stand above its files.
pinned uv "$test_lock"
if [ "$("$venv/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "$(sed -n 's/^uv==\([^ ]*\).*/\1/p' "$venv/uv.txt")" ]; then
    pip install --quiet --quiet --no-deps --require-hashes -r "$venv/uv.txt" # errors only
fi
pip_settings=$(pip config list 2>/dev/null || true)
pip_setting() {
    for section in :env: install global; do
        value=$(printf '%s\n' "$pip_settings" | sed -n "s/^$section\.$1='\(.*\)'\$/\1/p")
        if [ -n "$value" ]; then
            printf '%s\n' "$value" | sed 's/\\n/ /g' | xargs | tr ' ' ','
            return
        fi
    done
}
index=$(pip_setting index-url)
if [ -n "$index" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
fi
folders=$(pip_setting find-links)
if [ -n "$folders" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$folders}"
fi

# Without dependencies: the locks are complete, and what they leave out on purpose must stay out. Compiled here, as pip
# does it: where PYTHONDONTWRITEBYTECODE is set, every process would compile the packages for itself.
uv_install() {
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode "$@"
}

set -- "$lock"
if [ "$wanted" = test ]; then
    set -- "$lock" "$test_lock"
fi
echo "setup: installing $(cat "$@" | grep -c '==') pinned packages from $*"
# The CPU build of torch is not on the package index: where no folder of pip's has it, uv knows where it is.
torch=$(sed -n 's/^\(torch==[^ ]*+cpu\) .*/\1/p' "$lock")
pinned torch "$lock"
if [ -n "$torch" ] && ! without_backend=$(uv_install --require-hashes -r "$venv/torch.txt" 2>&1); then
    echo "setup: $torch is in no folder with wheels that pip is told of; asking its publisher"
    uv_install --torch-backend cpu --require-hashes -r "$venv/torch.txt" || {
        echo "$without_backend" >&2
        fail "uv could not install $torch"
    }
fi
for file in "$@"; do
    uv_install --require-hashes -r "$file"
done
uv_install --no-build-isolation -e .

echo "$wanted $lock $checksum" >"$stamp.partial"
mv "$stamp.partial" "$stamp"
echo "setup: done"
