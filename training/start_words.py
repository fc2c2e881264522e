"""Which words of [model] a run says that starts from a trained model, and whether that model has them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.model_owners import OWNERS, SIZE_OWNERS
from training.model_words import ATTENTION_WORDS, FEEDFORWARD_WORDS
from transformer import TransformerConfig

if TYPE_CHECKING:
    from training.model_config import ModelConfig

# what pruning and upcycling change: the trained model's own sizes hold, and the start says so
SIZES = ("layers", "heads", "kv_heads", "hidden", "shared_hidden", "num_experts", "k")
OF_MODEL = ("dim", "rope_theta", "norm_eps", "tied", "dropout", "max_length")
OF_ATTENTION = {word: word for word in ("head_dim", "softcap", "alibi", "head_dropout")} | {
    word: field for field, word in ATTENTION_WORDS.items() if not word.startswith("select_")
}


def said(model: "ModelConfig") -> dict[str, Any]:
    """The words of [model] that are not their default, without those of single layers."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name != "layer" and getattr(model, field.name) != field.default
    }


def said_of_layer(model: "ModelConfig", index: int) -> dict[str, Any]:
    """The words that the table of this layer names, which count even where they are a default."""
    tables = [dataclasses.asdict(layer) for layer in model.layer if layer.at == index]
    return {word: value for table in tables for word, value in table.items() if word != "at" and value is not None}


def attends(word: str) -> bool:
    """Whether a word says how weights attend, which trained ones can be told anew."""
    return word in ("pattern", "selection", "prefix_length") or word.startswith("select_")


def check_words(model: "ModelConfig", config: TransformerConfig, init: object) -> None:
    """config: of the model in ``init``.

    Raises: ValueError with the words that are neither of attention nor sizes nor what that model has, and what to do.
    """
    count = len(config.layers)
    at = [layer.at for layer in model.layer]
    for index in at:
        if not 0 <= index < count:
            raise ValueError(f"model.layer.at must be in [0, layers={count}) of {init}, got {index}")
        if at.count(index) > 1:
            raise ValueError(f"model.layer.at must name each layer once, got {index} twice: put both into one")
    refused = _refused(model, config)
    if refused:
        told = _told(refused, model)
        flags = " ".join(undone(model, config))
        raise ValueError(
            f"{init} gives the model, from which [model] may differ in pattern, prefix_length, selection and"
            f" select_… alone, got {told}: leave that out" + (f", or add {flags}" if flags else "")
        )


def other_sizes(model: "ModelConfig", config: TransformerConfig) -> str:
    """The sizes of [model] that the model in init has otherwise, which hold; empty where there are none."""
    return _told({word: pairs for word, pairs in _wrong(model, config).items() if word in SIZES}, model)


def _told(wrong: dict[str, list[tuple[Any, Any]]], model: "ModelConfig") -> str:
    return "; ".join(
        f"{word}={_list(pairs, 0, model, word)} where it has {_list(pairs, 1, model, word)}"
        for word, pairs in wrong.items()
    )


def undone(model: "ModelConfig", config: TransformerConfig) -> list[str]:
    """The arguments of `train` that leave out the words of [model] that :func:`check_words` would refuse."""
    refused, base = _refused(model, config), said(model)
    fields = [field for field in dataclasses.fields(model) if field.name in refused and field.name in base]
    return [part for field in fields for part in _flag(field.name, field.default)]


def renumbered(model: "ModelConfig", kept: Sequence[int]) -> str:
    """What becomes of the [[model.layer]] tables where ``kept`` of the layers are left: no argument of `train` says it.
    Empty where they stay as they are."""
    places = {old: new for new, old in enumerate(sorted(kept))}
    moves = [
        f"at = {layer.at} becomes at = {places[layer.at]}" if layer.at in places else f"at = {layer.at} goes"
        for layer in model.layer
        if places.get(layer.at) != layer.at
    ]
    return ", ".join(moves)


def _refused(model: "ModelConfig", config: TransformerConfig) -> dict[str, list[tuple[Any, Any]]]:
    return {word: pairs for word, pairs in _wrong(model, config).items() if word not in SIZES}


def _wrong(model: "ModelConfig", config: TransformerConfig) -> dict[str, list[tuple[Any, Any]]]:
    """Of what :func:`_compared` gives, the words that the model does not have."""
    return {
        word: pairs
        for word, pairs in _compared(model, config).items()
        if any(here != there for here, there in pairs) or not (pairs or word in SIZE_OWNERS)
    }


def _compared(model: "ModelConfig", config: TransformerConfig) -> dict[str, list[tuple[Any, Any]]]:
    """For each word that is not of attention, what is said and what the model has, wherever it has a place for it."""
    record, base = config.to_dict(), said(model)
    layers = record["layers"]
    of_model = {word: record[word] for word in OF_MODEL} | {"layers": len(layers)}
    found = {word: [(value, of_model[word])] if word in of_model else [] for word, value in base.items()}
    for index, layer in enumerate(layers):
        own = said_of_layer(model, index)
        for word, value in (base | own).items():
            if word in of_model or attends(word):
                continue
            if word == "path_dropout":  # of the last layer, of which the others have a part
                value = value * (index + 1) / len(layers)
            places = _places(layer, word)
            if word in own and not places:
                places = ["no place for it in this layer"]
            found.setdefault(word, []).extend((value, there) for there in places)
    return {word: pairs for word, pairs in found.items() if not attends(word)}


def _places(layer: dict[str, Any], word: str) -> list[Any]:
    """What a layer's record has under a word of [model]: nothing, or one or more values."""
    attention, feedforward, depth = (layer[name] or {} for name in ("attention", "feedforward", "depth"))
    kind = feedforward.get("kind")
    if word == "drop_connect":
        return [part[word] for part in (attention, feedforward) if word in part]
    if word == "attention_threshold":
        return list((attention["thresholds"] or {"": 0.0}).values()) if attention else []
    if word == "depth_capacity":
        return [depth.get("capacity")]
    if word == "layer_drop_rescale":
        return [layer[word]] if layer["layer_drop"] else []
    places: dict[str, Any] = {word: layer[word] for word in ("path_dropout", "layer_drop")}
    if depth:
        places["depth_weighting"] = depth["weighting"]
    if attention:
        places |= {word: attention[field] for word, field in OF_ATTENTION.items()}
        places["softcap"] = attention["softcap"] or 0.0
    if kind is not None:
        words = FEEDFORWARD_WORDS.get(kind, {})
        own = {words.get(field, field): value for field, value in feedforward.items() if field != "kind"}
        owned = OWNERS | SIZE_OWNERS
        places |= {word: value for word, value in own.items() if kind in owned.get(word, ())} | {"feedforward": kind}
    return [places[word]] if word in places else []


def _list(pairs: list[tuple[Any, Any]], side: int, model: "ModelConfig", word: str) -> str:
    values = [pair[side] for pair in pairs] or [getattr(model, word) if side == 0 else "no place for it"]
    return " and ".join(dict.fromkeys(str(value) for value in values))


def _flag(word: str, default: Any) -> list[str]:
    name = word.replace("_", "-")
    if isinstance(default, bool):
        return [f"--model.{name}" if default else f"--model.no-{name}"]
    return [f"--model.{name}", str(default)]
