"""A Fisher penalty and a low-Fisher-first order as words of [sparsify]: what they add, with which methods, and when."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pruning import Masks, prunable_weights
from pruning.diagnostics import fisher_penalty, fisher_trace
from pruning.saliency.products import twice_differentiable
from tests.tolerances import close
from tests.training.models import small_corpus
from training.config import RunConfig, from_dict
from training.data import Batches
from training.finite import NonFiniteError
from training.fisher_control import PENALTY_SEED, POOL_SEED, Admitted, Penalised
from training.run import make_trainer
from training.trainer import Trainer

MODELS = {
    "dense": {"feedforward": "dense"},
    "experts": {"feedforward": "moe", "num_experts": 4},
    "memory": {"feedforward": "product_key", "num_keys": 8, "memory_k": 3, "memory_heads": 2, "key_dim": 8},
    "peer": {"feedforward": "peer", "num_keys": 8, "memory_k": 3, "memory_heads": 2, "key_dim": 8},
}


@pytest.fixture
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(small_corpus().train))
    return path


def config(out: Path, text: Path, *, model: str = "dense", train=None, **sparsify) -> RunConfig:
    values = {
        "out": str(out),
        "data": {"corpus": str(text), "length": 16, "tokenizer": "bytes", "held_out": 0.2, "cache": str(text.parent)},
        "model": {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 16, **MODELS[model]},
        "optim": {"warmup": 2, "lr": 0.01},
        "train": {"steps": 12, "batch": 4, "dtype": "float32", "device": "cpu", "eval_every": 12, "save_every": 4,
                  **(train or {})},
        "sparsify": sparsify,
    }  # fmt: skip
    return from_dict(RunConfig, values, where="test")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def penalty_of(trainer: Trainer) -> Penalised:
    (found,) = [one for one in trainer.sparsifiers if isinstance(one, Penalised)]
    return found


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_dense().clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_of_a_step_is_the_batchs_and_lambda_times_the_penaltys(model, tmp_path, text):
    """Of all parameters, tables with gradients of rows too, for a micro-batch drawn apart."""
    with_it = make_trainer(config(tmp_path / "a", text, model=model, fisher_penalty=0.3, train={"accumulation": 2}))
    without = make_trainer(config(tmp_path / "b", text, model=model, train={"accumulation": 2}))
    batch = with_it.batches.next().keyed(seed=0, step=0)
    with_it._forward_backward(batch)
    without._forward_backward(batch)
    found, plain = gradients(with_it), gradients(without)
    other = without.model.eval()
    other.zero_grad()
    ids = Batches(without.data.train, batch=2, length=16, seed=PENALTY_SEED).next().inputs
    with twice_differentiable(other):
        value = fisher_penalty(
            other, ids, weights=list(prunable_weights(other)), generator=torch.Generator().manual_seed(0)
        )
        value.backward()
    added = gradients(without)
    assert any(gradient.any() for gradient in added.values())
    for name, gradient in found.items():
        close(gradient, plain[name] + 0.3 * added.get(name, torch.zeros_like(gradient)))


def test_it_comes_in_every_so_many_steps_and_is_part_of_the_norm(tmp_path, text):
    with_it = make_trainer(config(tmp_path / "a", text, fisher_penalty=5.0, fisher_every=3))
    without = make_trainer(config(tmp_path / "b", text))
    norms = [(with_it.train_step()["grad_norm"], without.train_step()["grad_norm"])]
    assert norms[0][0] > norms[0][1] * 1.01
    assert penalty_of(with_it).batches.state_dict()["consumed"] == 4
    for expected in (4, 4, 8):
        with_it.train_step()
        assert penalty_of(with_it).batches.state_dict()["consumed"] == expected


METHODS = [
    {"method": "rigl", "sparsity": 0.5, "every": 2},
    {"method": "movement", "sparsity": 0.5, "end": 6, "every": 1},
    {"method": "l0"},
    {"method": "top_kast", "sparsity": 0.5, "every": 2},
    {"method": "lottery", "sparsity": 0.5, "rounds": 2},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["method"])
def test_both_go_with_methods_keep_their_zeros_and_resume_exactly(method, tmp_path, text):
    words = {"fisher_penalty": 0.05, "fisher_every": 2, "curriculum": "low_fisher", "curriculum_pool": 6,
             "curriculum_begin": 2, "curriculum_end": 9, **method}  # fmt: skip
    whole = make_trainer(config(tmp_path / "whole", text, model="memory", **words))
    whole.run()
    make_trainer(config(tmp_path / "parts", text, model="memory", train={"stop_at": 4}, **words)).run()
    parts = make_trainer(config(tmp_path / "parts", text, model="memory", **words))
    torch.manual_seed(99)
    parts.resume(tmp_path / "parts" / "checkpoints" / "step-00000004")
    parts.run()
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert one.equal(two)
    masks = whole.sparsifiers[0].masks()
    for name, mask in masks.kept.items():
        assert not whole.model.get_parameter(name)[~mask].any()
    if "sparsity" in method:
        assert Masks.of(whole.model).sparsity == pytest.approx(0.5, abs=0.01)


def test_only_weights_that_are_there_are_penalised(tmp_path, text):
    trainer = make_trainer(config(tmp_path, text, method="static", sparsity=0.8, fisher_penalty=1.0))
    penalty, model = penalty_of(trainer), trainer.model.eval()
    ids = Batches(trainer.data.train, batch=4, length=16, seed=PENALTY_SEED).next().inputs
    masks = trainer.sparsifiers[0].masks()
    with twice_differentiable(model):
        value = fisher_penalty(
            model, ids, weights=penalty.weights, masks=masks, generator=torch.Generator().manual_seed(0)
        )
        value.backward()
    expected = gradients(trainer)
    model.zero_grad()
    penalty.contribute()
    for name, gradient in gradients(trainer).items():
        close(gradient, expected[name])


def test_the_lowest_open_first_in_the_order_of_traces_of_the_model_at_that_step(tmp_path, text):
    words = {"curriculum": "low_fisher", "curriculum_pool": 8, "curriculum_begin": 3, "curriculum_end": 7,
             "curriculum_start": 0.25}  # fmt: skip
    trainer = make_trainer(config(tmp_path, text, **words))
    for _ in range(3):
        trainer.train_step()
    assert isinstance(trainer.batches, Admitted) and trainer.batches._order is None
    pool = Batches(trainer.data.train, batch=8, length=16, seed=POOL_SEED).next()
    rows = torch.cat([pool.inputs, pool.targets[:, -1:]], 1)
    names = list(prunable_weights(trainer.model))
    draw = seeded()
    traces = [fisher_trace(trainer.model, [row[None, :-1]], weights=names, generator=draw).total for row in rows]
    batch = trainer.batches.next()
    lowest = rows[np.argsort(traces, kind="stable")[:2]]
    taken = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    assert {tuple(row) for row in taken.tolist()} <= {tuple(row) for row in lowest.tolist()}
    control = make_trainer(config(tmp_path, text, **(words | {"curriculum": "random", "curriculum_begin": 0})))
    assert isinstance(control.batches, Admitted)
    order = [control.batches.next(), control.batches._order.order][1]
    assert order.sort().values.tolist() == list(range(8)) and order.tolist() != np.argsort(traces).tolist()


def test_nothing_of_it_is_there_unless_asked(tmp_path, text):
    trainer = make_trainer(config(tmp_path, text))
    assert isinstance(trainer.batches, Batches) and trainer.sparsifiers == ()


def test_a_checkpoint_without_a_curriculum_is_refused(tmp_path, text):
    make_trainer(config(tmp_path, text, train={"stop_at": 4})).run()
    with pytest.raises(ValueError, match="trained without a curriculum, this run has sparsify.curriculum"):
        make_trainer(config(tmp_path, text, curriculum="random", curriculum_pool=4)).resume(
            tmp_path / "checkpoints" / "step-00000004"
        )


def test_a_penalty_that_is_not_finite_stops_before_anything_is_updated(tmp_path, text, monkeypatch):
    trainer = make_trainer(config(tmp_path, text, fisher_penalty=1.0))
    before = [p.clone() for p in trainer.model.parameters()]
    monkeypatch.setattr("training.fisher_control.fisher_penalty", lambda *_, **__: torch.tensor(torch.inf))
    with pytest.raises(
        NonFiniteError, match="step 1: the Fisher penalty is inf; nothing was updated: lower sparsify.fi"
    ):
        trainer.train_step()
    for one, two in zip(trainer.model.parameters(), before, strict=True):
        assert one.equal(two)


BAD = [
    ({"fisher_penalty": -0.1}, "fisher_penalty must be at least 0 and finite, got -0.1"),
    ({"fisher_penalty": float("inf")}, "fisher_penalty must be at least 0 and finite, got inf"),
    ({"fisher_penalty": 0.1, "fisher_every": 0}, r"fisher_every must be in \[1, train.steps=12\], got 0"),
    ({"fisher_penalty": 0.1, "fisher_every": 13}, r"fisher_every must be in \[1, train.steps=12\], got 13"),
    ({"curriculum": "random", "curriculum_pool": 0}, "curriculum_pool must be >= 1, got 0"),
    ({"curriculum": "random", "curriculum_start": 0.0}, r"curriculum_start must be in \(0, 1\], got 0.0"),
    ({"curriculum": "random", "curriculum_begin": 12}, "0 <= begin < end <= train.steps=12, got 12 and 12"),
    ({"curriculum": "random", "curriculum_end": 13}, "0 <= begin < end <= train.steps=12, got 0 and 13"),
    ({"curriculum": "highest"}, "sparsify.curriculum in test must be one of none, low_fisher, random, got 'highest'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_words(words, message, tmp_path, text):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, text, **words)


def test_what_does_not_go_together(tmp_path, text):
    with pytest.raises(ValueError, match="train.compile must be false with sparsify.fisher_penalty"):
        config(tmp_path, text, fisher_penalty=0.1, train={"compile": True})
    with pytest.raises(ValueError, match=r"curriculum_pool must be at most \d+, the sequences .* got 100000"):
        make_trainer(config(tmp_path, text, curriculum="random", curriculum_pool=100000))
    made = from_dict(RunConfig, {"sparsify": {"fisher_penalty": 0.01, "curriculum": "low_fisher"}}, where="test")
    assert json.loads(json.dumps(made.sparsify.fisher_penalty)) == 0.01
