"""What `prune` is asked for, and whether it can be: everything that needs no model is checked here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pruning.criteria import (
    ALLOCATIONS,
    CALIBRATED,
    CRITERIA,
    METHODS,
    check_name,
    check_pair,
    default_allocation,
    resolve_structure,
)
from pruning.structure import check_fraction, named_structure, parse_structure
from training.folders import MARKER
from training.prune_importance import IMPORTANCES

# in the order in which they go
UNITS = ("layers", "experts", "expert_neurons", "heads", "neurons", "width")
PARTIAL = ".partial"
BUDGETS = ("params", "flops", "latency")
COLUMNS_OF_SPARSEGPT = 128


def option(kind: str) -> str:
    """What a kind of units is asked for by: "expert_neurons" → "--expert-neurons"."""
    return f"--{kind.replace('_', '-')}"


@dataclass(frozen=True)
class PruneArguments:
    """Make a trained model smaller or sparse; save it with its masks, its numbers and a report page.

    Whole units go first (layers, experts and neurons inside them, heads, neurons, width: the model gets smaller), each
    by its importance on calibration text, then single weights are set to zero by --method. Loss and perplexity are
    measured before and after on text that is not the calibration text; of an encoder, which predicts no next token,
    how alike its embeddings of passages stay, and how many passages it finds.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint, a saved model, or a folder of Hugging Face transformers with a causal language
    model or a text encoder and its tokenizer (config.json and weights, or one .gguf file)."""
    target: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """Folder for the result; new or empty."""
    out: Path | None = None
    """The same as OUT."""
    sparsity: Annotated[float | None, tyro.conf.arg(aliases=["--weights"])] = None
    """Share of the weights of matrices to set to zero; embeddings, routers and the output head stay dense."""
    method: str = "magnitude"
    """Which weights go: magnitude, lamp, random, synflow; by text: correlation, gradient, grasp, obd, snip, taylor,
    woodfisher; layer by layer on text: wanda, sparsegpt, admm, obs, exact_obs, descent (n:m)."""
    structure: str | None = None
    """'2:4' (or another n:m, which implies the sparsity), 'block 16x16', 'row', 'column'; single weights if absent."""
    allocation: str | None = None
    """How the zeros are shared out: uniform, global, erk, lamp, owl, sensitivity, and for methods that go layer by
    layer also loss; uniform alone with n:m; the method's own if left out."""
    refit: bool = False
    """Solve the weights that stay by least squares on the calibration text, matrix by matrix: after a method that goes
    layer by layer, or after magnitude."""
    order: Literal["diag"] | None = None
    """diag: sparsegpt begins with the inputs that weigh most, not with the first."""
    scope: Literal["layerwise", "global"] | None = None
    """An older name: 'layerwise' is --allocation uniform, 'global' --allocation global."""
    heads: float = 0.0
    """Share of the attention heads to remove, least important first; they are gone, the model is smaller."""
    neurons: float = 0.0
    """Share of the feed-forward neurons to remove."""
    experts: float = 0.0
    """Share of the experts to remove."""
    expert_neurons: float = 0.0
    """Share of the neurons inside the experts to remove, by what they add; experts of a layer stay equally wide."""
    layers: float = 0.0
    """Share of the layers to remove."""
    width: float = 0.0
    """Share of the embedding's channels to remove."""
    budget: str | None = None
    """In place of shares: params=0.7, flops=0.5 or latency=0.6 removes the fewest units that bring the model to that
    share of its parameters, of the FLOPs of a token, or of the time of a pass measured here."""
    budget_units: str | None = None
    """Which units the budget takes, an equal share of each: heads,neurons (or experts, expert-neurons, layers, width);
    experts, heads and neurons, those that the model has, if left out."""
    importance: str = "gradient"
    """How heads and neurons are ranked. By the loss: gradient (of a gate on each), taylor, sensitivity, leave-one-out
    (slow), hard-concrete (gates that learn); by what they put out: confidence (heads), energy, variance, active,
    firing; without text: magnitude, random."""
    normalize: Literal["layer", "none"] | None = None
    """Whether scores of a layer are divided by their norm before layers are compared; as the importance's paper does
    if left out."""
    layerwise: bool = False
    """Remove the same share of heads, neurons, experts or their neurons from every layer, so that layers stay alike."""
    recover: int = 0
    """Steps of training after pruning, on other text than the held-out one; all zeros that matrices then have, of this
    run or an earlier one, are held."""
    recover_by: Literal["distill", "retrain"] = "distill"
    """distill: towards the outputs of the model before pruning; retrain: the next token of the text."""
    recover_rate: float = 1e-4
    """Highest learning rate of AdamW; it rises over a tenth of the steps and falls to 0."""
    recover_rank: int | None = None
    """Train low-rank adapters of this rank alone, and merge them without losing a zero; all weights if left out."""
    data: Annotated[str | None, tyro.conf.arg(aliases=["--corpus"])] = None
    """Text to calibrate and evaluate on, apart from each other: a file, a folder, a glob, 'stdlib' (the interpreter's
    own library) or 'hf:NAME'; a run's own text if left out, else 'stdlib'."""
    calibration_sequences: int = 64
    """Sequences that importance is measured on, and that calibrated methods see."""
    calibration_length: int | None = None
    """Tokens in each; 512 (of an encoder 128), or the model's longest if that is shorter."""
    batches: int | None = None
    """An older name: so many times --batch sequences, in place of --calibration-sequences."""
    eval_sequences: int = 64
    """Held-out sequences of the same length."""
    batch: int = 8
    """Sequences in a batch."""
    sensitivity: bool = False
    """Also measure how the loss rises when one matrix alone is pruned."""
    compact: bool = False
    """Also keep the model in a compact file, OUT/compact."""
    resume: bool = False
    """Go on with the stopped run in OUT, whose arguments must be the same."""
    json: bool = False
    """Print the numbers as JSON, not as a table."""
    seed: int = 0
    """Seed of the choice of text, and of random scores."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the weights; 'auto' leaves them as they are saved."""
    device: str = "auto"
    """Device."""

    @property
    def folder(self) -> Path:
        """Where the result goes. Raises: ValueError unless OUT or --out is given, once."""
        if (self.target is None) == (self.out is None):
            raise ValueError("give one folder for the result: prune MODEL OUT, or --out OUT")
        return self.target if self.target is not None else self.out  # type: ignore[return-value]

    @property
    def units(self) -> dict[str, float]:
        """Kind → share, of the units that go, in order."""
        return {kind: share for kind in UNITS if (share := getattr(self, kind))}

    @property
    def parsed_budget(self) -> tuple[str, float]:
        """What --budget bounds, and the share. Raises: ValueError unless it is NAME=SHARE, the share in (0, 1)."""
        name, _, text = (self.budget or "").partition("=")
        share = float(text) if re.fullmatch(r"\d*\.?\d+", text) else 0.0
        if name not in BUDGETS or not 0 < share < 1:
            raise ValueError(f"--budget must be {', '.join(f'{one}=SHARE' for one in BUDGETS)}, with a share in (0, 1) "
                             f"of what the model takes now, got {self.budget!r}")  # fmt: skip
        return name, share

    @property
    def budget_kinds(self) -> tuple[str, ...]:
        """The kinds that --budget-units names."""
        return () if self.budget_units is None else tuple(self.budget_units.replace(",", " ").replace("-", "_").split())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units that are known to go; of a budget without --budget-units heads and neurons, if the model has
        them."""
        if self.budget is None:
            return tuple(self.units)
        return self.budget_kinds or ("heads", "neurons")

    @property
    def prunes_weights(self) -> bool:
        """Whether weights are set to zero."""
        return bool(self.sparsity) or (self.structure is not None and ":" in self.structure)

    @property
    def by_layer(self) -> bool:
        """Whether weights go layer by layer, each on the outputs of the pruned layers before it."""
        return self.method in CALIBRATED or self.refit

    @property
    def chosen_allocation(self) -> str | None:
        """--allocation, or what --scope says."""
        scopes: Mapping[str | None, str | None] = {"layerwise": "uniform", "global": "global", None: None}
        return self.allocation if self.allocation is not None else scopes[self.scope]

    @property
    def sequences(self) -> int:
        """Calibration sequences."""
        return self.calibration_sequences if self.batches is None else self.batches * self.batch


def check_arguments(arguments: PruneArguments) -> None:
    """Raises: ValueError or OSError for what can be seen without the model: name, bound, value, and what to do."""
    _check_budget(arguments)
    if not arguments.kinds and not arguments.prunes_weights and arguments.sparsity is None:
        raise ValueError("say what to prune: --sparsity 0.5, --structure 2:4, --heads 0.3, --neurons, --experts, "
                         "--expert-neurons, --layers, --width, or --budget params=0.7")  # fmt: skip
    for name, value in {**{option(kind): getattr(arguments, kind) for kind in UNITS},
                        "--sparsity or --weights": arguments.sparsity or 0.0}.items():  # fmt: skip
        check_fraction(name, value)
    if not arguments.kinds and not arguments.prunes_weights:
        raise ValueError(f"--sparsity must be above 0 where nothing else is pruned, got {arguments.sparsity}")
    check_name("--method", arguments.method, METHODS)
    if arguments.allocation is not None:
        check_name("--allocation", arguments.allocation, ALLOCATIONS)
    _check_importance(arguments)
    _check_recovery(arguments)
    _check_numbers(arguments)
    _check_weights(arguments)
    _check_folder(arguments)


def _check_budget(arguments: PruneArguments) -> None:
    if arguments.budget is None:
        if arguments.budget_units is not None:
            raise ValueError(f"--budget-units goes with --budget params=0.7, got {arguments.budget_units!r} alone")
        return
    _ = arguments.parsed_budget
    for kind in arguments.budget_kinds:
        check_name("--budget-units", kind, UNITS)
    given: dict[str, object] = {option(kind): share for kind, share in arguments.units.items()}
    given |= {} if arguments.sparsity is None else {"--sparsity": arguments.sparsity}
    given |= {"--structure": arguments.structure} if arguments.prunes_weights and arguments.structure else {}
    given |= {"--layerwise": True} if arguments.layerwise else {}
    for name, value in given.items():
        raise ValueError(f"--budget {arguments.budget} says itself how much goes: leave out {name}, got {value}; "
                         "prune the result again for both")  # fmt: skip


def _check_importance(arguments: PruneArguments) -> None:
    check_name("--importance", arguments.importance, IMPORTANCES)
    ranked = [kind for kind in ("heads", "neurons") if kind in arguments.kinds]
    if not ranked and (arguments.importance != "gradient" or arguments.normalize is not None):
        raise ValueError("--importance and --normalize rank heads and neurons: give --heads 0.3 or --neurons 0.3 with "
                         "them")  # fmt: skip
    able = IMPORTANCES[arguments.importance].kinds
    for kind in ranked:
        if kind not in able:
            raise ValueError(f"--importance {arguments.importance} ranks {', '.join(able)}, got {kind}: give "
                             "--budget-units heads, or rank neurons in a run of their own")  # fmt: skip


def _check_recovery(arguments: PruneArguments) -> None:
    if arguments.recover < 0:
        raise ValueError(f"--recover must be at least 0 steps, got {arguments.recover}")
    if not arguments.recover:
        changed = {"--recover-by": arguments.recover_by != "distill", "--recover-rate": arguments.recover_rate != 1e-4,
                   "--recover-rank": arguments.recover_rank is not None}  # fmt: skip
        for name in (name for name, is_changed in changed.items() if is_changed):
            raise ValueError(f"{name} goes with --recover 200, the number of steps")
    if arguments.recover_rate <= 0:
        raise ValueError(f"--recover-rate must be above 0, got {arguments.recover_rate}")
    if arguments.recover_rank is not None and arguments.recover_rank < 1:
        raise ValueError(f"--recover-rank must be at least 1, got {arguments.recover_rank}")


def _check_numbers(arguments: PruneArguments) -> None:
    least = {"--batches": 1, "--batch": 1, "--eval-sequences": 1, "--calibration-length": 2}
    least["--calibration-sequences"] = 0
    for name, bound in least.items():
        value = getattr(arguments, name[2:].replace("-", "_"))
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
    needing = needs_text(arguments)
    if needing is not None and not arguments.sequences:
        raise ValueError(f"{needing} needs calibration text: --calibration-sequences must be at least 1, got 0")


def needs_text(arguments: PruneArguments) -> str | None:
    """The option that looks at calibration text; None if none does."""
    looking = [kind for kind in arguments.kinds if kind in ("layers", "experts", "expert_neurons")
               or (kind in ("heads", "neurons") and IMPORTANCES[arguments.importance].text)]  # fmt: skip
    if looking:
        return option(looking[0]) if arguments.budget is None else "--budget"
    if arguments.sensitivity:
        return "--sensitivity"
    if not arguments.prunes_weights:
        return None
    if arguments.refit:
        return "--refit"
    if arguments.method in CALIBRATED or CRITERIA[arguments.method].data:
        return f"--method {arguments.method}"
    return f"--allocation {arguments.allocation}" if arguments.allocation in ("owl", "sensitivity") else None


def check_encoder(arguments: PruneArguments) -> None:
    """Raises: ValueError for fewer passages than an encoder needs to be scored, or judged by."""
    if arguments.eval_sequences < 2:
        raise ValueError("--eval-sequences of an encoder must be at least 2, among which passages are found, got "
                         f"{arguments.eval_sequences}")  # fmt: skip
    if arguments.recover and arguments.recover_by == "retrain":
        raise ValueError("--recover-by retrain learns the next token, which an encoder does not predict: leave it out, "
                         "for distill")  # fmt: skip
    if arguments.recover and "width" in arguments.kinds:
        raise ValueError("--recover of an encoder learns its parent's embeddings, which must be as wide: leave out "
                         "the width that goes")  # fmt: skip
    needing = needs_text(arguments)
    if needing is not None and arguments.sequences < 2:
        raise ValueError(f"{needing} of an encoder is scored by which of several passages it finds: "
                         f"--calibration-sequences must be at least 2, got {arguments.sequences}")  # fmt: skip


def _check_weights(arguments: PruneArguments) -> None:
    method, structure = arguments.method, arguments.structure
    if arguments.allocation is not None and arguments.scope is not None:
        raise ValueError(f"--scope is an older name of --allocation: give one, got {arguments.scope!r} "
                         f"and {arguments.allocation!r}")  # fmt: skip
    if not arguments.prunes_weights:
        if structure is not None or method != "magnitude" or arguments.chosen_allocation is not None or (
            arguments.refit or arguments.order is not None
        ):  # fmt: skip
            raise ValueError("--method, --structure, --allocation, --refit and --order choose weights: give "
                             "--sparsity 0.5 with them")  # fmt: skip
        return
    resolve_structure(structure, arguments.sparsity)
    allocation = default_allocation(method, arguments.chosen_allocation, structure)
    _check_solving(arguments)
    if arguments.by_layer:
        _check_calibrated(method, allocation, structure)
    elif allocation == "loss":
        raise ValueError(f"--allocation loss goes with --method {', '.join(CALIBRATED)}, got {method!r}")
    else:
        check_pair(method, allocation, structure, None, None)


def _check_solving(arguments: PruneArguments) -> None:
    solved = ("magnitude", *CALIBRATED)
    if arguments.refit and arguments.method not in solved:
        raise ValueError(f"--refit goes with --method {', '.join(solved)}, got {arguments.method!r}")
    if arguments.order is not None and (arguments.method != "sparsegpt" or ":" in (arguments.structure or "")):
        raise ValueError(f"--order {arguments.order} goes with --method sparsegpt and single weights, got "
                         f"{arguments.method!r} and --structure {arguments.structure}")  # fmt: skip


def _check_calibrated(method: str, allocation: object, structure: str | None) -> None:
    if method == "descent" and structure is None:
        raise ValueError("--method descent solves groups of m inputs: give --structure 2:4")
    if structure is None:
        return
    named_structure(structure)
    if ":" in structure and allocation != "uniform":
        raise ValueError(f"--structure {structure} fixes every matrix's sparsity: --allocation must be uniform")
    if ":" not in structure and method != "wanda":
        raise ValueError(f"--method {method} chooses weights or n:m groups: --structure must be n:m, got {structure!r}")
    if ":" not in structure and allocation == "loss":
        raise ValueError(f"--structure {structure} takes whole tiles: --allocation loss shares out single weights")
    if method == "exact_obs":
        raise ValueError(f"--method exact_obs removes one weight at a time: leave out --structure, got {structure!r}")
    if method in ("descent", "sparsegpt") and COLUMNS_OF_SPARSEGPT % parse_structure(structure)[1]:
        raise ValueError(f"--structure of --method {method} must be n:m with m a divisor of {COLUMNS_OF_SPARSEGPT}, "
                         f"got {structure!r}")  # fmt: skip


def _check_folder(arguments: PruneArguments) -> None:
    out = arguments.folder
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file: give another")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if PARTIAL in names:
        if not arguments.resume:
            raise ValueError(f"{out} holds a stopped run: add --resume to go on with it, or give another --out")
        return
    if arguments.resume:
        raise FileNotFoundError(f"no stopped run in {out} to --resume: leave it out to start, or see prune.json there "
                                "if the run has ended")  # fmt: skip
    held = [name for name in names if name != MARKER]
    if held:
        raise ValueError(f"--out must hold no run or model, nor other files, {out} has {held[0]}: give another folder")
