import pytest
import torch

from tests.tolerances import close
from tests.transformer.reference import turn
from transformer.attention import rotary_angles, rotate


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 8)])
def test_rotation_equals_complex_multiplication_with_its_gradients(shape):
    angles = rotary_angles(torch.arange(7, 7 + shape[2]), shape[3], theta=100.0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = rotate(x, angles)
    places = torch.cartesian_prod(*map(torch.arange, shape[:3]))
    expected = [turn(x.detach()[b, h, i], 7 + int(i), 100.0) for b, h, i in places]
    close(y.flatten(0, 2), torch.stack(expected), dtype=torch.float32)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, angles), (x,))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for start in (0, 100):
        angles = [rotary_angles(torch.tensor([start + offset]), 8) for offset in (0, 5)]
        scores.append((rotate(q, angles[0]) * rotate(k, angles[1])).sum())
    close(scores[0], scores[1])


def test_any_batch_of_positions():
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    x = torch.randn(2, 4, 3, 8)
    both = rotate(x, rotary_angles(positions, 8))
    for row in range(2):
        close(both[row], rotate(x[row : row + 1], rotary_angles(positions[row], 8))[0])
