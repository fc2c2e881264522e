#!/bin/sh
# Builds the wheel, installs it with the pinned dependencies into an empty environment outside the tree, and runs the
# command there. Usage: sh tests/wheel_check.sh PYTHON, with a PYTHON that has hatchling.
set -eu
python=$1
top=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV
"$python" -m hatchling build --target wheel --directory "$work/dist"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --constraint "$top/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/sparse-transformers" --help >/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import moe, pruning, sparse_attn, training, transformer
from moe import MoE, TopKRouter
import torch
assert "site-packages" in transformer.__file__, transformer.__file__
y, routing = MoE(dim=16, hidden=32, num_experts=4, router=TopKRouter(16, 4, k=2))(torch.randn(5, 16))
assert y.shape == (5, 16) and int(routing.loads().sum()) == 10
print("wheel installs and runs, torch", torch.__version__)
PYTHON
