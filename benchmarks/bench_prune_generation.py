"""Does removing half of the heads make generation faster, and by as much as the FLOPs say?

A width-512 model with random weights (what the weights are does not matter to the speed) generates with a cache for a
batch of 16. Gate: the pruned model's logits equal those of the whole model with the same heads masked. Then both
generate in turn; the row carries the ratio of FLOPs and of weight bytes beside the ratio of times.

    python -m benchmarks.bench_prune_generation
"""

import argparse
import copy
from functools import partial

import torch

from benchmarks.harness import interleaved, paired_ratio, require_parity, row
from pruning import magnitude_importance, prune_heads
from pruning.gates import masked
from training.allocator import keep_freed_memory
from transformer import DenseConfig, Transformer, TransformerConfig, generate

FRACTION = 0.5
TOLERANCE = 1e-4


def pair(*, layers: int, vocab_size: int, max_length: int) -> tuple[Transformer, Transformer, float]:
    """The whole model, a copy with half of its heads removed, and the relative error against masking (the gate)."""
    torch.manual_seed(0)
    whole = Transformer(
        TransformerConfig.uniform(
            vocab_size=vocab_size, dim=512, num_layers=layers, num_heads=8, feedforward=DenseConfig(1024),
            max_length=max_length,
        )
    ).eval()  # fmt: skip
    pruned = copy.deepcopy(whole)
    axes = [axis for axis in whole.prunable_axes() if axis.kind == "head"]
    report = prune_heads(pruned, magnitude_importance(whole, axes), fraction=FRACTION)
    ids = torch.randint(vocab_size, (2, 32))
    with torch.no_grad(), masked(whole, axes, report.kept):
        expected = whole(ids).logits
    with torch.no_grad():
        error = require_parity({"logits": pruned(ids).logits}, {"logits": expected}, tolerance=TOLERANCE)
    return whole, pruned, error


def decode_flops(model: Transformer, *, prompt: int, new: int) -> float:
    """FLOPs a token of the tokens after the prompt: what a sequence of prompt + new costs beyond the prompt's."""
    total = prompt + new
    return (total * model.flops_per_token(total) - prompt * model.flops_per_token(prompt)) / new


def main() -> None:
    """Gate, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    keep_freed_memory()
    whole, pruned, error = pair(layers=options.layers, vocab_size=4096, max_length=options.prompt + options.new)
    prompt = torch.randint(4096, (options.batch, options.prompt))
    models = {"all_heads": whole, "half_the_heads": pruned}
    runs = {name: partial(generate, model, prompt, max_new_tokens=options.new) for name, model in models.items()}
    seconds = interleaved(runs, rounds=options.rounds)
    flops = {name: decode_flops(model, prompt=options.prompt, new=options.new) for name, model in models.items()}
    for name, other in (("all_heads", "half_the_heads"), ("half_the_heads", "all_heads")):
        conditions = {
            "D": 512, "layers": options.layers, "B": options.batch, "prompt": options.prompt, "new": options.new,
            "dtype": "float32", "parameters": models[name].num_parameters(),
            "flops_ratio": round(flops[name] / flops[other], 3),
        }  # fmt: skip
        row(f"generate {name}", conditions, seconds[name], versus={other: seconds[other]}, parity=f"pass {error:.0e}")
    speedup = paired_ratio(seconds["all_heads"], seconds["half_the_heads"])
    ceiling = flops["all_heads"] / flops["half_the_heads"]
    print(f"half of the heads removed: {speedup:.2f} times as fast; its FLOPs explain up to {ceiling:.2f}")


if __name__ == "__main__":
    main()
