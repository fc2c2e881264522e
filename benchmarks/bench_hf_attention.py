"""Bidirectional windows and BigBird beside Hugging Face's Longformer and BigBird layers, and dense attention.

python -m benchmarks.bench_hf_attention [--lengths 4096] [--rounds 7]

Each contender is one self-attention with its projections of q, k and v: 4 heads of 64 on width 256, float32, forward
and forward + backward with gradients of x and of the weights, in turns. longformer: 256 keys to either side, no global
token; ours has its weights, and the same output to 1e-5. bigbird: blocks of 64, each seeing its neighbours, two global
and three random blocks; Hugging Face draws other blocks, as many. Needs transformers.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import forward_backward, forward_only, interleaved, require_parity, row
from sparse_attn import Pattern, attend, bigbird, full, sliding_window
from training.allocator import keep_freed_memory

HEADS, HEAD_DIM, BLOCK, SIDE = 4, 64, 64, 256
DIM = HEADS * HEAD_DIM


class Ours(nn.Module):
    """q, k and v from x, then ``attend``."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        maps = (self.query, self.key, self.value)
        q, k, v = (one(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for one in maps)
        return attend(q, k, v, pattern=self.pattern).transpose(1, 2).flatten(2)


def longformer() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Hugging Face's window of SIDE keys to either side."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[2 * SIDE], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, 0)

    def run(x: Tensor) -> Tensor:
        real = x.new_zeros(x.shape[:2])
        none = torch.zeros_like(real, dtype=torch.bool)
        return layer(x, real, is_index_masked=none, is_index_global_attn=none, is_global_attn=False)[0]

    return layer, run


def big_bird(length: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Hugging Face's block-sparse attention."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=DIM, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=3,
        max_position_embeddings=length, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = BigBirdBlockSparseAttention(config, seed=0)

    def run(x: Tensor) -> Tensor:
        blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(x.new_ones(x.shape[:2]), BLOCK)
        out = layer(x, band_mask=band, from_mask=rows, to_mask=keys, from_blocked_mask=blocked, to_blocked_mask=blocked)
        return out[0]

    return layer, run


def bench(length: int, rounds: int) -> None:
    """The gate, then all contenders in turns, then the rows."""
    torch.manual_seed(0)
    x = torch.randn(1, length, DIM, requires_grad=True)
    grad = torch.randn(1, length, DIM)
    ours = {
        "window": Ours(sliding_window(SIDE + 1)),
        "bigbird": Ours(bigbird(BLOCK + 1, 2 * BLOCK, 3, BLOCK, length=length)),
        "dense": Ours(full()),
    }
    layers: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {name: (one, one) for name, one in ours.items()}
    layers |= {"hf_longformer": longformer(), "hf_bigbird": big_bird(length)}
    theirs = layers["hf_longformer"][0].state_dict()
    ours["window"].load_state_dict({name: weight for name, weight in theirs.items() if "global" not in name})
    with torch.no_grad():
        error = require_parity({"y": ours["window"](x)}, {"y": layers["hf_longformer"][1](x)}, tolerance=1e-5)
    verdicts = {"window": f"pass {error:.0e}", "hf_longformer": "peer", "hf_bigbird": "draws other blocks"}
    rivals = {"window": ("dense", "hf_longformer"), "bigbird": ("dense", "hf_bigbird")}
    contests: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward+backward": {}}
    for name, (layer, run) in layers.items():
        weights = [weight for key, weight in layer.named_parameters() if "global" not in key]
        contests["forward"][name] = forward_only(partial(run, x))
        contests["forward+backward"][name] = forward_backward(partial(run, x), [x, *weights], grad)
    for passes, runs in contests.items():
        seconds = interleaved(runs, rounds=rounds, warmup=2)
        conditions = {"passes": passes, "B": 1, "L": length, "H": HEADS, "d": HEAD_DIM, "dtype": "float32"}
        for name, times in seconds.items():
            versus = {other: seconds[other] for other in rivals.get(name, ())}
            row(f"layer_{name}", conditions, times, versus=versus, parity=verdicts.get(name, ""))


def main() -> None:
    """Parse the command line and run every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for length in options.lengths:
        bench(length, options.rounds)


if __name__ == "__main__":
    main()
