"""The subcommand threshold: a trained model that leaves out small activations, calibrated on training text."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from rich.console import Console
from torch import Tensor

from moe import (
    ActivePredictor,
    AttentionThresholds,
    Foresight,
    Thresholds,
    calibrate_teal,
    calibrate_thresholds,
    foresight,
    train_predictors,
)
from moe.calibration import Allocation, CalibratedMethod, check_target, feedforward_inputs, thresholds_from_inputs
from training.commands import PROGRAM, Source, data_config, require_at_least, require_free
from training.data import Batches, Data
from training.evaluation import Evaluation, evaluate
from training.folders import only_user
from training.run import load_data, model_folder
from training.saved_model import open_model, save_made
from transformer import Transformer, own_foresight, train_own_predictors, with_thresholds
from transformer.predictors import has_predictors

# rows of each network that thresholds are taken from; batches of held-out text that predictors are judged on
SAMPLE, BATCHES_TOLD = 1024, 2


@dataclass(frozen=True)
class ThresholdArguments:
    """Let a trained model leave out small activations, so that decoding reads fewer weights; its own stay as they are.

    Thresholds are found on training text, and the loss on held-out text before and after is shown.
    """

    source: Source
    """A run's folder (its latest checkpoint is taken), a checkpoint, a saved model, or a folder of Hugging Face
    transformers (Llama and its kin)."""
    out: Path
    """Folder for the new model and its tokenizer."""
    method: Literal["teal", "cats", "cett", "hard", "dejavu"] = "teal"
    """What is left out: small inputs of every matrix (teal), neurons with a small gate (cats), with a small effect on
    the output (cett), or of small magnitude (hard). dejavu: cett's neurons, told beforehand by a small network of each
    layer, which is trained here, so that the matrix of the gate need not be read whole either. A model made with
    model.activation_predictor_rank keeps its own thresholds, and its networks learn which neurons those keep."""
    sparsity: float | None = None
    """Share that is left out, of inputs or neurons; 0.4 if neither this nor --error is given."""
    error: float | None = None
    """Instead: the largest relative error of each feed-forward network's output."""
    allocation: Allocation = "uniform"
    """How a sparsity is shared out: alike; where it costs least inside a block (teal); or with equal errors."""
    attention: bool = True
    """With teal and a sparsity, also for the projections of attention."""
    rank: int = 64
    """Rank of the networks that tell the neurons (dejavu), or a layer's smaller side if that is less."""
    recall: float = 0.95
    """Share of the neurons that are wanted which they shall tell (dejavu)."""
    steps: int = 300
    """Steps of their training (dejavu)."""
    batches: int = 2
    """Batches of eight sequences of training text to calibrate, and train those networks, on."""
    corpus: str | None = None
    """Other text than the run's own, named as in data.corpus."""
    length: int | None = None
    """Tokens of a sequence; the run's own if left out."""
    seed: int = 0
    """Seed of the sequences and of the rows that are drawn."""
    device: str = "cpu"
    """Device to calibrate on."""


@dataclass(frozen=True)
class Found:
    """Thresholds by module name, and where neurons are told beforehand by what."""

    feedforward: Mapping[str, Thresholds]
    attention: Mapping[str, AttentionThresholds] | None = None
    predictors: Mapping[str, ActivePredictor] | None = None


@dataclass(frozen=True)
class Made:
    """The new model, what was done in words, and what its predictors tell of held-out text, if they were trained."""

    model: Transformer
    what: str
    told: Foresight | None


def threshold_command(arguments: ThresholdArguments, console: Console) -> None:
    """Calibrate, save, and print what it costs.

    Raises: ValueError, before text is read, for options that do not go together, or an --out that holds a model.
    """
    sparsity = 0.4 if arguments.sparsity is None and arguments.error is None else arguments.sparsity
    _check(arguments, sparsity)
    folder = model_folder(arguments.source)
    model = open_model(folder).to(arguments.device)
    config = data_config(arguments.source, folder, arguments.corpus, arguments.length, model)
    own = has_predictors(model)
    if own:
        _check_own(arguments)
    data = load_data(config)
    before = _held_out(model, data, config.length)
    made = (_with_own if own else _with_found)(model, data, config.length, arguments, sparsity)
    after = _held_out(made.model, data, config.length)
    with only_user(arguments.out):
        save_made(made.model, arguments.out, source=folder)
    console.print(
        f"{arguments.method}, {made.what}:"
        f" {before.bits_per_byte:.4f} -> {after.bits_per_byte:.4f} bits per byte,"
        f" perplexity {math.exp(before.loss):.2f} -> {math.exp(after.loss):.2f}"
        f" ({after.tokens:,} held-out tokens), saved in {arguments.out}{_shown(made.told)}; decode with:\n"
        f"  {shlex.join([PROGRAM, 'generate', str(arguments.out)])}",
        highlight=False,
    )


def _check(arguments: ThresholdArguments, sparsity: float | None) -> None:
    check_target(sparsity, arguments.error, arguments.allocation, _method(arguments))
    counts = {"--batches": arguments.batches, "--length": arguments.length}
    require_at_least(1, counts | {"--rank": arguments.rank, "--steps": arguments.steps})
    if not 0 < arguments.recall <= 1:
        raise ValueError(f"--recall must be in (0, 1], got {arguments.recall:g}")
    for name in ("rank", "recall", "steps"):
        if arguments.method != "dejavu" and getattr(arguments, name) != getattr(ThresholdArguments, name):
            raise ValueError(f"--{name} belongs to --method dejavu, got {arguments.method}")
    if _with_attention(arguments, sparsity) and arguments.allocation == "equal_error":
        raise ValueError("--allocation equal_error is of feed-forward layers alone: add --no-attention")
    require_free(arguments.out)


def _check_own(arguments: ThresholdArguments) -> None:
    """Raises: ValueError for what a model with predictors and thresholds of its own does not take."""
    if arguments.method != "dejavu":
        raise ValueError(f"--method must be dejavu for a model made with predictors, got {arguments.method}")
    for name in ("sparsity", "error", "allocation", "rank"):
        value = getattr(arguments, name)
        if value != getattr(ThresholdArguments, name):
            raise ValueError(
                f"--{name} must be left out for a model made with predictors: its thresholds and rank stay, got {value}"
            )


def _with_own(
    model: Transformer, data: Data, length: int, arguments: ThresholdArguments, sparsity: float | None
) -> Made:
    """The predictors that it was made with, trained."""
    batches = _batches(data, arguments, length)
    made = train_own_predictors(
        model, batches, rows=sum(ids.numel() for ids in batches), recall=arguments.recall, steps=arguments.steps,
        generator=torch.Generator().manual_seed(arguments.seed),
    )  # fmt: skip
    ids = _judged_on(data, length, arguments.device)
    return Made(made, "the model's own thresholds", own_foresight(made, ids.split(8), rows=ids.numel()))


def _with_found(
    model: Transformer, data: Data, length: int, arguments: ThresholdArguments, sparsity: float | None
) -> Made:
    """Thresholds, and with dejavu predictors, that it had not."""
    found = _calibrated(model, _batches(data, arguments, length), arguments, sparsity)
    made = with_thresholds(
        model, method=_method(arguments), thresholds=found.feedforward or None, attention=found.attention,
        predictors=found.predictors,
    )  # fmt: skip
    told = None if found.predictors is None else _told(model, data, length, found, arguments.device)
    return Made(made, f"{_target(sparsity, arguments.error)}, of {_where(found)}", told)


def _with_attention(arguments: ThresholdArguments, sparsity: float | None) -> bool:
    return arguments.method == "teal" and arguments.attention and sparsity is not None


def _calibrated(
    model: Transformer, batches: Sequence[Tensor], arguments: ThresholdArguments, sparsity: float | None
) -> Found:
    generator = torch.Generator().manual_seed(arguments.seed)
    if _with_attention(arguments, sparsity):
        allocation: Literal["uniform", "greedy"] = "greedy" if arguments.allocation == "greedy" else "uniform"
        both = calibrate_teal(
            model, batches, sparsity=cast(float, sparsity), allocation=allocation, generator=generator
        )
        return Found(both.feedforward, both.attention)
    if arguments.method == "dejavu":
        return _foretold(model, batches, arguments, sparsity, generator)
    return Found(
        calibrate_thresholds(
            model, batches, method=_method(arguments), sparsity=sparsity, error=arguments.error,
            allocation=arguments.allocation, generator=generator,
        )
    )  # fmt: skip


def _foretold(
    model: Transformer,
    batches: Sequence[Tensor],
    arguments: ThresholdArguments,
    sparsity: float | None,
    generator: torch.Generator,
) -> Found:
    """Thresholds from a sample of the rows, as without predictors, which are trained on all of them."""
    rows = sum(ids.numel() for ids in batches)
    inputs = feedforward_inputs(model, batches, rows=rows, generator=generator)
    # rows come in an order drawn at random: the first are a sample
    thresholds = thresholds_from_inputs(
        model, {name: x[:SAMPLE] for name, x in inputs.items()}, method=_method(arguments), sparsity=sparsity,
        error=arguments.error, allocation=arguments.allocation,
    )  # fmt: skip
    predictors = train_predictors(
        model, inputs, method=_method(arguments), thresholds=thresholds, rank=arguments.rank, recall=arguments.recall,
        steps=arguments.steps, generator=generator,
    )  # fmt: skip
    return Found(thresholds, predictors=predictors)


def _told(model: Transformer, data: Data, length: int, found: Found, device: str) -> Foresight:
    """What the predictors tell of the first held-out sequences."""
    ids = _judged_on(data, length, device)
    inputs = feedforward_inputs(model, ids.split(8), rows=ids.numel())
    return foresight(model, inputs, found.predictors or {}, method="cett", thresholds=found.feedforward)


def _judged_on(data: Data, length: int, device: str) -> Tensor:
    """Token ids of the first held-out sequences."""
    rows = max(1, min(8 * BATCHES_TOLD, len(data.held_out) // length))
    return torch.from_numpy(data.held_out[: rows * length].astype("int64")).view(rows, -1).to(device)


def _shown(told: Foresight | None) -> str:
    if told is None:
        return ""
    return (
        f";\n  told beforehand on held-out text: {told.predicted:.1%} of the neurons, among them {told.recall:.1%} of"
        f" the {told.active:.1%} that the thresholds keep"
    )


def _method(arguments: ThresholdArguments) -> CalibratedMethod:
    """Whose thresholds decide."""
    return "cett" if arguments.method == "dejavu" else arguments.method


def _batches(data: Data, arguments: ThresholdArguments, length: int) -> list[Tensor]:
    """Token ids [8, length] of training text, as a run with this seed would meet them."""
    batches = Batches(data.train, batch=8, length=length, seed=arguments.seed)
    return [batches.next().inputs.to(arguments.device) for _ in range(arguments.batches)]


def _held_out(model: Transformer, data: Data, length: int) -> Evaluation:
    return evaluate(model, data.held_out, data.tokenizer, length=length, batch=8)


def _target(sparsity: float | None, error: float | None) -> str:
    return f"error {error:g}" if sparsity is None else f"sparsity {sparsity:g}"


def _where(found: Found) -> str:
    return f"{len(found.feedforward)} feed-forward and {len(found.attention or {})} attention layers"
