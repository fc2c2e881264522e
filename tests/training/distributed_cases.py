"""Runs of a small model that one process and many must train alike, by name."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pruning import Sparsifier, global_ranking
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    DeepR,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    StaticSparsity,
    TopKAST,
)
from pruning.sharding import as_wholes, gathered, spread_layouts
from tests.training.models import small_data
from training.config import OptimConfig, TrainConfig
from training.optim import local
from training.parallel import Alone, Parallel
from training.trainer import Trainer
from transformer import (
    AttentionConfig,
    DenseConfig,
    DepthConfig,
    LayerConfig,
    MoEConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
)
from transformer.feedforward_config import ROUTERS

STEPS = 5
PLAIN = LayerConfig(AttentionConfig(2, 2, 8), None)
# every kind of dropout that all processes must draw alike
DROPPING = LayerConfig(
    AttentionConfig(2, 2, 8, head_dropout=0.2, drop_connect=0.1, dropout=0.1), None, path_dropout=0.2, layer_drop=0.3
)
# groups of two query heads that 2 and 3 ranks can share out, with what is whole on each of them and split beside them;
# each rank has the patterns and ALiBi's slopes of its own heads
WINDOWS = f"causal() & per_head({', '.join(f'sliding_window({width})' for width in range(1, 13))})"
HEADS = LayerConfig(
    AttentionConfig(12, 6, 4, WINDOWS, qk_norm="head", bias=True, alibi=True, softcap=2.0),
    None,
    path_dropout=0.2,
    layer_drop=0.2,
)
# half of the tokens pass
PASSED = LayerConfig(AttentionConfig(2, 2, 8), None, depth=DepthConfig(0.5))
GLOBAL = {"aux_scope": "global", "aux": 0.1}


class Run(NamedTuple):
    """feedforward, layer: of the model; dropout: of its branches; train: settings of [train]."""

    feedforward: DenseConfig | ThresholdedConfig | MoEConfig
    train: dict[str, Any] = {}
    layer: LayerConfig = PLAIN
    dropout: float = 0.0


RUNS: dict[str, Run] = {
    "dense": Run(DenseConfig(hidden=24)),
    # predictors that no gradient reaches
    "told": Run(ThresholdedConfig(hidden=24, activation="reglu", predictor_rank=4)),
    "moe": Run(MoEConfig(hidden=8, num_experts=12, k=2, shared_hidden=8, expert_bias=True), GLOBAL),
    "sigmoid": Run(MoEConfig(hidden=8, num_experts=4, k=2, router="sigmoid"), {"aux": 0.0, "accumulation": 2}),
    # noise: in routers, and of every dropout; recomputed; in micro-batches
    "noisy": Run(MoEConfig(hidden=8, num_experts=12, k=2, router="noisy_top_k"), GLOBAL, DROPPING, 0.1),
    "jitter": Run(
        MoEConfig(hidden=8, num_experts=4, k=1, router="switch", jitter=0.3), GLOBAL | {"checkpointing": True}
    ),
    "second": Run(
        MoEConfig(hidden=8, num_experts=4, k=2, router="top_2"),
        {"aux": 0.0, "accumulation": 2, "checkpointing": True}, DROPPING, 0.1,
    ),
    "heads": Run(MoEConfig(hidden=8, num_experts=4, k=2), GLOBAL, HEADS, 0.1),
    "depths": Run(MoEConfig(hidden=8, num_experts=4, k=2), GLOBAL, PASSED, 0.1),
    # epochs of 549 sequences end inside the third batch and the fifth
    "epochs": Run(MoEConfig(hidden=8, num_experts=4, k=2), GLOBAL | {"batch": 240}),
}  # fmt: skip
# one run for each router; ranks route their own tokens, as one process does its micro-batches; "exact": in float64, but
# for BASE, which shares out equal scores among equal tokens by rounding: one process does when scaled by 1 + 1e-15
ROUTED = {f"{kind}-{name}": name for kind in ("router", "exact") for name in ROUTERS if kind + name != "exactbase"}
ROUTED_WIDE = [run for run in ROUTED if run.startswith("exact")]
RUNS |= {
    run: Run(
        MoEConfig(
            hidden=8, num_experts=12 if run in ROUTED_WIDE else 4, k=1 if name in ("switch", "base") else 2,
            router=name, shared_hidden=4, capacity_factor=1.0 if name in ("switch", "top_2") else None,
            allow_future=name == "expert_choice",
        ),
        {"aux": 0.05} | ({"dtype": "float64"} if run in ROUTED_WIDE else {}),
    )
    for run, name in ROUTED.items()
}  # fmt: skip


class Layout(NamedTuple):
    """A run, by how many ranks its experts and heads are shared out, and what becomes of the rest."""

    run: str
    experts: int = 1
    shard: str = "none"
    heads: int = 1

    def __str__(self) -> str:
        return "-".join(map(str, self))


# runs in a world of so many ranks
LAYOUTS = {
    1: [Layout("moe"), Layout("noisy"), *(Layout(run) for run in ROUTED_WIDE)],
    2: [
        Layout("dense"),
        Layout("dense", shard="fsdp"),
        Layout("told"),
        Layout("told", shard="fsdp"),
        Layout("moe", shard="fsdp"),
        Layout("moe", 2),
        Layout("moe", 2, "fsdp"),
        Layout("sigmoid", 2),
        Layout("noisy", 2),
        Layout("noisy", shard="fsdp"),
        Layout("jitter", 2),
        Layout("sigmoid", shard="fsdp"),
        Layout("second"),
        Layout("second", shard="fsdp"),
        Layout("epochs", 2),
        Layout("heads", heads=2),
        Layout("heads", shard="fsdp", heads=2),
        Layout("depths"),
        Layout("depths", 2, "fsdp"),
        Layout("depths", heads=2),
        *(Layout(run, 2) for run in ROUTED if run not in ROUTED_WIDE),
        *(Layout(run, shard="fsdp") for run in ROUTED_WIDE),
        Layout("router-switch", shard="fsdp"),
        Layout("router-expert_choice", 2, "fsdp"),
    ],
    3: [
        Layout("dense", shard="fsdp"),
        Layout("epochs", shard="fsdp"),
        Layout("moe", 3),
        Layout("noisy", 3),
        Layout("heads", heads=3),
        *(Layout(run, 3, shard) for run, shard in zip(ROUTED_WIDE, itertools.cycle(("none", "fsdp")), strict=False)),
    ],
    4: [
        Layout("moe", 2, "fsdp"),
        Layout("moe", 4),
        Layout("sigmoid", 2),
        Layout("noisy", 2, "fsdp"),
        Layout("second", 2),
        Layout("heads", 2, heads=2),
        Layout("heads", shard="fsdp", heads=2),
        *(Layout(run, 2, "fsdp") for run in ROUTED_WIDE[::2]),
        *(Layout(run, 4) for run in ROUTED_WIDE[1::2]),
    ],
}

# what is saved by 4 ranks, at which step, and where it goes on
SAVED, SAVED_STEP = [Layout("moe", 2), Layout("moe", 2, "fsdp"), Layout("heads", 2, heads=2)], 3
# methods of compression that keep what they do not send
UNSENT = ("topk", "threshold", "dropping", "adacomp", "dgc")
RESUMED = {
    2: [Layout("", 1, "fsdp"), Layout("", 2), Layout("", heads=2)],
    3: [Layout("", 3, "fsdp"), Layout(""), Layout("", heads=3)],
}


def resumed(layout: Layout, world: int) -> list[Layout]:
    """The layouts of RESUMED in which the run can go on."""
    fitting = [other for other in RESUMED[world] if layout.run == "heads" or other.heads == 1]
    return [layout._replace(experts=o.experts, shard=o.shard, heads=o.heads)
            for o in fitting if RUNS[layout.run].feedforward.num_experts % o.experts == 0]  # fmt: skip


def make_model(name: str) -> Transformer:
    """The seeded model of a run."""
    torch.manual_seed(0)
    run = RUNS[name]
    layer = dataclasses.replace(run.layer, feedforward=run.feedforward)
    model = Transformer(TransformerConfig(257, 16, (layer, layer), max_length=16, dropout=run.dropout))
    return model.double() if run.train.get("dtype") == "float64" else model


def make_trainer(
    name: str, out: Path, *, parallel: Parallel | None = None, sparsifiers: Any = None,
    optim: Mapping[str, Any] | None = None, **settings: Any,
) -> Trainer:  # fmt: skip
    """A trainer of STEPS steps of 24 sequences; sparsifiers: a function of the placed model; optim:
    settings of [optim]."""
    model = make_model(name)
    parallel = parallel or Alone()
    parallel.place(model)
    torch.manual_seed(parallel.rank)  # no process may draw what all need alike from its own generator
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "batch": 24,
        "dtype": "float32",
        "eval_every": 100,
        "save_every": 100,
        "device": "cpu",
    }
    # eps: AdamW would make whole steps of the rounding in gradients of 1e-8
    rates: dict[str, Any] = {"lr": 0.01, "warmup": 2, "eps": 1e-5}
    return Trainer(
        model, small_data(), out=out, length=16, optim=OptimConfig(**(rates | dict(optim or {}))),
        train=TrainConfig(**(defaults | RUNS[name].train | settings)), parallel=parallel,
        sparsifiers=[] if sparsifiers is None else sparsifiers(model),
    )  # fmt: skip


def keep_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Will hold every gradient of the next step, whole, before it is clipped. All processes call it."""
    found: dict[str, Tensor] = {}
    clip, model = trainer.parallel.clip, trainer.model

    def keeping(parameters: Any, norm: Tensor, *, limit: float) -> None:
        if not found:
            own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
            whole = gathered(as_wholes(own, spread_layouts(model)))
            found.update({name: gradient.detach().clone() for name, gradient in whole.items()})
        clip(parameters, norm, limit=limit)

    trainer.parallel.clip = keeping  # type: ignore[method-assign]
    return found


def magnitude_pruner(model: Transformer) -> list[Sparsifier]:
    """Half of all weights at step 0, in one ranking with many ties; seven tenths from step 4 on."""
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(100).round_().div_(100)
    return [Sparsifier(model, schedule=lambda step: 0.5 if step < 4 else 0.7, allocation=global_ranking)]


# connections that move every second step
MOVING = {"sparsity": 0.5, "every": 2, "stop": 5}
PRUNERS: dict[str, Any] = {
    "magnitude": magnitude_pruner,
    "static": lambda model: [StaticSparsity(model, sparsity=0.5)],
    "set": lambda model: [SET(model, **MOVING)],
    "rigl": lambda model: [RigL(model, **MOVING)],
    "snfs": lambda model: [SNFS(model, **MOVING)],
    "dsr": lambda model: [DSR(model, threshold=0.005, **MOVING)],
    "deep_r": lambda model: [DeepR(model, sparsity=0.5, temperature=1e-3)],
    "preferential": lambda model: [PreferentialAttachment(model, **MOVING)],
    "robust_rewiring": lambda model: [RobustRewiring(model, sparsity=0.5, noise=1e-2)],
    "top_kast": lambda model: [TopKAST(model, sparsity=0.5, every=2)],
}
# methods and layouts of two ranks
PRUNED = [
    ("magnitude", Layout("dense")),
    ("magnitude", Layout("dense", shard="fsdp")),
    *((method, Layout("moe", 2)) for method in PRUNERS),
    ("magnitude", Layout("moe", 2, "fsdp")),
    ("rigl", Layout("moe", 2, "fsdp")),
    ("deep_r", Layout("dense", shard="fsdp")),
    ("robust_rewiring", Layout("heads", heads=2)),
    ("snfs", Layout("heads", shard="fsdp", heads=2)),
    ("top_kast", Layout("heads", heads=2)),
]

# RigL with moments of the weights that are there: where two ranks train it → where it goes on besides, if anywhere
COMPACT: dict[Layout, Layout | None] = {
    Layout("moe"): Layout("moe", 2, "fsdp"),
    Layout("moe", shard="fsdp"): Layout("moe"),
    Layout("moe", 2, "fsdp"): Layout("moe", 2),
    Layout("heads", shard="fsdp", heads=2): None,
}
COMPACT_FROM_ONE = [Layout("moe", 2, "fsdp"), Layout("heads", shard="fsdp", heads=2)]
COMPACT_OPTIONS: dict[str, Any] = {"sparsifiers": PRUNERS["rigl"], "optim": {"sparse_state": True}}


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics less what the clock says."""
    return {key: value for key, value in line.items() if key not in {"time", "tokens_per_s"}}


def sampled(trainer: Trainer) -> str | None:
    """A sample of a model that can be sampled from."""
    return None if trainer.model.config.sees_future else trainer.sample()
