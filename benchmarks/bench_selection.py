"""Attention to blocks that each query chooses: MoBA and NSA, the choice inside the time, against dense causal SDPA.

python -m benchmarks.bench_selection [--lengths 4096 16384] [--rounds 5] [--heads 4] [--kv-heads 4] [--peer]

Contenders, all in every round, forward and forward + backward: MoBA (8 blocks of 128), NSA (compressed keys of 32, one
every 16; 16 blocks of 64; window 512; its compression and its gates inside the time, and their gradients), and SDPA
causal, the floor that a dense model pays. vs_X < 1 means faster than X. --peer adds native-sparse-attention-pytorch
with the same sizes where it is installed, up to length 4096: it copies every chosen key for every query. Its row
includes its projections of q, k, v and the output, which it cannot be run without. Freed memory is kept in the heap
for every contender, as in training.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.harness import forward_backward, forward_only, interleaved, require_parity, row
from sparse_attn.selection import NSA, MoBA, Selected
from training.allocator import keep_freed_memory

HEAD_DIM = 64
# What the gate compares with dense masks.
GATE_LENGTH = 1500
PEER_UP_TO = 4096


def dense_moba(module: MoBA, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """SDPA with the chosen blocks as a boolean mask."""
    groups = q.shape[1] // k.shape[1]
    return _masked(q, k, v, _mask(module(q, k, v, hidden=hidden)).repeat_interleave(groups, 1))


def dense_nsa(module: NSA, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The three branches by SDPA with boolean masks."""
    sizes, at = module.geometry, torch.arange(q.shape[2])
    groups = q.shape[1] // k.shape[1]
    ends = torch.arange(sizes.compressed(k.shape[2])) * sizes.stride + sizes.compress - 1
    far = at[:, None] - at
    branches = (
        _masked(q, module.compress_key(k), module.compress_value(v), ends <= at[:, None]),
        _masked(q, k, v, _mask(module(q, k, v, hidden=hidden)).repeat_interleave(groups, 1)),
        _masked(q, k, v, (far >= 0) & (far < module.window)),
    )
    gates = module.gate(hidden).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)
    return torch.stack([gate[..., None] * branch for gate, branch in zip(gates, branches, strict=True)]).sum(0)


def _mask(selected: Selected) -> Tensor:
    if selected.chosen is None:
        raise ValueError("chosen must be a selection, got None")
    return selected.chosen.to_mask()


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = sdpa(q, k, v, attn_mask=mask | ~mask.any(-1, keepdim=True), enable_gqa=q.shape[1] != k.shape[1])
    return out * mask.any(-1, keepdim=True)


DENSE: dict[str, Callable[..., Tensor]] = {"moba": dense_moba, "nsa": dense_nsa}


def gate(name: str, module: nn.Module, inputs: list[Tensor], grad: Tensor) -> float:
    """Worst relative error of output and all gradients against dense masks, over the first positions."""
    q, k, v = (x[:, :, :GATE_LENGTH].detach().requires_grad_() for x in inputs[:3])
    some = [q, k, v, inputs[3][:, :GATE_LENGTH].detach().requires_grad_()]
    wanted = [*some, *module.parameters()]

    def results(out: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(out, wanted, grad[:, :, :GATE_LENGTH], materialize_grads=True)
        return {"out": out, **{f"grad_{index}": x for index, x in enumerate(found)}}

    actual = results(module(*some[:3], hidden=some[3]).out)
    return require_parity(actual, results(DENSE[name](module, *some)), tolerance=1e-4)


def peer(heads: int, kv_heads: int) -> nn.Module:
    """native-sparse-attention-pytorch with NSA's default sizes."""
    from native_sparse_attention_pytorch import SparseAttention  # type: ignore[import-not-found]

    return SparseAttention(
        dim=heads * HEAD_DIM,
        dim_head=HEAD_DIM,
        heads=heads,
        kv_heads=kv_heads,
        sliding_window_size=512,
        compress_block_size=32,
        compress_block_sliding_stride=16,
        selection_block_size=64,
        num_selected_blocks=16,
        causal=True,
    )


def bench(length: int, *, heads: int, kv_heads: int, rounds: int, passes: list[str], with_peer: bool) -> None:
    """Gate, then time, then print the rows of one length."""
    torch.manual_seed(0)
    dim = heads * HEAD_DIM
    shapes = [(1, count, length, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(*shape, requires_grad=True) for shape in [*shapes, (1, length, dim)]]
    grad = torch.randn(shapes[0])
    q, k, v, hidden = inputs
    modules: dict[str, nn.Module] = {"moba": MoBA(block=128, top_k=8), "nsa": NSA(dim, heads, kv_heads, HEAD_DIM)}
    parity = {name: f"pass {gate(name, module, inputs, grad):.0e}" for name, module in modules.items()}
    runs: dict[str, Callable[[], Tensor]] = {
        "moba": lambda: modules["moba"](q, k, v, hidden=hidden).out,
        "nsa": lambda: modules["nsa"](q, k, v, hidden=hidden).out,
        "sdpa_causal": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=heads != kv_heads),
    }
    trained = {"moba": inputs[:3], "nsa": [*inputs, *modules["nsa"].parameters()], "sdpa_causal": inputs[:3]}
    if with_peer and length <= PEER_UP_TO:
        layer = peer(heads, kv_heads)
        runs["lucidrains_nsa"] = lambda: layer(hidden)
        trained["lucidrains_nsa"] = [hidden, *layer.parameters()]
    for kind in passes:
        contest: dict[str, Callable[[], object]] = {}
        for name, run in runs.items():
            contest[name] = forward_only(run) if kind == "forward" else forward_backward(run, trained[name], grad)
        seconds = interleaved(contest, rounds=rounds, warmup=1)
        conditions = {"passes": kind, "B": 1, "L": length, "H": heads, "Hkv": kv_heads, "d": HEAD_DIM}
        for name in contest:
            versus = {other: times for other, times in seconds.items() if other != name} if name in parity else {}
            extra = {"dtype": "float32"}
            row(
                f"selection_{name}",
                {**conditions, **extra},
                seconds[name],
                versus=versus,
                parity=parity.get(name, "peer"),
            )


def main() -> None:
    """Parse the command line and run every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", nargs="+", default=["forward", "forward+backward"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", action="store_true", help="add native-sparse-attention-pytorch, if it is installed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for length in options.lengths:
        bench(
            length,
            heads=options.heads,
            kv_heads=options.kv_heads,
            rounds=options.rounds,
            passes=options.passes,
            with_peer=options.peer,
        )


if __name__ == "__main__":
    main()
