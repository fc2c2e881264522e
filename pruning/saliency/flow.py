"""A model as a flow through its matrices: absolute weights, and everything that is not a matrix of degree 1."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

# query, key, value and output projection; what an attention of this kind returns besides
ATTENTIONS: dict[tuple[str, str, str, str], Callable[[], Any]] = {
    ("query", "key", "value", "output"): dict,
    ("q_proj", "k_proj", "v_proj", "o_proj"): type(None),
}
KNOWN = "SynFlow knows this library's models, Llama-like ones, and stacks of linear layers and activation modules"
FEEDFORWARDS = (("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj"))


def flow_model(model: nn.Module) -> nn.Module:
    """A float64 copy of `model` whose output R is of degree 1 in its input and conserved by its layers: the network of
    absolute weights of Tanaka et al. 2020 (arXiv:2006.05467), for transformers.

    Embeddings give ones, whatever the ids. Activations, dropout and positions are left out; biases are 0. A norm
    multiplies by its weight and divides by the mean of its input, taken as a constant: it scales all scores alike, and
    float64 never overflows. Where a layer multiplies paths, their geometric mean stands, so that the degree is 1 and
    no factor can go without the whole: silu(gate)·up is √(gate·up), and softmax(q·k)·v of head h is ∛((Σ_i q_i k_i)·v),
    keys and values repeated for their queries. Branches come one after the other: beside a residual stream that carries
    all flow by itself an empty branch would cost nothing. A mixture sends every token to all experts with weight 1/E,
    past its router; experts are parallel, so that single ones may go empty.
    Known are this library's models, Llama-like ones of transformers, and any stack of linear layers, norms and
    activation modules. Whether the result is of degree 1, `check_degree` tells."""
    flow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.abs_()
            if name.rpartition(".")[2] == "bias":
                parameter.zero_()
    stream = _Stream()
    for module in flow.modules():
        made = _flow_forward(module, stream)
        if made is not None:
            vars(module)["forward"] = made
    return flow


class _Stream:
    """What the last norm was given: the residual stream, which a branch takes away from what is added to it."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x · weight / mean(x), the mean a constant."""
        self.last = x
        mean = x.detach().mean()
        # nothing left to scale in a dead flow
        scaled = x / torch.where(mean > 0, mean, 1.0)
        return scaled if weight is None else scaled * weight

    def instead(self, y: Tensor) -> Tensor:
        """What to add to the stream so that y remains."""
        taken, self.last = self.last, None
        return y if taken is None or taken.shape != y.shape else y - taken


def _flow_forward(module: Any, stream: _Stream) -> Callable[..., Any] | None:
    for parts, besides in ATTENTIONS.items():
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
            query, key, value, output = (getattr(module, part) for part in parts)
            return _attention(query, key, value, output, module.head_dim, besides, stream)
    for gate, up, down in FEEDFORWARDS:
        if isinstance(getattr(module, up, None), nn.Linear) and hasattr(module, down):
            return _feedforward(getattr(module, gate, None), getattr(module, up), getattr(module, down), stream)
    if hasattr(module, "route") and hasattr(module, "experts"):
        return _mixture(module, stream)
    if hasattr(module, "hidden_one") and hasattr(module, "forward_one"):
        # called past the module's own forward
        vars(module)["hidden_one"] = _hidden(module)
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return lambda ids: torch.ones(*ids.shape, module.embedding_dim, dtype=torch.float64, device=ids.device)
    if "Norm" in kind:
        return lambda x, *_: stream.norm(x, getattr(module, "weight", None))
    is_torch = type(module).__module__ == "torch.nn.modules.activation" and kind != "MultiheadAttention"
    if is_torch or kind.endswith("Activation") or isinstance(module, nn.Dropout):
        return lambda x: x
    return None


def _root(x: Tensor, degree: int) -> Tensor:
    """x^(1/degree), 0 with gradient 0 where x is 0: nothing flows through a dead product."""
    alive = x > 0
    return torch.where(alive, torch.where(alive, x, 1.0).pow(1 / degree), 0.0)


def _attention(
    query: nn.Module,
    key: nn.Module,
    value: nn.Module,
    output: nn.Module,
    head_dim: int,
    besides: Callable[[], Any],
    stream: _Stream,
) -> Callable[..., Any]:
    def forward(x: Tensor | None = None, *_: Any, hidden_states: Tensor | None = None, **__: Any) -> Any:
        rows = hidden_states if x is None else x
        q, k, v = (part(rows).unflatten(-1, (-1, head_dim)) for part in (query, key, value))
        k, v = (part.repeat_interleave(q.shape[-2] // max(part.shape[-2], 1), -2) for part in (k, v))
        mixed = _root((q * k).sum(-1, keepdim=True) * v, 3)
        return stream.instead(output(mixed.flatten(-2))), besides()

    return forward


def _feedforward(gate: nn.Module | None, up: nn.Module, down: nn.Module, stream: _Stream) -> Callable[..., Tensor]:
    # options of a call (the generator of dropout) do not change what flows
    return lambda x, **_: stream.instead(down(up(x) if gate is None else _root(gate(x) * up(x), 2)))


def _mixture(layer: Any, stream: _Stream) -> Callable[..., Any]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Any:
        rows = x.flatten(0, -2)
        y = torch.stack([layer.experts.forward_one(e, rows) for e in range(layer.num_experts)]).mean(0)
        if layer.shared is not None:
            y = y + layer.shared.forward_one(0, rows)
        return stream.instead(y.view(x.shape)), None

    return forward


def _hidden(experts: Any) -> Callable[..., Tensor]:
    def hidden_one(expert: int, rows: Tensor) -> Tensor:
        parts = (rows @ experts.up[expert]).unflatten(-1, (-1, experts.hidden))
        return _root(parts.prod(-2), parts.shape[-2])

    return hidden_one


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
    """R = the sum of the model's outputs (its logits, or first output)."""
    output = flow(given)
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
