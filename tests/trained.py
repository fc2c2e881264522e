"""Weights of trained models, which come with packages (`make models`): where they lie."""

import importlib.util
import os
from functools import cache, lru_cache
from pathlib import Path

import pytest


def folder_of(package: str) -> Path:
    """The folder of an installed package of weights; without it the test is skipped, or fails where TRAINED_MODELS is
    "required"."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        missing = f"needs the package {package.replace('_', '-')}: make models"
        if os.environ.get("TRAINED_MODELS") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    _parse_once()
    return Path(spec.submodule_search_locations[0])


@cache
def _parse_once() -> None:
    """transformers parses a .gguf file for the config, the tokenizer and the model, and makes a table of names for each
    module of it: half of the time of a test. From now on each is made once in a process."""
    if importlib.util.find_spec("gguf") is None:
        return
    import gguf

    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    gguf.GGUFReader = lru_cache(maxsize=1)(gguf.GGUFReader)  # type: ignore[misc]
