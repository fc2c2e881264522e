"""The [sparsify] table of a run's config, and which of its settings go together."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

SparsifyMethod = Literal[
    "magnitude", "static", "set", "rigl", "snfs", "dsr", "deep_r", "top_kast",
    "nest", "preferential", "robust_rewiring", "snip", "grasp", "synflow", "random", "mask",
    "movement", "feedback", "dnw", "iht", "dsd", "lc", "generalization", "lottery", "early_bird",
    "l1", "hoyer_square", "group_lasso", "sigmoid_units", "softplus_units", "polarized_units",
    "soft_movement", "l0", "l0_units", "str", "variational", "variational_units", "proximal", "group_proximal",
]  # fmt: skip
# These find their sparsity; `strength` is what they are asked.
FINDING = ("soft_movement", "l0", "l0_units", "str", "variational", "variational_units", "proximal", "group_proximal")
# These move connections every `every` steps, before the step at which they rest.
UPDATING = ("set", "rigl", "snfs", "dsr", "preferential")
# These tell the optimiser which weights are there.
COMPACT = ("static", "set", "rigl", "snfs", "dsr", "deep_r", "nest", "preferential", "robust_rewiring")
# These reach their sparsity along a schedule; the last two choose masks at multiples of `every`.
GRADUAL = ("magnitude", "movement", "feedback")
# These choose their masks before the first step, from the initial weights.
BEFORE = ("snip", "grasp", "synflow", "random")
BEGINNING = (*GRADUAL, "iht", "dsd", "generalization", "lottery")
EARLY_BIRD_WINDOW = 5
STRONG = (*FINDING, "lc", "l1", "hoyer_square", "group_lasso", "sigmoid_units", "softplus_units", "polarized_units")
# With any method, and without one.
ALWAYS_READ = ("sparsity", "method", "fisher_penalty", "fisher_every", "curriculum", "curriculum_pool",
               "curriculum_begin", "curriculum_end", "curriculum_start")  # fmt: skip
_MOVING = ("fraction", "allocation", "end", "every")
_GATED = ("strength", "gate_lr")
_SHRINKING = ("strength", "scope")
_SANITY = ("shuffle", "reinitialise")
_ALONG = ("begin", "end", "every", "schedule", "scope", "rate")
# Method → what it reads besides.
READS: dict[str, tuple[str, ...]] = {
    "magnitude": _ALONG, "movement": ("gate_lr", *_ALONG), "feedback": _ALONG, "dnw": (),
    "static": ("topology", "allocation"), "set": _MOVING, "rigl": _MOVING, "snfs": _MOVING, "dsr": _MOVING,
    "preferential": _MOVING, "deep_r": ("allocation", "end"), "robust_rewiring": ("attack", "allocation", "end"),
    "top_kast": ("allocation", "every"), "nest": ("allocation", "end", "every"),
    "snip": _SANITY, "grasp": _SANITY, "synflow": _SANITY, "random": _SANITY, "mask": ("mask",),
    "iht": ("begin", "every", "scope"), "dsd": ("begin", "end", "scope"), "lc": ("strength", "every", "scope"),
    "generalization": ("fraction", "when", "criterion", "begin", "scope"), "lottery": ("begin", "rounds", "scope"),
    "early_bird": ("end", "every", "distance", "scope"),
    "l1": _SHRINKING, "hoyer_square": _SHRINKING, "group_lasso": _SHRINKING,
    "sigmoid_units": _GATED, "softplus_units": _GATED, "polarized_units": _GATED,
    "soft_movement": _GATED, "l0": _GATED, "l0_units": _GATED, "str": _GATED, "variational": _GATED,
    "variational_units": _GATED, "proximal": ("strength",), "group_proximal": ("strength",),
}  # fmt: skip


@dataclass(frozen=True)
class SparsifyConfig:
    """Weights or units pruned while training, or absent from the start; the zeros are held.

    A word that the method does not read (:data:`READS`) is refused unless it is as it is by itself."""

    sparsity: float = 0.0
    """Share of the weights of matrices (of units, for the methods of units) that is zero in the end; 0 prunes nothing.
    The methods that find their sparsity take 'strength' in its place."""
    method: SparsifyMethod = "magnitude"
    """'magnitude' prunes a dense start along a schedule. 'set', 'rigl', 'snfs', 'dsr', 'deep_r', 'preferential',
    'robust_rewiring' and 'top_kast' are sparse from the first step and move their connections; 'nest' starts sparser,
    grows connections and neurons, then prunes; 'static' keeps those that it starts with, 'snip', 'grasp', 'synflow' and
    'random' choose theirs from the initial weights, and 'mask' takes another model's, with its sparsity. 'movement',
    'feedback' and 'dnw' train dense weights through a masked forward pass; 'iht' and 'dsd' alternate sparse and dense
    phases, 'lc'
    pulls weights to their largest, 'generalization' prunes after evaluations; 'lottery' trains, prunes and rewinds in
    'rounds' before the pass that counts, 'early_bird' prunes once the mask has settled. 'l1', 'hoyer_square' and
    'group_lasso' shrink and prune at the end, 'sigmoid_units', 'softplus_units' and 'polarized_units' gate heads and
    neurons. These find their own sparsity: 'soft_movement', 'l0', 'str', 'variational' and 'proximal' for weights,
    'l0_units', 'variational_units' and 'group_proximal' for heads and neurons."""
    strength: float | None = None
    """Coefficient of the method's penalty; its own default if left out."""
    gate_lr: float = 10.0
    """Factor on the learning rate for scores, gates, thresholds and noise levels."""
    fraction: float = 0.3
    """Share of the connections that an update of set, rigl, snfs, dsr or preferential moves; of the weights that one
    evaluation of 'generalization' prunes at most, or of their mean statistic."""
    when: Literal["low", "high"] = "high"
    """At which generalisation loss 'generalization' prunes most: 'high', the further the held-out loss is above its
    best, as Prechelt (1997) does, the sparsity being a bound; 'low', its reverse, 'fraction' of what is left after each
    evaluation that is the best so far, which reaches the sparsity if there are enough of them."""
    criterion: Literal["magnitude", "statistic"] = "magnitude"
    """What 'generalization' prunes: the smallest weights, a share of them; or as Prechelt's lprune those whose test
    statistic (Finnoff, Hergert & Zimmermann 1993), gathered over the steps since the last evaluation, is below a share
    of its mean. 'fraction' is the most that the share can be, his 0.667."""
    mask: Path | None = None
    """Of 'mask': a file of `Masks.save`, or the folder of a saved model, whose zeros are the mask. Into a model of more
    or fewer layers it is stretched, each layer's repeated in its place."""
    shuffle: bool = False
    """Sanity check of snip, grasp, synflow and random: each matrix keeps as many weights, in places drawn anew."""
    reinitialise: bool = False
    """Sanity check of the same: under the masks found, the weights get other initial values."""
    topology: Literal["random", "banded", "local", "block_diagonal", "small_world"] = "random"
    """How 'static' lays its connections out."""
    attack: float = 0.05
    """Size of the change of the embeddings under which 'robust_rewiring' trains, in units of their RMS; 0 for none."""
    allocation: Literal["erk", "uniform"] = "erk"
    """How a method that is sparse from the start spreads its weights: Erdős–Rényi, or evenly."""
    begin: int = 0
    """Step at which pruning begins; for lottery, to which it rewinds. 0 for iht: as soon as the last phase can be a
    whole sparse one."""
    end: int = 0
    """Step at which magnitude pruning reaches its share, at or before 'begin' at once; at which movement and feedback
    do, or after which the connections of set, rigl, snfs, dsr, preferential, deep_r, robust_rewiring and nest rest, 0
    for three quarters of the training; at which 'early_bird' prunes at the latest (likewise); at which the sparse phase
    of dsd ends (0: begin and end at one and two thirds of the training)."""
    every: int = 50
    """Steps between choices of what to prune or move; of a phase of iht; between compression steps of lc."""
    rounds: int = 3
    """Prunings of 'lottery', each after a pass over equally many of the steps from 'begin', to which the weights and
    the learning rate are then wound back; one more pass trains what is left."""
    schedule: Literal["cubic", "linear", "exponential", "iterative"] = "cubic"
    """How magnitude, movement and feedback go from 'begin' to 'end': along a cubic (Zhu & Gupta 2017), evenly, with
    the same share of what is left in equal times, or in rounds of 'every' steps of retraining."""
    distance: Literal["absolute", "relative"] = "absolute"
    """How far 'early_bird' takes its mask to be from each of the last five, which must all be under 0.1: 'absolute',
    the share of all prunable weights in which two masks differ (You et al. 2020; above 95% sparsity no two differ by
    0.1, so that the sixth mask is taken); 'relative', that share over the largest that masks of their densities can
    reach, so that 0.1 says the same at every sparsity."""
    scope: Literal["layerwise", "global"] = "layerwise"
    """Whether weights are compared inside each matrix or over all of them, of which each then keeps at least one."""
    fisher_penalty: float = 0.0
    """Coefficient of the trace of the Fisher information of the weights that are not 0, which is estimated on a
    micro-batch of its own and added to the loss in every 'fisher_every'-th step (Jastrzebski et al. 2021); with any
    method, and without one. Replicas take the mean of estimates on their own rows of it. 0 for none."""
    fisher_every: int = 10
    """Steps between estimates of the Fisher penalty, the first of which is step 0."""
    curriculum: Literal["none", "low_fisher", "random"] = "none"
    """Which sequences training begins with: 'low_fisher' draws from a pool that opens with the steps, those of least
    Fisher trace first; 'random' opens as large a pool in a random order, its control. With any method, and without; on
    several processes 'low_fisher' needs all weights on each."""
    curriculum_pool: int = 256
    """Sequences of the pool."""
    curriculum_begin: int = 0
    """Step at which the pool is ranked, with the model as it is then, and drawing from it begins."""
    curriculum_end: int = 0
    """Step at which all of the pool is open and batches come from all text again; 0 for a fifth of the training after
    'curriculum_begin'."""
    curriculum_start: float = 0.2
    """Share of the pool that is open at 'curriculum_begin'."""
    rate: Literal["keep", "rewarm", "rewind"] = "keep"
    """What each pruning of magnitude, movement or feedback does to the learning rate: nothing, a warm-up of
    optim.warmup steps again, or the rate's schedule starting again after its warm-up (Renda et al. 2020)."""


def check_sparsify(config: SparsifyConfig, *, steps: int) -> None:
    """steps: of the training. Raises: ValueError, naming the field, its bound and its value."""
    if not 0 <= config.sparsity < 1:
        raise ValueError(f"sparsify.sparsity must be in [0, 1), got {config.sparsity}")
    if not 0 < config.fraction <= 1:
        raise ValueError(f"sparsify.fraction must be in (0, 1], got {config.fraction}")
    if config.method in FINDING and config.sparsity:
        raise ValueError(
            f"sparsify.sparsity must be 0 for method={config.method!r}, which finds its own (set sparsify.strength),"
            f" got {config.sparsity}"
        )
    _check_before(config)
    if config.strength is not None:
        if config.method not in STRONG:
            raise ValueError(f"sparsify.strength must be left out for method={config.method!r}, got {config.strength}")
        if not config.strength > 0:
            raise ValueError(f"sparsify.strength must be positive, got {config.strength}")
    if not config.gate_lr > 0:
        raise ValueError(f"sparsify.gate_lr must be positive, got {config.gate_lr}")
    if config.rate != "keep" and config.method not in ("magnitude", "movement", "feedback"):
        raise ValueError(f"sparsify.rate must be 'keep' for method={config.method!r}, got {config.rate!r}")
    _check_fisher(config, steps)
    if config.rounds < 1:
        raise ValueError(f"sparsify.rounds must be >= 1, got {config.rounds}")
    if prunes(config):
        check_read(config)
    if config.sparsity:
        _check_times(config, steps)
    if config.method == "lottery" and config.sparsity:
        left, passes = steps - config.begin, config.rounds + 1
        if left < passes or left % passes:
            raise ValueError(
                f"train.steps - sparsify.begin must be a multiple of sparsify.rounds + 1 = {passes}, got {left}: each"
                " pass has as many steps"
            )


def prunes(config: SparsifyConfig) -> bool:
    """Whether a method takes part: one that is asked for a sparsity, finds its own, or has another model's."""
    return config.sparsity > 0 or config.method in FINDING or config.method == "mask"


def check_read(config: SparsifyConfig) -> None:
    """Raises: ValueError for a word that the method does not read and that is not left as it is by itself, naming those
    that it reads."""
    reads = READS[config.method]
    for word in unread(config.method):
        if (value := getattr(config, word)) != getattr(SparsifyConfig, word):
            raise ValueError(
                f"sparsify.{word} must be left out for method={config.method!r}, which reads"
                f" {', '.join(reads) or 'sparsity alone'}, got {value!r}"
            )


def unread(method: SparsifyMethod) -> tuple[str, ...]:
    """The words of the table that the method does not read."""
    return tuple(word.name for word in fields(SparsifyConfig) if word.name not in (*ALWAYS_READ, *READS[method]))


def _check_fisher(config: SparsifyConfig, steps: int) -> None:
    if not 0 <= config.fisher_penalty < math.inf:
        raise ValueError(f"sparsify.fisher_penalty must be at least 0 and finite, got {config.fisher_penalty}")
    if config.fisher_penalty and not 1 <= config.fisher_every <= steps:
        raise ValueError(f"sparsify.fisher_every must be in [1, train.steps={steps}], got {config.fisher_every}")
    if config.curriculum == "none":
        return
    if config.curriculum_pool < 1:
        raise ValueError(f"sparsify.curriculum_pool must be >= 1, got {config.curriculum_pool}")
    if not 0 < config.curriculum_start <= 1:
        raise ValueError(f"sparsify.curriculum_start must be in (0, 1], got {config.curriculum_start}")
    begin, end = config.curriculum_begin, curriculum_end(config, steps)
    if not 0 <= begin < end <= steps:
        raise ValueError(
            f"sparsify.curriculum_begin and sparsify.curriculum_end must satisfy 0 <= begin < end <="
            f" train.steps={steps}, got {begin} and {end}"
        )


def curriculum_end(config: SparsifyConfig, steps: int) -> int:
    """The step at which all text is open: ``curriculum_end``, or a fifth of the training after the beginning."""
    return config.curriculum_end or min(steps, config.curriculum_begin + max(1, steps // 5))


def _check_before(config: SparsifyConfig) -> None:
    if (config.method == "mask") != (config.mask is not None):
        raise ValueError(
            f"sparsify.mask must be set for method='mask' and left out for others, got {config.mask} for"
            f" {config.method!r}"
        )
    if config.method == "mask" and config.sparsity:
        raise ValueError(f"sparsify.sparsity must be 0 for method='mask', which has its own, got {config.sparsity}")
    for name in ("shuffle", "reinitialise"):
        if getattr(config, name) and config.method not in BEFORE:
            raise ValueError(f"sparsify.{name} must be false unless method is one of {BEFORE}, got {config.method!r}")


def last_update(config: SparsifyConfig, steps: int) -> int:
    """The step from which connections rest: ``end``, or three quarters of the training."""
    return config.end or max(1, steps * 3 // 4)


def sparse_dense_sparse(config: SparsifyConfig, steps: int) -> int:
    """The step at which 'iht' begins: ``begin``, or the first from which its last phase is a whole sparse one."""
    return config.begin or (steps - config.every) % (2 * config.every)


def _check_times(config: SparsifyConfig, steps: int) -> None:
    """Raises: ValueError where what the method does every so often, or from some step on, would not come in time."""
    method, every = config.method, config.every
    if config.end < 0:
        raise ValueError(f"sparsify.end must be >= 0, got {config.end}")
    if method in BEGINNING and not 0 <= config.begin < steps:
        raise ValueError(f"sparsify.begin must be in [0, train.steps={steps}), got {config.begin}")
    rest = min(last_update(config, steps), steps)
    if method in UPDATING and every >= rest:
        raise ValueError(
            f"sparsify.every must be < {rest}, the step at which method={method!r} rests in a training of"
            f" {steps} steps, got {every}: it would never update"
        )
    if method in ("top_kast", "lc") and every >= steps:
        raise ValueError(f"sparsify.every must be < train.steps={steps} for method={method!r}, got {every}")
    if method == "nest" and 2 * every > min(rest, steps - 1):
        raise ValueError(
            f"sparsify.every must be <= {min(rest, steps - 1) // 2} in a training of {steps} steps, so that 'nest'"
            f" grows and then prunes, got {every}"
        )
    if method == "early_bird":
        _check_early_bird(config, steps)
    if method in GRADUAL:
        _check_gradual(config, steps)
    if method == "iht":
        _check_phases(config, steps)
    if method == "dsd":
        _check_dense_again(config, steps)


def _check_early_bird(config: SparsifyConfig, steps: int) -> None:
    end, masks = last_update(config, steps), EARLY_BIRD_WINDOW + 1
    if end > steps:
        raise ValueError(f"sparsify.end must be <= train.steps={steps}, or it may never prune, got {end}")
    if config.every * masks > end:
        raise ValueError(
            f"sparsify.every must be <= {end // masks}, so that the {masks} masks that show one to have settled are"
            f" drawn by step {end}, got {config.every}"
        )


def _check_gradual(config: SparsifyConfig, steps: int) -> None:
    end = config.end if config.method == "magnitude" else last_update(config, steps)
    if end > steps:
        raise ValueError(f"sparsify.end must be <= train.steps={steps}, got {end}: the sparsity would not be reached")
    if config.begin < end and config.every > end - config.begin:
        raise ValueError(
            f"sparsify.every must be <= {end - config.begin}, the steps from sparsify.begin to the end of pruning at"
            f" {end}, got {config.every}"
        )
    reached, last = max(end, config.begin), steps // config.every * config.every
    if config.method != "magnitude" and last < reached:
        raise ValueError(
            f"sparsify.every must have a multiple in [{reached}, train.steps={steps}], where the last masks are chosen,"
            f" got {config.every}"
        )


def _check_phases(config: SparsifyConfig, steps: int) -> None:
    begin, cycle = sparse_dense_sparse(config, steps), 2 * config.every
    if begin + config.every > steps:
        raise ValueError(
            f"sparsify.every must be <= {steps - config.begin}, the steps from sparsify.begin={config.begin} on, for"
            f" one sparse phase, got {config.every}"
        )
    if (steps - 1 - begin) % cycle >= config.every:
        later = begin + (steps - begin - config.every) % cycle
        raise ValueError(
            f"a training of {steps} steps with sparsify.begin={begin} and sparsify.every={config.every} ends in a dense"
            f" phase of 'iht', whose weights would then be cut: sparsify.begin must be {later}, or 0 for the first that"
            f" fits"
        )


def _check_dense_again(config: SparsifyConfig, steps: int) -> None:
    if not config.end and config.begin:
        raise ValueError(f"sparsify.begin must be 0 without sparsify.end for method='dsd', got {config.begin}")
    if config.end and not config.begin < config.end < steps:
        raise ValueError(
            f"sparsify.end must be in (sparsify.begin={config.begin}, train.steps={steps}) for method='dsd', which is"
            f" dense again from it on, got {config.end}"
        )


def check_evaluations(config: SparsifyConfig, *, steps: int, eval_every: int) -> None:
    """Raises: ValueError if 'generalization' would see no evaluation at which it may still prune."""
    last = (steps - 1) // eval_every * eval_every
    if config.method == "generalization" and config.sparsity and last < max(1, config.begin):
        raise ValueError(
            f"train.eval_every must have a multiple in [{max(1, config.begin)}, train.steps={steps}) for"
            f" method='generalization', which prunes after evaluations, got {eval_every}"
        )
