"""The shape of a model: frozen records that validate themselves and survive a JSON round trip.

Layers are unequal on purpose: a pruned model has its own head count, pattern and feed-forward in every layer.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from moe import AttentionThresholds, Thresholds
from moe.checks import at_least, below_one
from sparse_attn import parse_pattern
from transformer.checks import check_fields
from transformer.feedforward_config import (
    DenseConfig,
    FeedForwardConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    SoftMoEConfig,
    ThresholdedConfig,
)
from transformer.layer_config import AttentionConfig, DepthConfig, LayerConfig
from transformer.rope import RopeScaling
from transformer.selection_config import SELECTIONS, SinkhornConfig

T = TypeVar("T")


@dataclass(frozen=True)
class TransformerConfig:
    """A transformer: token embedding, ``layers``, final norm, output head.

    vocab_size, dim: rows and width of the embedding. max_length: longest sequence (positions) the model is meant for;
    longer inputs are refused. rope_theta: base of the rotary frequencies; rope_scaling: how they are
    stretched. tied: the head shares the embedding.
    dropout: rate after each sub-layer in training. causal: False makes an encoder, whose patterns may look ahead.
    prefix_length: of a prefix language model, whose first tokens may see each other (``prefix_lm(n)``): patterns may
    look ahead to these alone, and the loss leaves them out.
    """

    vocab_size: int
    dim: int
    layers: tuple[LayerConfig, ...]
    max_length: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = True
    dropout: float = 0.0
    causal: bool = True
    rope_scaling: RopeScaling | None = None
    prefix_length: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_fields(self)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LayerConfig):
                raise ValueError(f"layers[{index}] must be a LayerConfig, got {type(layer).__name__}")
        for name in ("vocab_size", "dim", "max_length"):
            at_least(name, getattr(self, name), 1)
        if not (self.rope_theta > 0 and self.norm_eps > 0):
            raise ValueError(f"rope_theta and norm_eps must be > 0, got {self.rope_theta} and {self.norm_eps}")
        below_one("dropout", self.dropout)
        _check_pools(self.layers)
        self._check_prefix()
        for index, layer in enumerate(self.layers):
            if self.causal and layer.attention:
                _check_past(index, layer.attention.pattern, self.prefix_length)
            _check_blocks(index, layer, self.max_length)
            if not self.causal and layer.attention and _looks_back(layer.attention):
                raise ValueError(f"layer {index}: a selection never looks ahead: set causal=True, or selection=None")
            if self.causal and isinstance(layer.feedforward, MoEConfig | SoftMoEConfig) and _leaks(layer.feedforward):
                raise ValueError(
                    f"layer {index}: {_kind(_FEEDFORWARDS, type(layer.feedforward))} compares a token with later ones; "
                    f"set allow_future=True to train with it all the same, or causal=False"
                )
        _ = self.counts_positions  # found out now: torch.compile then reads it as a constant

    def _check_prefix(self) -> None:
        at_least("prefix_length", self.prefix_length, 0)
        if self.prefix_length and not self.causal:
            raise ValueError(f"prefix_length must be 0 for an encoder (causal=False), got {self.prefix_length}")
        if self.prefix_length >= self.max_length:
            raise ValueError(f"prefix_length must be < max_length={self.max_length}, got {self.prefix_length}")

    @classmethod
    def uniform(
        cls,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        pattern: str | None = None,
        feedforward: FeedForwardConfig | None = None,
        max_length: int = 1024,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        tied: bool = True,
        dropout: float = 0.0,
        causal: bool = True,
        prefix_length: int = 0,
    ) -> "TransformerConfig":
        """All layers alike.

        Defaults: num_kv_heads = num_heads; head_dim = dim / num_heads; pattern = ``causal()`` (``full()`` for an
        encoder, ``prefix_lm(prefix_length)`` with a prefix); feedforward = SwiGLU of 8/3·dim neurons rounded up to a
        multiple of 64.
        Raises ValueError where a size does not fit (name, bound, value).
        """
        at_least("num_layers", num_layers, 0)
        at_least("num_heads", num_heads, 1)
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"num_heads must divide dim={dim} unless head_dim is given, got {num_heads}")
            head_dim = dim // num_heads
        if pattern is None:
            pattern = f"prefix_lm({prefix_length})" if prefix_length > 0 else "causal()" if causal else "full()"
        attention = AttentionConfig(num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim, pattern)
        if feedforward is None:
            feedforward = DenseConfig(-(-8 * dim // 3 // 64) * 64)
        return cls(
            vocab_size=vocab_size, dim=dim, layers=(LayerConfig(attention, feedforward),) * num_layers,
            max_length=max_length, rope_theta=rope_theta, norm_eps=norm_eps, tied=tied, dropout=dropout, causal=causal,
            prefix_length=prefix_length,
        )  # fmt: skip

    @cached_property
    def counts_positions(self) -> bool:
        """Whether some layer counts positions from the start of the text, as sinks and selections do."""
        attentions = [layer.attention for layer in self.layers if layer.attention is not None]
        return any(attention.selection or not parse_pattern(attention.pattern).is_relative for attention in attentions)

    @cached_property
    def seen_prefix(self) -> int:
        """prefix_length if some pattern looks ahead to a prefix, else 0."""
        patterns = (parse_pattern(layer.attention.pattern) for layer in self.layers if layer.attention)
        return 0 if all(pattern.is_causal for pattern in patterns) else self.prefix_length

    @property
    def sees_future(self) -> tuple[int, ...]:
        """The layers whose feed-forward compares a token with later ones."""
        return tuple(
            index for index, layer in enumerate(self.layers) if getattr(layer.feedforward, "sees_future", False)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; a feed-forward and a selection carry their ``kind``."""
        record = dataclasses.asdict(self)
        for layer, written in zip(self.layers, record["layers"], strict=True):
            if layer.feedforward is not None:
                written["feedforward"]["kind"] = _kind(_FEEDFORWARDS, type(layer.feedforward))
            if layer.attention is not None and layer.attention.selection is not None:
                written["attention"]["selection"]["kind"] = _kind(SELECTIONS, type(layer.attention.selection))
        record["layers"] = list(record["layers"])
        return {"model_type": "sparse-transformers", **record}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TransformerConfig":
        """The inverse of :meth:`to_dict`. Raises ValueError on an unknown key (naming the nearest) or a wrong type."""
        record = dict(_table(record, "config"))
        if record.pop("model_type", "sparse-transformers") != "sparse-transformers":
            raise ValueError("model_type must be 'sparse-transformers'; this config is another library's")
        if not isinstance(record.get("layers"), list | tuple):
            raise ValueError(f"layers must be a list of tables, got {record.get('layers')!r}")
        record["layers"] = tuple(_layer(layer, f"layers[{i}]") for i, layer in enumerate(record["layers"]))
        if record.get("rope_scaling") is not None:
            where = "config.rope_scaling"
            record["rope_scaling"] = _build(RopeScaling, _table(record["rope_scaling"], where), where)
        return _build(cls, record, "config")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TransformerConfig":
        """Read what :meth:`save` wrote. Raises ValueError when the file is no JSON or has wrong keys."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); was the copy cut short?") from error


_FEEDFORWARDS: dict[str, type[FeedForwardConfig]] = {
    "dense": DenseConfig,
    "thresholded": ThresholdedConfig,
    "moe": MoEConfig,
    "soft_moe": SoftMoEConfig,
    "product_key": ProductKeyConfig,
    "peer": PEERConfig,
}


def _check_pools(layers: tuple[LayerConfig, ...]) -> None:
    """Layers that share a pool of values agree on its size."""
    pools: dict[str, tuple[int, ProductKeyConfig]] = {}
    for index, layer in enumerate(layers):
        memory = layer.feedforward
        if isinstance(memory, ProductKeyConfig) and memory.pool is not None:
            first, other = pools.setdefault(memory.pool, (index, memory))
            for name in ("num_keys", "value_dim"):
                if getattr(memory, name) != getattr(other, name):
                    raise ValueError(
                        f"layer {index}: {name} must be {getattr(other, name)} as in layer {first}, "
                        f"which shares pool {memory.pool!r}, got {getattr(memory, name)}"
                    )


def _check_past(index: int, text: str, prefix: int) -> None:
    """No query of a causal model sees a later key, but for those of the prefix."""
    pattern = parse_pattern(text)
    if pattern.is_causal_after(prefix):
        return
    way_out = ""
    if pattern.is_causal_after(sys.maxsize):
        way_out = f", or prefix_length, got {prefix}, to the number of its first tokens, which the loss then leaves out"
    raise ValueError(
        f"layer {index}: pattern {text!r} sees the future; combine it with causal() or set causal=False{way_out}"
    )


def _check_blocks(index: int, layer: LayerConfig, max_length: int) -> None:
    """A Sinkhorn layer sorts every block of the longest sequence."""
    selection = layer.attention.selection if layer.attention else None
    if isinstance(selection, SinkhornConfig) and selection.block * selection.max_blocks < max_length:
        raise ValueError(
            f"layer {index}: max_blocks must be >= {-(-max_length // selection.block)} for max_length={max_length} in "
            f"blocks of {selection.block}, got {selection.max_blocks}"
        )


def _looks_back(attention: AttentionConfig) -> bool:
    """Whether a selection chooses among earlier keys only."""
    selection = attention.selection
    return selection is not None and not (isinstance(selection, SinkhornConfig) and not selection.causal)


def _leaks(feedforward: MoEConfig | SoftMoEConfig) -> bool:
    return feedforward.sees_future and not feedforward.allow_future


def _kind(kinds: Mapping[str, type], record_type: type) -> str:
    return next(name for name, candidate in kinds.items() if candidate is record_type)


def _layer(record: dict[str, Any], where: str) -> LayerConfig:
    attention, feedforward = _table(record, where).get("attention"), record.get("feedforward")
    depth = record.get("depth")
    if depth is not None:
        depth = _build(DepthConfig, _table(depth, f"{where}.depth"), f"{where}.depth")
    if attention is not None:
        attention = _attention(_table(attention, f"{where}.attention"), f"{where}.attention")
    if feedforward is not None:
        feedforward = _feedforward(_table(feedforward, f"{where}.feedforward"), f"{where}.feedforward")
    return _build(LayerConfig, {**record, "attention": attention, "feedforward": feedforward, "depth": depth}, where)


def _attention(record: dict[str, Any], where: str) -> AttentionConfig:
    selection = record.get("selection")
    if selection is not None:
        selection = _of_kind(SELECTIONS, _table(selection, f"{where}.selection"), f"{where}.selection")
    record = _with_thresholds(AttentionThresholds, record, where)
    if isinstance(record.get("alibi_slopes"), list):
        record = record | {"alibi_slopes": tuple(record["alibi_slopes"])}
    return _build(AttentionConfig, {**record, "selection": selection}, where)


def _feedforward(record: dict[str, Any], where: str) -> FeedForwardConfig:
    return _of_kind(_FEEDFORWARDS, {"kind": "dense"} | _with_thresholds(Thresholds, record, where), where)


def _with_thresholds(kind: type, record: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with its thresholds, if it has any, as the record that they are."""
    if record.get("thresholds") is None:
        return record
    where = f"{where}.thresholds"
    return record | {"thresholds": _build(kind, _table(record["thresholds"], where), where)}


def _of_kind(kinds: Mapping[str, type[T]], record: dict[str, Any], where: str) -> T:
    """The record that a table with a ``kind`` describes."""
    kind = record.get("kind")
    # a list or a table, which a damaged file may have there, is no key of a dict
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where}.kind must be one of {sorted(kinds)}, got {kind!r}")
    return _build(kinds[kind], {name: value for name, value in record.items() if name != "kind"}, where)


def _build(record_type: type[T], values: dict[str, Any], where: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            raise ValueError(f"unknown key {key!r} in {where}{hint}")
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return record_type(**values)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table, got {value!r}")
    return value
