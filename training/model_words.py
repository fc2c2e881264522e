"""The words of [model] that the records of a model know by shorter names: an error speaks the file's."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_MEMORY = {"heads": "memory_heads", "k": "memory_k", "pool": "memory_pool"}
FEEDFORWARD_WORDS: Mapping[str, Mapping[str, str]] = {
    "product_key": _MEMORY,
    "peer": _MEMORY,
    "thresholded": {"top_k": "top_neurons", "method": "threshold_method", "execution": "threshold_execution"}
    | {"predictor_rank": "activation_predictor_rank"},
}
ATTENTION_WORDS = {
    "num_heads": "heads", "num_kv_heads": "kv_heads", "dropout": "attention_dropout", "shared_qk": "select_shared_qk",
}  # fmt: skip
DEPTH_WORDS = {"capacity": "depth_capacity", "weighting": "depth_weighting"}
_BUCKETS = {"num_buckets": "select_buckets", "num_clusters": "select_buckets", "chunk": "select_block"}
SELECTION_WORDS: Mapping[str, Mapping[str, str]] = {
    "moba": {"block": "select_block", "top_k": "select_k"},
    "top_k": {"k": "select_k"},
    "nsa": {"top_n": "select_k", "mlp_hidden": "select_hidden"}
    | {name: f"select_{name}" for name in ("compress", "stride", "block", "initial", "local", "window")},
    "dsa": {"top_k": "select_k", "heads": "select_heads", "head_dim": "select_dim", "rope_dim": "select_rope_dim"},
    "lsh": _BUCKETS | {"rounds": "select_rounds", "seed": "select_seed", "shared_qk": "select_shared_qk"},
    "kmeans": _BUCKETS | {"window": "select_block", "decay": "select_decay", "seed": "select_seed"}
    | {"shared_qk": "select_shared_qk"},
    "sinkhorn": {name: f"select_{name}" for name in ("block", "iterations", "temperature", "gumbel", "seed")},
}  # fmt: skip


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """A ValueError raised in here comes out with each name in ``words`` replaced by what stands for it.

    >>> with in_words({"k": "memory_k"}):
    ...     raise ValueError("k must be in [1, num_keys=8], got 9")
    Traceback (most recent call last):
    ValueError: memory_k must be in [1, num_keys=8], got 9
    """
    try:
        yield
    except ValueError as error:
        names = "|".join(map(re.escape, words))
        text = re.sub(rf"(?<![\w'])({names})(?![\w'])", lambda found: words[found[1]], str(error)) if words else error
        raise ValueError(text) from error


@contextmanager
def of_layer(index: int) -> Iterator[None]:
    """A ValueError raised in here comes out with the layer's number before it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error
