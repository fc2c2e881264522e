import pytest
import torch

from tests.tolerances import FLOOR, TABLE, close


@pytest.mark.parametrize("dtype", TABLE)
def test_just_inside_passes_and_just_outside_fails(dtype):
    expected = torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64)
    room = TABLE[dtype].of_scale * 4.0
    close(expected + torch.tensor([0.0, 0.0, 0.9 * room]), expected, dtype)
    with pytest.raises(AssertionError):
        close(expected + torch.tensor([0.0, 0.0, 1.1 * room]), expected, dtype)


def test_a_small_tensor_is_held_as_tightly_as_a_large_one():
    expected = torch.tensor([1.0, 0.5]) * 2 * FLOOR
    with pytest.raises(AssertionError):
        close(expected + 1e-3 * FLOOR, expected)


def test_the_coarser_type_decides():
    expected = torch.ones(3, dtype=torch.float64)
    close(expected.bfloat16() * 1.01, expected)
    with pytest.raises(AssertionError):
        close(expected.float() * 1.01, expected)


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0]), torch.tensor([1, 3])])
def test_nan_shape_and_value_fail(wrong):
    with pytest.raises(AssertionError):
        close(wrong, torch.tensor([1.0, 2.0]))


def test_integers_must_be_equal():
    close(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        close(torch.tensor([1, 2]), torch.tensor([1, 3]))
