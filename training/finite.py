"""Where a NaN or infinity came from."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NOT_SEEN = "not seen when the step was run again"
# what the layers of moe say where they are compiled, by torch._assert_async
_REFUSAL = re.compile("must be finite, got NaN or infinity|the variance of queries must be within their type")


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


@contextmanager
def refusals() -> Iterator[None]:
    """What a compiled layer refuses is the FloatingPointError that it is uncompiled, and not torch's RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if _REFUSAL.search(str(error)) is None:
            raise
        raise FloatingPointError(str(error)) from error


def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> str:
    """Run again and name what first became NaN or infinite.

    In this order: a parameter; the first module to finish whose output is not finite (its own operations made it, as
    the modules inside it finished before); a gradient, the one of the latest parameter in the model, since the
    backward pass starts from there. run(): the same forward and backward passes; compiled layers run uncompiled, so
    that the modules inside them are seen and a router's refusal names its layer.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name} is not finite before the step"
    model.zero_grad()
    found = _outputs(model, run)
    if found:
        return f"first in the output of {found[0]}"
    spoilt = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if spoilt:
        return f"every layer's output is finite; first in the gradient of {spoilt[-1]}"
    return NOT_SEEN


def _outputs(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    found: list[str] = []  # names, in the order in which modules finish

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(value, Tensor) and not _finite(value) for value in values):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            run()
    except FloatingPointError as error:  # a router refuses logits that are not finite
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _finite(tensor: Tensor) -> bool:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
