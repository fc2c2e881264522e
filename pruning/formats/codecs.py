"""A sparse matrix ⇄ the parts of each format. Every decoder checks what it is given, for it may come from a file.

A part of a format holds what follows; n is the number of entries, z of those that are not 0.

dense       values [out, in]
bitmask     flags ⌈n/8⌉ bytes, values [z]
csr         starts [out + 1], columns [z], values [z]
coo         rows [z], columns [z], values [z]
run_length  runs [uint8]: r < 255 means r zeros and then a value, 255 means 255 zeros; values [z]. Row after row
block HxW   flags of the ⌈out/H⌉ · ⌈in/W⌉ blocks, values [blocks that are not all 0, H, W]; edges filled with 0
N:M         values [out, ⌈in/M⌉, N], places of ⌈log₂M⌉ bits each; a row's last group filled with 0

Indices are of the least type that holds them. 0 is what equals 0: −0 comes back as 0. NaN is kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Integer, Shaped
from torch import Tensor

from pruning.formats.bits import index_type, pack_flags, pack_numbers, packed_size, unpack_flags, unpack_numbers
from pruning.formats.encoded import Encoded, parse_format

Parts = dict[str, Tensor]
Numbers = tuple[int, int]
ESCAPE = 255


def encode(matrix: Shaped[Tensor, "out in"], format: str) -> Encoded:
    """The matrix in `format`, on the CPU; `decode` gives it back exactly.

    Raises: ValueError for an unknown format, and for N:M where a group of M holds more than N that are not 0."""
    kind, numbers = parse_format(format)
    held = matrix.detach().cpu().contiguous()
    parts = {name: part.contiguous() for name, part in _CODECS[kind][0](held, numbers).items()}
    return Encoded(format, (matrix.shape[0], matrix.shape[1]), matrix.dtype, parts)


def decode(encoded: Encoded) -> Shaped[Tensor, "out in"]:
    """The matrix that was encoded. Raises: ValueError if the parts contradict one another or the shape."""
    kind, numbers = parse_format(encoded.format)
    names = set(_CODECS[kind][2])
    if encoded.parts.keys() != names:
        raise ValueError(f"parts of {encoded.format} must be {sorted(names)}, got {sorted(encoded.parts)}")
    if encoded.parts["values"].dtype != encoded.dtype:
        raise ValueError(f"values must be {encoded.dtype}, got {encoded.parts['values'].dtype}")
    return _CODECS[kind][1](encoded, numbers)


def _dense(matrix: Tensor, numbers: Numbers) -> Parts:
    return {"values": matrix.clone()}


def _from_dense(encoded: Encoded, numbers: Numbers) -> Tensor:
    _check("values", encoded.parts["values"], encoded.shape)
    return encoded.parts["values"].clone()


def _bitmask(matrix: Tensor, numbers: Numbers) -> Parts:
    kept = matrix != 0
    return {"flags": pack_flags(kept.flatten()), "values": matrix[kept]}


def _from_bitmask(encoded: Encoded, numbers: Numbers) -> Tensor:
    rows, columns = encoded.shape
    return _placed(encoded, unpack_flags(encoded.parts["flags"], rows * columns).nonzero().squeeze(1))


def _csr(matrix: Tensor, numbers: Numbers) -> Parts:
    kept = matrix != 0
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    columns = kept.nonzero()[:, 1]
    return {
        "starts": starts.to(index_type(int(starts[-1]))),
        "columns": columns.to(index_type(max(matrix.shape[1] - 1, 0))),
        "values": matrix[kept],
    }


def _from_csr(encoded: Encoded, numbers: Numbers) -> Tensor:
    starts, columns = encoded.parts["starts"].long(), encoded.parts["columns"].long()
    _check("starts", starts, (encoded.shape[0] + 1,))
    counts = starts.diff()
    if int(starts[0]) != 0 or (counts < 0).any() or int(starts[-1]) != len(columns):
        raise ValueError(f"starts must rise from 0 to the {len(columns)} columns, got {starts[:8].tolist()}")
    return _at(encoded, torch.arange(encoded.shape[0]).repeat_interleave(counts), columns)


def _coo(matrix: Tensor, numbers: Numbers) -> Parts:
    rows, columns = (matrix != 0).nonzero().unbind(1)
    types = [index_type(max(size - 1, 0)) for size in matrix.shape]
    return {"rows": rows.to(types[0]), "columns": columns.to(types[1]), "values": matrix[matrix != 0]}


def _from_coo(encoded: Encoded, numbers: Numbers) -> Tensor:
    return _at(encoded, encoded.parts["rows"].long(), encoded.parts["columns"].long())


def _runs(matrix: Tensor) -> Integer[Tensor, "runs"]:
    """Zeros before each value, then an escape for each 255 of them."""
    places = (matrix.flatten() != 0).nonzero().squeeze(1)
    return places.diff(prepend=places.new_tensor([-1])) - 1


def _run_length(matrix: Tensor, numbers: Numbers) -> Parts:
    gaps = _runs(matrix)
    escapes = gaps // ESCAPE
    runs = torch.full((int(escapes.sum()) + len(gaps),), ESCAPE, dtype=torch.uint8)
    runs[(escapes + 1).cumsum(0) - 1] = (gaps % ESCAPE).to(torch.uint8)
    return {"runs": runs, "values": matrix[matrix != 0]}


def _from_run_length(encoded: Encoded, numbers: Numbers) -> Tensor:
    runs = encoded.parts["runs"].long()
    ends = runs != ESCAPE
    return _placed(encoded, (runs + ends).cumsum(0)[ends] - 1)


def _blocks(matrix: Tensor, numbers: Numbers) -> Shaped[Tensor, "rows columns h w"]:
    (height, width), (rows, columns) = numbers, matrix.shape
    padded = F.pad(matrix, (0, -columns % width, 0, -rows % height))
    down, across = -(-rows // height), -(-columns // width)
    return padded.view(down, height, across, width).transpose(1, 2)


def _block(matrix: Tensor, numbers: Numbers) -> Parts:
    blocks = _blocks(matrix, numbers)
    kept = (blocks != 0).flatten(2).any(2)
    return {"flags": pack_flags(kept.flatten()), "values": blocks[kept]}


def _from_block(encoded: Encoded, numbers: Numbers) -> Tensor:
    (height, width), (rows, columns) = numbers, encoded.shape
    down, across = -(-rows // height), -(-columns // width)
    kept = unpack_flags(encoded.parts["flags"], down * across)
    _check("values", encoded.parts["values"], (int(kept.sum()), height, width))
    blocks = torch.zeros(down * across, height, width, dtype=encoded.dtype)
    blocks[kept] = encoded.parts["values"]
    whole = blocks.view(down, across, height, width).transpose(1, 2).reshape(down * height, across * width)
    return whole[:rows, :columns].contiguous()


def _groups(matrix: Tensor, m: int) -> Shaped[Tensor, "rows groups m"]:
    padded = F.pad(matrix, (0, -matrix.shape[1] % m))
    return padded.view(matrix.shape[0], padded.shape[1] // m, m)


def _n_of_m(matrix: Tensor, numbers: Numbers) -> Parts:
    n, m = numbers
    groups = _groups(matrix, m)
    if not fits(groups != 0, n):
        raise ValueError(f"every {m} of a row must hold at most {n} that are not 0, got {_most(groups != 0)}")
    # what is not 0 comes first, and each place once: filling places hold zeros
    places = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :n]
    packed = pack_numbers(places.flatten(), _place_bits(m))
    return {"values": groups.gather(2, places), "places": packed}


def _from_n_of_m(encoded: Encoded, numbers: Numbers) -> Tensor:
    (n, m), (rows, columns) = numbers, encoded.shape
    shape = (rows, -(-columns // m), n)
    values = encoded.parts["values"]
    _check("values", values, shape)
    places = unpack_numbers(encoded.parts["places"], values.numel(), _place_bits(m)).view(shape)
    if (places >= m).any():
        raise ValueError(f"places of {encoded.format} must be below {m}, got {int(places.max())}")
    groups = torch.zeros(rows, shape[1], m, dtype=encoded.dtype).scatter_(2, places, values)
    return groups.flatten(1)[:, :columns].contiguous()


def fits(kept: Bool[Tensor, "rows groups m"], n: int) -> bool:
    """Whether each group keeps at most n."""
    return _most(kept) <= n


def _most(kept: Tensor) -> int:
    return int(kept.sum(2).max()) if kept.numel() else 0


def _place_bits(m: int) -> int:
    return (m - 1).bit_length()


def _at(encoded: Encoded, rows: Tensor, columns: Tensor) -> Tensor:
    for name, index, size in (("rows", rows, encoded.shape[0]), ("columns", columns, encoded.shape[1])):
        if ((index < 0) | (index >= size)).any():
            raise ValueError(f"{name} must be in [0, {size}), got {int(index.min())} to {int(index.max())}")
    if len(rows) != len(columns):
        raise ValueError(f"rows must be as many as the {len(columns)} columns, got {len(rows)}")
    return _placed(encoded, rows * encoded.shape[1] + columns)


def _placed(encoded: Encoded, places: Integer[Tensor, "z"]) -> Tensor:
    rows, columns = encoded.shape
    _check("values", encoded.parts["values"], (len(places),))
    if len(places) and int(places.max()) >= rows * columns:
        raise ValueError(f"places must be in [0, {rows * columns}), got {int(places.max())}")
    whole = torch.zeros(rows * columns, dtype=encoded.dtype)
    whole[places] = encoded.parts["values"]
    return whole.view(rows, columns)


def _check(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(part.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(part.shape)}")


Codec = tuple[Callable[[Tensor, Numbers], Parts], Callable[[Encoded, Numbers], Tensor], tuple[str, ...]]
_CODECS: dict[str, Codec] = {
    "dense": (_dense, _from_dense, ("values",)),
    "bitmask": (_bitmask, _from_bitmask, ("flags", "values")),
    "csr": (_csr, _from_csr, ("starts", "columns", "values")),
    "coo": (_coo, _from_coo, ("rows", "columns", "values")),
    "run_length": (_run_length, _from_run_length, ("runs", "values")),
    "block": (_block, _from_block, ("flags", "values")),
    "n:m": (_n_of_m, _from_n_of_m, ("places", "values")),
}


def encoded_bytes(matrix: Shaped[Tensor, "out in"], format: str) -> int | None:
    """`encode(matrix, format).nbytes` from counts alone; None where N:M does not fit."""
    kind, (a, b) = parse_format(format)
    kept = (matrix.detach() != 0).cpu()
    (rows, columns), each = matrix.shape, matrix.element_size()
    count = int(kept.sum())
    if kind == "dense":
        return rows * columns * each
    if kind == "block":
        blocks = _blocks(kept, (a, b)).flatten(2).any(2)
        return packed_size(blocks.numel()) + int(blocks.sum()) * a * b * each
    if kind == "n:m":
        groups = _groups(kept, b)
        numbers = groups.shape[0] * groups.shape[1] * a
        return numbers * each + packed_size(numbers, _place_bits(b)) if fits(groups, a) else None
    across = index_type(max(columns - 1, 0)).itemsize
    index = {
        "bitmask": packed_size(rows * columns),
        "csr": (rows + 1) * index_type(count).itemsize + count * across,
        "coo": count * (index_type(max(rows - 1, 0)).itemsize + across),
        "run_length": count + int((_runs(kept) // ESCAPE).sum()) if kind == "run_length" else 0,
    }
    return index[kind] + count * each
