"""From the [sparsify] table to a method that takes part in training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning import Masks, Sparsifier, erk, prunable_axes, prunable_weights, uniform
from pruning.agreement import follow_first
from pruning.allocation import guarded_ranking
from pruning.axes import Axis
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    Attack,
    DeepR,
    DynamicSparsity,
    NeST,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    StaticSparsity,
    TopKAST,
    Topology,
    banded,
    block_diagonal,
    locally_connected,
    small_world,
)
from pruning.learned import (
    L0,
    STR,
    L0Units,
    Movement,
    Proximal,
    Regularized,
    SoftMovement,
    UnitGates,
    VariationalDropout,
    VariationalUnits,
    group_lasso,
    hoyer_square,
    l1,
)
from pruning.prescribed import Prescribed, masks_before_training, masks_from
from pruning.retraining import (
    DenseSparseDense,
    EarlyBirdPruning,
    Feedback,
    GeneralizationDriven,
    HardThresholding,
    LearningCompression,
    NeuralWirings,
    Rewinding,
)
from pruning.schedules import Schedule, cubic, exponential, iterative, linear, one_shot, prunings, rewarmed, rewound
from pruning.sharding import as_wholes, spread_layouts
from pruning.structure import removal_count
from pruning.weights import matrices
from training.data import Batches, Data
from training.moments import Sparsifier as Method
from training.sparsify_config import (
    BEFORE,
    EARLY_BIRD_WINDOW,
    FINDING,
    READS,
    SparsifyConfig,
    last_update,
    sparse_dense_sparse,
)
from transformer import Transformer

FROM_THE_START = ("static", "set", "rigl", "snfs", "dsr", "deep_r", "top_kast", "nest", "preferential",
                  "robust_rewiring")  # fmt: skip
TOPOLOGIES: dict[str, Topology | None] = {
    "random": None,
    "banded": banded,
    "local": locally_connected,
    "block_diagonal": block_diagonal,
    "small_world": small_world(),
}
Options = Mapping[str, Any]
SCORED_BATCHES = 8


@dataclass(frozen=True)
class Pace:
    """What prunings do to the learning rate: step → the step whose rate is used, and → a factor on it.

    steps: of the schedule, where it is not the whole run's."""

    clock: Callable[[int], int] = lambda step: step
    factor: Callable[[int], float] = lambda step: 1.0
    steps: int | None = None


def make_sparsifiers(
    config: SparsifyConfig,
    model: Transformer,
    *,
    steps: int,
    seed: int = 0,
    calibration: Callable[[], Sequence[Tensor]] | None = None,
    masks: Masks | None = None,
) -> list[Method]:
    """The method of a [sparsify] section, none where it asks for no sparsity. seed: of what it draws.

    calibration: makes the token ids [B, L] on which 'snip' and 'grasp' score the initial weights. masks: found by
    :func:`masks_at_start` while the model was whole; needed where ranks hold it in part.
    Raises: ValueError for either without it, for a mask that does not fit the model, and as :func:`check_leaves`."""
    if config.method in FINDING:
        return [_finding(config, model, seed)]
    if config.mask is not None:
        return [Prescribed(model, masks_from(read_masks(config.mask), model))]
    if config.sparsity == 0:
        return []
    check_leaves(config, model)
    if config.method == "magnitude":
        allocation = guarded_ranking if config.scope == "global" else uniform
        return [Sparsifier(model, schedule=pruning_schedule(config, config.end), allocation=allocation)]
    if config.method in FROM_THE_START:
        return [_sparse_from_the_start(config, model, steps, seed)]
    if config.method in BEFORE:
        found = masks_at_start(config, model, seed=seed, calibration=calibration) if masks is None else masks
        return [] if found is None else [Prescribed(model, found)]
    return [_asked(config, model, steps)]


def check_leaves(config: SparsifyConfig, model: Transformer) -> None:
    """Raises: ValueError for a sparsity that leaves a matrix without a weight, where the sizes alone say so: under one
    ranking that keeps one weight of each, and Erdős–Rényi. Layer by layer, ⌊sparsity · n⌋ of n weights never go all."""
    ranked = config.method == "dnw" or (config.scope == "global" and "scope" in READS[config.method])
    if not ranked and not (config.method in FROM_THE_START and config.allocation == "erk"):
        return
    weights = as_wholes(prunable_weights(model), spread_layouts(model))
    parts = matrices({name: torch.empty(w.shape, device="meta") for name, w in weights.items() if w.numel()})
    total, least = sum(part.numel() for part in parts.values()), min(parts, key=lambda name: parts[name].numel())
    if ranked and removal_count(config.sparsity, total) > total - len(parts):
        raise ValueError(
            f"sparsify.sparsity must be <= {math.floor((1 - len(parts) / total) * 1e4) / 1e4}, so that each of"
            f" {len(parts)} matrices, the least of them {least!r} {list(parts[least].shape)}, keeps a weight, got"
            f" {config.sparsity}"
        )
    for name, count in () if ranked else erk(parts, config.sparsity).items():
        if count == parts[name].numel():
            raise ValueError(
                f"sparsify.sparsity must leave {name!r} {list(parts[name].shape)} a weight under sparsify.allocation ="
                f" 'erk', got {config.sparsity}"
            )


def calibration_ids(data: Data, *, batch: int, length: int, seed: int, device: torch.device) -> list[Tensor]:
    """The token ids [B, L] of the first :data:`SCORED_BATCHES` batches of a run."""
    batches = Batches(data.train, batch=batch, length=length, seed=seed)
    return [batches.next().inputs.to(device) for _ in range(SCORED_BATCHES)]


def read_masks(path: Path) -> Masks:
    """Of a file of `Masks.save`, or the zeros of a model saved in a folder.

    Raises: FileNotFoundError; ValueError for a file that is damaged, and where nothing is masked."""
    masks = Masks.of(Transformer.from_pretrained(path)) if path.is_dir() else Masks.load(path)
    if not masks.zeros:
        raise ValueError(f"{path} must have zeros, got none in {masks.total:,} weights")
    return masks


def masks_at_start(
    config: SparsifyConfig,
    model: Transformer,
    *,
    seed: int = 0,
    calibration: Callable[[], Sequence[Tensor]] | None = None,
) -> Masks | None:
    """The masks of a method that looks at the initial weights, put on them; None for any other. Ranks that hold the
    whole model take rank 0's, and its weights. Raises: as :func:`pruning.prescribed.masks_before_training`."""
    if config.method not in BEFORE or config.sparsity == 0:
        return None

    def other() -> Transformer:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return Transformer(model.config)

    masks = masks_before_training(
        model,
        method=config.method,
        sparsity=config.sparsity,
        calibration=calibration() if calibration is not None and config.method in ("snip", "grasp") else None,
        shuffle=config.shuffle,
        build=other if config.reinitialise else None,
        generator=torch.Generator().manual_seed(seed),
    )
    follow_first([*masks.kept.values(), *model.parameters()])
    return masks


def make_pace(config: SparsifyConfig, *, steps: int, warmup: int) -> Pace:
    """How the learning rate follows the prunings of a [sparsify] section. warmup: steps of a warm-up."""
    if config.method == "lottery" and config.sparsity:
        begin, every = config.begin, pass_steps(config, steps)
        return Pace(clock=lambda step: step if step < begin else begin + (step - begin) % every, steps=begin + every)
    if config.rate == "keep" or config.sparsity == 0:
        return Pace()
    end = config.end if config.method == "magnitude" else last_update(config, steps)
    pruned = [step for step in prunings(pruning_schedule(config, end), steps=steps) if step > 0]
    if config.rate == "rewarm":
        return Pace(factor=rewarmed(pruned, warmup=max(1, warmup)))
    return Pace(clock=rewound(pruned, to=warmup))


def pass_steps(config: SparsifyConfig, steps: int) -> int:
    """Steps of a pass of 'lottery' in a run of ``steps``."""
    return (steps - config.begin) // (config.rounds + 1)


def pruning_schedule(config: SparsifyConfig, end: int) -> Schedule:
    """Step → sparsity of magnitude, movement and feedback, which reach their share at ``end``."""
    if end <= config.begin:
        return one_shot(config.sparsity, step=config.begin)
    if config.schedule == "iterative":
        rounds = max(1, (end - config.begin) // config.every)
        return iterative(config.sparsity, begin=config.begin, every=config.every, rounds=rounds)
    make = {"cubic": cubic, "linear": linear, "exponential": exponential}[config.schedule]
    return make(config.sparsity, begin=config.begin, end=end, every=config.every)


def _sparse_from_the_start(config: SparsifyConfig, model: Transformer, steps: int, seed: int) -> Method:
    sizes: dict[str, Any] = {
        "sparsity": config.sparsity, "allocation": erk if config.allocation == "erk" else uniform,
    }  # fmt: skip
    if config.method == "top_kast":
        return TopKAST(model, every=config.every, **sizes)
    sizes["generator"] = torch.Generator().manual_seed(seed)
    stop = last_update(config, steps)
    if config.method == "deep_r":
        return DeepR(model, stop=stop, **sizes)
    if config.method == "robust_rewiring":
        return RobustRewiring(model, stop=stop, attack=Attack(config.attack) if config.attack else None, **sizes)
    if config.method == "static":
        return StaticSparsity(model, topology=TOPOLOGIES[config.topology], **sizes)
    if config.method == "nest":
        updates = max(2, min(stop, steps - 1) // config.every)
        return NeST(model, every=config.every, growths=updates // 2, prunings=updates - updates // 2, **sizes)
    kinds: dict[str, type[DynamicSparsity]] = {
        "set": SET, "rigl": RigL, "snfs": SNFS, "dsr": DSR, "preferential": PreferentialAttachment,
    }  # fmt: skip
    return kinds[config.method](model, every=config.every, stop=stop, fraction=config.fraction, **sizes)


def _finding(config: SparsifyConfig, model: Transformer, seed: int) -> Method:
    strong: Options = {} if config.strength is None else {"strength": config.strength}
    gates: Options = {**strong, "gate_lr": config.gate_lr}
    drawn: Options = {**gates, "generator": torch.Generator().manual_seed(seed)}
    made: dict[str, Callable[[], Method]] = {
        "soft_movement": lambda: SoftMovement(model, **gates),
        "l0": lambda: L0(model, **drawn),
        "l0_units": lambda: L0Units(model, **drawn),
        "str": lambda: STR(model, **gates),
        "variational": lambda: VariationalDropout(model, **drawn),
        "variational_units": lambda: VariationalUnits(model, **drawn),
        "proximal": lambda: Proximal(model, **strong),
        "group_proximal": lambda: Proximal(model, axes=_units(model), **strong),
    }
    return made[config.method]()


def _asked(config: SparsifyConfig, model: Transformer, steps: int) -> Method:
    strong: Options = {} if config.strength is None else {"strength": config.strength}
    spread: Options = {"allocation": guarded_ranking if config.scope == "global" else uniform}
    asked: Options = {"sparsity": config.sparsity, **spread}
    shrinking: Options = {**asked, **strong}
    gates: Options = {"sparsity": config.sparsity, "gate_lr": config.gate_lr, **strong}
    schedule = pruning_schedule(config, last_update(config, steps))
    gradual: Options = {"schedule": schedule, "every": config.every, **spread}
    begin, end = (config.begin, config.end) if config.end else (steps // 3, max(steps * 2 // 3, steps // 3 + 1))
    made: dict[str, Callable[[], Method]] = {
        "movement": lambda: Movement(model, gate_lr=config.gate_lr, **gradual),
        "feedback": lambda: Feedback(model, **gradual),
        "dnw": lambda: NeuralWirings(model, sparsity=config.sparsity),
        "iht": lambda: HardThresholding(
            model,
            sparse_steps=config.every,
            dense_steps=config.every,
            begin=sparse_dense_sparse(config, steps),
            **asked,
        ),
        "dsd": lambda: DenseSparseDense(model, begin=begin, end=end, **asked),
        "lc": lambda: LearningCompression(
            model, every=config.every, mu=1e-3 if config.strength is None else config.strength, **asked
        ),
        "generalization": lambda: GeneralizationDriven(
            model,
            begin=config.begin,
            most=config.fraction,
            when=config.when,
            criterion=config.criterion,
            **asked,
        ),
        "lottery": lambda: Rewinding(
            model, every=pass_steps(config, steps), rounds=config.rounds, rewind=config.begin, **asked
        ),
        "early_bird": lambda: EarlyBirdPruning(
            model,
            every=config.every,
            end=last_update(config, steps),
            window=EARLY_BIRD_WINDOW,
            relative=config.distance == "relative",
            **asked,
        ),
        "l1": lambda: Regularized(model, penalty=l1, **shrinking),
        "hoyer_square": lambda: Regularized(model, penalty=hoyer_square, **shrinking),
        "group_lasso": lambda: Regularized(model, penalty=partial(group_lasso, axes=_units(model)), **shrinking),
        "sigmoid_units": lambda: UnitGates(model, form="sigmoid", **gates),
        "softplus_units": lambda: UnitGates(model, form="softplus", **gates),
        "polarized_units": lambda: UnitGates(model, form="softplus", polarize=1.2, **gates),
    }
    return made[config.method]()


def _units(model: Transformer) -> list[Axis]:
    """Heads, neurons and experts."""
    return [axis for axis in prunable_axes(model) if axis.kind in ("head", "neuron", "expert")]
