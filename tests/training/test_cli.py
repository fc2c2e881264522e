"""The command from end to end: train, stop, resume, evaluate, generate, prune; errors are one line."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.spawning import PATIENCE
from training.checkpoint import checkpoints
from training.cli import _file_first, main
from transformer import Transformer

ROOT = Path(__file__).parents[2]


def sparse_transformers(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of a few steps on a folder of texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"the number is {number} and the next is {number + 1}\n" * 12)
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
out = "{tmp_path}/run"
[data]
corpus = "{texts}"
tokenizer = "bytes"
length = 16
held_out = 0.2
cache = "{tmp_path}/cache"
[model]
dim = 16
layers = 2
heads = 2
hidden = 16
num_experts = 4
[train]
steps = 8
batch = 4
dtype = "float32"
eval_every = 4
save_every = 2
"""
    )
    return file


def test_train_stop_resume_evaluate_generate_prune(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert sparse_transformers("train", str(config), "--train.stop-at", "5", "--optim.lr", "0.01") == 0
    shown = capsys.readouterr().out
    assert "go on with:\n  sparse-transformers train" in shown
    assert "--optim.lr 0.01 --resume" in shown
    assert sparse_transformers("train", str(config), "--resume", "--optim.lr", "0.01") == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 9))
    final = next(line["bits_per_byte"] for line in reversed(steps) if "bits_per_byte" in line)
    capsys.readouterr()
    assert sparse_transformers("evaluate", run) == 0
    assert f"{final:.4f} bits per byte" in capsys.readouterr().out
    assert sparse_transformers("evaluate", run, "--whole", "--corpus", str(tmp_path / "texts")) == 0
    assert sparse_transformers("generate", run, "--prompt", "the ", "--tokens", "5", "--temperature", "0") == 0
    assert "\nthe " in capsys.readouterr().out
    pruned = str(tmp_path / "pruned")
    assert (
        sparse_transformers("prune", run, "--out", pruned, "--heads", "0.5", "--weights", "0.5", "--batches", "2") == 0
    )
    assert "removed 2 of 4 heads" in capsys.readouterr().out
    small, full = (
        Transformer.from_pretrained(pruned),
        Transformer.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000008"),
    )
    assert small.num_parameters() < full.num_parameters()
    pruned_on = ("train", str(config), "--init", pruned, "--out", f"{run}2", "--sparsify.sparsity", "0.5")
    assert sparse_transformers(*pruned_on) == 0
    assert "its own sizes hold: [model] says heads=2 where it has 1" in capsys.readouterr().out
    recovered = Transformer.from_pretrained(tmp_path / "run2" / "checkpoints" / "step-00000008")
    assert recovered.num_parameters() == small.num_parameters()
    gate = recovered.layers[0].attention.query.weight
    assert gate.numel() == 0 or (gate == 0).float().mean() == 0.5


def test_a_run_in_float64_is_one_in_every_digit(config: Path, tmp_path: Path) -> None:
    exact = ("--train.dtype", "float64")
    assert sparse_transformers("train", str(config), *exact, "--train.stop-at", "4") == 0
    assert sparse_transformers("train", str(config), *exact, "--resume") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [line[name] for line in lines if "loss" in line for name in ("loss", "grad_norm")]
    assert len(numbers) == 16 and not any(torch.tensor(number).item() == number for number in numbers)
    model = Transformer.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "missing.toml"], "no config at missing.toml"),
        (["train", "{config}", "--data.corpus", "{empty}"], "no file for corpus"),
        (["train", "{config}", "--data.length", "100000"], "fewer than one sequence of length=100000"),
        (["train", "{config}", "--resume"], "no checkpoint at"),
        (["train", "{config}", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["train", "{config}", "--model.k", "9"], "k must be in [1, num_experts=4], got 9"),
        (["train", "{config}", "--model.pattern", "causal() & sliding_windw(3)"], "sliding_window"),
        (["train", "{config}", "--optim.warmup", "-1"], "optim.warmup must be at least 0, got -1"),
        (["train", "{config}", "--train.device", "cuda:63"], "device 'cuda:63' is not there"),
        (
            ["train", "{config}", "--train.device", "gpu"],
            "device must be auto, cpu, cuda or cuda:0, cuda:1, …, got 'gpu'",
        ),
        (["train", "{config}", "--train.device", "meta"], "device must be auto, cpu or cuda, got 'meta'"),
        (["train", "{config}", "--train.threads", "0"], "train.threads must be positive, got 0"),
        (["train", "{config}", "--train.sample-every", "2", "--train.prompt", ""], "to max_length-1=15 tokens, got 0"),
        (["train", "{config}", "--train.sample-every", "2", "--train.prompt", "x" * 16], "tokens, got 16"),
        (["evaluate", "{empty}"], "no model in"),
        (["evaluate", "{empty}", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["evaluate", "{empty}", "--length", "0"], "--length must be at least 1, got 0"),
        (["generate", "{empty}", "--tokens", "-4"], "--tokens must be at least 0, got -4"),
        (["prune", "{empty}", "--out", "x"], "say what to prune"),
        (["prune", "{empty}", "--out", "x", "--heads", "1.5"], "--heads must be in [0, 1), got 1.5"),
        (["prune", "{empty}", "--out", "x", "--weights", "1"], "--weights must be in [0, 1), got 1.0"),
        (["prune", "{empty}", "--out", "x", "--heads", "0.5", "--batches", "0"], "--batches must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [argument.format(config=config, empty=tmp_path / "empty") for argument in arguments]
    assert sparse_transformers(*filled) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def zeros_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor == 0 for name, tensor in Transformer.from_pretrained(folder).named_parameters()}


@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_the_recovery_that_prune_prints_keeps_the_zeros(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: str
) -> None:
    run, pruned = str(tmp_path / "run"), tmp_path / "pruned"
    assert sparse_transformers("train", str(config), "--train.steps", "2") == 0
    arguments = ["--out", str(pruned), "--heads", "0.5", "--weights", "0.6", "--scope", scope, "--batches", "1"]
    capsys.readouterr()
    assert sparse_transformers("prune", run, *arguments) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[:3] == ["sparse-transformers", "train", "CONFIG.toml"]
    config.write_text(config.read_text() + "[sparsify]\nbegin = 3\nend = 90\n")
    assert sparse_transformers("train", str(config), *printed[3:]) == 0
    before, after = zeros_of(pruned), zeros_of(tmp_path / "pruned-recovered" / "checkpoints" / "step-00000008")
    assert sum(zeros.sum() for zeros in before.values()) > 0
    assert all(torch.equal(before[name], after[name]) for name in before if ".layers." in f".{name}")


@pytest.mark.parametrize("out", ["run", "model"])
def test_prune_refuses_a_folder_with_a_run_or_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert sparse_transformers("train", str(config), "--train.steps", "1") == 0
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "model")
    before = sorted((tmp_path / out).rglob("*"))
    assert sparse_transformers("prune", str(tmp_path / "run"), "--out", str(tmp_path / out), "--weights", "0.5") == 1
    assert "--out must hold no run or model" in capsys.readouterr().err
    assert sorted((tmp_path / out).rglob("*")) == before


def test_generate_checks_before_it_prints(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse_transformers("train", str(config), "--train.steps", "1") == 0
    capsys.readouterr()
    for bad in (["--top-p", "0"], ["--top-k", "0"], ["--temperature", "-1"], ["--prompt", "x" * 16]):
        assert sparse_transformers("generate", str(tmp_path / "run"), *bad) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1


def test_flags_may_come_before_the_file_and_changes_are_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparse_transformers("train", "--train.stop-at", "2", str(config)) == 0
    assert f"train {config} --train.stop-at 2 --resume" in capsys.readouterr().out
    assert sparse_transformers("train", "--resume", str(config), "--optim.lr", "0.01", "--train.steps", "4") == 0
    shown = capsys.readouterr().out
    assert "changed since the run began: optim.lr 0.002 → 0.01\n" in shown
    assert "changed since the run began: train.steps 8 → 4\n" in shown
    assert shown.count("changed since") == 2
    assert _file_first(["--out", "a.toml", "--seed", "3"]) == (None, ["--out", "a.toml", "--seed", "3"])


def test_a_truncated_run_json_is_named_with_the_way_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparse_transformers("train", str(config), "--train.steps", "1") == 0
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text()[:40])
    assert sparse_transformers("evaluate", str(tmp_path / "run")) == 1
    assert f"{record} is cut short or not JSON" in capsys.readouterr().err
    record.unlink()
    flags = ["--data.length", "16", "--train.steps", "2", "--resume"]
    assert sparse_transformers("train", str(config), *flags) == 0
    assert sparse_transformers("evaluate", str(tmp_path / "run")) == 0


def test_an_error_of_torch_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr("training.cli.train", fail)
    assert sparse_transformers("train", str(config)) == 1
    assert capsys.readouterr().err == "error: no memory for this\n"


def test_debug_shows_where_an_error_came_from() -> None:
    with pytest.raises(FileNotFoundError):
        main(["train", "missing.toml", "--debug"])


def test_a_run_is_not_overwritten_by_accident(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse_transformers("train", str(config), "--train.steps", "2") == 0
    assert sparse_transformers("train", str(config)) == 1
    assert "add --resume to go on, --overwrite to start anew" in capsys.readouterr().err
    assert sparse_transformers("train", str(config), "--train.steps", "3", "--overwrite") == 0


def test_a_run_does_not_move_in_beside_a_saved_model(config: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert sparse_transformers("train", str(config), "--out", str(tmp_path / "model")) == 1
    assert "holds a saved model: give another --out" in capsys.readouterr().err


def test_overwrite_removes_nothing_before_the_new_run_can_start(config: Path, tmp_path: Path) -> None:
    assert sparse_transformers("train", str(config), "--train.steps", "2") == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for bad in (["--data.corpus", str(tmp_path / "none")], ["--model.k", "9"]):
        assert sparse_transformers("train", str(config), "--overwrite", *bad) == 1
    after = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert after == before
    assert sparse_transformers("train", str(config), "--train.steps", "1", "--overwrite") == 0
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000001"]


def test_a_folder_has_one_run_at_a_time(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    script = "import sys, time, pathlib; from training.folders import only_user\n"
    script += f"with only_user(pathlib.Path({str(run)!r})): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            assert sparse_transformers("train", str(config), "--train.steps", "1") == 1
        finally:
            process.kill()
    shown = capsys.readouterr().err
    assert f"{run} is in use by process {process.pid}:" in shown
    assert shown.count("\n") == 1
    assert sparse_transformers("train", str(config), "--train.steps", "1") == 0


def test_runs_and_caches_below_the_corpus_are_not_text(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "texts")
    Path("latin.txt").write_bytes(b"caf\xe9")
    flags = ["--data.corpus", ".", "--out", "runs/a", "--data.cache", "runs/cache", "--data.tokenizer", "bpe"]
    flags += ["--data.vocab-size", "270", "--train.steps", "4"]
    assert sparse_transformers("train", str(config), *flags, "--train.stop-at", "2") == 0
    assert "left out, as not UTF-8 text: 1 (latin.txt)" in capsys.readouterr().out
    assert sparse_transformers("train", str(config), *flags, "--resume") == 0
    assert sparse_transformers("evaluate", "runs/a") == 0
    other = [flag.replace("runs/a", "runs/b") for flag in flags]
    assert sparse_transformers("train", str(config), *other) == 0
    first, second = (Path("runs", name, "checkpoints", "step-00000004", "state.json").read_text() for name in "ab")
    assert json.loads(first)["fingerprint"] == json.loads(second)["fingerprint"]


def test_ctrl_c_saves_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "train", str(config), "--train.steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(2)
    shown, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "stopped by SIGINT; go on with:" in shown
    assert f"train {config} --train.steps 100000 --resume" in shown
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse_transformers("--help") == 0
    shown = capsys.readouterr().out
    for name in ("demo", "train", "evaluate", "generate", "prune", "report", "bench"):
        assert f"\n  {name}" in shown
