"""The check that records are what the code gives: the same bits pass, a record of other code is named."""

import pytest

from benchmarks import study_check
from tests.training.toy_study import DENSE_BASE
from training.study import load_study, run_study
from training.study import regimes as regimes_module
from training.study import runner as runner_module
from training.study.cell import run_cell

TOML = (
    """
name = "toy"
question = "Does it run?"
reference = "dense"
budget_minutes = 5
lrs = [1e-3, 1e-2]
sweep_steps = 4
seeds = [0, 1]
speeds = false
regimes = ["random_labels"]
"""
    + DENSE_BASE
    + """[[arm]]
name = "dense"
label = "Dense"
[[arm]]
name = "set"
label = "SET"
changes = {{ "sparsify.method" = "set", "sparsify.sparsity" = 0.5, "sparsify.every" = 1 }}
"""
)


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """(the study above, its records)."""

    def completed(jobs, *, at_once, threads):
        for job in jobs:
            assert run_cell(job) == 0
            yield job.parent

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"line {number} of text\n" * 20)
    (tmp_path / "toy.toml").write_text(TOML.format(corpus=texts))
    monkeypatch.setattr(runner_module, "completed", completed)
    monkeypatch.setattr(regimes_module, "FEW", 1)
    monkeypatch.setattr(study_check, "OUT", tmp_path / "check")
    study = load_study(tmp_path / "toy.toml")
    return study, run_study(study, out=tmp_path / "out", records=tmp_path / "records.jsonl")


def test_one_cell_of_every_arm_is_trained_again_and_a_record_of_other_code_is_named(checked, capsys):
    study, lines = checked
    picked = [(cell.arm.name, cell.regime, old["steps"]) for cell, old in study_check.chosen(study, lines)]
    assert picked == [("dense", None, 4), ("dense", "random_labels", 8), ("set", None, 4), ("set", "random_labels", 8)]
    assert study_check.check(study, lines) == 0
    assert "4 of 4 cells as recorded\n" in capsys.readouterr().out
    other = [
        line | {"bits_per_byte": line["bits_per_byte"] + 1e-9}
        if line["kind"] == "cell" and line["arm"] == "set"
        else line
        for line in lines
    ]
    assert study_check.check(study, other, among=["set"]) == 1
    said = capsys.readouterr().out
    assert "differs by -1e-09" in said and "1 of 2 cells as recorded; not: set, rate" in said
    assert study_check.check(study, lines, among=["nothing"]) == 2


def test_a_loss_that_one_alone_has_is_a_difference():
    one = {"kind": "cell", "bits_per_byte": 2.0}
    none = {"kind": "cell", "bits_per_byte": None}
    assert study_check.difference(one, none) is None and study_check.difference(none, one) is None
    assert study_check.difference(none, none) == 0.0
