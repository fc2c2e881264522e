"""NeST: a sparse seed grows connections and neurons by gradient, then is pruned by magnitude."""

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, erk
from pruning.axes import Axis
from pruning.dynamic.base import DynamicSparsity, highest, lowest_active
from pruning.dynamic.bridges import Birth, Bridge, births, find_bridges, of_strength, watch
from pruning.structure import check_fraction


@final
class NeST(DynamicSparsity):
    """Dai, Yin & Jha 2017 (arXiv:1711.02017): grow, then prune.

    ``growths`` updates, every ``every`` steps, raise the connections of each matrix in equal steps from those of
    ``seed_sparsity`` to those of ``peak_sparsity``; ``prunings`` updates lower them to those of ``sparsity``, after
    which they rest. An update that grows first adds neurons, then switches on the absent connections of largest
    gradient magnitude, at 0 (policy 1). One that prunes drops the least magnitudes of each matrix (policy 4).

    Neurons grow inside the model's own width, which is the largest that they can reach: the seed has
    ``seed_width`` of the hidden neurons of each feed-forward, the others have no connection, and each growth adds an
    equal share. A new neuron connects the ⌈growth · in · out⌉ pairs of largest bridging gradient (:func:`births`), its
    weights then scaled to ``strength`` times the mean magnitude of the layer's (policy 2, equation 7; strength > 0.3
    works in the paper). It is born only where the matrices' connections leave room for it; where the neurons that
    there are cannot hold all connections of the schedule, the matrix keeps fewer. Stacked experts, and layers whose
    axes the model does not list, have all their neurons from the start. In a gated feed-forward both incoming matrices
    get the same values; the neuron's first effect is then of second order, and the rule for its sign a heuristic.
    Neurons that lost every connection are dead: `prune_neurons` removes them. history: (step, density in its passes and
    from then on), at first and after each update.

    Bridging gradients are collected by hooks in the passes of a growing step.
    axes: "neuron" axes; None takes the model's.
    Raises: ValueError unless 0 ≤ peak_sparsity ≤ sparsity, peak_sparsity ≤ seed_sparsity < 1, growths, prunings ≥ 1,
    seed_width and growth in (0, 1] and strength > 0; as :class:`DynamicSparsity`. RuntimeError in ``before_step`` if
    neurons are due and no forward and backward pass was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        seed_sparsity: float | None = None,
        peak_sparsity: float | None = None,
        allocation: Allocation | None = None,
        every: int = 100,
        growths: int = 5,
        prunings: int = 5,
        seed_width: float = 0.5,
        growth: float = 0.001,
        strength: float = 0.5,
        axes: Sequence[Axis] | None = None,
        weights: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_fraction("sparsity", sparsity)
        seed = (1 + sparsity) / 2 if seed_sparsity is None else seed_sparsity
        peak = max(0.0, 2 * sparsity - 1) if peak_sparsity is None else peak_sparsity
        _check(sparsity, seed, peak, growths, prunings, seed_width, growth, strength)
        self.growths, self.prunings, self.seed_width = growths, prunings, seed_width
        self.growth, self.strength, self.seed_sparsity, self.peak_sparsity = growth, strength, seed, peak
        self._axes, self._stages = axes, (seed, peak, sparsity)
        self._allocation = erk if allocation is None else allocation
        self._counts: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._bridges: list[Bridge] = []
        self._bridging: dict[str, Tensor] = {}
        super().__init__(model, sparsity=seed, allocation=self._plan, every=every, weights=weights, generator=generator)
        self.sparsity = sparsity
        self.history = [(0, 1 - self.masks().sparsity)]
        for bridge in self._bridges:
            watch(bridge, self._looking, self._adder(bridge.name))

    def initial(self, name: str, noise: Float[Tensor, "out in"], removed: int) -> Bool[Tensor, "out in"]:
        """Connections at random among the neurons of the seed."""
        open_places = self._open(name, noise)
        return highest(noise, open_places, min(noise.numel() - removed, int(open_places.sum())))

    def due(self) -> bool:
        """Every ``every`` steps, not at 0, until all growths and prunings are done."""
        return 0 < self.step <= self.every * (self.growths + self.prunings) and self.step % self.every == 0

    def update(self, optimizer: Optimizer) -> dict[str, Bool[Tensor, "out in"]]:
        """Grow neurons and connections, or prune connections: no update drops and grows, so nothing does both."""
        number = self.step // self.every
        if number <= self.growths:
            for bridge in self._bridges:
                self._grow_neurons(bridge, number)
        self._bridging.clear()
        for name, (weight, gradient, mask) in self.parts().items():
            change = self._target(name, number) - int(mask.sum())
            if number > self.growths:
                mask.copy_(lowest_active(weight, mask, max(0, -change)))
                continue
            free = self._open(name, mask) & ~mask
            grown = highest(gradient.abs(), free, min(max(0, change), int(free.sum())))
            weight.masked_fill_(grown, 0)
            mask.copy_(mask | grown)
        return {}

    def rewire(self, optimizer: Optimizer, change: Callable[[], Mapping[str, Tensor]]) -> None:
        """As every method's; the density is noted."""
        super().rewire(optimizer, change)
        self.history.append((self.step + 1, 1 - self.masks().sparsity))

    def grows_at(self, step: int) -> bool:
        """Whether the update of this step, if it has one, grows: it looks at the gradients of absent connections."""
        return 0 < step <= self.every * self.growths and step % self.every == 0

    def bridging_flops(self) -> int:
        """FLOPs a token of the bridging gradients of a growing step: 2 · in · out for each feed-forward's."""
        parameters = dict(self.model.named_parameters())
        return sum(
            2 * parameters[bridge.fan_in[0][0]].shape[1] * parameters[bridge.fan_out].shape[0]
            for bridge in self._bridges
        )

    def live(self) -> dict[str, Bool[Tensor, "size"]]:
        """Axis name → which of its neurons have been born."""
        return dict(self._live)

    def extra_state(self) -> dict[str, Tensor]:
        """Connections of each matrix in the seed, at the peak and in the end; neurons born; densities."""
        kept = {f"count:{n}": c for n, c in self._counts.items()} | {f"live:{n}": v for n, v in self._live.items()}
        return kept | {"history": torch.tensor(self.history, dtype=torch.float64)}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take all back."""
        self.history = [(int(step), density) for step, density in state["history"].tolist()]
        for kind, mine in (("count:", self._counts), ("live:", self._live)):
            for name in mine:
                mine[name].copy_(state[kind + name])

    def _plan(self, noise: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        """The allocation, asked for all three stages at once; called once the weights are known."""
        removed = [self._allocation(noise, stage) for stage in self._stages]
        self._counts = {n: torch.tensor([x.numel() - r[n] for r in removed]) for n, x in noise.items()}
        self._bridges = find_bridges(self.model, list(self._weights), self._axes)
        for bridge in self._bridges:
            alive = max(1, round(self.seed_width * bridge.size))
            self._live[bridge.name] = torch.arange(bridge.size) < alive
        return removed[0]

    def _open(self, name: str, like: Tensor) -> Bool[Tensor, "out in"]:
        """Places of a matrix [out, in] that belong to no unborn neuron."""
        places = torch.ones(like.shape, dtype=torch.bool, device=like.device)
        for bridge in self._bridges:
            live = self._live[bridge.name].to(like.device)
            for weight, first in bridge.fan_in:
                if weight == name:
                    places[first : first + bridge.size] &= live[:, None]
            if bridge.fan_out == name:
                places &= live
        return places

    def _target(self, name: str, number: int) -> int:
        """Connections of a matrix after an update, 1 being the first."""
        seed, peak, end = self._counts[name].tolist()
        if number <= self.growths:
            return seed + (peak - seed) * number // self.growths
        return peak + (end - peak) * (number - self.growths) // self.prunings

    def _grow_neurons(self, bridge: Bridge, number: int) -> None:
        live = self._live[bridge.name]
        seed = max(1, round(self.seed_width * bridge.size))
        count = seed + (bridge.size - seed) * number // self.growths - int(live.sum())
        if count <= 0:
            return
        made = births(self._reduced(bridge), growth=self.growth, count=count, generator=self.generator)
        unborn = (~live).nonzero().flatten().tolist()
        parts = self.parts()
        scales = {name: (parts[name][0].clone(), parts[name][2].clone()) for name in self._names(bridge)}
        for neuron, birth in zip(unborn, made, strict=False):
            if not self._room(bridge, birth, number):
                break
            self._give_birth(bridge, neuron, birth, scales)
            live[neuron] = True

    def _give_birth(
        self, bridge: Bridge, neuron: int, birth: Birth, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        parts = self.parts()
        for name, first in bridge.fan_in:
            weight, _, mask = parts[name]
            weight[first + neuron] = of_strength(birth.incoming, *scales[name], self.strength).to(weight)
            mask[first + neuron] = birth.incoming != 0
        weight, _, mask = parts[bridge.fan_out]
        weight[:, neuron] = of_strength(birth.outgoing, *scales[bridge.fan_out], self.strength).to(weight)
        mask[:, neuron] = birth.outgoing != 0

    def _room(self, bridge: Bridge, birth: Birth, number: int) -> bool:
        needed = dict.fromkeys(self._names(bridge), 0)
        for name, _ in bridge.fan_in:
            needed[name] += int((birth.incoming != 0).sum())
        needed[bridge.fan_out] += int((birth.outgoing != 0).sum())
        masks = {name: mask for name, (_, _, mask) in self.parts().items()}
        return all(int(masks[name].sum()) + more <= self._target(name, number) for name, more in needed.items())

    def _names(self, bridge: Bridge) -> list[str]:
        return list(dict.fromkeys([name for name, _ in bridge.fan_in] + [bridge.fan_out]))

    def _looking(self) -> bool:
        return self.due() and self.step // self.every <= self.growths and torch.is_grad_enabled()

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(found: Float[Tensor, "in out"]) -> None:
            self._bridging[name] = self._bridging[name] + found if name in self._bridging else found

        return add

    def _reduced(self, bridge: Bridge) -> Float[Tensor, "in out"]:
        """B of the whole batch, over all processes."""
        if bridge.name not in self._bridging:
            raise RuntimeError(
                f"NeST grows neurons of {bridge.name!r} at step {self.step}, but saw no forward and backward pass of"
                " that step: run both before before_step, or set seed_width=1"
            )
        total = self._bridging[bridge.name]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total


def _check(
    sparsity: float,
    seed: float,
    peak: float,
    growths: int,
    prunings: int,
    seed_width: float,
    growth: float,
    strength: float,
) -> None:
    if not 0 <= peak <= sparsity:
        raise ValueError(f"peak_sparsity must be in [0, sparsity={sparsity}], got {peak}")
    if not peak <= seed < 1:
        raise ValueError(f"seed_sparsity must be in [peak_sparsity={peak}, 1), got {seed}")
    for name, count in (("growths", growths), ("prunings", prunings)):
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    for name, share in (("seed_width", seed_width), ("growth", growth)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {share}")
    if not strength > 0:
        raise ValueError(f"strength must be > 0, got {strength}")
