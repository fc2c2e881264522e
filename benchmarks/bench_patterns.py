"""Every kind of sparse pattern against causal SDPA, beside the speed-up that its visited blocks promise.

python -m benchmarks.bench_patterns [--lengths 4096 16384] [--patterns window bigbird ...] [--rounds 5] [--merged]
                                    [--peer]

promise = blocks of 64 that a causal mask would visit ÷ blocks that the pattern visits; share = measured speed-up over
SDPA causal ÷ promise, on 4 heads of 64, float32, forward and forward + backward, interleaved; SDPA causal is timed as
torch gives it. A row's "layout" is the time to build, once a shape, what attend walks (the block layout and its plan;
for documents their lengths alone, each being dense inside), as a share of the row's pass. --peer adds local-attention
(window; it sees between one and two windows) where it is installed, projections left out. --merged: heads lie as a
model has them, [B, L, H, d] in memory, for every contender; otherwise each in one stretch. Freed memory is kept in the
heap for every contender, as in training.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.harness import forward_backward, forward_only, interleaved, require_parity, row
from sparse_attn import (
    Pattern,
    attend,
    bigbird,
    causal,
    dilated,
    documents,
    explain_backend,
    fixed,
    global_tokens,
    sinks,
    sliding_window,
    strided,
)
from sparse_attn.backends.plan import make_plan
from sparse_attn.patterns.documents import split_documents
from training.allocator import keep_freed_memory

HEADS, HEAD_DIM, BLOCK, WINDOW = 4, 64, 64, 256
GATE_LENGTH = 2048


def patterns(length: int) -> dict[str, Pattern]:
    """The patterns at one length; all but the sinks grow with nothing but the length."""
    draws = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(int(torch.randint(100, 900, (1,), generator=draws)), length - sum(sizes)))
    return {
        "window": causal() & sliding_window(WINDOW),
        "window+sinks": causal() & (sliding_window(WINDOW) | sinks(4)),
        "window+global": causal() & (sliding_window(WINDOW) | global_tokens(range(0, length, length // 8))),
        "bigbird": causal() & bigbird(3 * BLOCK, BLOCK, 3, BLOCK, length=length),
        "strided": causal() & strided(128),
        "fixed": causal() & fixed(128, 32),
        "dilated": causal() & dilated(64, 4),
        "documents": causal() & documents(sizes),
    }


def promised(pattern: Pattern, length: int) -> float:
    """Causal blocks ÷ visited blocks."""
    rows = -(-length // BLOCK)
    return rows * (rows + 1) / 2 / pattern.layout(length, block=BLOCK).visited_blocks


def layout_seconds(pattern: Pattern, length: int) -> float:
    """Median of 9 builds of what attend walks."""
    apart = explain_backend(pattern, length).pairs == "documents"
    times = []
    for _ in range(9):
        start = time.perf_counter()
        split_documents(pattern, length) if apart else make_plan(pattern.layout(length, block=BLOCK))
        times.append(time.perf_counter() - start)
    return median(times)


def gate(name: str, inputs: list[Tensor], grad: Tensor) -> float:
    """Worst relative error of output and gradients against the dense reference in float64, at GATE_LENGTH.

    float64, because the first float32 product of a process was seen to be off by 1e-4 here, now and then."""
    pattern = patterns(GATE_LENGTH)[name]
    results = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        some = [x[:, :, :GATE_LENGTH].detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*some, pattern=pattern, backend=backend)
        gradients = torch.autograd.grad(out, some, grad[:, :, :GATE_LENGTH].to(dtype))
        results.append(dict(zip(("out", "q", "k", "v"), (out, *gradients), strict=True)))
    return require_parity(*results, tolerance=1e-5)


def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The package's windows: each block of WINDOW queries sees its own block and the one before it."""
    from local_attention import LocalAttention

    module = LocalAttention(window_size=WINDOW, causal=True, look_backward=1, use_rotary_pos_emb=False)
    return lambda: module(q, k, v)


def bench(length: int, names: list[str], *, rounds: int, peer: bool, merged: bool) -> None:
    """Gates, then every pattern and SDPA in turns, then the rows."""
    torch.manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM) if merged else (1, HEADS, length, HEAD_DIM)
    *inputs, grad = (torch.randn(shape).transpose(1, 2) if merged else torch.randn(shape) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in inputs)
    chosen = {name: pattern for name, pattern in patterns(length).items() if name in names}
    errors = {name: gate(name, inputs, grad) for name in chosen}
    runs: dict[str, Callable[[], Tensor]] = {"sdpa_causal": lambda: sdpa(q, k, v, is_causal=True)}
    runs |= {name: partial(attend, q, k, v, pattern=pattern) for name, pattern in chosen.items()}
    if peer and importlib.util.find_spec("local_attention"):
        runs["local_attention"] = local_attention(q, k, v)
    contests: dict[str, Mapping[str, Callable[[], object]]] = {
        "forward": {name: forward_only(run) for name, run in runs.items()},
        "forward+backward": {name: forward_backward(run, inputs, grad) for name, run in runs.items()},
    }
    for passes, contest in contests.items():
        seconds = interleaved(contest, rounds=rounds, warmup=1)
        floor = median(seconds["sdpa_causal"])
        for name, times in seconds.items():
            conditions = {"passes": passes, "B": 1, "L": length, "H": HEADS, "d": HEAD_DIM, "dtype": "float32"}
            conditions |= {"heads": "merged"} if merged else {}
            if name in chosen:
                promise, speedup = promised(chosen[name], length), floor / median(times)
                conditions |= {"promise": round(promise, 2), "speedup": round(speedup, 2)}
                conditions |= {"share": round(speedup / promise, 2)}
                layout = layout_seconds(chosen[name], length)
                conditions |= {"layout_ms": round(1e3 * layout, 3), "layout": round(layout / median(times), 4)}
            versus = {} if name == "sdpa_causal" else {"sdpa_causal": seconds["sdpa_causal"]}
            row(f"pattern_{name}", conditions, times, versus=versus,
                parity=f"pass {errors[name]:.0e}" if name in errors else "peer")  # fmt: skip


def main() -> None:
    """Parse the command line and run every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(patterns(GATE_LENGTH))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--patterns", nargs="+", choices=every, default=every)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", action="store_true", help="time local-attention too, where it is installed")
    parser.add_argument("--merged", action="store_true", help="heads side by side in each row, as a model has them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for length in options.lengths:
        bench(length, options.patterns, rounds=options.rounds, peer=options.peer, merged=options.merged)


if __name__ == "__main__":
    main()
