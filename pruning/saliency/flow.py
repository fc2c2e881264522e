"""A model as a flow through its matrices: absolute weights, and everything that is not a matrix of degree 1."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pruning.saliency.flow_layers import Stream, flow_forward

KNOWN = ("SynFlow knows this library's models, those of transformers whose heads and neurons are known, and stacks of "
         "linear layers and activation modules")  # fmt: skip


def flow_model(model: nn.Module) -> nn.Module:
    """A float64 copy of `model` whose output R is of degree 1 in its input and conserved by its layers: the network of
    absolute weights of Tanaka et al. 2020 (arXiv:2006.05467), for transformers.

    Embeddings give ones, whatever the ids. Activations, dropout and turned positions are left out; biases are 0. A norm
    multiplies by its weight and divides by the mean of its input, taken as a constant: it scales all scores alike, and
    float64 never overflows. Where a layer multiplies paths, their geometric mean stands, so that the degree is 1 and
    no factor can go without the whole: silu(gate)·up is √(gate·up), and softmax(q·k)·v of head h is ∛((Σ_i q_i k_i)·v),
    keys and values repeated for their queries, queries and keys by the weights of their norm where they have one.
    Branches come one after the other: beside a residual stream that carries all flow by itself an empty branch would
    cost nothing. A mixture sends every token to all experts with weight 1/E, past its router; experts are parallel, so
    that single ones may go empty. A memory reads the mean of its values, weighted by the sum over heads of the mean
    score s = q·k of all keys, which is of degree 1 already: s · v, in PEER √(s · (u·x)v), with the gate of Memory+
    √(gate · (s · v)).
    Known are this library's models, those of transformers that `prunable_axes` knows, and any stack of linear layers,
    norms and activation modules. Whether the result is of degree 1, `check_degree` tells."""
    flow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.abs_()
            if name.rpartition(".")[2] == "bias":
                parameter.zero_()
    stream = Stream(post=any(getattr(m, "do_layer_norm_before", True) is False for m in flow.modules()))
    for module in flow.modules():
        made = flow_forward(module, stream)
        if made is not None:
            vars(module)["forward"] = made
    return flow


def flow_input(model: nn.Module, example: Tensor | None) -> Tensor:
    """What to call the flow model with: ones of the shape of `example`, or token ids of that shape, which become ones.

    None: two tokens for a model with an embedding, else one row of ones for its first linear layer.
    Raises: ValueError if a model without either gets no example."""
    device = next(model.parameters()).device
    if example is not None:
        made = torch.ones_like(example, dtype=torch.float64) if example.is_floating_point() else example
        return made.to(device)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return torch.zeros(1, 2, dtype=torch.long, device=device)
    first = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no embedding and no linear layer: pass example=")
    return torch.ones(1, first.in_features, dtype=torch.float64, device=device)


def total_flow(flow: nn.Module, given: Tensor) -> Tensor:
    """R = the sum of the model's outputs: its logits, its first output, or all tensors of a mapping."""
    output = flow(given)
    if isinstance(output, Mapping):
        return torch.stack([found.sum() for found in output.values() if isinstance(found, Tensor)]).sum()
    tensor = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return (output[0] if tensor is None else tensor).sum()


def check_degree(flow: nn.Module, given: Tensor) -> None:
    """Raises: ValueError unless R is of degree 1 in the input x of ones: Σ x · ∂R/∂x = R, after Euler."""
    ones: list[Tensor] = [given.clone().requires_grad_()] if given.is_floating_point() else []

    def keep(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        ones.append(output.requires_grad_())

    with ExitStack() as stack, torch.enable_grad():
        for module in flow.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(keep).remove)
        whole = total_flow(flow, ones[0] if ones else given)
        slopes = torch.autograd.grad(whole, ones, allow_unused=True, materialize_grads=True)
    total, found = whole.item(), sum((x.detach() * g).sum().item() for x, g in zip(ones, slopes, strict=True))
    if not abs(found - total) <= 1e-6 * abs(total):
        raise ValueError(
            f"{type(flow).__name__} must be of degree 1 in its input once its norms, gates, softmax and activation "
            f"modules are left out, got a flow of {total:g} and x·∂R/∂x = {found:g}: {KNOWN}"
        )
