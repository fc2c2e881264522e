"""What a run is: frozen records read from TOML, every field but the [[model.layer]] tables also a flag."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from moe.losses import Scope
from training.model_config import ModelConfig, model_config
from training.optim import Schedule
from training.precision import TrainDType
from training.sparsify_config import COMPACT, SparsifyConfig, check_evaluations, check_sparsify
from training.upcycle_config import UpcycleConfig, check_upcycle
from transformer import MoEConfig, TransformerConfig

POSITIVE_IN_TRAIN = ("steps", "batch", "accumulation", "threads", "log_every", "eval_every", "eval_batches",
                     "save_every", "keep", "sample_every", "sample_tokens", "stop_at")  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    corpus: str = "stdlib"
    """'stdlib' (the interpreter's own library); a file, folder or glob (one document a file, .gz unpacked, .jsonl one
    document a line); or 'hf:NAME[:CONFIG]', a Hugging Face dataset ('hf:json:FILES' for local files)."""
    length: int = 256
    """Tokens in a sequence."""
    tokenizer: str = "bpe"
    """'bpe' (learnt from the training documents), 'bytes', or the path of a saved tokenizer.json."""
    vocab_size: int = 4096
    """Tokens of a learnt bpe, the 256 bytes and the separator included."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation."""
    validation: float = 0.0
    """Share of the documents kept for choices between runs: not trained on, and evaluated beside those held out."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    text_field: str = "text"
    """Field that holds the text, in a Hugging Face dataset or .jsonl."""
    max_documents: int | None = None
    """Use at most so many documents."""
    streaming: bool = False
    """Read only the first max_documents of a Hugging Face dataset, without downloading the rest."""
    cache: Path | None = Path("runs/cache")
    """Folder that keeps tokenizers and token ids between runs."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 2e-3
    """Peak learning rate."""
    router_lr: float = 1.0
    """Factor on it for the routers."""
    memory_lr: float = 1e-3
    """Learning rate of the tables of memories (product_key, peer), constant over the run."""
    weight_decay: float = 0.1
    """Decay of weight matrices (experts too); never of embeddings, tables of memories, norms or biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    schedule: Schedule = "cosine"
    """'cosine', 'wsd' (warm-up, stable, linear decay), or 'constant'."""
    warmup: int = 50
    """Steps of linear warm-up (never more than the run has, or than wsd leaves before it decays)."""
    final: float = 0.1
    """Learning rate of the last step, as a share of the peak (cosine and wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    clip: float = 1.0
    """Largest L2 norm of the whole gradient; where it is compressed, each rank clips what it adds to it instead."""
    sparse_state: bool = False
    """Keep moments only of weights that are there, under a [sparsify] method that is sparse from the first step."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 16
    """Sequences in a step."""
    accumulation: int = 1
    """Micro-batches that a step is split into, to save memory; the gradient is the whole batch's."""
    aux: float = 0.01
    """Coefficient of the load-balancing loss, which is summed over the layers, as every loss of a router is."""
    aux_scope: Scope = "micro_batch"
    """Tokens that load is balanced over: those of a micro-batch, of each sequence, or of all processes ('global')."""
    z: float = 0.001
    """Coefficient of the router z-loss."""
    importance: float = 0.0
    """Coefficient of the squared variation of the experts' summed weights (Shazeer et al. 2017)."""
    load: float = 0.0
    """Coefficient of the squared variation of the load that noisy_top_k routers estimate (Shazeer et al. 2017)."""
    entropy: float = 0.0
    """Coefficient of ln E minus the entropy of the mean router probability."""
    dtype: TrainDType = "auto"
    """Format of the matrix products: 'float32', 'bfloat16', or 'auto' (bfloat16 where it measures faster). 'float64':
    weights and optimiser too, for comparisons in which rounding must not show."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', …, or 'auto' (the first GPU if there is one)."""
    threads: int | None = None
    """CPU threads of torch."""
    checkpointing: bool = False
    """Recompute each block in the backward pass, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between evaluations on held-out text (also at the end)."""
    eval_batches: int | None = None
    """Batches of an evaluation; all held-out text if left out."""
    save_every: int = 200
    """Steps between checkpoints (also at the end and on Ctrl-C)."""
    keep: int = 2
    """Checkpoints kept."""
    sample_every: int | None = None
    """Steps between generated samples; none if left out."""
    sample_tokens: int = 64
    """Tokens of a sample."""
    prompt: str = "def "
    """What samples start from."""
    tensorboard: bool = False
    """Also write TensorBoard scalars (needs the extra 'tensorboard')."""
    stop_at: int | None = None
    """Stop and save after this step, as if interrupted; the schedule still runs to 'steps'."""


@dataclass(frozen=True)
class DistributedConfig:
    """Many processes, started by torchrun; a run of one process reads none of this."""

    expert_parallel: Annotated[int, arg(aliases=["--expert-parallel"])] = 1
    """Ranks that share out one copy of the experts; a divisor of the number of processes."""
    tensor_parallel: Annotated[int, arg(aliases=["--tensor-parallel"])] = 1
    """Ranks that split the heads of one attention and have the same rows; a divisor of the number of processes."""
    shard: Annotated[Literal["none", "fsdp"], arg(aliases=["--shard"])] = "none"
    """Of parameters, gradients and moments outside expert parallel, each rank holds all ('none') or a part ('fsdp')."""
    compression: Literal["none", "topk", "randomk", "threshold", "dropping", "adacomp", "dgc"] = "none"
    """Which entries of gradients are sent (see compress_gradients); those of spread experts stay on their ranks."""
    density: float = 0.01
    """Share of the entries that topk, randomk, dropping and dgc send."""
    compression_warmup: int = 0
    """Steps in which that share falls from 25 through 6.25, 1.6 and 0.4% to 'density'."""
    compression_momentum: float = 0.9
    """Momentum of dgc, in [0, 1), in place of the first of 'optim.betas'; at 1% 0.3 did better where measured."""
    async_checkpoints: bool = False
    """Write checkpoints while training goes on, from a copy of the weights and moments on each device."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in one exchange before the job ends with an error."""


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/train")
    """Folder for metrics, checkpoints and the config used."""
    seed: int = 0
    """Seed of the weights, the order of the data, dropout and samples."""
    init: Path | None = None
    """Start from the model saved in this folder or run, or by Hugging Face transformers (its shape, weights and
    tokenizer). Of [model] it then takes pattern, selection and select_…, where they are not at their default; other
    words are refused unless that model has them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _check(self)


def load_config(path: Path) -> RunConfig:
    """Read a TOML file.

    Raises: FileNotFoundError; ValueError for bad TOML, an unknown key (with the nearest known one), or a value of
    another type or out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}: see examples/configs")
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return from_dict(RunConfig, record, where=str(path))


def from_dict(record_type: Any, values: dict[str, Any], *, where: str, section: str = "") -> Any:
    """Build a record of this module, checking names and types. where, section: for the error text."""
    known = typing.get_type_hints(record_type)
    place = f"[{section}] of {where}" if section else where
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {place}: {_suggestion(key, known)}")
    required = {f.name for f in dataclasses.fields(record_type) if _has_no_default(f)}
    if missing := required - set(values):
        raise ValueError(f"{place} needs {', '.join(sorted(missing))}")
    path = f"{section}." if section else ""
    built = {k: _convert(known[k], v, where=where, section=f"{path}{k}") for k, v in values.items()}
    return record_type(**built)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dicts of JSON values; :func:`from_dict` reads them back."""
    return _plain(dataclasses.asdict(config))


def _check(config: RunConfig) -> None:
    train, data, optim = config.train, config.data, config.optim
    positive: dict[str, float | None] = {f"train.{name}": getattr(train, name) for name in POSITIVE_IN_TRAIN}
    positive |= {"data.length": data.length, "model.layers": config.model.layers}
    positive |= {"optim.lr": optim.lr, "optim.clip": optim.clip, "optim.eps": optim.eps}
    positive |= {"optim.memory_lr": optim.memory_lr}
    positive |= {"sparsify.every": config.sparsify.every}
    counts = ("expert_parallel", "tensor_parallel", "timeout_s")
    positive |= {f"distributed.{name}": getattr(config.distributed, name) for name in counts}
    _check_compression(config.distributed)
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("aux", "z", "importance", "load", "entropy"):
        if not 0 <= getattr(train, name) < math.inf:
            raise ValueError(f"train.{name} must be at least 0 and finite, got {getattr(train, name)}")
    if train.batch % train.accumulation:
        raise ValueError(f"train.accumulation must divide batch={train.batch}, got {train.accumulation}")
    if config.model.max_length is not None and config.model.max_length < data.length:
        raise ValueError(f"model.max_length must be at least data.length={data.length}, got {config.model.max_length}")
    if config.model.prefix_length >= data.length:
        raise ValueError(
            f"model.prefix_length must be below data.length={data.length}, so that tokens are left to predict, "
            f"got {config.model.prefix_length}"
        )
    check_sparsify(config.sparsify, steps=train.steps)
    check_evaluations(config.sparsify, steps=train.steps, eval_every=train.eval_every)
    if optim.sparse_state and (config.sparsify.method not in COMPACT or not config.sparsify.sparsity):
        raise ValueError(
            f"optim.sparse_state must be false unless sparsify.method is one of {', '.join(COMPACT)} and its sparsity"
            f" above 0, got method={config.sparsify.method!r}, sparsity={config.sparsify.sparsity}: it would be dense"
        )
    if train.compile and config.sparsify.fisher_penalty:
        raise ValueError(
            "train.compile must be false with sparsify.fisher_penalty: compiled layers are differentiable once"
        )
    if train.compile and config.sparsify.method == "variational":
        raise ValueError("train.compile must be false for sparsify.method='variational', whose hooks it would skip")
    _check_optim(optim)
    check_upcycle(config.upcycle, config.init)
    if config.model.select_warm_up and config.sparsify != SparsifyConfig():
        raise ValueError("[sparsify] must be left out with model.select_warm_up, in which only the indexers learn")
    if config.init is None:
        # a layer that cannot be built is found before the corpus is read; its vocabulary changes nothing of that
        _check_routers(config, model_config(config.model, vocab_size=1, length=data.length))


def _check_compression(distributed: DistributedConfig) -> None:
    if not 0 < distributed.density <= 1:
        raise ValueError(f"distributed.density must be in (0, 1], got {distributed.density}")
    if distributed.compression_warmup < 0:
        raise ValueError(f"distributed.compression_warmup must be at least 0, got {distributed.compression_warmup}")
    momentum, default = distributed.compression_momentum, DistributedConfig.compression_momentum
    if not 0 <= momentum < 1:
        raise ValueError(f"distributed.compression_momentum must be in [0, 1), got {momentum}")
    if momentum != default and distributed.compression != "dgc":
        raise ValueError(
            f"distributed.compression_momentum is of compression 'dgc', got {momentum} with "
            f"'{distributed.compression}': set optim.betas"
        )


def _check_routers(config: RunConfig, model: TransformerConfig) -> None:
    """Raises: ValueError for what only routers have where no layer has one, or a load that none of them estimates."""
    routers = {layer.feedforward.router for layer in model.layers if isinstance(layer.feedforward, MoEConfig)}
    losses = ("importance", "load", "entropy")
    asked = {f"train.{name}": value for name in losses if (value := getattr(config.train, name))}
    if config.optim.router_lr != OptimConfig.router_lr:
        asked["optim.router_lr"] = config.optim.router_lr
    if asked and not routers:
        name, value = next(iter(asked.items()))
        raise ValueError(f"{name} needs a layer with a router, got {value} and no layer of feedforward moe")
    if config.train.load and routers - {"noisy_top_k"}:
        raise ValueError(
            f"train.load must be 0 unless model.router is noisy_top_k, which estimates a load, got {config.train.load} "
            f"with {', '.join(sorted(routers))}"
        )


def _check_optim(optim: OptimConfig) -> None:
    for name, value in {
        "warmup": optim.warmup,
        "weight_decay": optim.weight_decay,
        "router_lr": optim.router_lr,
    }.items():
        if not value >= 0:
            raise ValueError(f"optim.{name} must be at least 0, got {value}")
    if not 0 <= optim.final <= 1:
        raise ValueError(f"optim.final must be in [0, 1], got {optim.final}")
    if not 0 < optim.decay_fraction <= 1:
        raise ValueError(f"optim.decay_fraction must be in (0, 1], got {optim.decay_fraction}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas must be in [0, 1), got {optim.betas}")


def _convert(kind: Any, value: Any, *, where: str, section: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return from_dict(kind, value, where=where, section=section)
    elif origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where=where, section=section)
    elif origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{section} in {where} must be one of {', '.join(arguments)}, got {value!r}")
    elif origin is tuple:
        if isinstance(value, list) and (arguments[-1] is Ellipsis or len(value) == len(arguments)):
            inner = arguments[0]
            return tuple(_convert(inner, item, where=where, section=section) for item in value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{section} in {where} must be {_name(kind)}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _suggestion(key: str, known: dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known keys are {', '.join(known)}"


def _has_no_default(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "a table"
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
