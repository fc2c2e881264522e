"""`prune`: a trained model in, a smaller or sparser one out, with its masks, its numbers and a page."""

import json
import math
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from pruning import Masks, save_compact
from pruning.batches import Loss
from pruning.weights import matrices
from training.allocator import keep_freed_memory
from training.commands import PROGRAM, going_on, tables_to_change
from training.conditions import conditions, device_name
from training.durable import sync_folder, write_durably
from training.folders import only_user
from training.prune_arguments import PruneArguments, check_arguments, check_encoder, needs_text
from training.prune_encoder import Likeness, encoder_weights, finding_loss, likeness
from training.prune_measure import bytes_of, forward_speed, size_of, timed
from training.prune_models import (
    Coder,
    Source,
    check_model,
    check_units,
    check_vocabulary,
    find_source,
    load_coder,
    load_model,
    longest,
)
from training.prune_numbers import numbers_table
from training.prune_partial import Partial
from training.prune_progress import Passes
from training.prune_recovery import lesson_of, recover
from training.prune_report import RECORD, prune_report_html
from training.prune_stages import LEVELS, Weights, check_structure, prune_weights, recovery_scope, sensitivity
from training.prune_text import Quality, Texts, hash_of_model, quality, read_texts
from training.prune_units import Scoring, budget_kinds, remove_again, remove_to_budget, remove_units
from training.run import seed_everything
from training.trainer import choose_device
from transformer import Transformer

NOT_OF_THE_RUN = ("model", "target", "out", "resume", "json")  # arguments that may differ when a run goes on
MASKS, COMPACT, REPORT = "masks.safetensors", "compact", "report.html"
SENSITIVITY_SEQUENCES = 8


@dataclass(frozen=True)
class Job:
    """What every stage needs."""

    arguments: PruneArguments
    source: Source
    model: nn.Module
    coder: Coder
    texts: Texts
    partial: Partial
    console: Console

    @property
    def names(self) -> list[str] | None:
        """The weights that may go: all, or those inside an encoder's layers."""
        return None if self.coder.encoder is None else encoder_weights(self.model)

    @property
    def loss(self) -> Loss | None:
        """What importance is taken of: the next-token loss (None), or whether the encoder as it is finds passages."""
        if self.coder.encoder is None or needs_text(self.arguments) is None:
            return None
        return finding_loss(self.coder.encoder, self.model, self.texts.calibration, batch=self.arguments.batch)

    @property
    def passes(self) -> Passes:
        """Progress of the passes."""
        return Passes(self.console)

    def say(self, text: str) -> None:
        """A line for the reader."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def prune_command(arguments: PruneArguments, console: Console, *, command: str = f"{PROGRAM} prune") -> dict[str, Any]:
    """Prune, measure before and after, save, print the numbers; returns the record that prune.json holds.

    command: what was typed, for the page and for going on. OUT holds the model (as its library saves it) with its
    tokenizer, masks.safetensors, prune.json and report.html; it is whole, or holds `.partial` and no config.json yet.
    Raises: ValueError or OSError before work starts for what can be known then; what the stages raise. Ctrl-C and
    SIGKILL leave what is finished for --resume.
    """
    check_arguments(arguments)
    source = find_source(arguments.model)
    if source.encodes:
        check_encoder(arguments)
    check_units(source, ["budget"] if arguments.budget else list(arguments.units))
    keep_freed_memory()
    with only_user(arguments.folder), _kept_for_later(Partial(arguments.folder), command, console) as partial:
        job = _prepared(arguments, source, partial, console)
        record = {**_pruned(job), "command": command}
        _publish(job, record)
    console.print(numbers_table(record))
    for line in _closing(arguments, record, own=source.own):
        job.say(line)
    if arguments.json:
        print(json.dumps(record, allow_nan=False))
    return record


@contextmanager
def _kept_for_later(partial: Partial, command: str, console: Console) -> Iterator[Partial]:
    """After an error without a finished block there is nothing to go on from; after Ctrl-C the way on is said."""
    stopped = False
    try:
        yield partial
    except KeyboardInterrupt:
        stopped = partial.folder.is_dir()
        if stopped:
            again = command if "--resume" in command else f"{command} --resume"
            console.print(f"stopped; go on with:\n  {again}", highlight=False, soft_wrap=True, markup=False)
        raise
    finally:
        if partial.folder.is_dir() and not stopped and not partial.blocks:
            partial.remove()


def _prepared(arguments: PruneArguments, source: Source, partial: Partial, console: Console) -> Job:
    """Model, tokenizer and text, checked against one another and against the stopped run."""
    device = choose_device(arguments.device)
    coder = load_coder(source)
    model = load_model(source, dtype=arguments.dtype, device=device)
    check_model(model, arguments.budget_kinds if arguments.budget else list(arguments.units))
    if arguments.budget is not None and not budget_kinds(model, arguments):
        raise ValueError(f"--budget takes experts, heads and neurons, {type(model).__name__} has none: say which units "
                         "by --budget-units layers")  # fmt: skip
    check_vocabulary(model, coder)
    check_structure(model, arguments, None if coder.encoder is None else encoder_weights(model))
    texts = read_texts(arguments, source, coder, most=longest(model))
    own = {field.name: str(getattr(arguments, field.name)) for field in fields(arguments)}
    began = {f"--{name}": value for name, value in own.items() if name not in NOT_OF_THE_RUN}
    began |= {"the model": hash_of_model(model), **texts.fingerprints(), "torch": torch.__version__,
              "threads": str(torch.get_num_threads()), "device": device_name(device)}  # fmt: skip
    partial.start(began, resume=arguments.resume)
    seed_everything(arguments.seed)
    return Job(arguments, source, model, coder, texts, partial, console)


def _pruned(job: Job) -> dict[str, Any]:
    """Everything done and measured; the result lies in the partial folder."""
    started, resumed = time.monotonic(), job.partial.blocks
    size = size_of(job.model)
    before = _before(job)
    job.say(f"before: {describe(before)}")
    notes: list[str] = []
    units: list[dict[str, Any]] = []
    budget = None
    for kind in ("budget",) if job.arguments.budget is not None else tuple(job.arguments.units):
        fresh: list[str] = []
        with _noted(fresh):
            found = _units(job, kind)
        notes = fresh or notes  # the last warning about sizes says all
        if kind == "budget":
            units, budget = found.pop("units"), found
        else:
            units.append(found)
    rises = _sensitivity(job)
    weights = None
    if job.arguments.prunes_weights:
        with _noted(notes):
            weights = _weights(job)
    pruning_seconds = time.monotonic() - started
    dense = load_model(job.source, dtype=job.arguments.dtype, device=next(job.model.parameters()).device)
    recovered = None if job.texts.lessons is None else _recovered(job, dense, weights)
    after = _quality(job, "after", dense)
    job.say(f"after: {describe(after)}")
    for note in notes:
        job.say(f"note: {note}")
    result = _save(job, weights)
    return {
        "model": str(job.arguments.model),
        "architecture": job.source.architecture or type(job.model).__name__,
        "arguments": {field.name: _plain(getattr(job.arguments, field.name)) for field in fields(job.arguments)},
        "text": _text(job),
        "before": _as_record(before),
        "after": _as_record(after),
        "sizes": {"before": asdict(size), "after": asdict(size_of(job.model)), **result},
        "budget": budget,
        "units": units,
        "recovery": recovered,
        "weights": None if weights is None else _weights_record(weights),
        "sensitivity": None if rises is None else {"levels": list(LEVELS), "rises": rises},
        "speed": asdict(forward_speed(dense, job.model, job.texts.inputs[:1].to(next(dense.parameters()).device))),
        "notes": notes,
        "recover": _recovery(job, weights),
        "tables": tables_to_change(job.arguments.model, job.source.folder, units),
        "stock": not any(getattr(getattr(job.model, "config", None), name, None)
                         for name in ("pruned_layers", "pruned_width", "pruned_biases")),
        "resumed_blocks": resumed,
        "pruning_seconds": pruning_seconds,
        "seconds": time.monotonic() - started,
        "conditions": conditions(device=next(job.model.parameters()).device, seed=job.arguments.seed,
                                 dtype=str(next(job.model.parameters()).dtype).removeprefix("torch.")),
    }  # fmt: skip


def _before(job: Job) -> Quality | Likeness:
    kept = job.partial.kept("before.json")
    if kept is not None:
        return Quality(**kept) if job.coder.encoder is None else Likeness(**kept)
    found = _quality(job, "before", job.model)
    job.partial.keep("before.json", asdict(found))
    return found


def _quality(job: Job, when: str, whole: nn.Module) -> Quality | Likeness:
    """Of the model on held-out text; an encoder's beside the whole one."""
    batch, texts, encoder = job.arguments.batch, job.texts, job.coder.encoder
    if encoder is not None:
        return likeness(encoder, job.model, whole, texts.held_out, batch=batch,
                        progress=job.passes.over(f"held-out embeddings {when}"))  # fmt: skip
    return quality(job.model, texts.held_out, job.coder.token_bytes, batch=batch,
                   progress=job.passes.over(f"held-out loss {when}"))  # fmt: skip


def _units(job: Job, kind: str) -> dict[str, Any]:
    """Units of a kind go, or those of the budget; what an earlier run decided, or anew."""
    name = f"{kind}.json"
    kept = job.partial.kept(name)
    if kept is not None:
        remove_again(job.model, kept.get("units", [kept]))
        job.say(kept.pop("said"))
        return kept
    scoring = Scoring(job.arguments, job.texts.batches(job.arguments.batch), job.loss, job.passes)
    if kind == "budget":
        inputs = job.texts.inputs[:1].to(next(job.model.parameters()).device)
        found, said = remove_to_budget(job.model, scoring, length=inputs.shape[1], run=partial(timed, ids=inputs))
    else:
        found, said = remove_units(job.model, kind, getattr(job.arguments, kind), scoring)
    job.partial.keep(name, {**found, "said": said})
    job.say(said)
    return found


def _recovered(job: Job, dense: nn.Module, weights: Weights | None) -> dict[str, Any]:
    """The model trains on; what it was before that, and the losses."""
    lessons, plan = job.texts.lessons, lesson_of(job.arguments)
    assert lessons is not None
    before, held = _quality(job, "before recovery", dense), Masks.of(job.model).zeros
    job.say(f"before recovery: {describe(before)}")
    losses = recover(job.model, dense, lessons, plan, masks=None if weights is None else weights.masks,
                     encoder=job.coder.encoder, progress=job.passes.over("recovery"))  # fmt: skip
    return {**asdict(plan), "sequences": len(lessons), "length": lessons.shape[1], "held": held,
            "losses": losses, "before": _as_record(before)}  # fmt: skip


def _sensitivity(job: Job) -> dict[str, list[float]] | None:
    if not job.arguments.sensitivity:
        return None
    kept = job.partial.kept("sensitivity.json")
    if kept is None:
        few = job.texts.calibration[:SENSITIVITY_SEQUENCES]
        kept = sensitivity(job.model, few, names=job.names, loss=job.loss, progress=job.passes.over("sensitivity"))
        job.partial.keep("sensitivity.json", kept)
    return kept


def _weights(job: Job) -> Weights:
    method = job.arguments.method
    if job.partial.blocks:
        job.say(f"going on behind {job.partial.blocks} finished blocks")
    found = prune_weights(job.model, job.arguments, job.texts.batches(job.arguments.batch), names=job.names,
                          loss=job.loss, journal=job.partial, progress=job.passes.over(method))  # fmt: skip
    job.say(f"{found.masks.zeros:,} of {found.masks.total:,} weights are zero ({found.masks.sparsity:.2%}) by {method}")
    return found


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Warnings become notes, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [text for one in caught if (text := " ".join(str(one.message).split())) not in notes]


def _save(job: Job, weights: Weights | None) -> dict[str, int | None]:
    """The result into a folder inside the partial one; its bytes."""
    folder = job.partial.folder / "result"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    job.model.save_pretrained(folder)
    job.coder.save(folder)
    model_bytes = bytes_of(folder)
    compact = masks = None
    if weights is not None:
        masks = weights.masks.save(folder / MASKS).stat().st_size
        compact = save_compact(job.model, folder / COMPACT).file_bytes
        if not job.arguments.compact:
            shutil.rmtree(folder / COMPACT)
    return {"folder_bytes": model_bytes, "compact_bytes": compact, "mask_bytes": masks}


def _publish(job: Job, record: Mapping[str, Any]) -> None:
    """The result moves to OUT, its config last, and the partial folder goes."""
    folder, out = job.partial.folder / "result", job.arguments.folder
    write_durably(folder / RECORD, json.dumps(record, indent=1, allow_nan=False).encode())
    write_durably(folder / REPORT, prune_report_html(record).encode())
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        os.replace(path, out / path.name)
    sync_folder(out)
    job.partial.remove()


def _text(job: Job) -> dict[str, Any]:
    sequences, length = job.texts.calibration.shape
    windows, held_out_length = job.texts.inputs.shape
    return {"corpus": job.texts.corpus, "sequences": sequences, "asked": job.arguments.sequences, "length": length,
            "held_out_windows": windows, "held_out_length": held_out_length}  # fmt: skip


def _as_record(found: Quality | Likeness) -> dict[str, float | int | None]:
    if isinstance(found, Likeness):
        return asdict(found)
    perplexity = found.perplexity if math.isfinite(found.perplexity) else None
    return {**asdict(found), "perplexity": perplexity}


def _weights_record(weights: Weights) -> dict[str, Any]:
    counts = {name: [int((~mask).sum()), mask.numel()] for name, mask in weights.masks.kept.items()}
    return {"zeros": weights.masks.zeros, "total": weights.masks.total, "by_name": counts,
            "matrices": [asdict(one) for one in weights.matrices]}  # fmt: skip


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def describe(found: Quality | Likeness) -> str:
    """One line."""
    if isinstance(found, Likeness):
        shown = {"agreement": found.agreement, "cosine": found.cosine, "error of the states": found.error}
        parts = [f", {name} {value:.4f}" for name, value in shown.items() if value is not None]
        return f"{found.found:.1%} of {found.passages:,} passages found" + "".join(parts)
    bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f} bits per byte, "
    return f"{bits}{found.loss:.4f} nats per token, perplexity {found.perplexity:,.2f}, over {found.tokens:,} tokens"


def _recovery(job: Job, weights: Weights | None) -> str | None:
    """The command that trains this library's model on, into another folder, and holds all its zeros. None for models of
    transformers and encoders, and where a matrix has nothing left, under which no training begins."""
    if not job.source.own or job.source.encodes:
        return None
    held, out = Masks.of(job.model), job.arguments.folder
    if not all(mask.any() for mask in matrices(held.kept).values() if mask.numel()):
        return None
    command = going_on(
        out, out=out.with_name(f"{out.name}-recovered"), source=job.arguments.model, folder=job.source.folder,
        config=cast(Transformer, job.model).config,
    )  # fmt: skip
    return shlex.join(command + (_holding(job, held, weights) if held.zeros else []))


def _holding(job: Job, held: Masks, weights: Weights | None) -> list[str]:
    """Options of `train` under which the zeros stay: by magnitude at the share that this run pruned, where one scope
    finds just them again, for they are the smallest weights there are; else as the mask that the saved model is."""
    share = held.sparsity if job.arguments.sparsity is None else job.arguments.sparsity
    scope = None if weights is None else recovery_scope(held, share)
    if scope is None:
        return ["--sparsify.method", "mask", "--sparsify.mask", str(job.arguments.folder), "--sparsify.sparsity", "0"]
    return ["--sparsify.sparsity", str(share), "--sparsify.scope", scope, "--sparsify.begin", "0", "--sparsify.end",
            "0"]  # fmt: skip


def _closing(arguments: PruneArguments, record: Mapping[str, Any], *, own: bool) -> list[str]:
    """Where the result is, and what to do with it."""
    out = arguments.folder
    saved = f"saved in {out}, with {out / REPORT}"
    if record["recover"] is not None:
        tables = [f"  after a change of CONFIG.toml's [[model.layer]] tables: {record['tables']}"]
        return [f"{saved}; recover with:", *(tables if record["tables"] else []), f"  {record['recover']}"]
    reader = "transformers' from_pretrained" if record["stock"] else "pruning.load_pruned"
    if own:
        reader = "transformer.Transformer.from_pretrained"
    return [f"{saved}; {reader} loads it"]
