"""What small subcommands do: saved models evaluated, sampled and upcycled."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from training.config import DataConfig, RunConfig, from_dict
from training.data import tokenise
from training.evaluation import Evaluation, evaluate
from training.folders import only_user
from training.precision import DTypeName, choose_precision
from training.run import CONFIG, load_data, model_folder, read_corpus, read_record
from training.saved_model import open_model, save_made
from training.start_words import renumbered, undone
from training.tokenizer import FILE_NAME as TOKENIZER
from training.tokenizer import load_tokenizer
from training.trainer import CHECKPOINTS, choose_device
from transformer import Transformer, TransformerConfig, stream
from transformer.upcycle import upcycle

PROGRAM = "sparse-transformers"
Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|FOLDER")]


@dataclass(frozen=True)
class EvaluateArguments:
    """Held-out loss of a trained model, in nats a token and bits a byte."""

    source: Source
    """A run's folder (its latest checkpoint is taken), a checkpoint, or a saved model."""
    corpus: str | None = None
    """Other text than the run's own, named as in data.corpus."""
    whole: bool = False
    """Evaluate on all documents of --corpus, not only its held-out share."""
    length: int | None = None
    """Tokens of context; the run's own if left out."""
    batch: int = 8
    """Sequences in a batch."""
    dtype: DTypeName = "float32"
    """Format of the matrix products."""
    device: str = "auto"
    """Device."""


@dataclass(frozen=True)
class GenerateArguments:
    """Text from a trained model."""

    source: Source
    """A run's folder, a checkpoint, or a saved model."""
    prompt: str = "def "
    """What the text starts with."""
    tokens: int = 128
    """Tokens to add, fewer if the model's longest sequence is reached."""
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int | None = None
    """Draw only from the k most likely tokens."""
    top_p: float | None = 0.95
    """Draw only from the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the draws."""
    allow_future: bool = False
    """Draw even from a model whose layers compare a token with later ones (expert_choice, soft_moe)."""
    device: str = "auto"
    """Device."""


@dataclass(frozen=True)
class UpcycleArguments:
    """Turn the dense feed-forward layers of a trained model into mixtures of experts that compute the same."""

    source: Source
    """A run's folder, a checkpoint, a saved model, or a folder of Hugging Face transformers (Llama and its kin)."""
    out: Path
    """Folder for the new model and its tokenizer."""
    experts: int
    """Experts a layer."""
    k: int = 2
    """Experts a token."""
    granularity: int = 1
    """Cut each dense layer into this many shards; experts are copies of shards. Must divide --experts and --k."""
    layers: tuple[int, ...] | None = None
    """Layers to convert, counted from 0; every dense one if left out."""
    reinitialize: float = 0.0
    """Share of each expert's neurons drawn anew, so that the copies differ; the outputs then change."""
    seed: int = 0
    """Seed of the routers and of what is drawn anew."""


def evaluate_command(arguments: EvaluateArguments, console: Console) -> None:
    """Print the loss."""
    require_at_least(1, {"--batch": arguments.batch, "--length": arguments.length})
    model, folder = _load(arguments.source, arguments.device)
    config = data_config(arguments.source, folder, arguments.corpus, arguments.length, model)
    if arguments.whole:
        tokenizer = load_tokenizer(folder)
        corpus = read_corpus(config)
        tokens = tokenise(corpus.train + corpus.held_out, tokenizer)
    else:
        data = load_data(config)
        tokenizer, tokens = data.tokenizer, data.held_out
    precision = choose_precision(arguments.dtype, device=choose_device(arguments.device))
    result = evaluate(
        model,
        tokens,
        tokenizer,
        length=config.length,
        batch=arguments.batch,
        autocast=precision.autocast(model.head_weight.device),
    )
    console.print(describe_evaluation(result), highlight=False)


def generate_command(arguments: GenerateArguments, console: Console) -> None:
    """Print the text as it comes.

    Raises: ValueError, before anything is printed, for an option out of range or a prompt that fills the model.
    """
    require_at_least(0, {"--tokens": arguments.tokens})
    model, folder = _load(arguments.source, arguments.device)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(arguments.prompt) or [tokenizer.eos_id]
    prompt = torch.tensor([ids], device=model.head_weight.device)
    room = model.config.max_length - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt must be shorter than the model's max_length={len(ids) + room}, got {len(ids)} tokens"
        )
    tokens = stream(  # checks its options at once
        model,
        prompt,
        max_new_tokens=min(arguments.tokens, room),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=torch.Generator(prompt.device).manual_seed(arguments.seed),
        eos_id=tokenizer.eos_id,
        allow_future=arguments.allow_future,
    )
    drawn, shown = list(ids), arguments.prompt
    console.print(shown, end="", markup=False, highlight=False, soft_wrap=True)
    for token in tokens:
        drawn.append(int(token))
        text = tokenizer.decode(drawn).rstrip("\ufffd")  # a character whose bytes are not all there yet
        console.print(text[len(shown) :], end="", markup=False, highlight=False, soft_wrap=True)
        shown = text
    console.print()


def require_free(out: Path) -> None:
    """Raises: ValueError for an ``out`` that holds a run or a model."""
    for name in (CONFIG, "config.json", CHECKPOINTS):
        if (out / name).exists():
            raise ValueError(f"--out must hold no run or model, {out} has {name}: give another folder")


def upcycle_command(arguments: UpcycleArguments, console: Console) -> None:
    """Upcycle, save, and print the command that trains the result on.

    Raises: ValueError, before anything is read, for an --out that holds a run or a model.
    """
    require_free(arguments.out)
    with only_user(arguments.out):
        folder = model_folder(arguments.source)
        dense = open_model(folder)
        model = upcycle(
            dense,
            num_experts=arguments.experts,
            k=arguments.k,
            granularity=arguments.granularity,
            layers=arguments.layers,
            reinitialize=arguments.reinitialize,
            generator=torch.Generator().manual_seed(arguments.seed),
        )
        save_made(model, arguments.out, source=folder)
    command = going_on(arguments.out, out="FOLDER", source=arguments.source, folder=folder, config=model.config)
    console.print(
        f"{dense.num_parameters():,} parameters -> {model.num_parameters():,}"
        f" ({model.num_parameters(active=True):,} active), saved in {arguments.out}; train on with:\n"
        f"  {shlex.join(command)}",
        highlight=False,
    )


def require_at_least(least: int, options: Mapping[str, int | None]) -> None:
    """Raises: ValueError naming the first option that is below ``least``; None is an option left out."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def describe_evaluation(result: Evaluation) -> str:
    """One line."""
    return (
        f"{result.bits_per_byte:.4f} bits per byte, {result.loss:.4f} nats per token"
        f" over {result.tokens:,} tokens ({result.bytes:,} bytes)"
    )


def run_config_of(source: Path, folder: Path) -> RunConfig | None:
    """The config that a run was started with, found beside the run or above its checkpoint."""
    for file in (source / CONFIG, folder.parent.parent / CONFIG):
        if file.is_file():
            return from_dict(RunConfig, read_record(file), where=str(file))
    return None


def going_on(init: Path, *, out: Path | str, source: Path, folder: Path, config: TransformerConfig) -> list[str]:
    """The command that trains the model in ``init`` on: with the config of the run that made its source, if there is
    one, less the words of [model] that are no longer true of it."""
    run = _readable_config_of(source, folder)
    words = [] if run is None else undone(run.model, config)
    return [PROGRAM, "train", "CONFIG.toml", "--init", str(init), "--out", str(out), *words]


def tables_to_change(source: Path, folder: Path, units: Sequence[Mapping[str, Any]]) -> str:
    """What to change in the [[model.layer]] tables of the source's config before :func:`going_on`'s command, after the
    removals that ``units`` of prune.json records; empty where nothing."""
    kept = [ids for one in units if one["kind"] == "layer" for ids in one["kept"].values()]
    run = _readable_config_of(source, folder) if kept else None
    return "" if run is None else renumbered(run.model, kept[0])


def _readable_config_of(source: Path, folder: Path) -> RunConfig | None:
    try:
        return run_config_of(source, folder)
    except ValueError:  # a damaged record: what was made is whole
        return None


def _load(source: Path, device: str) -> tuple[Transformer, Path]:
    folder = model_folder(source)
    return Transformer.from_pretrained(folder).to(choose_device(device)), folder


def data_config(source: Path, folder: Path, corpus: str | None, length: int | None, model: Transformer) -> DataConfig:
    """The run's own data settings, with the tokenizer saved with the model, and --corpus and --length over them."""
    run = run_config_of(source, folder)
    if run is None and corpus is None:
        raise ValueError(f"{source} has no {CONFIG} that says what text it was trained on: give --corpus")
    record = {} if run is None else {f: getattr(run.data, f) for f in DataConfig.__dataclass_fields__}
    record |= {"tokenizer": str(folder / TOKENIZER)}
    if corpus is not None:
        record |= {"corpus": corpus, "max_documents": None, "streaming": False}
    record |= {"length": record.get("length", model.config.max_length) if length is None else length}
    return DataConfig(**record)
