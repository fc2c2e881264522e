"""Products of the Hessian with a vector, and models made differentiable twice for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from pruning.batches import Batch, Loss, batch_size, evaluating, scalar_loss
from pruning.saliency.first_order import mean_gradients
from pruning.saliency.rounds import restored

PRODUCTS = ("exact", "difference")
# what every function under the decorator runs
_ONCE = once_differentiable(lambda ctx: None).__code__


@contextmanager
def replaced_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Inside the context `module.name` is `method` instead of its class's."""
    before = vars(module).get(name)
    vars(module)[name] = method
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, torch's attention and this library's stacked experts and tables of memories run as plain operations,
    which can be differentiated again: torch's mathematical kernel, a loop over the experts, gathered rows."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            if hasattr(module, "hidden_one") and hasattr(module, "forward_one"):
                stack.enter_context(replaced_method(module, "forward", _mixture(module)))
            if hasattr(module, "num_slots") and hasattr(module, "dot"):
                stack.enter_context(replaced_method(module, "forward", _summed(module)))
                stack.enter_context(replaced_method(module, "dot", _dotted(module)))
        yield


def check_twice_differentiable(value: Tensor) -> None:
    """Raises: ValueError naming a function of the graph of ``value`` that is marked with ``once_differentiable``.

    A gradient of a gradient takes what such a function puts out for a constant, without an error where
    `torch.autograd.grad` asks for some tensors' gradients alone."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(node, "_forward_cls", None)
        if owner is not None and _marked(owner.backward):
            raise ValueError(
                f"functions of the loss must be differentiable twice, got {owner.__name__} of {owner.__module__}"
            )
        waiting += [parent for parent, _ in node.next_functions]


def _marked(backward: Any) -> bool:
    """Whether it went through ``once_differentiable``, whatever else wraps it."""
    while backward is not None:
        if getattr(backward, "__code__", None) is _ONCE:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


def _summed(table: Any) -> Callable[..., Tensor]:
    def forward(slots: Tensor, weights: Tensor) -> Tensor:
        rows = F.embedding(slots, table.weight, sparse=table.sparse)
        return (weights.to(rows.dtype)[..., None] * rows).sum(-2)

    return forward


def _dotted(table: Any) -> Callable[..., Tensor]:
    def dot(slots: Tensor, x: Tensor) -> Tensor:
        rows = F.embedding(slots, table.weight, sparse=table.sparse)
        return (rows * x.to(rows.dtype)[:, None]).sum(-1)

    return dot


def _mixture(experts: Any) -> Callable[..., Tensor]:
    """y_t = Σ over the assignments of t of weight · f_expert(x_t), expert by expert."""

    def forward(x: Tensor, routing: Any) -> Tensor:
        y = torch.zeros_like(x)
        for expert in routing.expert.unique().tolist():
            taken = routing.expert == expert
            tokens = routing.token[taken]
            rows = experts.forward_one(expert, x[tokens]) * routing.weight[taken, None].to(x.dtype)
            y = y.index_add(0, tokens, rows)
        return y

    return forward


def hessian_product(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    vectors: Mapping[str, Tensor],
    *,
    product: str = "exact",
    loss: Loss | None = None,
    step: float = 1e-3,
) -> dict[str, Tensor]:
    """H v for each weight, H the Hessian of the loss averaged over all samples and v = `vectors` over all weights.

    product: "exact" differentiates twice (Pearlmutter 1994), so that memory holds two backward passes; "difference" is
    (g(w + εv) − g(w − εv)) / 2ε with ε = step · ‖w‖/‖v‖, for models that can be differentiated once only.
    Raises: ValueError for another product, step <= 0, and a model that cannot be differentiated twice under "exact"."""
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
    if not 0 < step < 1:
        raise ValueError(f"step must be in (0, 1), got {step}")
    if product == "exact":
        return _exact(model, weights, batches, vectors, loss)
    return _difference(model, weights, batches, vectors, loss, step)


def _exact(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    vectors: Mapping[str, Tensor],
    loss: Loss | None,
) -> dict[str, Tensor]:
    parameters, samples = list(weights.values()), 0
    totals = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    with evaluating(model, frozen=False), torch.enable_grad(), twice_differentiable(model):
        for batch in batches:
            samples += batch_size(batch)
            value = scalar_loss(model, batch, loss)
            try:
                check_twice_differentiable(value)
                first = torch.autograd.grad(
                    value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                inner = torch.stack([(g * v).sum() for g, v in zip(first, vectors.values(), strict=True)]).sum()
                second = torch.autograd.grad(inner, parameters, allow_unused=True, materialize_grads=True)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{type(model).__name__} cannot be differentiated twice ({error}): pass product='difference'"
                ) from error
            for total, part in zip(totals.values(), second, strict=True):
                total += part
    return {name: total / samples for name, total in totals.items()}


def _difference(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    vectors: Mapping[str, Tensor],
    loss: Loss | None,
    step: float,
) -> dict[str, Tensor]:
    norms = [_norm(weights.values()), _norm(vectors.values())]
    epsilon = step * norms[0] / max(norms[1], 1e-30)
    ends = []
    with restored(weights):
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for sign in (1, -1):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name] + sign * epsilon * vectors[name])
            ends.append(mean_gradients(model, weights, batches, loss))
    return {name: (ends[0][name] - ends[1][name]) / (2 * epsilon) for name in weights}


def _norm(tensors: Any) -> float:
    return sum(tensor.detach().double().square().sum().item() for tensor in tensors) ** 0.5
