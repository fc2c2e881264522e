"""Each format gives every matrix back exactly, takes the bytes that it says, and refuses what cannot be."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.formats import FORMATS, Encoded, decode, encode, encoded_bytes, parse_format, sizes, smallest
from tests.typecheck import unchecked

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALWAYS = [name for name in FORMATS if ":" not in name] + ["block 3x2", "block 1x7"]


def sparse(rows, columns, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0).to(dtype)


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    assert torch.equal(found.isnan(), expected.isnan()) and found.nan_to_num(7.0).equal(expected.nan_to_num(7.0))


@given(
    rows=st.integers(0, 40), columns=st.integers(0, 40), density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES), format=st.sampled_from(ALWAYS), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_matrix_comes_back_exactly_and_takes_the_bytes_it_says(rows, columns, density, dtype, format, seed):
    matrix = sparse(rows, columns, density, dtype, seed)
    encoded = encode(matrix, format)
    same(decode(encoded), matrix)
    assert encoded.nbytes == encoded_bytes(matrix, format)


@given(
    rows=st.integers(0, 9), columns=st.integers(0, 21),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 3), (4, 8), (3, 5)]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9),
)  # fmt: skip
def test_n_of_m_holds_any_width_and_groups_with_fewer(rows, columns, pattern, dtype, seed):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    matrix = sparse(rows, columns, 0.8, dtype, seed)
    for row in range(rows):
        for start in range(0, columns, m):
            width = min(m, columns - start)
            gone = torch.randperm(width, generator=generator)[: max(width - n, 0)]
            matrix[row, start + gone] = 0
    encoded = encode(matrix, f"{n}:{m}")
    same(decode(encoded), matrix)
    groups = rows * math.ceil(columns / m) * n
    assert encoded.nbytes == groups * dtype.itemsize + math.ceil(groups * math.ceil(math.log2(m)) / 8)
    assert encoded.nbytes == encoded_bytes(matrix, f"{n}:{m}")


def test_bytes_of_each_format_worked_by_hand():
    matrix = torch.zeros(4, 300)
    matrix[0, 0], matrix[1, 299], matrix[3, 5] = 1.0, 2.0, 3.0
    expected = {
        "dense": 4 * 300 * 4,
        "bitmask": 1200 // 8 + 3 * 4,
        "csr": 5 * 1 + 3 * 2 + 3 * 4,
        "coo": 3 * 1 + 3 * 2 + 3 * 4,
        "run_length": (1 + 3 + 2) + 3 * 4,  # gaps of 0, 598 = 2·255 + 88 and 305 = 255 + 50
        "block 4x4": math.ceil(75 / 8) + 3 * 16 * 4,
    }
    assert sizes(matrix, formats=tuple(expected)) == expected
    assert smallest(matrix, formats=tuple(expected)) == "run_length"
    runs = encode(matrix, "run_length").parts["runs"]
    assert runs.tolist() == [0, 255, 255, 88, 255, 50]


def test_a_run_that_is_a_multiple_of_the_escape():
    for gap in (254, 255, 256, 510):
        matrix = torch.zeros(1, 600)
        matrix[0, gap] = 1.0
        same(decode(encode(matrix, "run_length")), matrix)


@pytest.mark.parametrize(
    "matrix, expected",
    [
        (sparse(64, 64, 1.0), "dense"),
        (sparse(64, 64, 0.5), "bitmask"),
        (sparse(64, 64, 0.04), "run_length"),
        (torch.block_diag(*[torch.ones(32, 32)] * 4), "block 32x32"),
        (torch.tensor([[1.0, 0, 0, 0]]).repeat(16, 8), "1:4"),
        (torch.zeros(0, 7), "dense"),
    ],
)
def test_the_smallest_is_chosen(matrix, expected):
    found = sizes(matrix)
    assert smallest(matrix) == expected and found[expected] == min(found.values())
    assert all(encode(matrix, format).nbytes == size for format, size in found.items())


def test_other_layouts_types_and_special_values():
    matrix = sparse(20, 30, 0.3)
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = math.nan, -0.0, math.inf
    for format in ALWAYS:
        same(decode(encode(matrix.mT, format)), matrix.mT.contiguous() + 0.0)
    whole = torch.tensor([[0, -3, 0, 127]], dtype=torch.int8)
    for format in (*ALWAYS, "2:4"):
        same(decode(encode(whole, format)), whole)
    wide = torch.zeros(3, 70000)
    wide[:, 69999] = 1.0
    assert encode(wide, "csr").parts["columns"].dtype == torch.int32
    same(decode(encode(wide, "csr")), wide)
    same(decode(encode(sparse(2, 40000, 0.5), "csr")), sparse(2, 40000, 0.5))


def test_a_parameter_encodes_without_its_graph():
    weight = torch.nn.Parameter(sparse(4, 4, 0.5))
    assert not decode(encode(weight, "csr")).requires_grad


@pytest.mark.parametrize("text", ["", "CSR", "block 0x4", "block 4", "4:2", "0:4", "2:300", "2:4 "])
def test_unknown_formats_are_refused(text):
    with pytest.raises(ValueError, match="format must be one of dense"):
        parse_format(text)


def test_n_of_m_that_does_not_fit():
    matrix = torch.ones(2, 8)
    with pytest.raises(ValueError, match="every 4 of a row must hold at most 2 that are not 0, got 4"):
        encode(matrix, "2:4")
    assert encoded_bytes(matrix, "2:4") is None
    with pytest.raises(ValueError, match="formats must have one that can hold the matrix, got \\['2:4'\\]"):
        smallest(matrix, formats=["2:4"])


def broken(format, part, change, matrix=None):
    encoded = encode(sparse(6, 10, 0.4) if matrix is None else matrix, format)
    return dataclasses.replace(encoded, parts=encoded.parts | {part: change(encoded.parts[part].clone())})


def first_is(value):
    def change(part):
        part[0] = value
        return part

    return change


@pytest.mark.parametrize(
    "encoded, message",
    [
        (broken("bitmask", "flags", lambda p: p[:-1]), "60 flags must take 8 bytes, got 7"),
        (broken("bitmask", "values", lambda p: p[:-1]), "values must have shape"),
        (broken("bitmask", "values", lambda p: p.half()), "values must be torch.float32, got torch.float16"),
        (broken("csr", "starts", first_is(1)), "starts must rise from 0"),
        (broken("csr", "starts", lambda p: p.flip(0)), "starts must rise from 0"),
        (broken("csr", "starts", lambda p: p[1:]), "starts must have shape \\[7\\], got \\[6\\]"),
        (broken("csr", "columns", first_is(10)), "columns must be in \\[0, 10\\)"),
        (broken("coo", "rows", first_is(6)), "rows must be in \\[0, 6\\)"),
        (broken("coo", "rows", lambda p: p[1:]), "rows must be as many as the"),
        (broken("run_length", "runs", first_is(200)), "places must be in \\[0, 60\\)"),
        (broken("block 2x2", "flags", first_is(0), torch.ones(6, 10)), "values must have shape \\[7, 2, 2\\], got"),
        (broken("1:3", "places", first_is(255), torch.eye(3)), "places of 1:3 must be below 3, got 3"),
        (broken("dense", "values", lambda p: p.flatten()), "values must have shape \\[6, 10\\], got \\[60\\]"),
        (Encoded("csr", (1, 1), torch.float32, {}), "parts of csr must be \\['columns', 'starts', 'values'\\]"),
    ],
)  # fmt: skip
def test_parts_that_contradict_are_refused(encoded, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        decode(encoded)
