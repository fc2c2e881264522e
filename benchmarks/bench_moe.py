"""One MoE layer, forward and backward, against the dense layer of equal active FLOPs and against other MoE layers.

python -m benchmarks.bench_moe [--dtype float32 bfloat16] [--rounds 10] [--fresh-memory] [--new-tokens]
python -m benchmarks.bench_moe --experts 64 --k 8 --hidden 256 [--tokens 4096] [--dim 512]

T 4096 tokens, width 512, 16 experts of 1024, two for each token, SwiGLU, unless asked otherwise; the dense layer is
k · hidden wide. Each contender
computes y and all gradients, into ``.grad`` of its input and its weights. The MoE layers share weights and tokens where
they can; the gate compares outputs and gradients with HF Mixtral's plain loop over experts in float32. The dense layer
is the fastest of three plain ways to write it; ``products`` is the time of the experts' matrix products alone, torch's
own, without routing, gathering, activations and sums. Freed memory is kept in the heap for all alike (training does
the same); ``--fresh-memory`` leaves the C library's default. ``--new-tokens`` gives every round tokens of its own, as
training does: experts then get other numbers of rows each time, and oneDNN prepares products for sizes not met lately.

Run as a module: fairscale installs a top-level package that is also called ``benchmarks``.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import interleaved, require_parity, row, spread
from moe import MoE, TopKRouter
from training.allocator import keep_freed_memory

WARMUP = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """Tokens, width, hidden width of an expert, experts, experts of a token."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 1024
    experts: int = 16
    k: int = 2


SIZES = Sizes()


@dataclass(frozen=True)
class Contender:
    """A layer, what it returns for x, and the weights whose gradients the gate compares (none: another function).

    turned: the up weights lie as [E, 2F, D] instead of [E, D, 2F].
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    weights: Mapping[str, Tensor]
    turned: bool = False


class Dense(nn.Module):
    """A SwiGLU layer as three linear maps, or with gate and value in one; out: nn.Linear's layout or its transpose."""

    def __init__(self, dim: int, hidden: int, *, fused: bool, transposed: bool = False) -> None:
        super().__init__()
        widths = [2 * hidden] if fused else [hidden, hidden]
        shapes = [(width, dim) for width in widths] + [(dim, hidden)]
        shapes = [shape[::-1] for shape in shapes] if transposed else shapes
        self.weights = nn.ParameterList(torch.randn(shape) * shape[transposed - 1] ** -0.5 for shape in shapes)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        *up, down = (w.mT if self.transposed else w for w in self.weights)
        gate, value = F.linear(x, up[0]).chunk(2, -1) if len(up) == 1 else (F.linear(x, w) for w in up)
        return F.linear(F.silu(gate) * value, down)


def ours(dtype: torch.dtype, sizes: Sizes = SIZES) -> tuple[MoE, Contender]:
    """This library's layer."""
    router = TopKRouter(sizes.dim, sizes.experts, k=sizes.k)
    layer = MoE(sizes.dim, sizes.hidden, sizes.experts, router).to(dtype)
    weights = {"router": layer.get_parameter("router.weight"), "up": layer.experts.up, "down": layer.experts.down}
    return layer, Contender(layer, lambda x: layer(x)[0], weights)


def mixtral(layer: MoE, dtype: torch.dtype, implementation: str, sizes: Sizes = SIZES) -> Contender:
    """Hugging Face's block with this layer's weights; implementation: "eager" or "grouped_mm"."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=sizes.dim, intermediate_size=sizes.hidden, num_local_experts=sizes.experts,
                           num_experts_per_tok=sizes.k)  # fmt: skip
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config).to(dtype)
    names = {"router": "gate.weight", "up": "experts.gate_up_proj", "down": "experts.down_proj"}
    weights = {name: block.get_parameter(path) for name, path in names.items()}
    with torch.no_grad():
        weights["router"].copy_(layer.get_parameter("router.weight"))
        weights["up"].copy_(layer.experts.up.mT)
        weights["down"].copy_(layer.experts.down)
    return Contender(block, lambda x: block(x[None])[0], weights, turned=True)


def fairscale(dtype: torch.dtype, sizes: Sizes) -> Contender:
    """fairscale's GShard layer, one process. Its capacity is 2·T/E for top-2, so it drops.

    It makes its dispatch mask float32 whatever it is given; in half precision autocast brings the two together.
    """
    import tempfile

    from fairscale.nn import MOELayer, Top2Gate

    if not torch.distributed.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    experts = nn.ModuleList(Dense(sizes.dim, sizes.hidden, fused=True) for _ in range(sizes.experts))
    layer = MOELayer(Top2Gate(sizes.dim, sizes.experts), experts).to(dtype)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y: Tensor = layer(x.view(sizes.experts, -1, sizes.dim))
        return y.view(x.shape)

    return Contender(layer, run, {})


def dropped_by_fairscale(contender: Contender, x: Tensor) -> float:
    """Share of the 2·T choices that got no place."""
    with torch.no_grad():
        placed = contender.module.gate(x)[2].sum().item()
    return 1 - placed / (2 * len(x))


def step(contender: Contender, xs: Sequence[Tensor], d_y: Tensor) -> Callable[[], None]:
    """One forward and backward pass with fresh gradients, on the next of xs, over and over."""
    turns = itertools.cycle(xs)

    def run() -> None:
        x = next(turns)
        x.grad = None
        contender.module.zero_grad()
        contender.run(x).backward(d_y)

    return run


def products(layer: MoE, x: Tensor, d_y: Tensor, sizes: Sizes) -> Callable[[], None]:
    """The six products of each expert on an equal share of the rows, into ready memory: the floor under the layer."""
    rows = sizes.k * sizes.tokens // sizes.experts
    up, down = layer.experts.up.detach(), layer.experts.down.detach()
    given, wanted = x.detach()[:rows], d_y[:rows]
    d_up, d_down, hidden = torch.empty_like(up), torch.empty_like(down), x.new_empty(rows, sizes.hidden)
    pre, out = x.new_empty(rows, up.shape[2]), x.new_empty(rows, sizes.dim)

    def run() -> None:
        for e in range(sizes.experts):
            torch.mm(given, up[e], out=pre)
            torch.mm(hidden.fill_(0.5), down[e].mT, out=out)
            torch.mm(wanted, down[e], out=hidden)
            torch.mm(pre, up[e].mT, out=out)
            torch.mm(wanted.mT, hidden, out=d_down[e])
            torch.mm(given.mT, pre, out=d_up[e])

    return run


def answers(contender: Contender, x: Tensor, d_y: Tensor) -> dict[str, Tensor]:
    """y and every gradient, by name; that of the up weights as [E, D, 2F]."""
    x = x.detach().requires_grad_()
    y = contender.run(x)
    gradients = torch.autograd.grad(y, [x, *contender.weights.values()], d_y)
    found = {"y": y.detach()} | dict(zip(["x", *contender.weights], gradients, strict=True))
    if contender.turned:
        found["up"] = found["up"].mT
    return found


def gate(layer: MoE, contenders: dict[str, Contender], x: Tensor, d_y: Tensor, sizes: Sizes) -> dict[str, str]:
    """What each MoE layer's answer is worth. Raises: ValueError if ours is wrong."""
    dtype = x.dtype
    oracle = answers(mixtral(layer, torch.float32, "eager", sizes), x.float(), d_y.float())
    verdict = {"dense": "other function", "products": "the expert products alone"}
    for name in ("moe", "hf_grouped_mm", "hf_eager"):
        found = answers(contenders[name], x, d_y)
        if name == "moe" or dtype == torch.float32:
            verdict[name] = f"pass {require_parity(found, oracle, tolerance=TOLERANCE[dtype]):.0e}"
        else:
            # its router computes in bf16, so some tokens go elsewhere
            verdict[name] = f"y differs {require_parity({'y': found['y']}, {'y': oracle['y']}, tolerance=1.0):.0e}"
    if "fairscale" in contenders:
        verdict["fairscale"] = f"drops {dropped_by_fairscale(contenders['fairscale'], x):.1%} of the choices"
    return verdict


def compare(dtype: torch.dtype, rounds: int, memory: str, sizes: Sizes, *, new_tokens: bool = False) -> None:
    """Gate, then time all contenders in turns, then one row each."""
    torch.manual_seed(0)
    x, d_y = (torch.randn(sizes.tokens, sizes.dim).to(dtype) for _ in range(2))
    xs = [x] + [torch.randn_like(x) for _ in range(WARMUP + rounds - 1 if new_tokens else 0)]
    for some in xs:
        some.requires_grad_()
    layer, moe = ours(dtype, sizes)
    contenders = {"moe": moe} | {f"hf_{name}": mixtral(layer, dtype, name, sizes) for name in ("grouped_mm", "eager")}
    if sizes.k == 2:
        contenders["fairscale"] = fairscale(dtype, sizes)
    verdict = gate(layer, contenders, x, d_y, sizes)
    plain = {
        "dense": Dense(sizes.dim, sizes.k * sizes.hidden, fused=False).to(dtype),
        "dense_fused": Dense(sizes.dim, sizes.k * sizes.hidden, fused=True).to(dtype),
        "dense_transposed": Dense(sizes.dim, sizes.k * sizes.hidden, fused=True, transposed=True).to(dtype),
    }
    contenders |= {name: Contender(module, module, {}) for name, module in plain.items()}
    runs = {name: step(c, xs, d_y) for name, c in contenders.items()} | {"products": products(layer, x, d_y, sizes)}
    seconds = interleaved(runs, rounds=rounds, warmup=WARMUP)
    fastest = min(plain, key=lambda name: spread(seconds[name])[0])
    seconds["dense"] = seconds[fastest]
    numbers = {"T": sizes.tokens, "D": sizes.dim, "F": sizes.hidden, "E": sizes.experts, "K": sizes.k}
    conditions = numbers | {"dtype": str(dtype).removeprefix("torch."), "memory": memory}
    conditions |= {"tokens": "new"} if new_tokens else {}
    for name in verdict:
        others = [other for other in verdict if other != name and (name == "moe" or other == "dense")]
        row(name, conditions, seconds[name], versus={o: seconds[o] for o in others}, parity=verdict[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", action="store_true", help="other tokens in every round")
    parser.add_argument("--fresh-memory", action="store_true", help="leave the C library's allocator as it is")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    arguments = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    kept = not arguments.fresh_memory and keep_freed_memory()
    for name in arguments.dtype:
        compare(
            getattr(torch, name), arguments.rounds, "kept" if kept else "fresh", sizes, new_tokens=arguments.new_tokens
        )


if __name__ == "__main__":
    main()
