"""The named moments of a training step at which sparse methods take part."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moe import Noise, SigmoidRouter
from pruning import Masks
from pruning.retraining import start_afresh
from pruning.sharding import sharded_as
from sparse_attn.selection.kmeans import KMeansRouting
from sparse_attn.selection.sinkhorn import SinkhornSorting
from training.data import Batch
from training.step import StepOutput
from training.warm_up import warming

Pass = Callable[[Batch], StepOutput]


@runtime_checkable
class Sparsifier(Protocol):
    """A method that takes part in training: a mask that is held, a schedule, dynamic sparsity, a router's bias."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Gradients are complete and not yet clipped. False vetoes the optimiser's step."""
        ...

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser has stepped, or was vetoed: masks go on weights, counts on biases, proximal steps are taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, in dicts with text keys and lists: all that resuming needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go on from a saved state."""
        ...


@runtime_checkable
class Parametriser(Protocol):
    """A sparsifier whose forward pass uses other weights than the optimiser's (movement, L0, Top-KAST)."""

    def parametrise(self) -> AbstractContextManager[Any]:
        """The context in which a step's forward and backward passes run."""
        ...


@runtime_checkable
class Masked(Protocol):
    """A sparsifier that tells which weights are there."""

    def masks(self) -> Masks:
        """Those that the model has now."""
        ...


@runtime_checkable
class Finisher(Protocol):
    """A sparsifier that leaves something to be done when training ends (Top-KAST: its zeros go into the weights)."""

    def finish(self) -> Any:
        """The last step has been taken."""
        ...


@runtime_checkable
class GateOwner(Protocol):
    """A sparsifier with parameters of its own: scores, gates, thresholds, noise levels."""

    def named_gates(self) -> dict[str, nn.Parameter]:
        """Them by name."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser of the model's parameters, each with its ``lr_factor`` and ``weight_decay``."""
        ...


@runtime_checkable
class Observer(Protocol):
    """A sparsifier that acts on evaluations."""

    def observe(self, held_out: float) -> None:
        """The loss on held-out text, in nats a token."""
        ...


@runtime_checkable
class Rewinder(Protocol):
    """A sparsifier that sets parameters back, all of them (lottery tickets)."""

    def rewound(self) -> bool:
        """Whether the last ``after_step`` did: then every optimiser starts afresh, its own it has seen to itself."""
        ...


@runtime_checkable
class Contributor(Protocol):
    """A sparsifier whose own loss has other passes than the batch's (a Fisher penalty)."""

    def contribute(self) -> None:
        """The batch's gradients are complete, the weights still those of its passes: add one's own gradients."""
        ...


@runtime_checkable
class Drawer(Protocol):
    """A sparsifier that draws for the rows of each forward pass (variational dropout)."""

    def draw_from(self, noise: Noise | None) -> None:
        """The next passes are of these sequences; None: torch's global generators."""
        ...


@runtime_checkable
class Reader(Protocol):
    """A sparsifier whose passes read parameters that are not the model's (the noise levels of variational dropout)."""

    def pass_parameters(self) -> list[Tensor]:
        """Those that take the gradients of this process's passes now."""
        ...


@runtime_checkable
class Attacker(Protocol):
    """A sparsifier that trains on the worst change of its inputs, looked for before a pass (robust rewiring)."""

    def attack_rows(self, ids: Tensor | None) -> None:
        """The next passes are of these token ids [B, L]; None: of others."""
        ...


def add_gates(sparsifiers: Sequence[Sparsifier], optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the sparsifiers' own parameters, as groups of their own."""
    for sparsifier in sparsifiers:
        for group in sparsifier.parameter_groups() if isinstance(sparsifier, GateOwner) else []:
            optimizer.add_param_group(group)


def gate_moments(sparsifiers: Sequence[Sparsifier], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state of the sparsifiers' own parameters, for a checkpoint."""
    return {name: dict(optimizer.state.get(gate, {})) for name, gate in _all_gates(sparsifiers).items()}


def load_gate_moments(
    sparsifiers: Sequence[Sparsifier], optimizer: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """The inverse of :func:`gate_moments`. Raises: ValueError if the parameters are not those of these sparsifiers."""
    gates = _all_gates(sparsifiers)
    if saved.keys() != gates.keys():
        odd = sorted(saved.keys() ^ gates.keys())
        raise ValueError(f"the optimiser's state must be that of {len(gates)} gates, got {odd[0]!r} besides")
    for name, gate in gates.items():
        optimizer.state[gate] = {
            slot: sharded_as(value.to(gate.device), gate.detach()) if value.ndim else
            value.to(gate.device) if optimizer.defaults.get("fused") else value
            for slot, value in saved[name].items()
        }  # fmt: skip


def _all_gates(sparsifiers: Sequence[Sparsifier]) -> dict[str, nn.Parameter]:
    return {
        f"{index}:{name}": gate
        for index, sparsifier in enumerate(sparsifiers)
        if isinstance(sparsifier, GateOwner)
        for name, gate in sparsifier.named_gates().items()
    }


def observe_all(sparsifiers: Sequence[Sparsifier], held_out: float) -> None:
    """Tell every sparsifier that asks the loss of an evaluation."""
    for sparsifier in sparsifiers:
        if isinstance(sparsifier, Observer):
            sparsifier.observe(held_out)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, and parametrisations are deterministic."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def settle_all(
    sparsifiers: Sequence[Sparsifier], optimizer: torch.optim.Optimizer, others: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Tell every sparsifier that the step was taken or vetoed. others: of parameters that ``optimizer`` has not (tables
    of memories); they forget their moments where a sparsifier set all parameters back."""
    for sparsifier in sparsifiers:
        sparsifier.after_step(optimizer)
        if isinstance(sparsifier, Rewinder) and sparsifier.rewound():
            for other in others:
                start_afresh(other)


def finish_all(sparsifiers: Sequence[Sparsifier]) -> None:
    """Tell every sparsifier that waits for it that the last step has been taken."""
    for sparsifier in sparsifiers:
        if isinstance(sparsifier, Finisher):
            sparsifier.finish()


@contextmanager
def parametrised(sparsifiers: Sequence[Sparsifier]) -> Iterator[None]:
    """The contexts of all sparsifiers that have one, entered in order."""
    with ExitStack() as stack:
        for sparsifier in sparsifiers:
            if isinstance(sparsifier, Parametriser):
                stack.enter_context(sparsifier.parametrise())
        yield


@contextmanager
def passes(sparsifiers: Sequence[Sparsifier]) -> Iterator[Callable[[Pass], Pass]]:
    """Around the passes of a training step: :func:`parametrised`, and at its end those that contribute do.

    Gives what makes a forward pass one that first tells those that draw for its rows, or attack them, whose they are.
    """
    with parametrised(sparsifiers):
        yield lambda run: partial(_telling, sparsifiers, run)
        _tell(sparsifiers, None)  # other passes are of other rows
        for sparsifier in sparsifiers:
            if isinstance(sparsifier, Contributor):
                sparsifier.contribute()


def _telling(sparsifiers: Sequence[Sparsifier], run: Pass, batch: Batch) -> StepOutput:
    _tell(sparsifiers, batch)
    return run(batch)


def _tell(sparsifiers: Sequence[Sparsifier], batch: Batch | None) -> None:
    draw_from(sparsifiers, None if batch is None else batch.noise)
    for sparsifier in sparsifiers:
        if isinstance(sparsifier, Attacker):
            sparsifier.attack_rows(None if batch is None else batch.inputs)


def draw_from(sparsifiers: Sequence[Sparsifier], noise: Noise | None) -> None:
    """Tell every sparsifier that draws for the rows of a pass whose these are."""
    for sparsifier in sparsifiers:
        if isinstance(sparsifier, Drawer):
            sparsifier.draw_from(noise)


def balance_routers(model: nn.Module) -> None:
    """Let what counts in a forward pass use its counts after the optimiser step.

    Routers that balance by a bias move it, k-means attention moves its centroids, Sinkhorn sorting draws new noise.
    While indexers warm up nothing moves.
    """
    if warming(model):
        return
    for module in model.modules():
        if isinstance(module, SigmoidRouter | KMeansRouting | SinkhornSorting):
            module.after_step()


def all_agree(sparsifiers: Sequence[Sparsifier], optimizer: torch.optim.Optimizer) -> bool:
    """Ask every sparsifier, even after a veto: each may read this step's gradients."""
    answers = [sparsifier.before_step(optimizer) for sparsifier in sparsifiers]
    return all(answers)
