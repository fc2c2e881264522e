"""This library's own transformer from a compact folder."""

from pathlib import Path

from pruning.formats import load_compact
from transformer import Transformer, TransformerConfig


def load_compact_transformer(folder: str | Path) -> Transformer:
    """The model that :func:`pruning.formats.save_compact` wrote, with its config, in evaluation mode.

    >>> save_compact(model, folder)
    >>> model = load_compact_transformer(folder)

    Raises: FileNotFoundError or ValueError naming the file and what is wrong with it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the config of a transformer.Transformer")
    return load_compact(folder, Transformer(TransformerConfig.load(path))).eval()
