#!/bin/sh
# Collects what a machine with torch and transformers lacks for `python -m benchmarks.gpu`:
#
#     sh benchmarks/gpu/collect_wheels.sh build/wheels
#
# and there, without a network:
#
#     python3 -m pip install --no-index --no-deps --target /tmp/site build/wheels/*.whl && export PYTHONPATH=/tmp/site
#
# In versions of the locks, for CPython 3.12 on Linux x86-64; about 8 MB, or 55 with PYARROW=yes, for a machine that has
# no pyarrow. DeepSpeed is built from its source distribution, without compiled operators; that needs .venv.
set -eu
cd "$(dirname "$0")/../.."
target=${1:?usage: sh benchmarks/gpu/collect_wheels.sh DIR}
mkdir -p "$target"
names="pydantic pydantic-core annotated-types typing-inspection hjson py-cpuinfo msgpack einops"
names="$names trl datasets dill multiprocess xxhash accelerate"
[ "${PYARROW:-no}" = yes ] && names="$names pyarrow"
# Of one package, as the locks have it.
pinned() {
    sed -n "s/^\($1==[^ ]*\).*/\1/p" requirements/linux-x86_64-cpu.txt requirements/linux-x86_64-cpu-test.txt
}
wanted=""
for name in $names; do
    wanted="$wanted $(pinned "$name")"
done
# shellcheck disable=SC2086 # one word each
.venv/bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
    --dest "$target" $wanted
DS_BUILD_OPS=0 .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --no-binary deepspeed \
    --wheel-dir "$target" "$(pinned deepspeed)"
du -sh "$target"
