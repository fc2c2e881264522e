"""Layer collapse: the loss after training against compression, pruned before training by four methods and by chance.

python -m benchmarks.layer_collapse [--models chain transformer] [--methods ...] [--seeds 0 1 2] [--text FILE]

Both models say the byte that follows CONTEXT bytes of prose; nats a byte on the last tenth of the text. chain: five
linear layers with tanh, 128 to 256 wide, and nothing beside them, so that an emptied layer cuts all input off: what is
left is the constant that the last bias begins with, the bytes' frequencies. transformer: six narrow layers of this
library, whose residual stream goes around them. Before training one ranking over all matrices keeps one weight in
`compression`; SNIP and GraSP score once on 256 windows, SynFlow in 100 rounds without data. Then --steps steps of AdamW
with the zeros held. empty: matrices that keep nothing; cut: whether what the chain keeps leads nowhere from any input
to any output. Embeddings, norms, biases and the transformer's head stay dense. Records are appended to
runs/layer-collapse.jsonl; ``python -m benchmarks.pruning_page --collect`` makes the table and the figure of them.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import commit
from benchmarks.smollm2_pruning import prose
from pruning import Masks, grasp_scores, prunable_weights, random_scores, select_masks, snip_scores, synflow_scores
from pruning.allocation import global_ranking
from training.allocator import keep_freed_memory
from transformer import DenseConfig, Transformer, TransformerConfig

RECORDS = Path("runs/layer-collapse.jsonl")
METHODS = ("magnitude", "snip", "grasp", "synflow", "chance")
POWERS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
BYTES, CONTEXT, WIDTHS = 256, 8, (128, 192, 256, 256, 128)
BATCH, SCORED, EVALUATED = 128, 256, 8192


def new_chain(seed: int) -> nn.Module:
    """Five linear layers after one another; uniform weights of variance 2 / inputs (He et al. 2015), biases 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = [nn.Embedding(BYTES, WIDTHS[0] // CONTEXT), nn.Flatten()]
        for inputs, outputs in zip(WIDTHS, (*WIDTHS[1:], BYTES), strict=True):
            linear = nn.Linear(inputs, outputs)
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.Tanh()]
        return nn.Sequential(*parts[:-1])


def new_transformer(seed: int) -> nn.Module:
    """Six narrow layers."""
    config = TransformerConfig.uniform(
        vocab_size=BYTES, dim=64, num_layers=6, num_heads=4, max_length=CONTEXT, feedforward=DenseConfig(hidden=192)
    )
    return Transformer(config, generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, Callable[[int], nn.Module]] = {"chain": new_chain, "transformer": new_transformer}


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Σ −log p of the last byte of each window [B, CONTEXT + 1]."""
    ids = windows[:, :-1].long()
    logits = model(ids).logits[:, -1] if isinstance(model, Transformer) else model(ids)
    return F.cross_entropy(logits, windows[:, -1].long(), reduction="sum")


def draw(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Windows [count, CONTEXT + 1] from anywhere in the bytes."""
    starts = torch.randint(len(text) - CONTEXT, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def prune(model: nn.Module, method: str, compression: float, windows: Tensor, seed: int) -> Masks:
    """Keep one weight in `compression`, by one ranking over all matrices."""
    weights, sparsity = prunable_weights(model), 1 - 1 / compression
    scores: Mapping[str, Tensor]
    if method == "magnitude":
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
    elif method == "chance":
        generator = torch.Generator().manual_seed(seed)
        scores = {name: random_scores(weight.detach(), generator=generator) for name, weight in weights.items()}
    elif method == "synflow":
        scores = synflow_scores(model, weights, sparsity=sparsity, example=windows[:1, :-1].long())
    else:
        scorer = {"snip": snip_scores, "grasp": grasp_scores}[method]
        scores = scorer(model, weights, [windows], loss=loss)
    masks = select_masks(scores, sparsity=sparsity, allocation=global_ranking)
    masks.apply(model)
    return masks


def train(model: nn.Module, masks: Masks | None, text: Tensor, steps: int, seed: int) -> None:
    """AdamW, the rate falling to 0; pruned weights are put back to 0 after each step."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        (loss(model, draw(text, BATCH, generator)) / BATCH).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        if masks is not None:
            masks.apply(model)


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor) -> float:
    """Nats a byte over EVALUATED windows spread evenly over the text."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, EVALUATED).long()
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return sum(float(loss(model, rows)) for rows in windows.split(1024)) / EVALUATED


def frequencies(text: Tensor) -> Tensor:
    """log p of each byte by how often it is there, every byte once more."""
    counts = torch.bincount(text.long(), minlength=BYTES) + 1
    return (counts / counts.sum()).log()


def is_cut(kept: Sequence[Tensor]) -> bool:
    """Whether no path of weights leads through these masks [out, in], one after the other."""
    reached = torch.ones(kept[0].shape[1], dtype=torch.bool)
    for mask in kept:
        reached = (mask & reached).any(1)
    return not bool(reached.any())


def measured(kind: str, method: str, compression: float, seed: int, text: Tensor, held: Tensor, steps: int
             ) -> dict[str, object]:  # fmt: skip
    """Prune a new model, train it, and say what is left and what it is worth; method "dense" prunes nothing."""
    model = MODELS[kind](seed)
    if isinstance(model, nn.Sequential):
        with torch.no_grad():
            model[-1].bias.copy_(frequencies(text))
    masks = None
    if method != "dense":
        scored = draw(text, SCORED, torch.Generator().manual_seed(seed))
        masks = prune(model, method, compression, scored, seed)
    kept = [weight.detach() != 0 for weight in prunable_weights(model).values()]
    counts = [int(mask.sum()) for mask in kept]
    train(model, masks, text, steps, seed)
    return {"model": kind, "method": method, "compression": compression, "seed": seed, "steps": steps,
            "weights": sum(mask.numel() for mask in kept), "kept": sum(counts), "matrices": len(kept),
            "empty": counts.count(0), "cut": kind == "chain" and is_cut(kept),
            "nats": held_out(model, held)}  # fmt: skip


def main() -> None:
    """Each model dense, then by each method at each compression, for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=("dense", *METHODS), default=("dense", *METHODS))
    parser.add_argument("--powers", type=float, nargs="+", default=POWERS, help="compressions, as powers of 10")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    written, name = prose(options.text)
    text = torch.frombuffer(bytearray(written.encode()), dtype=torch.uint8)
    text, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    constant = -float(frequencies(text)[held.long()].mean())
    common = {"name": "collapse", "text": name, "constant_nats": constant, "threads": options.threads,
              "torch": torch.__version__, "commit": commit()}  # fmt: skip
    RECORDS.parent.mkdir(exist_ok=True)
    for seed in options.seeds:
        for kind in options.models:
            for method in options.methods:
                for power in (0.0,) if method == "dense" else options.powers:
                    line = common | measured(kind, method, 10**power, seed, text, held, options.steps)
                    with RECORDS.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(
                        *(line[key] for key in ("model", "method", "compression", "seed", "empty", "cut", "nats")),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
