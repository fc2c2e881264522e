"""`prune` on what it made before: zeros that hold through recovery, and a command that holds them in training."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from pruning import Masks, prunable_weights, sparsify
from tests.training.prune_folders import hf_folder, load, own_folder, texts_folder
from tests.training.test_cli import config, sparse_transformers  # noqa: F401
from tests.training.test_prune_recovery import llama, plan, recovered
from training.layer_override import LayerOverride
from training.model_config import ModelConfig
from training.start_words import renumbered
from transformer import Transformer

FEW = ["--calibration-sequences", "4", "--eval-sequences", "3", "--batch", "2", "--calibration-length", "16"]
RECOVER = ["--recover", "3", "--recover-rate", "0.01"]


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() == 0 for name, weight in prunable_weights(load(folder)).items()}


def count(zeros: dict[str, torch.Tensor]) -> int:
    return sum(int(one.sum()) for one in zeros.values())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and models half of whose weights a first run set to zero."""
    root = tmp_path_factory.mktemp("again")
    texts_folder(root / "texts")
    for name in ("dense", "llama"):
        own_folder(root / name) if name == "dense" else hf_folder(root / name, name)
        prune(root, root / name, root / f"{name}-half", "--sparsity", "0.5")
    return root


def prune(root: Path, folder: Path, out: Path, *options: str) -> dict:
    text = ["--data", str(root / "texts"), *FEW]
    assert sparse_transformers("prune", str(folder), str(out), *text, *options) == 0
    return json.loads((out / "prune.json").read_text())


@pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")
@pytest.mark.parametrize(
    ("model", "units", "options"),
    [
        ("dense", ["--heads", "0.25"], []),
        ("dense", ["--budget", "params=0.8"], ["--recover-rank", "2"]),
        ("llama", ["--neurons", "0.25"], ["--recover-by", "retrain"]),
    ],
)
def test_recovery_holds_the_zeros_of_an_earlier_run(
    root: Path, tmp_path: Path, model: str, units: list[str], options: list[str]
) -> None:
    units = [*units, "--importance", "magnitude"]
    prune(root, root / f"{model}-half", tmp_path / "alone", *units)
    record = prune(root, root / f"{model}-half", tmp_path / "out", *units, *options, *RECOVER)
    expected, found = zeros_of(tmp_path / "alone"), zeros_of(tmp_path / "out")
    assert count(expected) > 0.9 * 0.5 * sum(zeros.numel() for zeros in expected.values())
    assert found.keys() == expected.keys() and all(found[name].equal(zeros) for name, zeros in expected.items())
    assert record["recovery"]["held"] == count(expected) and record["weights"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"The {count(expected):,} weights of matrices that were zero, by whichever run, stayed zero." in page
    before, after = (dict(load(tmp_path / name).named_parameters()) for name in ("alone", "out"))
    assert all(not after[name].equal(before[name]) for name in expected)


def test_a_lower_sparsity_lets_no_zero_go(root: Path, tmp_path: Path) -> None:
    record = prune(root, root / "dense-half", tmp_path / "out", "--sparsity", "0.3", *RECOVER)
    before, after = zeros_of(root / "dense-half"), zeros_of(tmp_path / "out")
    assert all(after[name].equal(zeros) for name, zeros in before.items())
    masks = Masks.load(tmp_path / "out" / "masks.safetensors")
    assert all(masks.kept[name].equal(~zeros) for name, zeros in before.items())
    assert record["weights"]["zeros"] == record["recovery"]["held"] == count(before)
    assert "--sparsify.method mask" in record["recover"]


def test_a_model_without_zeros_trains_freely(root: Path, tmp_path: Path) -> None:
    record = prune(root, root / "dense", tmp_path / "out", "--width", "0.5", *RECOVER)
    page = (tmp_path / "out" / "report.html").read_text()
    assert record["recovery"]["held"] == count(zeros_of(tmp_path / "out")) == 0
    assert "No weight of a matrix was zero." in page and "stayed zero" not in page
    assert "--sparsify" not in record["recover"] and "Train on:" in page and "holding the zeros" not in page


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("part", [False, True])
def test_zeros_beside_the_masks_hold_too(rank: int | None, part: bool) -> None:
    """A first run's zeros everywhere; masks of a second one in one matrix, or none."""
    pytest.importorskip("transformers")
    whole, model = llama(), llama()
    zeros = sparsify(model, sparsity=0.5)
    name = next(iter(zeros.kept))
    masks = None
    if part:
        more = sparsify(model, sparsity=0.7, weights=[name])
        zeros, masks = Masks({**zeros.kept, **more.kept}), more
    recovered(model, whole, plan(rank=rank), masks)
    assert all(torch.equal(model.get_parameter(one) == 0, ~kept) for one, kept in zeros.kept.items())


def test_the_command_on_the_page_holds_the_zeros_of_a_model_pruned_again(
    config: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    half, again = tmp_path / "half", tmp_path / "again"
    assert sparse_transformers("train", str(config), "--train.steps", "2") == 0
    common = ["--batches", "1"]
    assert sparse_transformers("prune", str(tmp_path / "run"), str(half), "--weights", "0.6", *common) == 0
    capsys.readouterr()
    assert sparse_transformers("prune", str(half), str(again), "--heads", "0.25", *common) == 0
    command = capsys.readouterr().out.splitlines()[-1].strip()
    page = (again / "report.html").read_text()
    assert "Train on, holding the zeros:" in page and command in page
    config.write_text(config.read_text() + "[sparsify]\nsparsity = 0.3\n")
    assert sparse_transformers("train", str(config), *shlex.split(command)[3:]) == 0
    trained = tmp_path / "again-recovered" / "checkpoints" / "step-00000008"
    before, after = (Transformer.from_pretrained(folder) for folder in (again, trained))
    expected = Masks.of(before)
    assert expected.zeros > 0
    for name, kept in expected.kept.items():
        assert torch.equal(after.get_parameter(name) == 0, ~kept), name
        assert not after.get_parameter(name).equal(before.get_parameter(name))


def test_no_command_where_a_matrix_has_nothing_left(root: Path, tmp_path: Path) -> None:
    """Training under masks refuses it: nothing is claimed."""
    model = Transformer.from_pretrained(root / "dense")
    with torch.no_grad():
        model.layers[0].attention.query.weight.zero_()
    model.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_bytes((root / "dense" / "tokenizer.json").read_bytes())
    record = prune(root, tmp_path / "empty", tmp_path / "out", "--neurons", "0.25")
    assert record["recover"] is None and "Train on" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((0, 1, 2, 3), ""),
        ((0, 1), "at = 2 goes, at = 3 goes"),
        ((0, 2, 3), "at = 2 becomes at = 1, at = 3 becomes at = 2"),
        ((1, 2), "at = 0 goes, at = 2 becomes at = 1, at = 3 goes"),
    ],
)
def test_tables_of_layers_are_renumbered_in_words(kept: tuple[int, ...], said: str) -> None:
    tables = tuple(LayerOverride(at=at, hidden=8) for at in (0, 2, 3))
    assert renumbered(ModelConfig(layers=4, layer=tables), kept) == said


def test_the_command_behind_lost_layers_runs_once_the_tables_are_changed_as_it_says(
    config: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = [f"[[model.layer]]\nat = {at}\nhidden = {8 + 8 * at}\n" for at in (0, 2)]
    text = config.read_text().replace("layers = 2\n", "layers = 3\n")
    config.write_text(text + "".join(tables))
    assert sparse_transformers("train", str(config), "--train.steps", "2") == 0
    half = tmp_path / "half"
    assert sparse_transformers("prune", str(tmp_path / "run"), str(half), "--layers", "0.4", "--batches", "1") == 0
    *_, first, command = (line.strip() for line in capsys.readouterr().out.splitlines())
    said = first.removeprefix("after a change of CONFIG.toml's [[model.layer]] tables: ")
    assert said != first and said in (half / "report.html").read_text()
    arguments = shlex.split(command)[3:]
    assert sparse_transformers("train", str(config), *arguments) != 0
    capsys.readouterr()
    changes = dict(re.findall(r"at = (\d) (goes|becomes at = \d)", said))
    for at, table in zip("02", tables, strict=True):
        change = changes.get(at, "stays")
        moved = table.replace(f"at = {at}", change.removeprefix("becomes "))
        tables[tables.index(table)] = {"stays": table, "goes": ""}.get(change, moved)
    config.write_text(text + "".join(tables))
    assert sparse_transformers("train", str(config), *arguments) == 0
