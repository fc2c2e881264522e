"""What is differentiable once: a second derivative or a transform of torch.func is an error, never a zero."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = Tensor | None | tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]
Given = ParamSpec("Given")
Result = TypeVar("Result")


def differentiable_once(backward: Backward) -> Backward:
    """As torch's ``once_differentiable``, but for where the error hangs.

    Torch's hangs on nothing that came before, so ``torch.autograd.grad`` of some tensors alone passes it by and takes
    the gradient for a constant. Here it hangs on what was saved and on the gradients that came in.

    Raises: RuntimeError, in the second pass, where a gradient made with ``create_graph=True`` is differentiated; in the
    first where nothing was saved that it could hang on.
    """
    plain = once_differentiable(backward)

    @functools.wraps(plain)
    def run(ctx: Any, *gradients: Tensor | None) -> Gradients:
        found = plain(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        saved = [x for x in ctx.saved_tensors if isinstance(x, Tensor) and x.requires_grad]
        if not saved:
            _refuse(ctx.name())
        sources = saved + [x for x in gradients if x is not None and x.requires_grad]
        several = found if isinstance(found, tuple) else (found,)
        told = [None if x is None else _Refused.apply(x.detach(), ctx.name(), *sources) for x in several]
        return tuple(told) if isinstance(found, tuple) else told[0]

    return run


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args). Raises: RuntimeError under torch.func's transforms, which would look into its steps."""
    if torch._C._are_functorch_transforms_active():
        name = function.__name__.removeprefix("_")
        raise RuntimeError(
            f"{name} cannot be transformed by torch.func: use torch.autograd, or attend by backend='reference'"
        )
    return function.apply(*args)


def untransformed(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """For what counts blocks: under torch.func its tensors stay numbers that numpy can read."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with torch._C._DisableFuncTorch():
            return function(*args, **kwargs)

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, *sources: Tensor) -> Tensor:
        ctx.name_of = name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse(ctx.name_of)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"{name} is differentiable once: leave out create_graph=True, or attend by backend='reference'")
