#!/usr/bin/env bash
# Makes the wheel of the version before: make_wheel.sh COMMIT VERSION [PYTHON]. The README beside it says when and why.
set -euo pipefail
commit=$1 version=$2 python=${3:-python3}
here=$(cd "$(dirname "$0")" && pwd)
root=$(git -C "$here" rev-parse --show-toplevel)
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT

git -C "$root" archive "$commit" bus observability schemas workers pyproject.toml LICENSE README.md | tar -x -C "$source"
# A megabyte of checkpoint and samples, and the code that trained it, which no test of upgrades needs.
rm -r "$source"/workers/models/{digits,training,train_digits.py}
sed -i "s/^version = .*/version = \"$version\"/" "$source/pyproject.toml"
SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct "$commit")
export SOURCE_DATE_EPOCH  # the same bytes each time
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$here" "$source"
