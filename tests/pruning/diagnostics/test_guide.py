"""The guide to the diagnostics runs as it stands, and shows each of them."""

import re
from pathlib import Path

import pruning.diagnostics

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "guides" / "diagnostics.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_runs_after_those_before_it(capsys):
    names = {"__name__": "guide"}
    for number, block in enumerate(BLOCK.findall(GUIDE.read_text())):
        exec(compile(block, f"block {number} of {GUIDE.name}", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.count("\n") >= 14 and "nan" not in shown
    assert names["masks"].sparsity > 0.79 and names["snip"].ratio > 0.1


def test_every_function_that_measures_is_in_the_guide():
    blocks = "".join(BLOCK.findall(GUIDE.read_text()))
    measured = {name for name in pruning.diagnostics.__all__ if name[0].islower() and not name.endswith("_run")}
    # parts of others, and scores that ranking_stability reports
    parts = {"mean_loss", "random_labels", "layer_kind", "kendall_tau", "spearman_rho"}
    assert not {name for name in measured - parts if f"{name}(" not in blocks}
