"""Where the time of a training step goes: at width 512, at least 85% should be matrix products and attention.

python benchmarks/bench_train_step.py [--dtype float32|bfloat16] [--tokens 8192] [--steps 5]

The step is the trainer's own (batch, forward, backward, clipping, optimiser, metrics), under torch.profiler; a row is
the share of an operator kind in the step's CPU time. Freed memory is kept in the heap, as in training.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import interleaved, row
from training.allocator import keep_freed_memory
from training.config import OptimConfig, TrainConfig
from training.data import Data
from training.precision import DTypeName
from training.tokenizer import byte_tokenizer
from training.trainer import Trainer
from transformer import MoEConfig, Transformer, TransformerConfig

GOAL = 0.85
LENGTH = 512
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "mkldnn_linear", "linear"),
    "attention": ("scaled_dot_product", "_flash_attention", "_folded", "attention"),
    "optimiser": ("_fused_adamw_",),
    "gather and scatter": ("index", "embedding", "gather", "scatter", "sort", "topk", "searchsorted", "cumsum"),
    "norms and reductions": ("norm", "mean", "sum", "logsumexp", "softmax", "max", "min", "var"),
    "copies and casts": ("copy_", "to", "cat", "clone", "contiguous", "fill_", "zero_", "empty", "zeros"),
    "elementwise": (
        "mul",
        "add",
        "sub",
        "div",
        "silu",
        "gelu",
        "exp",
        "neg",
        "rsqrt",
        "pow",
        "sigmoid",
        "where",
        "lerp",
    ),
}


def kind_of(operator: str) -> str:
    """The row that an operator such as ``aten::mm`` belongs to: exact names first, then names that contain a key."""
    name = operator.removeprefix("aten::").removesuffix("_out")
    for kind, keys in KINDS.items():
        if name in keys or name.rstrip("_") in keys:
            return kind
    for kind, keys in KINDS.items():
        if any(len(key) > 3 and key.strip("_") in name for key in keys):
            return kind
    return "elsewhere"


def make_trainer(out: Path, *, dtype: DTypeName, tokens: int, experts: int) -> Trainer:
    """Width 512, 4 layers, 8 heads, 8 experts of 1024 neurons, 2 a token, vocabulary 8192, random tokens."""
    torch.manual_seed(0)
    config = TransformerConfig.uniform(
        vocab_size=8192,
        dim=512,
        num_layers=4,
        num_heads=8,
        feedforward=MoEConfig(hidden=1024, num_experts=experts, k=2),
        max_length=LENGTH,
    )
    ids = torch.randint(8192, (LENGTH * 64 + 1,)).numpy().astype("uint16")
    data = Data(byte_tokenizer(), train=ids, held_out=ids[:2], train_bytes=0, held_out_bytes=0, fingerprint="random")
    train = TrainConfig(steps=10_000, batch=tokens // LENGTH, dtype=dtype, device="cpu")
    return Trainer(Transformer(config), data, out=out, length=LENGTH, optim=OptimConfig(), train=train)


def shares(trainer: Trainer, *, steps: int) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Share of each kind in the CPU time of all operators, and the costliest operators outside the first two kinds."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.train_step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    by_kind = dict.fromkeys([*KINDS, "elsewhere"], 0.0)
    for operator, time in times.items():
        by_kind[kind_of(operator)] += time / total
    useful = {"matrix products", "attention"}
    rest = [(operator, time / total) for operator, time in times.items() if kind_of(operator) not in useful]
    return by_kind, sorted(rest, key=lambda pair: -pair[1])[:12]


def main() -> None:
    """Parity is the test suite's here (tests/training/test_step.py): a profile compares nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(Path(out), dtype=arguments.dtype, tokens=arguments.tokens, experts=arguments.experts)
        times = interleaved({"step": trainer.train_step}, rounds=arguments.steps, warmup=2)["step"]
        by_kind, rest = shares(trainer, steps=arguments.steps)
    useful = by_kind["matrix products"] + by_kind["attention"]
    conditions = {"D": 512, "layers": 4, "E": arguments.experts, "K": 2, "F": 1024, "V": 8192, "T": arguments.tokens}
    row(
        "train_step",
        conditions | {"dtype": arguments.dtype, "useful": f"{useful:.1%}"},
        times,
        versus={},
        parity="tests",
    )
    for kind, share in sorted(by_kind.items(), key=lambda pair: -pair[1]):
        print(f"  {kind:<24}{share:7.1%}")
    print("  costliest of the rest: " + ", ".join(f"{operator} {share:.1%}" for operator, share in rest))
    print(json.dumps({"useful": round(useful, 4), "goal": GOAL, "reached": useful >= GOAL}))


if __name__ == "__main__":
    main()
