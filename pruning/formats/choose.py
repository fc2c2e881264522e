"""The format that takes the fewest bytes."""

from collections.abc import Sequence

from jaxtyping import Shaped
from torch import Tensor

from pruning.formats.codecs import encoded_bytes
from pruning.formats.encoded import FORMATS


def sizes(matrix: Shaped[Tensor, "out in"], *, formats: Sequence[str] = FORMATS) -> dict[str, int]:
    """Format → bytes that the matrix takes in it, exactly; N:M is left out where it does not fit.

    >>> sizes(torch.eye(64), formats=("dense", "bitmask", "csr"))
    {'dense': 16384, 'bitmask': 768, 'csr': 385}

    Raises: ValueError for an unknown format."""
    found = {format: encoded_bytes(matrix, format) for format in formats}
    return {format: size for format, size in found.items() if size is not None}


def smallest(matrix: Shaped[Tensor, "out in"], *, formats: Sequence[str] = FORMATS) -> str:
    """The format of the fewest bytes; of equal ones the earlier in `formats`.

    Raises: ValueError for an unknown format, and if none of them can hold the matrix."""
    found = sizes(matrix, formats=formats)
    if not found:
        raise ValueError(f"formats must have one that can hold the matrix, got {list(formats)}")
    return min(found, key=lambda format: found[format])
