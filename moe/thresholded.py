"""A feed-forward network that drops small activations, densely in training and without reading them in decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.activation import products_at
from moe.checks import at_least, magnitude, one_of, within
from moe.column_products import Case, DecodesSparsely, Execution, Kept, decodes, kept

Activation = Literal["swiglu", "reglu", "drelu", "relu", "relu2", "gelu"]
Method = Literal["hard", "cats", "teal", "cett"]
GATED = ("swiglu", "reglu", "drelu")


@dataclass(frozen=True)
class Thresholds:
    """Magnitudes up to which values count as zero; what they are compared with is the method's business.

    gate, up, down: at the input of that projection (teal); gate also for cats, down also for hard and cett.
    Raises: ValueError for a negative or NaN threshold.
    """

    gate: float = 0.0
    up: float = 0.0
    down: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gate", "up", "down"):
            magnitude(f"threshold {name}", getattr(self, name))


def uniform_thresholds(value: float) -> Thresholds:
    """The same magnitude at all three places."""
    return Thresholds(gate=value, up=value, down=value)


def drop(x: Float[Tensor, "*batch F"], threshold: float) -> Float[Tensor, "*batch F"]:
    """x where abs(x) > threshold, else 0; the gradient passes where a number does. NaN is kept, so that it is seen."""
    return torch.hardshrink(x, threshold)


def activate_gate(a: Float[Tensor, "*batch F"], activation: Activation) -> Float[Tensor, "*batch F"]:
    """silu for swiglu, relu for reglu and drelu."""
    return F.silu(a) if activation == "swiglu" else F.relu(a)


def activate_up(a: Float[Tensor, "*batch F"], activation: Activation) -> Float[Tensor, "*batch F"]:
    """What multiplies the gate: a itself, relu(a) for drelu. Without a gate: relu(a), relu(a)² or exact gelu(a)."""
    if activation in ("swiglu", "reglu"):
        return a
    if activation == "gelu":
        return F.gelu(a)
    return F.relu(a).square() if activation == "relu2" else F.relu(a)


class ThresholdedFeedForward(DecodesSparsely):
    """y = down(mask ⊙ h), where the mask zeroes the neurons, or inputs, whose magnitude is at most a threshold.

    h = silu(gate x) ⊙ up x (swiglu), relu(gate x) ⊙ up x (reglu), relu(gate x) ⊙ relu(up x) (drelu, arXiv:2406.05955);
    without a gate relu(up x), relu(up x)² (relu2, arXiv:2109.08668) or gelu(up x). A neuron i is dropped by

    - hard: abs(h_i) ≤ threshold, or all but the ``top_k`` largest abs(h_i) of each token;
    - cett: abs(h_i) · ‖down_i‖ ≤ threshold, the size of what i adds to the output (arXiv:2411.02335);
    - cats: abs(silu(gate x)_i) ≤ threshold (arXiv:2404.08763);
    - teal: nothing by neuron: the inputs x of gate and of up, and h, lose their small entries (arXiv:2408.14690).

    predictor: a module whose ``active(x)`` gives Bool [..., hidden]: other neurons are dropped, and none of their three
    weight rows is read (DejaVu, arXiv:2310.17157; see ``calibration.train_predictor``); not with teal.

    Magnitudes equal to the threshold are dropped, so that 0 drops exact zeros only. The gradient is the masked
    function's. Up to DECODE_ROWS rows on the CPU without a gradient, outside autocast, take the decode path: weights
    that meet a zero are not read, where ``execution`` "auto" found that faster than dense; "sparse" and "dense" force
    one. "auto" times each projection both ways, in turns, on the layer's own calls, and then the layer (``races``;
    the first two dozen), again for other thresholds, rows or threads, and after a thousand calls, then two, four …, as
    inputs change. The two ways differ in the last bits, so equal calls may too while it does. Sparse decoding holds a
    transposed second copy of the weights that it reads by column, made on first use, dropped by ``train()`` and where
    dense is faster, and remade after any change that torch counts and any step of an optimiser (not
    writes through ``.data``: call ``forget_tables``).
    Raises: ValueError for an unknown option, sizes that are no int or < 1, top_k outside [1, hidden] or with a
    method but hard, cats without a gate; in forward for another width.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Activation = "swiglu",
        method: Method = "hard",
        threshold: float | Thresholds = 0.0,
        top_k: int | None = None,
        predictor: nn.Module | None = None,
        execution: Execution = "auto",
    ) -> None:
        super().__init__()
        _check(dim, hidden, activation, method, top_k, execution)
        if predictor is not None and method == "teal":
            raise ValueError("method must be 'hard', 'cats' or 'cett' with a predictor, got 'teal'")
        self.dim, self.hidden, self.top_k = dim, hidden, top_k
        self.activation, self.method, self.execution = activation, method, execution
        self.thresholds = threshold if isinstance(threshold, Thresholds) else uniform_thresholds(threshold)
        self.gate = nn.Linear(dim, hidden, bias=False) if activation in GATED else None
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.predictor = predictor

    @classmethod
    def from_linear(
        cls,
        gate: nn.Linear | None,
        up: nn.Linear,
        down: nn.Linear,
        *,
        activation: Activation = "swiglu",
        method: Method = "hard",
        threshold: float | Thresholds = 0.0,
        top_k: int | None = None,
        predictor: nn.Module | None = None,
        execution: Execution = "auto",
    ) -> Self:
        """The layer over existing projections, which it shares and does not copy; biases are allowed.

        Raises: ValueError if the shapes do not fit together, or the gate's presence does not fit the activation.
        """
        dim, hidden = up.in_features, up.out_features
        expected = {"down": (dim, hidden)} | ({} if gate is None else {"gate": (hidden, dim)})
        for name, linear in (("gate", gate), ("down", down)):
            if linear is not None and tuple(linear.weight.shape) != expected[name]:
                raise ValueError(f"{name}.weight must have shape {expected[name]}, got {tuple(linear.weight.shape)}")
        if (gate is not None) != (activation in GATED):
            raise ValueError(f"gate must be {'given' if gate is None else 'None'} for activation={activation!r}")
        with torch.device("meta"):
            layer = cls(
                dim, hidden, activation=activation, method=method, threshold=threshold, top_k=top_k,
                predictor=predictor, execution=execution,
            )  # fmt: skip
        layer.gate, layer.up, layer.down = gate, up, down
        return layer.train(up.training)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """x [..., dim] to the same shape."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have width dim={self.dim}, got {x.shape[-1]}")
        if not self._decodes(x):
            return self._masked(x, nn.Module.__call__)
        case = self._case(x)
        return self.decided(
            case,
            dense=lambda: self._masked(x, _product),
            sparse=lambda: self._decode(x.reshape(-1, self.dim), case).view(x.shape),
        )

    def _masked(self, x: Float[Tensor, "*batch D"], call: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        """All of the dense arithmetic, with zeros where something is dropped."""
        active = self._predicted(x)
        gate_in, up_in = self._inputs(x)
        parts: dict[str, Any] = self._modules
        h = activate_up(call(parts["up"], up_in), self.activation)
        gate = parts.get("gate")
        if gate is not None:
            h = self.opened(activate_gate(call(gate, gate_in), self.activation)) * h
        return call(parts["down"], self.keep(_mask(h, active)))

    def opened(self, gate: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """The gate, after its activation, without what CATS drops."""
        return drop(gate, self.thresholds.gate) if self.method == "cats" else gate

    def keep(self, h: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """The neurons h, dropped ones zeroed; those of CATS are zeros already, by their gate."""
        if self.top_k is not None:
            chosen = h.detach().abs().topk(self.top_k, dim=-1).indices
            return h.masked_fill(torch.ones_like(h, dtype=torch.bool).scatter_(-1, chosen, False), 0.0)
        if self.method == "cett":
            size = h.detach().abs() * self._down_norms()
            return h.masked_fill(size <= self.thresholds.down, 0.0)
        return h if self.method == "cats" else drop(h, self.thresholds.down)

    def _inputs(self, x: Float[Tensor, "*batch D"]) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        if self.method != "teal":
            return x, x
        gate, up = self.thresholds.gate, self.thresholds.up
        left = drop(x, up)
        return left if gate == up else drop(x, gate), left

    def _down_norms(self) -> Float[Tensor, "F"]:
        if self.training or torch.is_grad_enabled():
            return _column_norms(self.down.weight.detach())
        return kept(self._norms, "down", self.down.weight, _column_norms)

    def start_anew(self) -> None:
        """Drop tables, norms and what was measured."""
        super().start_anew()
        self._norms: dict[str, Kept[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without norms, too."""
        return super().__getstate__() | {"_norms": {}}

    def forget_tables(self) -> None:
        """Drop what decoding keeps of the weights; it makes it again when it needs it."""
        super().forget_tables()
        self._norms.clear()

    def _decodes(self, x: Tensor) -> bool:
        if not decodes(x, self.dim, execution=self.execution, training=self.training):
            return False
        parts: dict[str, Any] = self._modules  # nn.Module's own look-up takes as long as dropping small entries
        gate, dtype = parts.get("gate"), x.dtype
        return (gate is None or _plain(gate, dtype)) and _plain(parts["up"], dtype) and _plain(parts["down"], dtype)

    def _case(self, x: Tensor) -> Case:
        dropped = (self.thresholds, self.top_k, self.predictor)
        return Case(x.numel() // self.dim, x.dtype, torch.get_num_threads(), dropped)

    def _decode(self, x: Float[Tensor, "n D"], case: Case) -> Float[Tensor, "n D"]:
        active = self._predicted(x)
        gate_in, up_in = self._inputs(x)
        if self.gate is None:
            up = self._columns("up", up_in, case) if active is None else self._rows("up", x, active, case)
            return self._columns("down", self.keep(_mask(activate_up(up, self.activation), active)), case)
        gate = self._columns("gate", gate_in, case) if active is None else self._rows("gate", x, active, case)
        gate = self.opened(activate_gate(gate, self.activation))
        if self.method == "teal":
            up = self._columns("up", up_in, case)
        else:
            wanted = gate != 0  # NaN too, so that it is seen
            up = self._rows("up", up_in, wanted if active is None else wanted & active, case)
        h = _mask(gate * activate_up(up, self.activation), active)
        return self._columns("down", self.keep(h), case)

    def _predicted(self, x: Float[Tensor, "*batch D"]) -> Bool[Tensor, "*batch F"] | None:
        return None if self.predictor is None else self.predictor.active(x)

    def _columns(self, name: str, x: Float[Tensor, "n F"], case: Case) -> Float[Tensor, "n O"]:
        """The projection ``name`` of x, without reading the columns that meet zeros only."""
        linear = getattr(self, name)
        if name != "down" and self.method != "teal":
            return _product(linear, x)
        return self.times_nonzeros(name, x, linear.weight, linear.bias, case)

    def _rows(
        self, name: str, x: Float[Tensor, "n D"], active: Bool[Tensor, "n F"], case: Case
    ) -> Float[Tensor, "n F"]:
        """The projection's active outputs, 0 elsewhere (or what dense gives there: the mask comes later)."""
        linear = getattr(self, name)

        def sparse() -> Tensor:
            y = products_at(x, linear.weight.detach(), active)
            return y if linear.bias is None else y.add_(linear.bias)

        return self.faster(
            name, case, dense=lambda: _product(linear, x), sparse=sparse,
            density=lambda: active.count_nonzero().item() / active.numel(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        places = {"teal": ("gate", "up", "down"), "cats": ("gate",)}.get(self.method, ("down",))
        limits = ", ".join(f"{place}={getattr(self.thresholds, place):.4g}" for place in places)
        limits = limits if self.top_k is None else f"top_k={self.top_k}"
        return f"activation={self.activation}, method={self.method}, {limits}, execution={self.execution}"


def _mask(h: Float[Tensor, "*batch F"], active: Bool[Tensor, "*batch F"] | None) -> Float[Tensor, "*batch F"]:
    return h if active is None else h.masked_fill(~active, 0.0)


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` of one without hooks, in less time: calling three modules takes as long as dropping entries."""
    own: dict[str, Any] = linear._parameters
    return F.linear(x, own["weight"], own["bias"])


def _column_norms(weight: Float[Tensor, "O F"]) -> Float[Tensor, "F"]:
    return torch.linalg.vector_norm(weight, dim=0)


def _plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """A linear map that a person has not hooked or parametrised, in the input's type: the decode path may go round."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    own: dict[str, Any] = linear._parameters
    return bool(own["weight"].dtype == dtype)


def _check(dim: int, hidden: int, activation: str, method: str, top_k: int | None, execution: str) -> None:
    at_least("dim", dim, 1)
    at_least("hidden", hidden, 1)
    options = (("activation", activation, Activation), ("method", method, Method), ("execution", execution, Execution))
    for name, value, kind in options:
        one_of(name, value, get_args(kind))
    if top_k is not None:
        within("top_k", top_k, 1, hidden, most_name="hidden")
        if method != "hard":
            raise ValueError(f"method must be 'hard' with top_k={top_k}, got {method!r}")
    if method == "cats" and activation not in GATED:
        raise ValueError(f"method 'cats' must have a gate ({', '.join(GATED)}), got activation={activation!r}")
