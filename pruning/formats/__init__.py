"""Sparse matrices in fewer bytes: bitmask, CSR, COO, run-length, blocks, N:M, and compact files of whole models."""

from pruning.formats.choose import sizes, smallest
from pruning.formats.codecs import decode, encode, encoded_bytes
from pruning.formats.encoded import FORMATS, Encoded, parse_format
from pruning.formats.files import CompactReport, TensorSize, load_compact, read_compact, save_compact

__all__ = [
    "FORMATS",
    "CompactReport",
    "Encoded",
    "TensorSize",
    "decode",
    "encode",
    "encoded_bytes",
    "load_compact",
    "parse_format",
    "read_compact",
    "save_compact",
    "sizes",
    "smallest",
]
