"""What share of the FLOPs that sparsity saves becomes time, for each structure: a forward pass against the dense one.

python -m benchmarks.bench_structures [--tokens 1 1024] [--seeds 0 1 2] [--rounds 11] [--threads 2] [--records FILE]

Width 512, 8 heads, SwiGLU of 1408, four layers, vocabulary 256, float32, weights and removals by chance. Zeros run as
CSR, as 2:4 (through CSR: torch has no 2:4 product on CPUs), as blocks of 32 x 32; neurons, heads, layers and width are
cut out; experts replace the feed-forward by eight of an eighth of its size, of which a token uses some. Gate: each
against an oracle of its own (the same zeros dense, the same units switched off, a loop over the experts). For each seed
the model and what is removed are drawn anew, and all contenders run in turns. The share is (1 − t / t_dense) over
(1 − FLOPs / FLOPs_dense): 1 where time falls as FLOPs do, 0 where nothing is gained, below 0 where time is lost.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved, paired_ratio, require_parity, row
from moe import Routing
from pruning import (
    PruneReport,
    SparseLinear,
    n_of_m,
    prunable_weights,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_width,
    random_importance,
    select_masks,
)
from pruning.allocation import uniform
from pruning.axes import Axis
from pruning.gates import masked
from pruning.structure import Structure, block, unstructured
from training.allocator import keep_freed_memory
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig
from transformer.norm import RMSNorm

DIM, HEADS, HIDDEN, LAYERS, VOCABULARY, LENGTH, EXPERTS = 512, 8, 1408, 4, 256, 256, 8
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Contender:
    """A model with something gone. structure, level: as asked; flops: of a token, forward; parity: the gate's words."""

    structure: str
    level: str
    model: Transformer
    flops: float
    parity: str

    @property
    def name(self) -> str:
        """Structure and level."""
        return f"{self.structure} {self.level}"


def dense_model(length: int, feedforward: DenseConfig | MoEConfig | None = None) -> Transformer:
    """The model that everything is compared with, or one with experts."""
    config = TransformerConfig.uniform(
        vocab_size=VOCABULARY, dim=DIM, num_layers=LAYERS, num_heads=HEADS, max_length=length,
        feedforward=feedforward or DenseConfig(HIDDEN),
    )  # fmt: skip
    return Transformer(config).eval().requires_grad_(False)


def contenders(dense: Transformer, ids: Tensor, seed: int) -> list[Contender]:
    """Every structure at every level."""
    draw = torch.Generator().manual_seed(seed)
    found = [zeros(dense, ids, "CSR", sparsity, draw) for sparsity in (0.5, 0.75, 0.9, 0.95)]
    found.append(zeros(dense, ids, "2:4", 0.5, draw))
    found += [zeros(dense, ids, "blocks", sparsity, draw) for sparsity in (0.5, 0.75, 0.9)]
    for kind in ("neurons", "heads", "layers", "width"):
        found += [removed(dense, ids, kind, fraction, draw) for fraction in (0.25, 0.5, 0.75)]
    return found + [experts(ids, used) for used in (1, 2, 4)]


def zeros(dense: Transformer, ids: Tensor, structure: str, sparsity: float, draw: torch.Generator) -> Contender:
    """Zeros in every matrix but the head, executed in their sparse form; the gate is the same zeros run dense."""
    kinds: dict[str, tuple[Structure, str]] = {
        "CSR": (unstructured, "csr"),
        "2:4": (n_of_m(2, 4), "csr"),
        "blocks": (block(32, 32), "block 32x32"),
    }
    chosen, execution = kinds[structure]
    oracle = copy.deepcopy(dense)
    noise = {name: torch.rand(weight.shape, generator=draw) for name, weight in prunable_weights(oracle).items()}
    masks = select_masks(noise, sparsity=sparsity, allocation=uniform, structure=chosen)
    masks.apply(oracle)
    sparse = copy.deepcopy(oracle)
    for name in masks.kept:
        place = name.removesuffix(".weight")
        sparse.set_submodule(place, SparseLinear(sparse.get_parameter(name), None, execution=execution))
    flops = dense.flops_per_token(ids.shape[1]) - 2 * masks.zeros
    return Contender(structure, f"{sparsity:.0%}", sparse, flops, gate(sparse, oracle, ids))


def removed(dense: Transformer, ids: Tensor, kind: str, fraction: float, draw: torch.Generator) -> Contender:
    """Units cut out, as many in every layer; the gate is the dense model with the same units switched off."""
    small, oracle = copy.deepcopy(dense), copy.deepcopy(dense)
    axes = [axis for axis in small.prunable_axes() if axis.kind == kind.removesuffix("s")]
    scores = random_importance(axes, generator=draw)
    prune: dict[str, Callable[[], PruneReport]] = {
        "neurons": lambda: prune_neurons(small, scores, fraction=fraction, layerwise=True),
        "heads": lambda: prune_heads(small, scores, fraction=fraction, layerwise=True),
        "layers": lambda: prune_layers(small, scores, fraction=fraction),
        "width": lambda: prune_width(small, scores, fraction=fraction),
    }
    report = prune[kind]()
    if kind in ("neurons", "heads"):
        with masked(oracle, axes, report.kept):
            parity = gate(small, oracle, ids)
    else:
        switch_off(oracle, axes[0], report)
        parity = gate(small, oracle, ids)
    return Contender(kind, f"{fraction:.0%}", small, small.flops_per_token(ids.shape[1]), parity)


def switch_off(model: Transformer, axis: Axis, report: PruneReport) -> None:
    """Layers: they write nothing. Width: channels are written as 0, and norms take their mean over those that stay."""
    gone = list(report.removed[axis.name])
    if axis.kind == "layer":
        for index in gone:
            model.layers[index].attention.output.weight.zero_()
            model.layers[index].feedforward.down.weight.zero_()
        return
    model.embedding.weight[:, gone] = 0
    for layer in model.layers:
        layer.attention.output.weight[gone] = 0
        layer.feedforward.down.weight[gone] = 0
    share = len(report.kept[axis.name]) / axis.size
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.mul_(share**0.5)
            module.eps *= share


def experts(ids: Tensor, used: int) -> Contender:
    """Eight experts of an eighth of the neurons, of which a token uses ``used``; the gate is a loop over them."""
    config = MoEConfig(HIDDEN // EXPERTS, EXPERTS, k=used)
    model = dense_model(ids.shape[1], config)
    oracle = copy.deepcopy(model)
    for layer in oracle.layers:
        layer.feedforward.experts.forward = looped(layer.feedforward.experts)
    return Contender("experts", f"{used} of {EXPERTS}", model, model.flops_per_token(ids.shape[1]),
                     gate(model, oracle, ids))  # fmt: skip


def looped(module: Any) -> Callable[..., Tensor]:
    """One expert after another over the tokens that chose it."""

    def forward(x: Tensor, routing: Routing) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(EXPERTS):
            taken = routing.expert == expert
            tokens = routing.token[taken]
            rows = module.forward_one(expert, x[tokens]) * routing.weight[taken, None]
            y = y.index_add(0, tokens, rows)
        return y

    return forward


def gate(model: Transformer, oracle: Transformer, ids: Tensor) -> str:
    """The logits of both. Raises: ValueError where they differ."""
    error = require_parity({"logits": model(ids).logits}, {"logits": oracle(ids).logits}, tolerance=TOLERANCE)
    return f"pass {error:.0e}"


def compare(tokens: int, seed: int, rounds: int, memory: str, records: Path) -> None:
    """Draw, gate, time all in turns, write a row each."""
    torch.manual_seed(seed)
    length = min(tokens, LENGTH)
    ids = torch.randint(VOCABULARY, (tokens // length, length))
    dense = dense_model(length)
    held = contenders(dense, ids, seed)
    runs = {"dense": lambda: dense(ids)} | {c.name: (lambda model=c.model: model(ids)) for c in held}
    seconds = interleaved(runs, rounds=rounds)
    shape = {"D": DIM, "layers": LAYERS, "hidden": HIDDEN, "B": len(ids), "L": length, "dtype": "float32",
             "memory": memory, "seed": seed}  # fmt: skip
    whole = dense.flops_per_token(length)
    row("dense", {**shape, "flops": whole}, seconds["dense"], versus={}, parity="reference", path=records)
    for c in held:
        saved = 1 - c.flops / whole
        share = (1 - paired_ratio(seconds[c.name], seconds["dense"])) / saved
        conditions = {"structure": c.structure, "level": c.level, **shape, "flops": c.flops,
                      "flops_saved": round(saved, 4), "share_in_time": round(share, 4)}  # fmt: skip
        row("structure", conditions, seconds[c.name], versus={"dense": seconds["dense"]}, parity=c.parity, path=records)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 1024])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--records", type=Path, default=Path("runs/real-time.jsonl"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    memory = "kept" if keep_freed_memory() else "fresh"
    with torch.no_grad():
        for tokens in arguments.tokens:
            for seed in arguments.seeds:
                compare(tokens, seed, arguments.rounds, memory, arguments.records)


if __name__ == "__main__":
    main()
