"""Every method that learns or retrains, through a config, the trainer and its checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from pruning import Masks
from tests.training.models import small_data, small_model
from tests.typecheck import unchecked
from training.config import OptimConfig, RunConfig, SparsifyConfig, TrainConfig, from_dict, load_config
from training.model_config import model_config
from training.sparsify_config import FINDING
from training.sparsity import make_pace, make_sparsifiers
from training.trainer import Trainer
from transformer import Transformer

ASKED = ["movement", "feedback", "dnw", "iht", "lc", "generalization", "l1", "hoyer_square", "group_lasso",
         "sigmoid_units", "softplus_units", "polarized_units", "dsd"]  # fmt: skip
STRENGTH = {"soft_movement": 300.0, "l0": 300.0, "l0_units": 30.0, "str": 1.0, "variational": 300.0,
            "variational_units": 30.0, "proximal": 1.0, "group_proximal": 4.0}  # fmt: skip
EXAMPLES = sorted(Path("examples/configs").glob("learned-*.toml"))


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def table(method: str, **options) -> SparsifyConfig:
    found = (
        {"strength": STRENGTH[method], "gate_lr": 20.0 if method == "str" else 150.0}
        if method in FINDING
        else {"sparsity": 0.5}
    )
    prunes = {"when": "low"} if method == "generalization" else {}  # so short a run does not overfit
    return SparsifyConfig(method=method, every=3, begin=2, **(found | prunes | options))


def trainer(out: Path, config: SparsifyConfig, *, experts: int = 0, **train) -> Trainer:
    settings = {"steps": 10, "batch": 2, "dtype": "float32", "eval_every": 4, "save_every": 99, "device": "cpu"}
    torch.manual_seed(0)
    model = small_model(experts=experts, dropout=0.1)
    found = TrainConfig(**(settings | {"checkpointing": experts > 0, "eval_batches": 1} | train))
    return Trainer(
        model, small_data(), out=out, length=16, optim=OptimConfig(lr=0.01, warmup=3), train=found,
        sparsifiers=make_sparsifiers(config, model, steps=found.steps),
        pace=make_pace(config, steps=found.steps, warmup=3),
    )  # fmt: skip


@pytest.mark.parametrize("method", [*ASKED, *FINDING])
def test_it_trains_resumes_bitwise_and_ends_in_a_plain_model_with_exact_zeros(method, tmp_path):
    config, experts = table(method), 3 if len(method) % 2 else 0
    whole = trainer(tmp_path / "whole", config, experts=experts)
    outcome = whole.run()
    first = trainer(tmp_path / "parts", config, experts=experts, stop_at=6)
    first.run()
    second = trainer(tmp_path / "parts", config, experts=experts)
    second.resume(first.saved[1])
    second.run()
    ours, theirs = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert ours == theirs and len(ours) == 10 + 3
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert one.equal(two)
    plain = Transformer.from_pretrained(outcome.checkpoint)
    zeros = Masks.of(plain)
    (sparsifier,) = whole.sparsifiers
    if method == "dsd":
        assert zeros.zeros == 0
        return
    for name, mask in sparsifier.masks().kept.items():
        gone = plain.get_parameter(name)[~mask]
        assert gone.eq(0).all() and not gone.signbit().any()
    kept = sparsifier.masks()
    assert kept.sparsity > 0
    if method in ASKED and "units" not in method and method != "generalization":
        assert kept.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rate", ["rewarm", "rewind"])
def test_the_learning_rate_follows_the_prunings(rate, tmp_path):
    config = table("movement", rate=rate, schedule="iterative", end=11, sparsity=0.5)
    made = trainer(tmp_path, config, eval_every=100)
    rates = []
    while made.step < 12:
        rates.append(made.train_step()["lr"])
    plain = trainer(tmp_path / "plain", table("movement"), eval_every=100)
    base = [plain.train_step()["lr"] for _ in range(12)]
    for step in range(12):
        pruned = [p for p in (2, 5, 8) if p <= step]
        if not pruned:
            assert rates[step] == base[step]
        elif rate == "rewarm":
            assert rates[step] == pytest.approx(base[step] * min(1.0, (step - pruned[-1] + 1) / 3))
        else:
            assert rates[step] == base[min(step, 3 + step - pruned[-1])]


def test_gates_have_a_group_and_a_rate_of_their_own(tmp_path):
    made = trainer(tmp_path, table("l0", gate_lr=7.0))
    made.train_step()
    group = made.optimizers.main.param_groups[-1]
    (sparsifier,) = made.sparsifiers
    assert {id(p) for p in group["params"]} == {id(p) for p in sparsifier.named_gates().values()}
    assert group["weight_decay"] == 0.0
    assert group["lr"] == pytest.approx(7.0 * made.optimizers.main.param_groups[0]["lr"])
    assert trainer(tmp_path / "s", table("str")).optimizers.main.param_groups[-1]["weight_decay"] == STRENGTH["str"]


def test_the_checkpoint_of_a_run_without_gates_is_refused_by_one_with_them(tmp_path):
    first = trainer(tmp_path, table("feedback"), stop_at=5)
    first.run()
    with pytest.raises(ValueError, match="the optimiser's state must be that of .* gates, got '0:layers"):
        trainer(tmp_path, table("movement")).resume(first.saved[1])
    with pytest.raises(ValueError, match="state must be one of NeuralWirings, got 'Feedback'"):
        trainer(tmp_path, table("dnw")).resume(first.saved[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "l0", "sparsity": 0.5}, r"sparsify\.sparsity must be 0 for method='l0', which finds its own"),
        ({"method": "rigl", "strength": 1.0}, r"sparsify\.strength must be left out for method='rigl', got 1\.0"),
        ({"method": "l0", "strength": 0.0}, r"sparsify\.strength must be positive, got 0\.0"),
        ({"method": "l0", "gate_lr": 0.0}, r"sparsify\.gate_lr must be positive, got 0\.0"),
        ({"method": "l0", "rate": "rewarm"}, r"sparsify\.rate must be 'keep' for method='l0', got 'rewarm'"),
        ({"method": "hard"}, r"sparsify\.method in test must be one of magnitude, static"),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        from_dict(RunConfig, {"sparsify": values}, where="test")


def test_hooks_that_a_compiled_layer_would_skip_are_refused():
    with pytest.raises(ValueError, match=r"train\.compile must be false for sparsify\.method='variational'"):
        RunConfig(train=TrainConfig(compile=True), sparsify=SparsifyConfig(method="variational"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_config_builds_its_model_and_method(path):
    config = load_config(path)
    model = Transformer(model_config(config.model, vocab_size=64, length=config.data.length))
    (method,) = make_sparsifiers(config.sparsify, model, steps=config.train.steps)
    assert config.sparsify.method != "magnitude" and method.masks().total > 0
    ids = torch.randint(64, (1, 8))
    with method.parametrise():
        model(ids, labels=ids).loss.backward()
    assert method.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
