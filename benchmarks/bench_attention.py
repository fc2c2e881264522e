"""Sliding-window attention against what torch offers for it: forward, and forward + backward.

python -m benchmarks.bench_attention [--lengths 4096 16384] [--window 256] [--sinks 4] [--rounds 10] [--no-flex]

Contenders, all in every round: attend with a window (and with window + sinks) on the folded backend; SDPA causal (the
floor that a dense model pays); SDPA with the window as a boolean mask; compiled flex_attention, forward only (on CPU it
has no backward) and without the time to build its block mask. vs_X < 1 means faster than X; sdpa_causal / window is
the speed-up. Freed memory is kept in the heap for every contender, as in training.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.harness import forward_backward, forward_only, interleaved, require_parity, row
from sparse_attn import Pattern, attend, causal, explain_backend, sinks, sliding_window
from training.allocator import keep_freed_memory

HEADS, HEAD_DIM = 4, 64
# A boolean mask over more pairs than this takes more memory and minutes than it tells.
MASKED_UP_TO = 4096
Contenders = dict[str, Callable[[], Tensor]]


def contenders(q: Tensor, k: Tensor, v: Tensor, *, window: int, sink_count: int) -> Contenders:
    """What can train."""
    plain = causal() & sliding_window(window)
    with_sinks = causal() & (sliding_window(window) | sinks(sink_count))
    runs: Contenders = {
        "window": lambda: attend(q, k, v, pattern=plain),
        "window_and_sinks": lambda: attend(q, k, v, pattern=with_sinks),
        "sdpa_causal": lambda: sdpa(q, k, v, is_causal=True),
    }
    if q.shape[2] <= MASKED_UP_TO:
        where = torch.arange(q.shape[2])
        mask = plain.visible(where[:, None], where)
        runs["sdpa_masked"] = lambda: sdpa(q, k, v, attn_mask=mask)
    return runs


def flex_forward(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Callable[[], Tensor]:
    """Compiled flex_attention over the same window, on tensors that need no gradient."""
    q, k, v = q.detach(), k.detach(), v.detach()

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    blocks = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks)


def gate(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, window: int, sink_count: int) -> dict[str, float]:
    """Worst relative error of output and gradients against the dense reference, over the first 2048 positions."""
    size = min(2048, q.shape[2])
    inputs = [x[:, :, :size].detach().requires_grad_() for x in (q, k, v)]
    errors = {}
    for name, pattern in (
        ("window", causal() & sliding_window(window)),
        ("window_and_sinks", causal() & (sliding_window(window) | sinks(sink_count))),
    ):
        actual, expected = (_results(inputs, grad[:, :, :size], pattern, backend) for backend in ("auto", "reference"))
        errors[name] = require_parity(actual, expected, tolerance=1e-5)
    return errors


def _results(inputs: list[Tensor], grad: Tensor, pattern: Pattern, backend: str) -> dict[str, Tensor]:
    q, k, v = inputs
    out = attend(q, k, v, pattern=pattern, backend=backend)
    return dict(zip(("out", "q", "k", "v"), (out, *torch.autograd.grad(out, inputs, grad)), strict=True))


def bench(length: int, *, window: int, sink_count: int, rounds: int, flex: bool) -> None:
    """Gate, then time, then print the rows of one length."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, HEADS, length, HEAD_DIM)
    q, k, v = inputs
    errors = gate(q, k, v, grad, window=window, sink_count=sink_count)
    runs = contenders(q, k, v, window=window, sink_count=sink_count)
    forward = {name: forward_only(run) for name, run in runs.items()}
    if flex:
        forward["flex_compiled"] = forward_only(flex_forward(q, k, v, window=window))
        require_parity({"out": forward["flex_compiled"]()}, {"out": forward["window"]()}, tolerance=1e-5)
    both = {name: forward_backward(run, inputs, grad) for name, run in runs.items()}
    backend = explain_backend(causal() & sliding_window(window), length).backend
    for passes, contest in (("forward", forward), ("forward+backward", both)):
        seconds = interleaved(contest, rounds=rounds, warmup=2)
        conditions = {
            "passes": passes, "B": 1, "L": length, "H": HEADS, "d": HEAD_DIM, "window": window, "dtype": "float32",
        }  # fmt: skip
        for name in contest:
            ours = name in errors
            versus = {peer: times for peer, times in seconds.items() if peer != name} if ours else {}
            parity = f"pass {errors[name]:.0e}" if ours else "peer"
            extra = {"backend": backend} if ours else {}
            row(f"attention_{name}", {**conditions, **extra}, seconds[name], versus=versus, parity=parity)


def main() -> None:
    """Parse the command line and run every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-flex", action="store_true", help="leave out flex_attention (it needs a C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for length in options.lengths:
        bench(
            length,
            window=options.window,
            sink_count=options.sinks,
            rounds=options.rounds,
            flex=not options.no_flex,
        )


if __name__ == "__main__":
    main()
