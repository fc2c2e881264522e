"""The whole library in minutes: a mixture of experts and its dense twin trained on the standard library's source, the
mixture's heads and weights pruned, everything measured on the same held-out text, and a page that shows it."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training import demo_pruning as pruned
from training.allocator import keep_freed_memory
from training.baselines import as_symbols, ngram_baseline, xz_baseline
from training.checkpoint import latest_checkpoint
from training.conditions import conditions, peak_memory
from training.config import DataConfig, OptimConfig, RunConfig, TrainConfig, to_dict
from training.corpora import Corpus
from training.data import Data, prepare
from training.demo_tables import show
from training.durable import replace_durably
from training.evaluation import Evaluation, evaluate
from training.model_config import ModelConfig
from training.precision import DTypeName, Precision, choose_precision
from training.records import RESULTS, Line, read_lines
from training.report import write_report
from training.routing_record import record_routing
from training.run import make_model, read_corpus, train
from training.trainer import CHECKPOINTS, choose_device
from transformer import Transformer, generate

LABELS = {"moe": "Mixture of experts", "dense": "Dense twin"}
QUICK, QUICK_DOCUMENTS = 100, 60
PROMPT = 'def read_config(path):\n    """'
SAMPLE_TOKENS = 320
GENERATION_TOKENS, QUICK_TOKENS = 64, 8
SETTINGS = "demo.json"


@dataclass(frozen=True)
class DemoConfig:
    """Train a mixture of experts and its dense twin, prune the mixture, and write report.html.

    A demo that was interrupted goes on where it stopped when the same command is given again.
    """

    out: Path = Path("runs/demo")
    """Folder for models, records and the page."""
    steps: int = 500
    """Training steps of each model. Below 100: a quick look, on 60 documents."""
    device: str = "auto"
    """'cpu', 'cuda', or 'auto' (the first GPU if there is one)."""
    seed: int = 0
    """Seed of weights, data order and sampling."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")


# Peak rates of the best of 2e-3, 4e-3 and 8e-3 for each twin, in runs of 900 steps with seed 0.
LEARNING_RATES = {"moe": 3e-3, "dense": 3e-3}


def twin(kind: str, config: DemoConfig) -> RunConfig:
    """The run of one twin, "moe" or "dense": k=2 of 16 experts of 256 neurons, or 512 neurons; all else is equal."""
    hidden = {"moe": 256, "dense": 512}[kind]
    quick = config.steps < QUICK
    # products are so small here that on CPU converting their factors costs what bfloat16 would gain
    dtype: DTypeName = "float32" if choose_device(config.device).type == "cpu" else "auto"
    return RunConfig(
        out=config.out / kind,
        seed=config.seed,
        data=DataConfig(
            length=128, vocab_size=2048, held_out=0.02, max_documents=QUICK_DOCUMENTS if quick else None,
            cache=config.out / "cache",
        ),
        # The window equals the length of the training sequences: it changes nothing there, and lets generation go on
        # beyond them with a cache that stays small.
        model=ModelConfig(
            dim=128, layers=4, heads=4, feedforward="moe" if kind == "moe" else "dense", hidden=hidden, num_experts=16,
            pattern="causal() & sliding_window(128)", max_length=512,
        ),
        optim=OptimConfig(lr=LEARNING_RATES[kind], warmup=max(1, config.steps // 20), final=0.05),
        train=TrainConfig(
            steps=config.steps, batch=16, device=config.device, dtype=dtype, eval_every=-(-config.steps // 6),
            save_every=-(-config.steps // 4), keep=1,
        ),
    )  # fmt: skip


class Recorder:
    """Appends lines to results.jsonl, and times phases."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path, self.started = path, time.perf_counter()

    def write(self, kind: str, line: Line) -> None:
        """Append one line of this kind."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind} | line, ensure_ascii=False) + "\n")

    @contextmanager
    def phase(self, name: str, console: Console) -> Iterator[None]:
        """Time a part of the demo; its line is written when it ends."""
        console.rule(name, align="left")
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self.write("phase", {"name": name, "seconds": seconds})
        console.print(f"{name}: {seconds:.1f} s", style="dim", highlight=False)


@dataclass(frozen=True)
class Bench:
    """What every measurement of the demo shares: the text, the number format and the place."""

    data: Data
    length: int
    batch: int
    precision: Precision
    device: torch.device

    def evaluate(self, model: Transformer) -> Evaluation:
        """Loss over all of the held-out text."""
        return evaluate(
            model, self.data.held_out, self.data.tokenizer, length=self.length, batch=self.batch,
            autocast=self.precision.autocast(self.device),
        )  # fmt: skip


def demo(config: DemoConfig, *, console: Console | None = None) -> Path:
    """Run the demo and return the page's path.

    Raises: KeyboardInterrupt when stopped by a signal, after saying how to go on; ValueError if the twins' active
    parameters differ by more than 1%; what training and reading the corpus raise.
    """
    console = console or Console()
    keep_freed_memory()
    config.out.mkdir(parents=True, exist_ok=True)
    resume = unfinished(config)
    replace_durably(config.out / SETTINGS, json.dumps(_settings(config)).encode())
    records = Recorder(config.out / RESULTS)
    bench = _prepare(config, records, console, resumed=resume)
    moe = _train_twins(config, bench, records, console, resume=resume)
    _prune(config, moe, bench, records, console)
    with records.phase("sample", console):
        records.write("sample", _sample(moe, bench, seed=config.seed))
    with records.phase("report", console):
        record_routing(config.out, batches=8, device=str(bench.device))
        write_report(config.out)
    seconds = time.perf_counter() - records.started
    records.write("total", {"seconds": seconds, "peak_memory_bytes": peak_memory()})
    page = write_report(config.out)  # again: now with the total
    show(config.out, console)
    console.print(f"\nthe page with every figure: [bold]{page}[/bold]", highlight=False, soft_wrap=True)
    return page


def unfinished(config: DemoConfig) -> bool:
    """Whether ``out`` holds a demo of the same settings that did not reach its end."""
    settings = config.out / SETTINGS
    if not settings.is_file() or json.loads(settings.read_text()) != _settings(config):
        return False
    results = config.out / RESULTS
    return not results.is_file() or all(line["kind"] != "total" for line in read_lines(results))


def _settings(config: DemoConfig) -> dict[str, Any]:
    return {kind: to_dict(twin(kind, config)) for kind in LABELS}


def _prepare(config: DemoConfig, records: Recorder, console: Console, *, resumed: bool) -> Bench:
    settings = twin("moe", config)
    device = choose_device(config.device)
    precision = choose_precision(settings.train.dtype, device=device)
    dtype = f"{str(precision.dtype).removeprefix('torch.')} ({precision.reason}); weights and optimiser float32"
    facts = conditions(device=device, seed=config.seed, dtype=dtype) | {"steps": config.steps}
    records.write("conditions", facts | ({"resumed": "yes: training times are of the last part"} if resumed else {}))
    with records.phase("text and tokenizer", console):
        corpus = read_corpus(settings.data)
        data = prepare(
            corpus, length=settings.data.length, vocab_size=settings.data.vocab_size, cache=settings.data.cache
        )
    records.write("corpus", _describe(corpus, data))
    with records.phase("baselines", console):
        for baseline in _baselines(corpus, data):
            records.write("baseline", dataclasses.asdict(baseline))
    return Bench(data, settings.data.length, settings.train.batch, precision, device)


def _describe(corpus: Corpus, data: Data) -> Line:
    return {
        "name": corpus.name,
        "train_documents": len(corpus.train),
        "heldout_documents": len(corpus.held_out),
        "train_bytes": data.train_bytes,
        "heldout_bytes": data.held_out_bytes,
        "train_tokens": len(data.train),
        "heldout_tokens": len(data.held_out),
        "vocab_size": data.tokenizer.vocab_size,
    }


def _baselines(corpus: Corpus, data: Data) -> Iterator[Any]:
    train_text, heldout = ("".join(side).encode() for side in (corpus.train, corpus.held_out))
    yield xz_baseline(train_text, heldout)
    yield ngram_baseline(as_symbols(train_text), as_symbols(heldout), vocab_size=256, heldout_bytes=len(heldout))
    # Over the models' own tokens, separators paid for as the models do: the stronger of the two.
    yield ngram_baseline(
        data.train, data.held_out[1:], vocab_size=data.tokenizer.vocab_size, heldout_bytes=len(heldout), unit="token"
    )


def _train_twins(config: DemoConfig, bench: Bench, records: Recorder, console: Console, *, resume: bool) -> Transformer:
    """Train both, check that they are twins, record their results; returns the mixture."""
    _check_twins(config, bench.data.tokenizer.vocab_size)
    models = {}
    for kind, label in LABELS.items():
        with records.phase(f"train {label.lower()}", console):
            models[kind], line, evaluation = _train(twin(kind, config), bench, console, resume=resume)
        records.write("model", {"name": kind, "label": label} | line)
        records.write("result", {"name": kind} | dataclasses.asdict(evaluation))
    return models["moe"]


def _check_twins(config: DemoConfig, vocab_size: int) -> None:
    """Raises: ValueError if a token uses 1% more parameters in one twin than in the other."""
    active = {}
    for kind in LABELS:
        with torch.device("meta"):
            active[kind] = make_model(twin(kind, config), vocab_size=vocab_size).num_parameters(active=True)
    if abs(active["moe"] / active["dense"] - 1) > 0.01:
        raise ValueError(f"active parameters of the twins must agree within 1%, got {active}")


def _train(run: RunConfig, bench: Bench, console: Console, *, resume: bool) -> tuple[Transformer, Line, Evaluation]:
    started = latest_checkpoint(run.out / CHECKPOINTS) is not None
    outcome = train(run, resume=resume and started, overwrite=not resume, console=console)
    if outcome.stopped is not None:
        console.print("stopped; the same command goes on from the last checkpoint")
        raise KeyboardInterrupt
    model = Transformer.from_pretrained(outcome.checkpoint).to(bench.device)
    model.save_pretrained(run.out)
    bench.data.tokenizer.save(run.out)
    evaluation = outcome.evaluation or bench.evaluate(model)  # none where a resumed run had ended already
    line = {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(active=True),
        "flops_per_token": model.flops_per_token(run.data.length),
        "tokens": outcome.tokens,
        "learning_rate": run.optim.lr,
        "training_seconds": outcome.seconds,
    }
    return model, line, evaluation


def _prune(config: DemoConfig, model: Transformer, bench: Bench, records: Recorder, console: Console) -> None:
    run = twin("moe", config)
    with records.phase("head importance", console):
        scores = pruned.importance(model, bench.data, run, autocast=bench.precision.autocast(bench.device))
        records.write("importance", pruned.importance_line(model, scores, fraction=0.3))
    with records.phase("remove heads and recover", console):
        variants = list(pruned.remove_heads(model, scores, bench.data, run, bench.evaluate, console=console))
    with records.phase("generation speed", console):
        new = QUICK_TOKENS if config.steps < QUICK else GENERATION_TOKENS
        speeds = pruned.speeds([variant.model for variant in variants], seed=config.seed, new=new)
        for variant, speed in zip(variants, speeds, strict=True):
            records.write("heads", variant.line | speed)
    with records.phase("zero weights", console):
        for line in pruned.zero_weights(model, bench.evaluate):
            records.write("weights", line)


def _sample(model: Transformer, bench: Bench, *, seed: int) -> Line:
    ids = torch.tensor([bench.data.tokenizer.encode(PROMPT)], device=bench.device)
    generator = torch.Generator(bench.device).manual_seed(seed)
    new = SAMPLE_TOKENS
    drawn = generate(model, ids, max_new_tokens=new, temperature=0.7, top_p=0.95, generator=generator)
    text = bench.data.tokenizer.decode(drawn[0].tolist())
    return {"prompt": PROMPT, "text": text.removeprefix(PROMPT)}
