"""Weights of trained models, which come with packages (`make models`): where they lie."""

import importlib.util
import os
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
    return Path(spec.submodule_search_locations[0])
