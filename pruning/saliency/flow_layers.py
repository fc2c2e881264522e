"""What each kind of layer does in the flow of SynFlow; modules are known by their parts, whoever made them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NOTHING = type(None)


@dataclass(frozen=True)
class Attention:
    """The modules of an attention: projections to queries, keys and values (one, if fused), the norms of queries and
    keys, the projection after it (None: not its own); what calls it return besides, and how it names a head's size."""

    projections: tuple[str, ...]
    output: str | None
    besides: Callable[[], Any] = _NOTHING
    norms: tuple[str, str] = ("q_norm", "k_norm")
    head_dim: str = "head_dim"


ATTENTIONS = (
    Attention(("query", "key", "value"), "output", dict, ("query_norm", "key_norm")),
    Attention(("q_proj", "k_proj", "v_proj"), "o_proj"),
    Attention(("q_proj", "k_proj", "v_proj"), "out_proj"),
    Attention(("c_attn",), "c_proj"),
    Attention(("query", "key", "value"), None, head_dim="attention_head_size"),
)
FEEDFORWARDS = (("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj"), (None, "c_fc", "c_proj"))


class Stream:
    """The residual stream, which a branch takes away from what is added to it: what the last norm was given, or with
    `post`, where norms come after the sum, what it gave."""

    def __init__(self, *, post: bool = False) -> None:
        self.post = post
        self.last: Tensor | None = None

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x · weight / mean(x), the mean a constant."""
        mean = x.detach().mean()
        # nothing left to scale in a dead flow
        scaled = x / torch.where(mean > 0, mean, 1.0)
        y = scaled if weight is None else scaled * weight
        self.last = y if self.post else x
        return y

    def instead(self, y: Tensor) -> Tensor:
        """What to add to the stream so that y remains."""
        taken, self.last = self.last, None
        # OPT flattens its rows between the two
        fits = taken is not None and taken.shape[-1] == y.shape[-1] and taken.numel() == y.numel()
        return y - taken.view_as(y) if taken is not None and fits else y


def flow_forward(module: Any, stream: Stream) -> Callable[..., Any] | None:
    """What `module` does in the flow; None: as it is, its parts do the rest."""
    for kind in ATTENTIONS:
        parts = (*kind.projections, *([] if kind.output is None else [kind.output]))
        if hasattr(module, kind.head_dim) and all(_is_matrix(module, part) for part in parts):
            return _attention(module, kind, stream)
    for gate, up, down in FEEDFORWARDS:
        if _is_matrix(module, up) and hasattr(module, down):
            found = None if gate is None else getattr(module, gate, None)
            return _feedforward(found, getattr(module, up), getattr(module, down), stream)
    if hasattr(module, "experts"):
        return _mixture(module, stream) if hasattr(module, "route") else _stacked(module, stream)
    if hasattr(getattr(module, "keys", None), "matrix_inputs"):
        return _memory(module, stream)
    if hasattr(module, "hidden_one") and hasattr(module, "forward_one"):
        # called past the module's own forward
        hidden = _hidden(module)
        vars(module)["hidden_one"] = hidden
        vars(module)["forward_one"] = lambda expert, rows: hidden(expert, rows) @ module.down[expert].mT
        return None
    if _is_matrix(module, "fc1") and _is_matrix(module, "fc2"):
        # OPT's feed-forward has no module of its own: its last projection ends the branch
        vars(module.fc2)["forward"] = partial(_ending, module.fc2, stream)
        return None
    if _is_matrix(module, "dense") and hasattr(module, "LayerNorm"):
        # BERT adds the stream within: what comes of the branch alone goes on
        return lambda x, *_: module.LayerNorm(module.dense(x))
    return _elementwise(module, stream)


def _elementwise(module: Any, stream: Stream) -> Callable[..., Any] | None:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return lambda ids, *_, **__: torch.ones(
            *ids.shape, module.embedding_dim, dtype=torch.float64, device=module.weight.device
        )
    if "Norm" in kind:
        return lambda x, *_: stream.norm(x, getattr(module, "weight", None))
    is_torch = type(module).__module__ == "torch.nn.modules.activation" and kind != "MultiheadAttention"
    if is_torch or kind.endswith("Activation") or isinstance(module, nn.Dropout):
        return lambda x: x
    return None


def _is_matrix(module: Any, name: str) -> bool:
    found = getattr(module, name, None)
    return isinstance(found, nn.Linear) or type(found).__name__ == "Conv1D"


def _root(x: Tensor, degree: int) -> Tensor:
    """x^(1/degree), 0 with gradient 0 where x is 0: nothing flows through a dead product."""
    alive = x > 0
    return torch.where(alive, torch.where(alive, x, 1.0).pow(1 / degree), 0.0)


def _attention(module: Any, kind: Attention, stream: Stream) -> Callable[..., Any]:
    width = getattr(module, kind.head_dim)
    matrices = [getattr(module, name) for name in kind.projections]
    norms = [*(getattr(module, name, None) for name in kind.norms), None]

    def forward(x: Tensor | None = None, *_: Any, hidden_states: Tensor | None = None, **__: Any) -> Any:
        rows: Any = hidden_states if x is None else x
        if stream.post:
            stream.last = rows
        made = [matrix(rows) for matrix in matrices] if len(matrices) > 1 else matrices[0](rows).chunk(3, -1)
        q, k, v = (_heads(part, norm, width) for part, norm in zip(made, norms, strict=True))
        k, v = (part.repeat_interleave(q.shape[-2] // max(part.shape[-2], 1), -2) for part in (k, v))
        mixed = _root((q * k).sum(-1, keepdim=True) * v, 3).flatten(-2)
        y = mixed if kind.output is None else stream.instead(getattr(module, kind.output)(mixed))
        return y, kind.besides()

    return forward


def _heads(part: Tensor, norm: Any, width: int) -> Tensor:
    """[..., heads, width], by the weight of a norm over each head or over all of them."""
    if norm is not None:
        mean, gain = part.detach().mean(), norm.weight
        part = part * gain.repeat(part.shape[-1] // len(gain)) / torch.where(mean > 0, mean, 1.0)
    return part.unflatten(-1, (-1, width))


def _feedforward(gate: nn.Module | None, up: nn.Module, down: nn.Module, stream: Stream) -> Callable[..., Tensor]:
    # options of a call (the generator of dropout) do not change what flows
    return lambda x, **_: stream.instead(down(up(x) if gate is None else _root(gate(x) * up(x), 2)))


def _ending(matrix: nn.Linear, stream: Stream, x: Tensor) -> Tensor:
    return stream.instead(nn.functional.linear(x, matrix.weight, matrix.bias))


def _stacked(layer: Any, stream: Stream) -> Callable[..., Tensor] | None:
    """transformers' experts, past their router: gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""
    up, down = (getattr(layer.experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(up, Tensor) or not isinstance(down, Tensor):
        return None

    def forward(x: Tensor) -> Tensor:
        gate, other = torch.einsum("...d,efd->...ef", x, up).chunk(2, -1)
        return stream.instead(torch.einsum("...ef,edf->...d", _root(gate * other, 2), down) / len(up))

    return forward


def _mixture(layer: Any, stream: Stream) -> Callable[..., Any]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Any:
        rows = x.flatten(0, -2)
        y = torch.stack([layer.experts.forward_one(e, rows) for e in range(layer.num_experts)]).mean(0)
        if layer.shared is not None:
            y = y + layer.shared.forward_one(0, rows)
        return stream.instead(y.view(x.shape)), None

    return forward


def _memory(layer: Any, stream: Stream) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = x.flatten(0, -2)
        scores = _mean_score(layer.keys, rows)[:, None]
        if hasattr(layer, "values"):
            y = scores * layer.values.weight.mean(0)
            y = y if layer.gate is None else layer.output(_root(y * layer.gate(rows), 2))
        else:
            y = _root(scores * (rows @ layer.up.weight.mT @ layer.down.weight / len(layer.up.weight)), 2)
        return stream.instead(y.view(x.shape))

    return forward


def _mean_score(keys: Any, rows: Tensor) -> Tensor:
    """Σ over heads and halves of the mean over sub-keys of q·k, q scaled by its norm's weight alone."""
    query = keys.query(rows).unflatten(-1, (keys.heads, keys.key_dim))
    if keys.norm is not None:
        mean = query.detach().mean()
        gain = keys.norm.weight.view(-1, keys.key_dim)
        query = query * gain / torch.where(mean > 0, mean, 1.0)
    sub_keys = keys.weight.expand(keys.heads, -1, -1, -1).mean(2)
    return torch.einsum("rhsc,hsc->r", query.unflatten(-1, (2, -1)), sub_keys)


def _hidden(experts: Any) -> Callable[..., Tensor]:
    def hidden_one(expert: int, rows: Tensor) -> Tensor:
        parts = (rows @ experts.up[expert]).unflatten(-1, (-1, experts.hidden))
        return _root(parts.prod(-2), parts.shape[-2])

    return hidden_one
