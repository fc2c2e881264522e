"""What every method with a parametrisation shares: effective weights inside a context, the chain rule, checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pruning.masking import Masks, check_same, clear_gradients
from pruning.sharding import as_parts_of, as_wholes, own_part, put, sharded_as, spread_layouts, summed_over
from pruning.weights import check_dense_gradients, check_values, prunable_weights


class LearnedSparsity(ABC):
    """The model computes with w = f(θ, φ): θ are its own parameters, φ the gates (scores, thresholds) of the method.

    Inside ``parametrise()`` the parameters hold w, so that every layer, checkpointed, compiled or sharded by data, sees
    plain weights and ``.grad`` collects ∂L/∂w over all micro-batches and ranks; on leaving they hold θ again.
    ``before_step`` turns ∂L/∂w into ∂L/∂θ and ∂L/∂φ through f, and adds the gradient of ``loss()``. The optimiser owns
    θ as always, and φ by ``parameter_groups()``.

    >>> method = Movement(model, schedule=cubic(0.9, begin=100, end=800))
    >>> for group in method.parameter_groups():     # after model.to(device)
    ...     optimizer.add_param_group(group)
    >>> with method.parametrise():
    ...     model(ids, labels=ids).loss.backward()
    >>> if method.before_step(optimizer):
    ...     optimizer.step()
    >>> method.after_step(optimizer); optimizer.zero_grad()
    >>> method.finish()                             # plain weights, exact zeros, nothing left to apply

    In training mode (``model.training`` on entry) f may draw noise, from ``generator`` on the CPU, the same for all
    that enters in one step; in evaluation it is deterministic. gate_lr: factor on the learning rate for φ, in
    ``lr_factor`` and applied to ``lr`` by whoever sets rates. Ranks that hold the same weights and average their
    gradients stay alike, given the same seed. Of weights that ranks hold in part (FSDP2, split heads, spread experts;
    build it afterwards) f works on this process's part: gates of single weights are laid out as the weights are, others
    are whole on every rank, their gradients summed. What goes is chosen whole, as by one process.
    Raises: ValueError for a gate_lr or strength below 0, and for weights that are frozen (without a gradient their
    gates would stay where they are) or on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 0.0,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("strength", strength), ("gate_lr", gate_lr)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.model, self.strength, self.gate_lr, self.step, self.finished = model, strength, gate_lr, 0, False
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._drawn_from = self.generator.get_state()
        self._noise: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        self._weights = prunable_weights(model, weights)
        check_values(self._weights)
        check_dense_gradients(model, self._weights)
        for name, weight in self._weights.items():
            if not weight.requires_grad:
                raise ValueError(f"{type(self).__name__} learns from the gradients of the weights, got {name!r} with "
                                 "requires_grad=False: leave it out with weights=")  # fmt: skip
        self._layouts = spread_layouts(model)
        self._gates: dict[str, nn.Parameter] = {}
        self._held: Masks | None = None

    @abstractmethod
    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """w = f(θ, φ) for the parameter ``name``, differentiable in θ and in its gate; θ, w: this process's part."""

    def prepare(self) -> None:
        """Before the effective weights of evaluation are asked for: choose what goes, over all of them."""
        return

    def loss(self) -> Tensor:
        """The side loss, its coefficient included; ``before_step`` adds its gradient. 0 where there is none.

        Of weights that ranks hold in part, this process's share of it."""
        return torch.zeros(())

    def settle(self, optimizer: Optimizer) -> None:
        """After the optimiser's step: choose masks again, move multipliers."""
        return

    @contextmanager
    def parametrise(self) -> Iterator[None]:
        """Inside, the parameters hold the effective weights; on leaving θ comes back. Nothing once finished."""
        if self.finished:
            yield
            return
        own = {name: weight.data for name, weight in self._weights.items()}
        # FSDP2 gathers the bytes of its own parameters: it would not see another tensor in their place
        kept = {name: own_part(value).clone() for name, value in own.items() if isinstance(value, DTensor)}
        self._draw()
        with torch.no_grad():
            if not self.model.training:
                self.prepare()
            for name, weight in self._weights.items():
                value = self.effective(name, kept.get(name, own[name]), training=self.model.training).to(weight.dtype)
                _fill(weight, value, in_place=name in kept)
        try:
            yield
        finally:
            for name, value in own.items():
                _fill(self._weights[name], kept.get(name, value), in_place=name in kept)

    def before_step(self, optimizer: Optimizer) -> bool:
        """∂L/∂w in ``.grad`` becomes ∂L/∂θ, and the gates get their gradients. True: every step is taken.

        Once finished, the gradients of what is held at 0 are cleared."""
        if self.finished:
            clear_gradients(self.model, {} if self._held is None else self._held.kept)
            return True
        self._draw()
        for name, weight in self._weights.items():
            if weight.grad is not None:
                self._pull_back(name, weight, weight.grad)
        self._noise = {}
        self._add_loss()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step. Once finished: hold the zeros."""
        if self.finished and self._held is not None:
            self._held.apply(self.model)
            return
        self._drawn_from = self.generator.get_state()
        self.step += 1
        self.settle(optimizer)

    @torch.no_grad()
    def masks(self) -> Masks:
        """Where the weights that evaluation uses are not 0; once finished, those that are held."""
        if self._held is not None:
            return self._held
        self.prepare()
        kept = {name: self.effective(name, own_part(weight.data), training=False) != 0
                for name, weight in self._weights.items()}  # fmt: skip
        return Masks(self.wholes(kept))

    @torch.no_grad()
    def finish(self) -> Masks:
        """Write what evaluation uses into the parameters, zeros exact, and hold the zeros from now on."""
        if self._held is None:
            self.prepare()
            for name, weight in self._weights.items():
                own = own_part(weight.data)
                own.copy_(self.effective(name, own, training=False))
            self._held = Masks({name: weight != 0 for name, weight in self.views().items()})
            self._held.apply(self.model)  # −w · 0 is −0, which is other bits
            self.finished = True
        return self._held

    def named_gates(self) -> dict[str, nn.Parameter]:
        """The method's own parameters φ by name, on the device of the weights they belong to."""
        device = next(iter(self._weights.values())).device
        for gate in self._gates.values():
            if gate.device != device:
                gate.data = gate.data.to(device)
        return dict(self._gates)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For ``optimizer.add_param_group``: the gates, not decayed, at ``gate_lr`` times the learning rate.

        The trainer adds them to the optimiser of the model's parameters, and sets every group's rate to lr · lr_factor.
        Gates are not clipped: what is clipped is the model's gradient. One group for each mesh that gates are on,
        as a fused step takes tensors of one, or of none."""
        groups: dict[object, list[nn.Parameter]] = {}
        for gate in self.named_gates().values():
            groups.setdefault(gate.device_mesh if isinstance(gate, DTensor) else None, []).append(gate)
        return [{"params": gates, "weight_decay": 0.0, "lr_factor": self.gate_lr} for gates in groups.values()]

    def state_dict(self) -> dict[str, Any]:
        """Step, gates, generator, the zeros that are held, and what the method keeps besides."""
        return {
            "method": type(self).__name__,
            "step": self.step,
            "gates": {name: gate.detach() for name, gate in self._gates.items()},
            "generator": self._drawn_from,
            "held": None if self._held is None else self._held.state_dict(),
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Raises: ValueError for the state of another method or of another model."""
        if state.get("method") != type(self).__name__:
            raise ValueError(f"state must be one of {type(self).__name__}, got {state.get('method')!r}")
        shapes = {name: list(gate.shape) for name, gate in self._gates.items()}
        found = {name: list(gate.shape) for name, gate in state["gates"].items()}
        for name in [*shapes, *found]:
            if shapes.get(name) != found.get(name):
                raise ValueError(f"gate {name!r} must have shape {shapes.get(name)}, got {found.get(name)}")
        with torch.no_grad():
            for name, gate in self._gates.items():
                put(gate.data, state["gates"][name].to(gate.device))
        self.step, self._drawn_from = state["step"], state["generator"].cpu()
        self._held = None if state["held"] is None else self._own(state["held"])
        self.finished = self._held is not None
        self.load_extra_state(state["extra"])

    def extra_state(self) -> dict[str, Any]:
        """Tensors and JSON values that the method keeps besides its gates."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``extra_state`` gave. Raises: ValueError for what the method does not keep."""
        if state:
            raise ValueError(f"state of {type(self).__name__} must hold no extra values, got {sorted(state)}")

    def noise(self, name: str, shape: Sequence[int], kind: str) -> Tensor:
        """This step's draw for ``name``, "uniform" on (0, 1) or "normal", float32 on the device of the weights."""
        if name not in self._noise:
            device = next(iter(self._weights.values())).device
            drawn = torch.empty(list(shape))
            tiny = torch.finfo(torch.float32).eps
            if kind == "uniform":
                drawn.uniform_(generator=self.generator).clamp_(tiny, 1 - tiny)
            else:
                drawn.normal_(generator=self.generator)
            self._noise[name] = drawn.to(device)
        return self._noise[name]

    def _draw(self) -> None:
        """Start the step's draws anew: whoever enters within one step gets the same numbers."""
        self._noise = {}
        self.generator.set_state(self._drawn_from)

    def views(self) -> dict[str, Tensor]:
        """The values of the weights, without gradients: of those that ranks hold in part a DTensor of the whole."""
        return as_wholes({name: weight.data for name, weight in self._weights.items()}, self._layouts)

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of this process's part of the weights as the wholes, sharing their memory."""
        return as_parts_of(parts, self.views())

    def gate_part(self, name: str) -> Tensor:
        """This process's part of a gate of single weights."""
        return own_part(self._gates[name])

    def number_of_gates(self) -> int:
        """Entries of all gates, on all ranks together."""
        return sum(gate.numel() for gate in self._gates.values())

    @torch.enable_grad()
    def _pull_back(self, name: str, weight: nn.Parameter, slope: Tensor) -> None:
        theta = own_part(weight.detach()).requires_grad_()
        value = self.effective(name, theta, training=True)
        gates = [self._gates[name]] if name in self._gates else []
        found = torch.autograd.grad(value, [theta, *gates], own_part(slope).to(value.dtype), allow_unused=True)
        own_part(slope).copy_(torch.zeros_like(theta) if found[0] is None else found[0])
        for gate, part in zip(gates, found[1:], strict=True):
            _add(gate, part if part is None or isinstance(gate, DTensor) else summed_over(part, self.view(name)))

    @torch.enable_grad()
    def _add_loss(self) -> None:
        # leaves of their own: a hook of a parameter, as moe.shard_experts has, may scale what reaches it
        leaves = {name: own_part(weight.data).detach().requires_grad_() for name, weight in self._weights.items()}
        self._leaves = leaves
        value = self.loss()
        self._leaves = {}
        if not value.requires_grad:
            return
        found = torch.autograd.grad(value, [*leaves.values(), *self._gates.values()], allow_unused=True)
        for weight, part in zip(self._weights.values(), found, strict=False):
            add_to_part(weight, part)
        for gate, part in zip(self._gates.values(), found[len(leaves) :], strict=True):
            _add(gate, part)

    def part(self, name: str) -> Tensor:
        """This process's part of a weight, the one to compute a side loss from."""
        return self._leaves[name] if name in self._leaves else own_part(self._weights[name].data)

    def view(self, name: str) -> Tensor:
        """One of :meth:`views`."""
        return as_wholes({name: self._weights[name].data}, self._layouts)[name]

    def _own(self, masks: Mapping[str, Tensor]) -> Masks:
        views = self.views()
        check_same(masks, views)
        here = {name: mask.to(views[name].device) for name, mask in masks.items()}
        return Masks.from_state_dict({name: sharded_as(mask, views[name]) for name, mask in here.items()})

    def _own_gates(self, tensors: Mapping[str, Tensor]) -> None:
        self._gates = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}


def add_to_part(weight: nn.Parameter, part: Tensor | None) -> None:
    """Add to the gradient of what this process holds of a weight; None adds nothing."""
    if part is None:
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    own_part(weight.grad).add_(part)


def _add(parameter: nn.Parameter, part: Tensor | None) -> None:
    if part is not None:
        parameter.grad = part if parameter.grad is None else parameter.grad + part


def _fill(weight: nn.Parameter, value: Tensor, *, in_place: bool) -> None:
    if in_place:
        own_part(weight.data).copy_(value)
    else:
        weight.data = value
