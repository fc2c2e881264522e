"""A step of decoding through MoE layers, 1 to 16 tokens without a graph, against the time to read the chosen experts.

python -m benchmarks.bench_decode [--dtype float32 bfloat16] [--tokens 1 4 16] [--rounds 40]
                                  [--dim 2048 --hidden 1024 --experts 64 --k 8 --layers 2]

Width 512, 16 experts of 1024, two for each token, SwiGLU, unless told otherwise (the sizes above: OLMoE's). A step
passes the tokens through all layers, x ← x + layer(x), routers included; their weights together do not fit into the
processor's caches. ``read`` sums the weights of the experts that each layer chooses, once each.

``moe``: as it is built. ``moe_prepared``: after prepare_for_decoding. ``moe_fused``: after
prepare_for_decoding(compiled=True). ``moe_compiled``: prepared, and the step given to torch.compile as a whole, with
its cpp_wrapper. The peers are Hugging Face's Mixtral block with the same weights, with both of its ways to run experts,
each as it is and with the step given to torch.compile likewise. The gate compares every contender's step with that
block's in float32.
"""

import argparse
import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_moe import SIZES, Sizes, mixtral, ours
from benchmarks.harness import interleaved, require_parity, row
from moe import MoE, prepare_for_decoding

# of a step's sum: half precision rounds it once a layer, and a token on the edge may choose another expert
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
# calls the loops from C++: of a step's overhead Python is the larger part
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True
}  # calls the loops from C++, a step's overhead being Python's
PEERS = ("grouped_mm", "eager")
Layer = Callable[[Tensor], Tensor]


class Step(nn.Module):
    """x ← x + layer(x) for each layer."""

    def __init__(self, layers: list[nn.Module], run: Callable[[nn.Module], Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.run(layer)(x)
        return x


def compiled(step: Step) -> Layer:
    """The step as one compiled graph, with code of its own: torch keeps the graphs of one code object in one list, and
    each contender would check the others' guards at every call."""
    forward = Step.forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
    step.forward = MethodType(own, step)  # type: ignore[method-assign]
    done: Layer = torch.compile(step, options=OPTIONS)
    return done


def our_step(layers: list[MoE]) -> Step:
    return Step(list(layers), lambda layer: lambda x: layer(x)[0])


def theirs(layers: list[MoE], dtype: torch.dtype, implementation: str, sizes: Sizes) -> list[nn.Module]:
    return [mixtral(layer, dtype, implementation, sizes).module for layer in layers]


def their_step(blocks: list[nn.Module]) -> Step:
    return Step(blocks, lambda block: lambda x: block(x[None])[0])


def read(layers: list[MoE], x: Tensor) -> Callable[[], object]:
    """Sum of every weight of the experts that the layers choose in a step from x, once each."""
    matrices = []
    for layer in layers:
        y, routing = layer(x)
        chosen = routing.expert.unique().tolist()
        matrices += [weight[expert] for expert in chosen for weight in (layer.experts.up, layer.experts.down)]
        x = x + y
    return lambda: [matrix.sum() for matrix in matrices]


def prepared(layers: list[MoE], *, compiled: bool) -> list[MoE]:
    copies = nn.ModuleList(deepcopy(layers))
    prepare_for_decoding(copies, compiled=compiled)
    return [copy for copy in copies if isinstance(copy, MoE)]


def compare(dtype: torch.dtype, tokens: int, sizes: Sizes, *, layers: int, rounds: int) -> None:
    """Gate, then time all contenders in turns, then one row each."""
    torch.manual_seed(0)
    torch.compiler.reset()
    gc.collect()  # the steps of the comparison before: they and their compiled graphs hold each other
    x = torch.randn(tokens, sizes.dim).to(dtype)
    made = [ours(dtype, sizes)[0] for _ in range(layers)]
    laid_out = prepared(made, compiled=False)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "moe": our_step(made),
        "moe_prepared": our_step(laid_out),
        "moe_fused": our_step(prepared(made, compiled=True)),
        "moe_compiled": compiled(our_step(laid_out)),
    }
    for name in PEERS:
        blocks = theirs(made, dtype, name, sizes)
        steps |= {f"hf_{name}": their_step(blocks), f"hf_{name}_compiled": compiled(their_step(blocks))}
    oracle = {"y": their_step(theirs(made, torch.float32, "eager", sizes))(x.float()) - x.float()}
    errors = {
        name: require_parity({"y": step(x).float() - x.float()}, oracle, tolerance=TOLERANCE[dtype])
        for name, step in steps.items()
    }
    runs: dict[str, Callable[[], object]] = {name: partial(step, x) for name, step in steps.items()}
    seconds = interleaved(runs | {"read": read(made, x)}, rounds=rounds, warmup=4)
    shape = {"T": tokens, "D": sizes.dim, "F": sizes.hidden, "E": sizes.experts, "K": sizes.k, "layers": layers}
    conditions = {"mode": "decode"} | shape | {"dtype": str(dtype).removeprefix("torch.")}
    peers = {name: taken for name, taken in seconds.items() if name.startswith("hf_")}
    row("read", conditions, seconds["read"], versus={}, parity="not gated")
    for name, error in errors.items():
        against = {"read": seconds["read"]} | (peers if name.startswith("moe") else {})
        row(name, conditions, seconds[name], versus=against, parity=f"pass {error:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=40)
    for name in ("dim", "hidden", "experts", "k"):
        parser.add_argument(f"--{name}", type=int, default=getattr(SIZES, name))
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    sizes = replace(SIZES, dim=arguments.dim, hidden=arguments.hidden, experts=arguments.experts, k=arguments.k)
    with torch.inference_mode():
        for name in arguments.dtype:
            for tokens in arguments.tokens:
                compare(getattr(torch, name), tokens, sizes, layers=arguments.layers, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
