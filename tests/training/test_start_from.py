"""A run that starts from a trained model: what [model] changes of it, and what it refuses to throw away."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import close
from training.config import RunConfig, from_dict
from training.data import Batch
from training.model_config import LayerOverride, ModelConfig, model_config
from training.optim import make_optimizers
from training.run import make_model, make_trainer, read_record, train
from training.start_from import StartReport
from training.step import accumulate
from training.warm_up import freeze_for_warm_up
from transformer import (
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SinkhornConfig,
    TopKKeysConfig,
    Transformer,
)

SIZES: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "feedforward": "dense", "hidden": 24}
WINDOW = "causal() & (sliding_window(4) | sinks(2))"


def saved(folder: Path, **words: Any) -> Path:
    """A model of [model], saved."""
    config = model_config(ModelConfig(**SIZES | words), vocab_size=257, length=32)
    return Transformer(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "trained")


def started(folder: Path, **words: Any) -> tuple[Transformer, StartReport]:
    """The saved model after a [model] section, and what is told of it."""
    told: list[StartReport] = []
    made = make_model(RunConfig(init=folder, model=ModelConfig(**words), data=DATA), vocab_size=257, report=told.append)
    return made, told[0]


DATA = from_dict(RunConfig, {"data": {"length": 32, "tokenizer": "bytes"}}, where="here").data


def ids() -> torch.Tensor:
    return torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("words", "selection"),
    [
        ({"selection": "moba", "select_block": 4, "select_k": 2}, MoBAConfig(4, 2)),
        ({"selection": "top_k", "select_k": 3, "pattern": WINDOW}, TopKKeysConfig(3)),
        ({"selection": "nsa", "select_stride": 2, "select_block": 4}, NSAConfig(4, 2, 4, 8, 1, 2, 128)),
        ({"selection": "dsa", "select_k": 3, "select_warm_up": True}, DSAConfig(3, warm_up=True)),
        ({"selection": "lsh", "select_block": 4}, LSHConfig(8, 2, 4)),
        ({"selection": "kmeans", "select_block": 4}, KMeansConfig(8, 4)),
        ({"selection": "sinkhorn", "select_block": 4}, SinkhornConfig(4, 8)),
        ({"pattern": WINDOW}, None),
    ],
)
def test_trained_weights_attend_as_the_words_say(tmp_path: Path, words: dict[str, Any], selection: object) -> None:
    trained = Transformer.from_pretrained(saved(tmp_path))
    model, report = started(tmp_path / "trained", **SIZES, **words)
    for layer in model.config.layers:
        assert layer.attention.selection == selection
        assert layer.attention.pattern == words.get("pattern", "causal()")
    kept, found = trained.state_dict(), model.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in kept.items())
    assert set(report.fresh) == found.keys() - kept.keys() and report.left_out == ()
    assert bool(report.fresh) == (words.get("selection") in ("nsa", "dsa", "lsh", "kmeans", "sinkhorn"))
    again = started(tmp_path / "trained", **SIZES, **words)[0].state_dict()
    assert all(again[name].equal(tensor) for name, tensor in found.items()), "new weights are drawn from the seed alone"
    logits = model(ids()).logits
    assert logits.isfinite().all()
    if not words.get("select_warm_up"):
        assert (logits - trained(ids()).logits).abs().max() > 1e-4
    text = report.lines()
    assert str(tmp_path) in text and ("new weights in layers 0, 1: attention.selection." in text) == bool(report.fresh)


def test_words_at_their_default_leave_what_the_model_has(tmp_path: Path) -> None:
    saved(tmp_path, selection="dsa", select_k=3, select_dim=8, pattern=WINDOW)
    trained = Transformer.from_pretrained(tmp_path / "trained")
    model, report = started(tmp_path / "trained")
    assert model.config == trained.config and not report.fresh
    close(model(ids()).logits, trained(ids()).logits)
    changed, report = started(tmp_path / "trained", select_k=5)
    assert changed.config.layers[0].attention.selection == DSAConfig(5, head_dim=8) and not report.fresh
    assert changed.config.layers[0].attention.pattern == WINDOW
    wider, report = started(tmp_path / "trained", select_dim=12)
    assert wider.config.layers[0].attention.selection == DSAConfig(3, head_dim=12)
    assert "layers.1.attention.selection.query.weight" in report.fresh
    blocks, report = started(tmp_path / "trained", selection="moba")
    assert blocks.config.layers[0].attention.pattern == "causal()", "the only one that it takes"
    assert "layers.0.attention.selection.query.weight" in report.left_out and "left out of layers" in report.lines()


def test_a_warm_up_ends_where_the_word_is_not_said(tmp_path: Path) -> None:
    saved(tmp_path, selection="dsa", select_k=3, select_warm_up=True)
    for words, warm in (({}, False), ({"select_warm_up": True}, True), ({"selection": "dsa"}, False)):
        model, report = started(tmp_path / "trained", **words)
        assert [layer.attention.selection for layer in model.config.layers] == [DSAConfig(3, warm_up=warm)] * 2
        assert not report.fresh and model.layers[0].attention.selection.warm_up == warm


def test_layers_have_words_of_their_own_and_another_seed_draws_anew(tmp_path: Path) -> None:
    saved(tmp_path, selection="lsh", select_seed=3)
    tables = (LayerOverride(0, selection="none", pattern=WINDOW), LayerOverride(1, heads=2))
    model, report = started(tmp_path / "trained", layer=tables)
    first, second = (layer.attention for layer in model.config.layers)
    assert (first.selection, first.pattern) == (None, WINDOW)
    assert second.selection == LSHConfig(8, 2, 64, 3) and not report.fresh
    assert report.left_out == ("layers.0.attention.selection.rotations",)
    _, report = started(tmp_path / "trained", select_seed=4)
    assert report.fresh == tuple(f"layers.{index}.attention.selection.rotations" for index in (0, 1))
    _, report = started(tmp_path / "trained", select_shared_qk=True)
    assert report.left_out == tuple(f"layers.{index}.attention.query.weight" for index in (0, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dim": 32, "alibi": True}, "got dim=32 where it has 16; alibi=True where it has False: .*m 256 --model.no-a"),
        ({"alibi": True}, "got alibi=True where it has False: .* --model.no-alibi"),
        ({"softcap": 3.0}, "got softcap=3.0 where it has 0.0"),
        ({"attention_dropout": 0.1}, "got attention_dropout=0.1 where it has 0.0"),
        ({"drop_connect": 0.1}, "got drop_connect=0.1 where it has 0.0"),
        ({"attention_threshold": 0.1}, "got attention_threshold=0.1 where it has 0.0"),
        ({"path_dropout": 0.1}, "got path_dropout=0.05 and 0.1 where it has 0.0"),
        ({"layer_drop_rescale": True}, "got layer_drop_rescale=True where it has no place for it"),
        ({"depth_capacity": 0.5}, "got depth_capacity=0.5 where it has None"),
        ({"feedforward": "peer"}, "got feedforward=peer where it has dense"),
        ({"activation": "gelu"}, "got activation=gelu where it has swiglu"),
        ({"router": "switch"}, "got router=switch where it has no place for it"),
        ({"memory_k": 3}, "got memory_k=3 where it has no place for it"),
        ({"rope_theta": 5.0}, "got rope_theta=5.0 where it has 10000.0"),
        ({"tied": False}, "got tied=False where it has True: .* --model.tied"),
        ({"max_length": 64}, "got max_length=64 where it has 32"),
        ({"layer": (LayerOverride(2, pattern=WINDOW),)}, r"model.layer.at must be in \[0, layers=2\) of .*, got 2"),
        ({"layer": (LayerOverride(1), LayerOverride(1))}, "model.layer.at must name each layer once, got 1 twice"),
        ({"select_k": 3}, "model.select_k belongs to selection moba or top_k or nsa or dsa, got select_k=3 with none"),
        ({"select_warm_up": True}, "model.select_warm_up belongs to selection dsa, got select_warm_up=True with none"),
        ({"selection": "moba", "pattern": WINDOW}, "layer 0: MoBAConfig chooses among all earlier keys"),
        ({"selection": "moba", "select_k": 0}, "layer 0: select_k must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_is_refused_by_name(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        started(tmp_path / "trained", **words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"hidden": 25}, "hidden=25 where it has 24"),
        ({"layers": 3, "heads": 8}, "layers=3 where it has 2; heads=8 where it has 2"),
        ({"kv_heads": 1}, "kv_heads=1 where it has 2"),
        ({"layer": (LayerOverride(1, hidden=8),)}, "hidden=8 where it has 24"),
        ({}, ""),
    ],
)
def test_the_sizes_of_the_trained_model_hold_as_pruning_left_them(
    tmp_path: Path, words: dict[str, Any], told: str
) -> None:
    saved(tmp_path)
    model, report = started(tmp_path / "trained", **words)
    assert model.config == Transformer.from_pretrained(tmp_path / "trained").config
    assert report.sizes == told == report.to_dict()["other_sizes"]
    assert ("its own sizes hold" in report.lines()) == bool(told) and told in report.lines()


def test_words_that_the_model_has_are_no_contradiction(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "moe": {"router": "sigmoid", "num_experts": 4, "num_groups": 2, "shared_hidden": 8, "k": 1},
        "peer": {"num_keys": 8, "memory_heads": 2, "memory_k": 3, "key_dim": 8, "activation": "relu2", "k": 1},
        "product_key": {"num_keys": 8, "memory_k": 3, "gated": True, "value_dim": 8, "memory_pool": "a"},
        "thresholded": {"top_neurons": 5, "attention_threshold": 0.1, "depth_capacity": 0.5, "depth_weighting": "raw"},
        "dense": {"path_dropout": 0.3, "layer_drop": 0.2, "layer_drop_rescale": True, "drop_connect": 0.1, "error_k": 3,
                  "softcap": 2.0, "alibi": True, "attention_dropout": 0.1, "head_dropout": 0.1, "kv_heads": 1,
                  "head_dim": 6, "dropout": 0.1, "tied": False, "norm_eps": 1e-5, "num_experts": 4},
    }  # fmt: skip
    for kind, words in kinds.items():
        words = SIZES | {"feedforward": kind, **words}
        saved(tmp_path / kind, **words)
        model, _ = started(tmp_path / kind / "trained", **words)
        assert model.config == model_config(ModelConfig(**words), vocab_size=257, length=32), kind


def corpus(folder: Path) -> dict[str, Any]:
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(f"the number is {number} and the next is {number + 1}\n" * 12)
    data = {"corpus": str(folder / "texts"), "tokenizer": "bytes", "length": 16, "held_out": 0.2, "cache": None}
    steps = {"steps": 4, "batch": 4, "dtype": "float32", "eval_every": 4, "save_every": 2, "device": "cpu"}
    return {"data": data, "train": steps, "optim": {"warmup": 1}}


def test_from_dense_through_the_warm_up_to_sparse(tmp_path: Path) -> None:
    base = corpus(tmp_path)

    def run(name: str, init: str | None = None, *, resume: bool = False, **words: Any) -> dict[str, torch.Tensor]:
        record = base | {"model": SIZES | words, "out": str(tmp_path / name)}
        record |= {} if init is None else {"init": str(tmp_path / init)}
        outcome = train(from_dict(RunConfig, record, where="here"), resume=resume)
        return Transformer.from_pretrained(outcome.checkpoint).state_dict()

    dense = run("dense")
    warm = run("warm", "dense", selection="dsa", select_k=4, select_dim=8, select_warm_up=True)
    assert all(warm[name].equal(tensor) for name, tensor in dense.items()), "all but the indexers are frozen"
    with pytest.raises(ValueError, match=r"warm_up is True there and False in this run: .*with --init .*warm"):
        run("warm", "dense", resume=True, selection="dsa", select_k=4, select_dim=8)
    told = json.loads((tmp_path / "warm" / "run.json").read_text())
    assert told["start"]["folder"].endswith("step-00000004") and len(told["start"]["new_weights"]) == len(warm) - len(
        dense
    )
    assert told["start"]["attention"][1]["selection"]["warm_up"] is True
    assert told["model"] == SIZES | {"selection": "dsa", "select_k": 4, "select_dim": 8, "select_warm_up": True}
    assert from_dict(RunConfig, read_record(tmp_path / "warm" / "run.json"), where="x").model.select_warm_up
    sparse = run("sparse", "warm")
    assert not any(sparse[name].equal(tensor) for name, tensor in warm.items())
    told = json.loads((tmp_path / "sparse" / "run.json").read_text())["start"]
    assert told["attention"][0]["selection"] == {"kind": "dsa", "top_k": 4, "heads": 4, "head_dim": 8, "warm_up": False,
                                                 "rope_dim": 0, "rope_theta": 10000.0}  # fmt: skip
    assert told["new_weights"] == []


def test_in_the_warm_up_nothing_but_indexers_has_a_gradient_or_a_state(tmp_path: Path) -> None:
    words = SIZES | {"selection": "dsa", "select_warm_up": True, "feedforward": "moe", "router": "sigmoid"}
    record = corpus(tmp_path) | {"model": words, "out": str(tmp_path / "out")}
    trainer = make_trainer(from_dict(RunConfig, record, where="here"))
    trainer.model.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not tensor.equal(before[name])}
    indexers = {name for name, _ in trainer.model.named_parameters() if ".selection." in name}
    assert moved == indexers, "a router's balancing bias stays too"
    named = dict(trainer.model.named_parameters())
    assert {name for name, p in named.items() if trainer.optimizers.main.state.get(p)} == indexers
    with pytest.raises(ValueError, match=r"\[sparsify\] must be left out with model.select_warm_up"):
        from_dict(RunConfig, record | {"sparsify": {"sparsity": 0.5}}, where="here")


def test_without_a_warm_up_nothing_is_frozen_and_a_skipped_layer_has_no_gradient(tmp_path: Path) -> None:
    plain = Transformer(model_config(ModelConfig(**SIZES), vocab_size=257, length=32))
    freeze_for_warm_up(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    words = SIZES | {"selection": "dsa", "select_warm_up": True, "layer_drop": 0.999}
    model = Transformer(model_config(ModelConfig(**words), vocab_size=257, length=32)).train()
    freeze_for_warm_up(model)
    torch.manual_seed(0)
    output = accumulate(model, Batch(ids()[:, :-1], ids()[:, 1:]))
    assert output.loss.isfinite() and all(parameter.grad is None for parameter in model.parameters())
    assert len(make_optimizers(model, lr=0.1).main.param_groups) == 2


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    saved(tmp_path, feedforward="thresholded", activation="reglu", activation_predictor_rank=2)
    model, report = started(tmp_path / "trained", feedforward="thresholded", activation="reglu", pattern=WINDOW)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".predictor." in name for name in frozen)
    assert model.config.layers[0].attention.pattern == WINDOW and not report.fresh
