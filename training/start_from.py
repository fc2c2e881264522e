"""The model that a run starts from, attending as [model] says."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from training.model_layers import attention_of
from training.model_owners import SELECTION_OWNERS
from training.model_words import SELECTION_WORDS, of_layer
from training.start_words import attends, check_words, other_sizes, said, said_of_layer
from transformer import (
    AttentionConfig,
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    SelectionConfig,
    Transformer,
    TransformerConfig,
)
from transformer.hf_patterns import with_pattern
from transformer.selection_config import SELECTIONS, Bounded

if TYPE_CHECKING:
    from training.model_config import ModelConfig


@dataclass(frozen=True)
class StartReport:
    """What became of the model in ``folder``. attention: of each layer, None where it is pruned away. prefix:
    prefix_length before and now. fresh: tensors that start anew; left_out: trained ones that nothing reads any more.
    sizes: those of [model] that do not hold."""

    folder: Path
    attention: tuple[dict[str, Any] | None, ...]
    prefix: tuple[int, int] = (0, 0)
    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sizes: str = ""

    def lines(self) -> str:
        """For the console."""
        ways: dict[str, list[str]] = {}
        for index, way in enumerate(self.attention):
            if way is not None:
                ways.setdefault(_told(way), []).append(str(index))
        found = [f"start from {self.folder}"]
        found += [f"  {_count('layer', at)} {', '.join(at)}: {way}" for way, at in ways.items()]
        if self.prefix[0] != self.prefix[1]:
            found.append(f"  prefix_length {self.prefix[1]}, before {self.prefix[0]}")
        found += [f"  its own sizes hold: [model] says {self.sizes}"] if self.sizes else []
        found += [f"  new weights in {names}" for names in _by_layer(self.fresh)]
        found += [f"  trained weights left out of {names}" for names in _by_layer(self.left_out)]
        return "\n".join(found)

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "folder": str(self.folder),
            "attention": list(self.attention),
            "prefix_length": {"before": self.prefix[0], "now": self.prefix[1]},
            "new_weights": list(self.fresh),
            "left_out": list(self.left_out),
            "other_sizes": self.sizes,
        }


def attending(model: Transformer, words: "ModelConfig", *, folder: Path, seed: int) -> tuple[Transformer, StartReport]:
    """The model with the pattern and selection that [model] says, and what that made of it.

    A word at its default says nothing: the model keeps what it has. But the indexer of DSA warms up only where
    ``select_warm_up`` says so, and a model of which no pattern looks ahead to a prefix any more has none. A selection
    that takes no pattern takes ``causal()``. Weights of a new selection are drawn from ``seed``; so are those that get
    another shape, and the rotations or centroids of another select_seed.
    Raises: ValueError for any other word that is not what the model has, and for words that do not go together.
    """
    check_words(words, model.config, folder)
    _check_owned(words, model.config, folder)
    config = attention_words_applied(words, model.config)
    made, fresh, left_out = _remade(model, config, seed)
    ways = [layer.get("attention") for layer in config.to_dict()["layers"]]
    shown = tuple(way and {name: way[name] for name in ("pattern", "selection")} for way in ways)
    prefix = model.config.prefix_length, config.prefix_length
    return made, StartReport(folder, shown, prefix, tuple(fresh), tuple(left_out), other_sizes(words, model.config))


def attention_words_applied(words: "ModelConfig", config: TransformerConfig) -> TransformerConfig:
    """The config with the pattern and selection of each layer that [model] says. Raises: ValueError."""
    selections: list[SelectionConfig | None] = []
    patterns: list[str | None] = []
    for index, layer in enumerate(config.layers):
        own = {word: value for word, value in (said(words) | said_of_layer(words, index)).items() if attends(word)}
        if layer.attention is None:
            selections.append(None)
            patterns.append(None)
            continue
        with of_layer(index):
            selection = _selection(layer.attention, own, config)
        placed = selection is not None and not isinstance(selection, Bounded) and "selection" in own
        selections.append(selection)
        patterns.append(own.get("pattern", "causal()" if placed else None))
    plain = _with_selections(config, [None] * len(config.layers))
    roomy = dataclasses.replace(plain, prefix_length=max(config.prefix_length, words.prefix_length))
    made = with_pattern(roomy, patterns)
    if words.prefix_length:
        made = dataclasses.replace(made, prefix_length=words.prefix_length)
    elif config.seen_prefix and not made.seen_prefix:
        made = dataclasses.replace(made, prefix_length=0)
    return _with_selections(made, selections)


def _selection(attention: AttentionConfig, own: dict[str, Any], config: TransformerConfig) -> SelectionConfig | None:
    had = attention.selection
    before = next((name for name, kind in SELECTIONS.items() if isinstance(had, kind)), "none")
    kind = own.get("selection", before)
    options = {word: value for word, value in own.items() if kind in SELECTION_OWNERS.get(word, ())}
    if kind == before and not options.keys() - {"select_warm_up"}:
        selection = had
    else:
        selection = _made(attention, kind, options, config)
        if kind == before and isinstance(had, DSAConfig) and isinstance(selection, DSAConfig) and had.rope_dim:
            selection = dataclasses.replace(selection, rope_theta=had.rope_theta)
    if isinstance(selection, DSAConfig):
        return dataclasses.replace(selection, warm_up=own.get("select_warm_up", False))
    return selection


def _made(
    attention: AttentionConfig, kind: str, options: dict[str, Any], config: TransformerConfig
) -> SelectionConfig | None:
    from training.model_config import ModelConfig  # which reads the layers' words

    had: dict[str, Any] = {}
    before = attention.selection
    if before is not None and isinstance(before, SELECTIONS.get(kind, ())):
        fields = dataclasses.asdict(before)
        had = {word: fields[field] for field, word in SELECTION_WORDS[kind].items() if field in fields}
    section = ModelConfig(
        dim=config.dim, heads=attention.num_heads, kv_heads=attention.num_kv_heads, head_dim=attention.head_dim,
        alibi=attention.alibi, rope_theta=config.rope_theta, selection=cast(Any, kind), **had | options,
    )  # fmt: skip
    return attention_of(section, config.max_length).selection


def _with_selections(config: TransformerConfig, selections: Sequence[SelectionConfig | None]) -> TransformerConfig:
    layers = []
    for index, (layer, selection) in enumerate(zip(config.layers, selections, strict=True)):
        if layer.attention is not None:
            with of_layer(index):
                layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, selection=selection))
        layers.append(layer)
    return dataclasses.replace(config, layers=tuple(layers))


def _check_owned(words: "ModelConfig", config: TransformerConfig, init: Path) -> None:
    """Raises: ValueError for a word of attention that no layer takes."""
    taken: set[str] = set()
    kinds: set[str] = set()
    for index, layer in enumerate(config.layers):
        own = said_of_layer(words, index)
        if layer.attention is None:
            if lost := [word for word in own if attends(word)]:
                raise ValueError(f"model.layer.{lost[0]} needs attention, of which layer {index} of {init} has none")
            continue
        had = next((name for name, kind in SELECTIONS.items() if isinstance(layer.attention.selection, kind)), "none")
        kind = (said(words) | own).get("selection", had)
        kinds.add(kind)
        taken |= {"pattern", "selection", "prefix_length"}
        taken |= {word for word, owners in SELECTION_OWNERS.items() if kind in owners}
    for word, value in said(words).items():
        if attends(word) and word not in taken:
            owners = SELECTION_OWNERS.get(word)
            what = "attention" if owners is None else f"selection {' or '.join(owners)}"
            raise ValueError(
                f"model.{word} belongs to {what}, got {word}={value!r} with"
                f" {', '.join(sorted(kinds)) or 'no attention'} in {init}"
            )


def _remade(model: Transformer, config: TransformerConfig, seed: int) -> tuple[Transformer, list[str], list[str]]:
    """A model of ``config`` with the weights of ``model`` as far as they fit, and the names of what is new or gone."""
    if config == model.config:
        return model, [], []
    with torch.device("meta"):
        made = Transformer(config)
    anew = tuple(
        f"layers.{index}.attention.selection."
        for index, (old, new) in enumerate(zip(model.config.layers, config.layers, strict=True))
        if old.attention and new.attention and _starts_anew(old.attention.selection, new.attention.selection)
    )
    tensors, wanted = model.state_dict(), made.state_dict()
    fresh = [
        name
        for name, tensor in wanted.items()
        if name.startswith(anew) or name not in tensors or tensors[name].shape != tensor.shape
    ]
    if fresh:
        drawn = Transformer(config, generator=torch.Generator().manual_seed(seed))
        for parameter in drawn.parameters():
            parameter.data = parameter.to(model.embedding.weight.dtype)
        tensors |= {name: tensor for name, tensor in drawn.state_dict().items() if name in fresh}
    made.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    return made.train(model.training), fresh, [name for name in tensors if name not in wanted]


def _starts_anew(old: SelectionConfig | None, new: SelectionConfig | None) -> bool:
    if type(old) is not type(new):
        return True
    return isinstance(old, LSHConfig | KMeansConfig) and old.seed != new.seed  # type: ignore[union-attr]


def _told(way: dict[str, Any]) -> str:
    selection = way["selection"]
    if selection is None:
        return way["pattern"]
    options = ", ".join(f"{name}={value}" for name, value in selection.items() if name != "kind")
    return f"{way['pattern']}, selection {selection['kind']} ({options})"


def _by_layer(names: Sequence[str]) -> list[str]:
    """layers.0.a, layers.0.b, layers.1.a, layers.1.b as "layers 0, 1: a, b"."""
    own: dict[str, list[str]] = {}
    for name in names:
        _, index, rest = name.split(".", 2)
        own.setdefault(index, []).append(rest)
    alike: dict[str, list[str]] = {}
    for index, found in own.items():
        alike.setdefault(", ".join(found), []).append(index)
    return [f"{_count('layer', at)} {', '.join(at)}: {found}" for found, at in alike.items()]


def _count(word: str, items: Sequence[str]) -> str:
    return word if len(items) == 1 else f"{word}s"
