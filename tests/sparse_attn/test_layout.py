import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import attend, causal, parse_pattern, sliding_window
from tests.sparse_attn.expressions import cases

lengths = st.integers(0, 50)


@given(cases, lengths, lengths, st.sampled_from([1, 3, 4, 8, 16]), st.integers(-20, 20), st.integers(0, 20))
def test_blocks_are_exactly_the_visible_set(case, q_len, kv_len, block, offset, key_offset):
    pattern, truth = case
    layout = pattern.layout(q_len, kv_len, block=block, offset=offset, key_offset=key_offset)
    dense = [[truth(i + offset, j + key_offset) for j in range(kv_len)] for i in range(q_len)]
    visits = dict(
        zip(
            zip(layout.query_block.tolist(), layout.key_block.tolist(), strict=True),
            layout.mask_index.tolist(),
            strict=True,
        )
    )
    assert len(visits) == layout.visited_blocks
    assert list(visits) == sorted(visits)
    for row in range(-(-q_len // block)):
        for column in range(-(-kv_len // block)):
            part = [line[column * block : (column + 1) * block] for line in dense[row * block : (row + 1) * block]]
            cells = [cell for line in part for cell in line]
            mask = visits.get((row, column))
            if mask is None:
                assert not any(cells)
            elif mask < 0:
                assert all(cells)
            else:
                assert any(cells) and not all(cells)
                truth_here = layout.masks[mask]
                assert truth_here[: len(part), : len(part[0])].tolist() == part
                assert int(truth_here.sum()) == sum(cells)
    assert layout.to_mask().tolist() == dense
    assert layout.visible_pairs() == sum(map(sum, dense))


def test_the_last_query_sits_at_the_last_key_by_default():
    assert causal().layout(2, 5, block=2).to_mask().int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_masks_are_shared_and_few():
    layout = parse_pattern("causal() & (sliding_window(256) | sinks(4))").layout(1 << 17, block=64)
    assert layout.visited_blocks < 6 * layout.num_query_blocks
    assert len(layout.masks) <= 5
    assert layout.full_blocks > 2.9 * layout.num_query_blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_len": -1}, "q_len must be >= 0, got -1"),
        ({"q_len": 1, "kv_len": -2}, "kv_len must be >= 0, got -2"),
        ({"q_len": 1, "block": 0}, "block must be >= 1, got 0"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(3).layout(**arguments)


@pytest.mark.parametrize(
    ("text", "masks"),
    [
        ("causal() & (sliding_window(256) | global_tokens([0, 512, 1024, 2048, 3584]))", 7),
        ("causal() & fixed(128, 32)", 2),
        ("causal() & bigbird(192, 64, 3, 64, length=4096)", 2),
        ("causal() & strided(128)", 3),
    ],
)
def test_masks_are_all_different(text, masks):
    layout = parse_pattern(text).layout(4096)
    assert len(layout.masks) == masks == len({mask.numpy().tobytes() for mask in layout.masks})
    assert layout.mask_index.unique().tolist() == list(range(-1 if layout.full_blocks else 0, masks))


def test_a_million_positions_take_no_million_squared():
    layout = (causal() & sliding_window(256)).layout(10**6)
    assert layout.visited_blocks == 15625 * 5 - (4 + 3 + 2 + 1)
    assert layout.row_start.dtype == torch.long


DAMAGED = {
    "key block beyond the end": ({"key_block": lambda x: x + 1}, r"layout.key_block must be in \[0, 13\), got 13"),
    "key block before all": ({"key_block": lambda x: x - 1}, r"layout.key_block must be in \[0, 13\), got -1"),
    "key blocks twice": ({"key_block": torch.zeros_like}, "layout.key_block must ascend inside each query block"),
    "no such mask": ({"mask_index": lambda x: x + 9}, r"layout.mask_index must be in \[-1, \d\), got"),
    "a hidden mask": ({"mask_index": lambda x: x - 2}, r"layout.mask_index must be in \[-1, \d\), got -"),
    "too few masks named": ({"mask_index": lambda x: x[1:]}, r"layout.mask_index must name \d+ masks, got"),
    "float masks": ({"masks": lambda x: x.float()}, "layout.masks must be bool .* block 8 >= 1, got torch.float32"),
    "another block": (
        {"block": lambda x: 4},
        r"layout.masks must be bool .* block 4 >= 1, got torch.bool \[\d+, 8, 8\]",
    ),
    "no block": ({"block": lambda x: 0}, "block 0 >= 1"),
    "rows that fall": ({"row_start": lambda x: x.flip(0)}, r"layout.row_start must rise from 0 to \d+ visits over 13"),
    "a row less": ({"row_start": lambda x: x[[0, *range(2, len(x))]]}, "layout.row_start must rise .* over 13 query"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layout_whose_parts_do_not_fit_is_refused(name, backend):
    change, message = DAMAGED[name]
    layout = (causal() & sliding_window(20)).layout(100, block=8)
    damaged = copy.copy(layout)
    for part, made in change.items():  # past the type checks that the tests add
        object.__setattr__(damaged, part, made(getattr(layout, part)))
    q = torch.randn(1, 1, 100, 4)
    attend(q, q, q, layout=layout, backend=backend)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, layout=damaged, backend=backend)
