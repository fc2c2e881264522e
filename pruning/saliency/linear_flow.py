"""A model as a sum over its paths: absolute weights, and everything that is not a matrix made linear."""

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
    """A float64 copy of `model` whose output is linear in its embeddings and in each of its matrices, all taken
    absolute: the network of Tanaka et al. 2020 (arXiv:2006.05467), for transformers.

    Embeddings give ones, whatever the ids. Norms multiply by their weight; activations, dropout and positions are left
    out; biases are 0. A product of two paths becomes their sum, so that each keeps a share of the flow: silu(gate)·up
    is gate + up, and softmax(q·k)·v, which for equal tokens gives v whatever q and k are, is q + k + v, keys and values
    repeated for their queries. A mixture sends every token to all experts with weight 1/E, past its router.
    Known are this library's models, Llama-like ones of transformers, and any model of such parts, linear layers,
    convolutions and activation modules. Whether the result is linear, `check_linear` tells."""
    flow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.abs_()
            if name.rpartition(".")[2] == "bias":
                parameter.zero_()
    for module in flow.modules():
        made = _linear_forward(module)
        if made is not None:
            vars(module)["forward"] = made
    return flow


def _linear_forward(module: Any) -> Callable[..., Any] | None:
    for parts, besides in ATTENTIONS.items():
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
            query, key, value, output = (getattr(module, part) for part in parts)
            return _attention(query, key, value, output, module.head_dim, besides)
    for gate, up, down in FEEDFORWARDS:
        if isinstance(getattr(module, up, None), nn.Linear) and hasattr(module, down):
            return _feedforward(getattr(module, gate, None), getattr(module, up), getattr(module, down))
    if hasattr(module, "route") and hasattr(module, "experts"):
        return _mixture(module)
    if hasattr(module, "hidden_one") and hasattr(module, "forward_one"):
        # called past the module's own forward
        vars(module)["hidden_one"] = _hidden(module)
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return lambda ids: torch.ones(*ids.shape, module.embedding_dim, dtype=torch.float64, device=ids.device)
    if "Norm" in kind:
        return lambda x, *_: x if getattr(module, "weight", None) is None else x * module.weight
    is_torch = type(module).__module__ == "torch.nn.modules.activation" and kind != "MultiheadAttention"
    if is_torch or kind.endswith("Activation") or isinstance(module, nn.Dropout):
        return lambda x: x
    return None


def _attention(
    query: nn.Module, key: nn.Module, value: nn.Module, output: nn.Module, head_dim: int, besides: Callable[[], Any]
) -> Callable[..., Any]:
    def forward(x: Tensor | None = None, *_: Any, hidden_states: Tensor | None = None, **__: Any) -> Any:
        rows = hidden_states if x is None else x
        q = query(rows)
        shared = (key(rows) + value(rows)).unflatten(-1, (-1, head_dim))
        repeats = q.shape[-1] // head_dim // max(shared.shape[-2], 1)
        return output(q + shared.repeat_interleave(repeats, -2).flatten(-2)), besides()

    return forward


def _feedforward(gate: nn.Module | None, up: nn.Module, down: nn.Module) -> Callable[..., Tensor]:
    return lambda x: down(up(x) if gate is None else gate(x) + up(x))


def _mixture(layer: Any) -> Callable[..., Any]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Any:
        rows = x.flatten(0, -2)
        y = torch.stack([layer.experts.forward_one(e, rows) for e in range(layer.num_experts)]).mean(0)
        if layer.shared is not None:
            y = y + layer.shared.forward_one(0, rows)
        return y.view(x.shape), None

    return forward


def _hidden(experts: Any) -> Callable[..., Tensor]:
    def hidden_one(expert: int, rows: Tensor) -> Tensor:
        return (rows @ experts.up[expert]).unflatten(-1, (-1, experts.hidden)).sum(-2)

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


@torch.no_grad()
def check_linear(flow: nn.Module, given: Tensor) -> None:
    """Raises: ValueError if twice the input (of ones) does not give twice the flow."""
    whole = total_flow(flow, given).item()
    with ExitStack() as stack:
        for module in flow.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(lambda _, args, ones: 2 * ones).remove)
        doubled = total_flow(flow, given if not given.is_floating_point() else 2 * given).item()
    if not abs(doubled - 2 * whole) <= 1e-6 * abs(whole):
        raise ValueError(
            f"{type(flow).__name__} must be linear once its norms, gates, softmax and activation modules are, got "
            f"a flow of {doubled:g} from twice the input that gives {whole:g}: {KNOWN}"
        )
