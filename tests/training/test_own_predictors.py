"""A run with activation_predictor_rank: trained with idle predictors, which the command threshold then trains."""

import re
from pathlib import Path

import pytest
import torch

from tests.training.test_starting_points import TEXT, lines, sparse_transformers
from training.config import load_config
from training.run import make_model
from transformer import Transformer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose model was made with predictors and is trained."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(f"the number is {number} and the next is {number + 1}\n" * 12)
    file = folder / "run.toml"
    words = 'feedforward = "thresholded"\nactivation = "reglu"\nactivation_predictor_rank = 5'
    file.write_text(TEXT.format(folder=folder).replace('feedforward = "dense"', words))
    assert sparse_transformers("train", str(file), "--train.stop-at", "2") == 0
    assert sparse_transformers("train", str(file), "--resume") == 0
    return folder / "run"


def checkpoint(run: Path, step: int) -> Transformer:
    return Transformer.from_pretrained(run / "checkpoints" / f"step-{step:08}")


def test_the_run_trains_all_but_the_predictors(run: Path) -> None:
    first = make_model(load_config(run.parent / "run.toml"), vocab_size=257).state_dict()
    trained = checkpoint(run, 4)
    assert [layer.feedforward.predictor_rank for layer in trained.config.layers] == [5, 5]
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4]
    for name, tensor in trained.state_dict().items():
        assert tensor.equal(checkpoint(run, 2).state_dict()[name]) == ("predictor" in name)
        assert tensor.shape == first[name].shape


def test_the_command_trains_them_for_the_models_own_thresholds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "told"
    options = ["--method", "dejavu", "--recall", "0.9", "--steps", "50"]
    assert sparse_transformers("threshold", str(run), "--out", str(out), *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "dejavu, the model's own thresholds:" in shown and f"saved in {out}" in shown
    told = re.search(r"text: ([\d.]+)% of the neurons, among them ([\d.]+)% of the ([\d.]+)% that", shown)
    computed, recall, kept = map(float, told.groups())
    assert 20 < kept < 80 and 75 < recall <= 100 and recall * kept / 100 <= computed < 100
    before, after = checkpoint(run, 4), Transformer.from_pretrained(out)
    for name, tensor in after.state_dict().items():
        assert tensor.equal(before.state_dict()[name]) != ("predictor" in name)
    ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(1))
    assert (after(ids).logits - before(ids).logits).abs().max() > 1e-5
    assert sparse_transformers("generate", str(out), "--prompt", "the ", "--tokens", "3") == 0
    again = tmp_path / "again"
    text = ["--corpus", str(run.parent / "texts")]
    assert sparse_transformers("threshold", str(out), "--out", str(again), *options, *text) == 0
    ranks = {layer.feedforward.predictor_rank for layer in Transformer.from_pretrained(again).config.layers}
    assert ranks == {5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "teal"], "--method must be dejavu for a model made with predictors, got teal"),
        (["--method", "dejavu", "--sparsity", "0.5"], "--sparsity must be left out for a model made with predictors"),
        (["--method", "dejavu", "--error", "0.5"], "--error must be left out for a model made with predictors"),
        (["--method", "dejavu", "--rank", "3"], "its thresholds and rank stay, got 3"),
    ],
)
def test_what_would_change_its_thresholds_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    capsys.readouterr()
    assert sparse_transformers("threshold", str(run), "--out", str(tmp_path / "out"), *options) == 1
    assert message in " ".join(capsys.readouterr().err.split())
