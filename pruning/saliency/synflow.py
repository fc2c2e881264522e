"""SynFlow: scores without data that no layer's collapse survives."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Progress
from pruning.mask_selection import ranked_globally
from pruning.saliency.flow import KNOWN, check_degree, flow_input, flow_model, total_flow
from pruning.saliency.rounds import Select, scored_in_rounds


def synflow_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    *,
    sparsity: float | None = None,
    rounds: int = 100,
    select: Select | None = None,
    example: Tensor | None = None,
    progress: Progress = None,
) -> dict[str, Float[Tensor, "..."]]:
    """w · ∂R/∂w with R = 1ᵀ Π abs(W) 1, the flow through all paths of the network: float64, never negative.

    Tanaka et al. 2020 (arXiv:2006.05467), eq. 1 and algorithm 1: `rounds` exponential steps to `sparsity`, the flow
    taken again after each; a weight that went in an earlier round scores −inf. Without a sparsity the flow is taken
    once. The scores of each layer add up to R (those of q, k and v to a third of it each, of gate and up to a half), so
    that the fewer weights a layer has left the more each carries, and none goes empty while others can give. All scores
    are known up to one factor. The model is copied in float64 and its flow made by `flow_model`; it is not touched
    itself.
    example: token ids, or an input, of the shape that the model takes. select(scores, sparsity) → masks makes the
    rounds (None: one ranking over all matrices); progress wraps them.
    Raises: ValueError for rounds < 1, a sparsity outside [0, 1), a model whose flow is not of degree 1, and a
    weight that no flow reaches."""
    flow, given = flow_model(model), flow_input(model, example)
    copies = _copied(model, flow, weights)
    check_degree(flow, given)
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    for copied in copies.values():
        copied.requires_grad_(True)
    score = partial(_flow_scores, flow, given, copies)
    dry = [name for name, found in score().items() if not found.any() and copies[name].any()]
    if dry:
        raise ValueError(f"flow must reach every weight, got none in {dry[0]!r}: {KNOWN}; weights= leaves it out")
    if sparsity is None:
        return score()
    select = select or ranked_globally
    return scored_in_rounds(copies, score, sparsity=sparsity, rounds=rounds, select=select, progress=progress)


def _copied(model: nn.Module, flow: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The flow model's parameter of each weight, in the order of the weights."""
    names = {id(parameter): name for name, parameter in weights.items()}
    own = {name: names[id(p)] for name, p in model.named_parameters() if id(p) in names}
    copies = {own[name]: p for name, p in flow.named_parameters() if name in own}
    foreign = [name for name in weights if name not in copies]
    if foreign:
        raise ValueError(f"weights must be parameters of the model, got {foreign[0]!r}")
    return {name: copies[name] for name in weights}


def _flow_scores(flow: nn.Module, given: Tensor, copies: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    with torch.enable_grad():
        total = total_flow(flow, given)
        found = torch.autograd.grad(total, list(copies.values()), allow_unused=True, materialize_grads=True)
    return {name: (copied.detach() * g).clamp_min(0) for (name, copied), g in zip(copies.items(), found, strict=True)}
