"""Whether a checkpoint is of the model that goes on from it: equal shapes do not say so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer import Transformer, TransformerConfig

# what a model does in training alone, how fast it decodes, how long its sequences may be, and leave to look ahead
MAY_CHANGE = frozenset(
    {"dropout", "head_dropout", "drop_connect", "path_dropout", "layer_drop", "layer_drop_rescale", "jitter",
     "bias_update", "second_expert", "sinkhorn_iterations", "sinkhorn_temperature", "auction_rounds", "auction_epsilon",
     "execution", "error_k", "error_unified", "max_length", "allow_future"}
)  # fmt: skip


def check_same_model(folder: Path, model: Transformer) -> None:
    """Compare config.json of a checkpoint with the model's config, but for ``MAY_CHANGE``.

    Heads, k, router, pattern, activation, rotary base, capacity and the like leave the shapes of the weights as they
    are and make another function of them.
    Raises: ValueError with the first setting that differs; or if config.json is not a config.
    """
    theirs = dict(_settings(TransformerConfig.load(folder / "config.json").to_dict(), ""))
    mine = dict(_settings(model.config.to_dict(), ""))
    for name in {**theirs, **mine}:
        there, here = theirs.get(name), mine.get(name)
        if there != here and name.rpartition(".")[2] not in MAY_CHANGE:
            raise ValueError(
                f"{folder} is of another model: {name} is {there!r} there and {here!r} in this run: resume with the"
                f" [model] settings that made it, or start a new --out (with --init {folder} to go on from its weights)"
            )


def _settings(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """{"layers": [{"depth": None}]} as ("layers.0.depth", None)."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
