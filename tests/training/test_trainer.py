"""Resuming is exact, sparsifiers take part at their moments, and nothing non-finite is ever applied."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moe
from pruning import Sparsifier, cubic
from tests.training.models import small_data, small_model, small_trainer
from training.checkpoint import checkpoints, latest_checkpoint
from training.finite import NonFiniteError, refusals
from training.trainer import Trainer, choose_device
from transformer import MoEConfig, Transformer, TransformerConfig


def losses(out: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def evaluations(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]


def resumed(out: Path, **options: Any) -> Trainer:
    trainer = small_trainer(out, **options)
    torch.manual_seed(999)  # the checkpoint's generators must win
    trainer.resume(latest_checkpoint(out / "checkpoints"))
    return trainer


@pytest.mark.parametrize(
    "train",
    [{}, {"dtype": "bfloat16"}, {"accumulation": 2}, {"checkpointing": True}],
    ids=["plain", "bfloat16", "accumulated", "recomputed"],
)
def test_twenty_steps_equal_ten_and_ten_resumed(tmp_path: Path, train: dict[str, Any]) -> None:
    small_trainer(tmp_path / "whole", train=train).run()
    outcome = small_trainer(tmp_path / "parts", train={**train, "stop_at": 10}).run()
    assert (outcome.step, outcome.stopped) == (10, "stop_at")
    outcome = resumed(tmp_path / "parts", train=train).run()
    assert (outcome.step, outcome.stopped, outcome.tokens) == (20, None, 20 * 64)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert [step for step, _ in evaluations(tmp_path / "whole")] == [10, 20]


def test_a_damaged_line_of_metrics_is_named_and_stops_no_new_run(tmp_path: Path) -> None:
    small_trainer(tmp_path, train={"stop_at": 10}).run()
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no line of metrics"):
        resumed(tmp_path).run()
    small_trainer(tmp_path, train={"stop_at": 1}).run()
    assert [step for step, _, _ in losses(tmp_path)] == [1]


def test_training_learns(tmp_path: Path) -> None:
    small_trainer(tmp_path, train={"steps": 60, "eval_every": 60}).run()
    history = losses(tmp_path)
    assert history[0][1] == pytest.approx(math.log(257), rel=0.05)
    assert history[-1][1] < 0.6 * history[0][1]


def test_a_line_holds_what_the_report_reads(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    line = trainer.train_step()
    assert {"step", "tokens", "time", "loss", "lr", "grad_norm", "tokens_per_s", "aux"} <= line.keys()
    assert len(line["loads"]) == len(line["entropy"]) == len(line["dropped"]) == 2
    assert [sum(loads) for loads in line["loads"]] == [4 * 16 * 2] * 2
    assert line["lr"] == pytest.approx(0.01 / 3)
    dense = small_trainer(tmp_path, model=small_model(experts=0)).train_step()
    assert dense["loads"] == dense["entropy"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    class Interrupter(Recorder):
        def after_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.calls.append("after")
            if self.calls.count("after") == 7:
                os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    outcome = small_trainer(tmp_path, sparsifiers=[Interrupter()]).run()
    assert (outcome.step, outcome.stopped) == (7, number.name)
    assert outcome.checkpoint.name == "step-00000007"
    assert signal.getsignal(number) == handler
    resumed(tmp_path, sparsifiers=[Recorder()]).run()
    small_trainer(tmp_path / "whole", sparsifiers=[Recorder()]).run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


class Recorder:
    """A sparsifier that writes down when it was called, and may veto."""

    def __init__(self, *, veto_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.veto_at = veto_at

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        self.calls.append("before")
        return self.calls.count("before") - 1 != self.veto_at

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("after")

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = list(state["calls"])


def test_moments_come_in_order_and_a_veto_leaves_the_weights(tmp_path: Path) -> None:
    class Parametrised(Recorder):
        @contextmanager
        def parametrise(self) -> Any:
            self.calls.append("enter")
            yield
            self.calls.append("leave")

    first, second = Parametrised(veto_at=1), Recorder()
    trainer = small_trainer(tmp_path, sparsifiers=[first, second])
    trainer.train_step()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.train_step()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert first.calls == ["enter", "leave", "before", "after"] * 3
    assert second.calls == ["before", "after"] * 3


def test_gradual_pruning_resumes_with_its_masks(tmp_path: Path) -> None:
    def run(out: Path, *, stop_at: int | None, resume: bool) -> Trainer:
        torch.manual_seed(0)
        model = small_model()
        sparsifier = Sparsifier(model, schedule=cubic(0.75, begin=2, end=16, every=2))
        trainer = small_trainer(out, model=model, sparsifiers=[sparsifier], train={"stop_at": stop_at})
        if resume:
            trainer.resume(latest_checkpoint(out / "checkpoints"))
        trainer.run()
        return trainer

    whole = run(tmp_path / "whole", stop_at=None, resume=False)
    run(tmp_path / "parts", stop_at=9, resume=False)
    parts = run(tmp_path / "parts", stop_at=None, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]), name
    zeros = (whole.model.layers[0].attention.query.weight == 0).float().mean()
    assert zeros == 0.75


def test_a_nan_loss_stops_before_the_update_and_names_step_and_layer(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, train={"stop_at": 7})
    trainer.run()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    norm = trainer.model.layers[1].feedforward_norm
    handle = norm.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(
        NonFiniteError, match=r"step 8: loss is nan, first in the output of layers\.1\.feedforward_norm"
    ):
        trainer.train_step()
    handle.remove()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000005", "step-00000007"]


def test_an_infinite_gradient_names_its_parameter(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.model.layers[0].attention.value.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan), .*layers\.0\.attention\.value\.weight"):
        trainer.train_step()
    assert trainer.step == 0


def test_a_spoilt_parameter_is_named(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.layers[0].attention.key.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"parameter layers\.0\.attention\.key\.weight is not finite"):
        trainer.train_step()


# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
COMPILED = """
import sys
from pathlib import Path
import torch
from tests.training.models import small_trainer

trainer = small_trainer(Path(sys.argv[1]))
for layer in trainer.model.layers:
    layer.compile(backend="eager")
norm = trainer.model.layers[1].feedforward_norm
router = trainer.model.layers[1].feedforward.router
for spoilt in (norm, router):
    with torch.no_grad():
        spoilt.weight.fill_(3e38)
    try:
        trainer.train_step()
    except ArithmeticError as error:
        print(error)
    with torch.no_grad():
        spoilt.weight.fill_(1.0)
"""


def test_what_a_compiled_router_refuses_is_diagnosed_as_uncompiled(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, tmp_path], capture_output=True, text=True, env=environment, check=False
    )
    norm, router = run.stdout.splitlines()
    assert norm.startswith("step 1: loss is nan, first in the output of layers.1.feedforward_norm; "), run.stderr
    named = "first in the output of layers.1.feedforward: router logits must be finite, got NaN or infinity for "
    assert router.startswith(f"step 1: loss is nan, {named}"), router
    assert router.endswith("start again with a lower --optim.lr or --train.dtype float32")


def test_whatever_compiled_layers_refuse_is_known_as_that() -> None:
    texts = [path.read_text() for path in Path(moe.__file__).parent.rglob("*.py")]
    messages = [message for text in texts for message in re.findall(r'_assert_async\([^"]+"(.+?)"\)', text)]
    assert len(messages) == sum(text.count("_assert_async(") for text in texts) > 0
    for message in messages:
        with pytest.raises(FloatingPointError, match=message), refusals():
            raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="no memory"), refusals():
        raise RuntimeError("no memory")


def test_other_data_or_sparsifiers_are_refused_on_resume(tmp_path: Path) -> None:
    small_trainer(tmp_path, train={"stop_at": 5}).run()
    other = small_data(length=17)
    object.__setattr__(other, "fingerprint", "another")
    with pytest.raises(ValueError, match="was trained on other text"):
        resumed(tmp_path, data=other)
    with pytest.raises(ValueError, match="state of 0 sparsifiers, this run has 1"):
        resumed(tmp_path, sparsifiers=[Recorder()])
    with pytest.raises(ValueError, match="data batch=4, this run has 8"):
        resumed(tmp_path, train={"batch": 8})


def test_samples_and_evaluations_do_not_disturb_the_run(tmp_path: Path) -> None:
    small_trainer(tmp_path / "plain", train={"eval_every": 20}).run()
    small_trainer(tmp_path / "busy", train={"eval_every": 3, "sample_every": 2, "sample_tokens": 5}).run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "busy")
    samples = [line for line in (tmp_path / "busy" / "metrics.jsonl").read_text().splitlines() if '"sample"' in line]
    assert len(samples) == 10


def test_a_model_that_looks_ahead_trains_on_without_samples_and_says_so(tmp_path: Path) -> None:
    config = small_model().config
    ahead = MoEConfig(8, 4, router="expert_choice", allow_future=True)
    layers = (config.layers[0], dataclasses.replace(config.layers[1], feedforward=ahead))
    model, console = Transformer(dataclasses.replace(config, layers=layers)), Console(record=True, width=100)
    trainer = small_trainer(tmp_path, model=model, train={"steps": 2, "sample_every": 1})
    assert trainer.run(console=console).step == 2
    assert "train.sample_every: no samples, as layer 1 compares a token with later ones" in console.export_text()
    assert '"sample"' not in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="allow_future=True"):
        trainer.sample()


def test_tensorboard_scalars_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    small_trainer(tmp_path, train={"steps": 2, "tensorboard": True}).run()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_missing_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda:63' is not there"):
        choose_device("cuda:63")


def test_a_balancing_bias_moves_once_a_step_whatever_the_micro_batches(tmp_path):
    config = TransformerConfig.uniform(
        vocab_size=257, dim=16, num_layers=1, num_heads=2, feedforward=MoEConfig(16, 4, router="sigmoid"),
        max_length=64,
    )  # fmt: skip
    trainer = small_trainer(tmp_path, model=Transformer(config), train={"accumulation": 2})
    trainer.train_step()
    bias = trainer.model.get_buffer("layers.0.feedforward.router.bias")
    assert 0 < bias.abs().max() < 1.5e-3
