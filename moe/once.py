"""Backward passes without a derivative of their own: a second derivative through them is an error, never a zero."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = Tensor | None | tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


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


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, *sources: Tensor) -> Tensor:
        ctx.name_of = name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse(ctx.name_of)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"{name} is differentiable once: leave out create_graph=True, or take derivatives by torch.func")
