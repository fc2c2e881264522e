"""From a config to a finished run."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moe import HashRouter
from training.allocator import keep_freed_memory
from training.checkpoint import LATEST, checkpoints, latest_checkpoint
from training.config import DataConfig, RunConfig, to_dict
from training.corpora import Corpus, load_corpus
from training.data import Data, prepare
from training.distributed import Ranks, joined, torchrun_environment
from training.distributed.agreement import (
    on_device,
    require_alike,
    require_alone,
    require_methods,
    require_rows,
    require_same_config,
)
from training.distributed.faults import how_to_go_on, one_clear_error, together
from training.durable import replace_durably
from training.fisher_control import in_order, make_penalties
from training.folders import mark, only_user
from training.model_config import model_config
from training.parallel import Alone, Parallel
from training.saved_model import open_model
from training.sparsity import calibration_ids, make_pace, make_sparsifiers, masks_at_start
from training.start_from import StartReport, attending
from training.start_words import said
from training.tokenizer import FILE_NAME as TOKENIZER
from training.trainer import CHECKPOINTS, Outcome, Trainer, choose_device
from training.upcycle_config import upcycled
from training.warm_up import describe_warm_up, freeze_for_warm_up
from transformer import Transformer

CONFIG = "run.json"
START = "start"  # what run.json says beside the config: what became of the model in 'init'
NAMED = 3  # files left out that are named
SEEDS_APART = 1_000_003  # between the seeds of two ranks


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Build corpus, tokenizer, model and trainer from a config, train, and leave all in ``config.out``.

    resume: go on from the latest checkpoint there, or from ``checkpoint``. overwrite: start anew
    where a run already is.
    Raises: ValueError or OSError, in one line that says what to do, before work starts where that is possible.
    """
    console = console or Console(quiet=True)
    environment = torchrun_environment()
    start = Start(resume=resume, checkpoint=checkpoint, overwrite=overwrite)
    if environment is None:
        require_alone(config.distributed)
        return _train(config, start, parallel=Alone(), console=console)
    settings = config.distributed
    given = start.checkpoint and str(start.checkpoint)
    flags = {"--resume": start.resume, "--checkpoint": given, "--overwrite": start.overwrite}
    with (
        joined(
            environment, device=config.train.device, expert_parallel=settings.expert_parallel,
            tensor_parallel=settings.tensor_parallel, timeout_s=settings.timeout_s,
            agree=partial(require_same_config, flat(to_dict(config)) | flags),
        ) as world,
        one_clear_error(
            timeout_s=settings.timeout_s,
            advice=partial(how_to_go_on, config.out / CHECKPOINTS, ranks=environment.ranks),
        ),
    ):  # fmt: skip
        if world.restarts and latest_checkpoint(config.out / CHECKPOINTS) is not None:
            start = Start(resume=True)  # torchrun gives the processes that it restarts the first ones' arguments
        require_rows(config, ranks=world.ranks)
        require_methods(config)
        ranks = Ranks(
            world, shard=settings.shard, background=settings.async_checkpoints,
            compression=None if settings.compression == "none" else settings.compression, density=settings.density,
            clip=config.optim.clip, warmup=settings.compression_warmup, momentum=settings.compression_momentum,
            seed=config.seed,
        )  # fmt: skip
        with closing(ranks) as parallel:
            config = on_device(config, world, parallel.gathered)
            return _train(config, start, parallel=parallel, console=console)


@dataclass(frozen=True)
class Start:
    """Where a run begins: see :func:`starting_point`."""

    resume: bool = False
    checkpoint: Path | None = None
    overwrite: bool = False


def _train(config: RunConfig, start: Start, *, parallel: Parallel, console: Console) -> Outcome:
    first = parallel.rank == 0
    with only_user(config.out) if first else nullcontext():
        found = partial(starting_point, config.out, **vars(start))
        point = together(found, parallel.gathered)
        require_alike("checkpoint", str(point), parallel.gathered)
        keep_freed_memory()
        starts: list[StartReport] = []
        trainer = make_trainer(config, parallel=parallel, report=starts.append)
        require_alike("fingerprint of the data", trainer.data.fingerprint, parallel.gathered)
        if point is not None:
            trainer.resume(point)
            for line in changes(config, config.out / CONFIG):
                console.print(f"changed since the run began: {line}", highlight=False, soft_wrap=True)
        elif start.overwrite and first:
            remove_checkpoints(config.out / CHECKPOINTS)
        if first:
            record = run_record(config) | ({START: starts[0].to_dict()} if starts else {})
            replace_durably(config.out / CONFIG, json.dumps(record, indent=1).encode())
        for start_report in starts if point is None else ():
            console.print(start_report.lines(), highlight=False, markup=False, soft_wrap=True)
        console.print(describe(trainer), highlight=False)
        return trainer.run(console=console)


def make_trainer(
    config: RunConfig, *, parallel: Parallel | None = None, report: Callable[[StartReport], None] | None = None
) -> Trainer:
    """Everything that a run needs, at its first step; global generators are seeded.

    parallel: the processes that train the model together, each with generators of its own once the model is made.
    report: hears what became of the model in ``config.init``, if there is one.
    """
    parallel = parallel or Alone()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    data_config = config.data
    if config.init is not None:
        data_config = _with_tokenizer_of(data_config, model_folder(config.init))
    data = load_data(data_config)
    seed_everything(config.seed)
    model = make_model(config, vocab_size=data.tokenizer.vocab_size, report=report)
    freeze_for_warm_up(model)
    balance_hash_tables(model, data.train)
    model = model.to(choose_device(config.train.device))
    if config.train.dtype == "float64":
        model.double()
    calibration = partial(
        calibration_ids, data, batch=config.train.batch, length=config.data.length, seed=config.seed,
        device=next(model.parameters()).device,
    )  # fmt: skip
    # before ranks hold parts of it: scores of the initial weights come from passes of the whole model
    masks = masks_at_start(config.sparsify, model, seed=config.seed, calibration=calibration)
    parallel.place(model)
    if parallel.rank:
        seed_everything(config.seed + SEEDS_APART * parallel.rank)
    sparsifiers = make_sparsifiers(config.sparsify, model, steps=config.train.steps, seed=config.seed, masks=masks)
    trainer = Trainer(
        model,
        data,
        out=config.out,
        length=config.data.length,
        optim=config.optim,
        train=config.train,
        seed=config.seed,
        sparsifiers=[*sparsifiers, *make_penalties(config, model, data, parallel=parallel, others=sparsifiers)],
        pace=make_pace(config.sparsify, steps=config.train.steps, warmup=config.optim.warmup),
        parallel=parallel,
    )
    trainer.batches = in_order(config, trainer)
    return trainer


def make_model(
    config: RunConfig, *, vocab_size: int, report: Callable[[StartReport], None] | None = None
) -> Transformer:
    """A fresh model of the [model] section, or the one in ``config.init``: it attends as [model] says
    (:func:`training.start_from.attending`), and is upcycled if [upcycle] says so.

    report: hears what became of the one in ``config.init``.
    Raises: ValueError if the vocabulary or length of ``config.init`` does not fit the data, [model] has a word that
    cannot be applied to it, or it cannot be upcycled.
    """
    if config.init is None:
        return Transformer(model_config(config.model, vocab_size=vocab_size, length=config.data.length))
    folder = model_folder(config.init)
    model = open_model(folder)
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"{config.init} knows {model.config.vocab_size} tokens, the tokenizer has {vocab_size}")
    if model.config.max_length < config.data.length:
        raise ValueError(f"data.length must be at most {model.config.max_length} for {config.init}")
    model, start = attending(model, config.model, folder=folder, seed=config.seed)
    if model.config.prefix_length >= config.data.length:
        raise ValueError(
            f"data.length must be above prefix_length={model.config.prefix_length} of {config.init}, so that tokens "
            f"are left to predict, got {config.data.length}"
        )
    if report is not None:
        report(start)
    return upcycled(model, config.upcycle, seed=config.seed)


def balance_hash_tables(model: Transformer, tokens: np.ndarray) -> None:
    """Make the tables of hash routers that wait for frequencies, from those of the ids in this text."""
    waiting = [module for module in model.modules() if isinstance(module, HashRouter) and module.waits]
    if waiting:
        frequencies = torch.from_numpy(np.bincount(tokens, minlength=model.config.vocab_size))
        for router in waiting:
            router.balance(frequencies)


def load_data(config: DataConfig) -> Data:
    """The tokenised corpus of a [data] section."""
    if config.cache is not None:
        mark(config.cache)
    return prepare(
        read_corpus(config),
        length=config.length,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        cache=config.cache,
    )


def read_corpus(config: DataConfig) -> Corpus:
    """The documents of a [data] section."""
    return load_corpus(
        config.corpus,
        held_out=config.held_out,
        validation=config.validation,
        split=config.split,
        field=config.text_field,
        max_documents=config.max_documents,
        streaming=config.streaming,
    )


def starting_point(out: Path, *, resume: bool, checkpoint: Path | None, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0.

    Raises: ValueError if ``out`` holds a run and neither resume nor overwrite was asked for, or both were, or if it
    holds a saved model, behind which the checkpoints of a run would not be found;
    FileNotFoundError if there is nothing to resume.
    """
    resume = resume or checkpoint is not None
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    root = out / CHECKPOINTS
    found = checkpoint or (latest_checkpoint(root) if resume or not overwrite else None)
    if resume:
        if found is None or not found.is_dir():
            raise FileNotFoundError(f"no checkpoint at {found or root}: leave out --resume to start at step 0")
        return found
    if found is not None and not overwrite:
        raise ValueError(f"{out} holds a run up to {found.name}: add --resume to go on, --overwrite to start anew")
    if (out / "config.json").is_file():
        raise ValueError(f"{out} holds a saved model: give another --out (and --init {out} to start from that model)")
    return None


def read_record(file: Path) -> dict[str, Any]:
    """The config that a run left in ``file``. Raises: ValueError, with the way out, if it is not whole."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is cut short or not JSON ({error}): remove it; train --resume writes it anew,"
            " other commands then need --corpus"
        ) from error
    record.pop(START, None)
    return record


def run_record(config: RunConfig) -> dict[str, Any]:
    """The config as run.json has it: of a run that starts from a model, [model] has only the words that counted."""
    record = to_dict(config)
    if config.init is not None:
        counted = said(config.model).keys() | ({"layer"} if config.model.layer else set())
        record["model"] = {word: value for word, value in record["model"].items() if word in counted}
    return record


def changes(config: RunConfig, file: Path) -> list[str]:
    """``field old → new`` for each field in which a run's config differs from the one left in ``file``, if any.

    train.stop_at is no property of the run and is not compared.
    """
    if not file.is_file():
        return []
    old, new = flat(read_record(file)), flat(run_record(config))
    names = [name for name in {**old, **new} if name != "train.stop_at"]
    return [f"{name} {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} as {"train.steps": 3}."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def remove_checkpoints(root: Path) -> None:
    """Remove every checkpoint below ``root``."""
    (root / LATEST).unlink(missing_ok=True)
    for old in checkpoints(root):
        shutil.rmtree(old)


def model_folder(path: Path) -> Path:
    """The folder of a saved model: ``path`` itself, or the latest checkpoint of the run there.

    Raises: FileNotFoundError if there is neither.
    """
    if (path / "config.json").is_file():
        return path
    found = latest_checkpoint(path / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"no model in {path}: give a folder with config.json, or a run with checkpoints")
    return found


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python, from which weights and dropout are drawn."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def describe(trainer: Trainer) -> str:
    """What is about to run, in two lines, and one more each for many processes, a warm-up and files left out."""
    model, data, precision = trainer.model, trainer.data, trainer.precision
    total, active = model.num_parameters(), model.num_parameters(active=True)
    tokens, skipped = len(data.train), _naming(data.skipped)
    precision_name = str(precision.dtype).removeprefix("torch.")
    return (
        trainer.parallel.describe()
        + describe_warm_up(trainer.model)
        + (
            f"{total:,} parameters ({active:,} active), {tokens:,} training tokens"
            f" ({data.train_bytes / 2**20:.1f} MiB), {data.held_out_bytes / 2**20:.2f} MiB held out,"
            f" vocabulary {data.tokenizer.vocab_size}\n{skipped}"
            f"{trainer.device}, {torch.get_num_threads()} threads, matrix products in {precision_name}"
            f" ({precision.reason}); step {trainer.step} of {trainer.train.steps}, into {trainer.out}"
        )
    )


def _naming(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    names = ", ".join(skipped[:NAMED]) + (", …" if len(skipped) > NAMED else "")
    return f"left out, as not UTF-8 text: {len(skipped)} ({names})\n"


def _with_tokenizer_of(config: DataConfig, folder: Path) -> DataConfig:
    """The tokenizer saved with a model goes with it, unless another file is named."""
    if config.tokenizer != "bpe" or not (folder / TOKENIZER).is_file():
        return config
    return dataclasses.replace(config, tokenizer=str(folder / TOKENIZER))
