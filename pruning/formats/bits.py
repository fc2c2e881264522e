"""Numbers of a few bits each, packed into bytes, and whole numbers in the least type that holds them."""

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, UInt8
from torch import Tensor

INDEX_TYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)
_LIMITS = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31, torch.int64: 2**63}


def index_type(largest: int) -> torch.dtype:
    """The least of :data:`INDEX_TYPES` that holds 0 to `largest`."""
    return next(kind for kind in INDEX_TYPES if largest < _LIMITS[kind])


def packed_size(count: int, width: int = 1) -> int:
    """Bytes of `count` numbers of `width` bits."""
    return -(-count * width // 8)


def pack_flags(flags: Bool[Tensor, "n"]) -> UInt8[Tensor, "bytes"]:
    """Eight flags a byte, the first in the highest bit; what fills the last byte is 0."""
    return torch.from_numpy(np.packbits(flags.cpu().numpy()))


def unpack_flags(packed: UInt8[Tensor, "bytes"], count: int) -> Bool[Tensor, "n"]:
    """The first `count` flags of what `pack_flags` gave. Raises: ValueError if the number of bytes is another."""
    if packed.numel() != packed_size(count):
        raise ValueError(f"{count} flags must take {packed_size(count)} bytes, got {packed.numel()}")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))


def pack_numbers(numbers: Int[Tensor, "n"], width: int) -> UInt8[Tensor, "bytes"]:
    """Each number in `width` bits, the highest bit first, without gaps."""
    places = torch.arange(width - 1, -1, -1)
    return pack_flags(((numbers.unsqueeze(1) >> places) & 1).bool().flatten())


def unpack_numbers(packed: UInt8[Tensor, "bytes"], count: int, width: int) -> Integer[Tensor, "n"]:
    """What `pack_numbers` packed. Raises: ValueError if the number of bytes is another."""
    places = torch.arange(width - 1, -1, -1)
    return (unpack_flags(packed, count * width).view(count, width).long() << places).sum(1)
