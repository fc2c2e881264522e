"""AdamW whose moments exist only for the weights that are there."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pruning.sharding import own_part

Slots = dict[str, Tensor]


@final
class SparseAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that keeps compact moments of the active weights.

    For a parameter with n active weights: ``mean`` and ``square`` [n] and ``index`` [n] (int32 places in the flat
    parameter), 12 bytes an active weight in float32 against 8 bytes a weight of torch.optim.AdamW: less below a density
    of 2/3. A parameter that was never given to :meth:`activate` is dense and has no index. Step by step as torch's:

        w ← w · (1 − lr · weight_decay);  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²
        w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

    on active weights alone; absent ones are neither decayed nor moved. t counts the parameter's steps, not a weight's,
    as for a masked AdamW; the moments of a regrown weight start at 0. Every :class:`DynamicSparsity` tells this
    optimiser its masks by itself, in ``before_step``. Of a parameter that ranks hold in part (a DTensor, a run of
    spread experts) each has the moments of its own part, with places in that: nothing is exchanged.

    Raises: ValueError for lr, eps or weight_decay below 0 and betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def activate(self, parameter: nn.Parameter, mask: Bool[Tensor, "..."]) -> None:
        """From now on only the weights under ``mask`` have moments: those that had keep theirs, new ones start at 0.

        mask: of what this process holds. Raises: ValueError if it has another shape."""
        own, mask = own_part(parameter), own_part(mask)
        if mask.shape != own.shape:
            raise ValueError(f"mask must have the parameter's shape {list(own.shape)}, got {list(mask.shape)}")
        index = mask.reshape(-1).nonzero().squeeze(1).to(torch.int32)
        slots: Slots = self.state[parameter]
        if not slots:
            slots.update(_fresh(own, len(index)), index=index)
        if "index" in slots and torch.equal(index, slots["index"]):
            return
        for name in ("mean", "square"):
            # one moment at a time is spread out over the whole parameter: that memory is given back at once
            slots[name] = spread_out(slots[name], slots.get("index"), own.numel())[index.long()]
        slots["index"] = index

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, where: Bool[Tensor, "..."]) -> None:
        """Set the moments of these weights to 0, as far as they are active. where: of what this process holds."""
        slots: Slots = self.state[parameter]
        if not slots:
            return
        chosen = own_part(where).reshape(-1).to(parameter.device)
        chosen = chosen[slots["index"].long()] if "index" in slots else chosen
        for name in ("mean", "square"):
            slots[name].masked_fill_(chosen, 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the active weights of every parameter that has a gradient. Returns what closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``, places as whole numbers (torch would turn them into the parameter's dtype)."""
        super().load_state_dict(dict(state_dict))
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(ids, parameters, strict=True):
            if "index" in state_dict["state"].get(number, {}):
                self.state[parameter]["index"] = state_dict["state"][number]["index"].clone().to(parameter.device)

    def moment_bytes(self) -> int:
        """Bytes of all moments and places that are held now."""
        slots = [value for state in self.state.values() for name, value in state.items() if name != "step"]
        return sum(value.numel() * value.element_size() for value in slots)

    def _update(self, parameter: nn.Parameter, slopes: Tensor, group: Mapping[str, Any]) -> None:
        slots: Slots = self.state[parameter]
        (beta1, beta2), lr = group["betas"], group["lr"]
        own = own_part(parameter)
        if not slots:
            slots.update(_fresh(own, own.numel()))
        slots["step"] += 1
        t, mean, square = float(slots["step"]), slots["mean"], slots["square"]
        place = slots["index"].long() if "index" in slots else torch.arange(own.numel(), device=own.device)
        gradient, weight = own_part(slopes).take(place), own.take(place)
        weight.mul_(1 - lr * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square.sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**t))
        own.put_(place, weight)


def spread_out(moment: Float[Tensor, "n"], index: Int[Tensor, "n"] | None, size: int) -> Float[Tensor, "size"]:
    """A moment of the active weights at their places among ``size``, 0 elsewhere; index None: of all of them."""
    wide = torch.zeros(size, dtype=moment.dtype, device=moment.device)
    wide[slice(None) if index is None else index.long()] = moment
    return wide


def _fresh(own: Tensor, count: int) -> Slots:
    zeros = {name: torch.zeros(count, dtype=own.dtype, device=own.device) for name in ("mean", "square")}
    return {"step": torch.zeros(()), **zeros}
