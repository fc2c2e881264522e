"""Degrees by loops; the power law found again in draws from one, and not in draws from another law."""

import math

import pytest
import torch

from pruning import Masks
from pruning.diagnostics import degree_distribution, fit_power_law


def test_degrees_are_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    masks = Masks(
        {"a": torch.rand(4, 3, generator=generator) < 0.5, "up": torch.rand(2, 5, 3, generator=generator) < 0.5}
    )
    found = degree_distribution(masks)
    assert list(found.fan_in) == ["a", "up[0]", "up[1]"]
    table = masks.kept["a"]
    assert found.fan_in["a"].tolist() == [sum(bool(table[i, j]) for j in range(3)) for i in range(4)]
    assert found.fan_out["a"].tolist() == [sum(bool(table[i, j]) for i in range(4)) for j in range(3)]
    # a stack is laid out [E, in, out]
    expert = masks.kept["up"][1]
    assert found.fan_in["up[1]"].tolist() == [sum(bool(expert[i, j]) for i in range(5)) for j in range(3)]
    histogram = found.histogram()
    assert sum(histogram.values()) == 7 + 16
    assert histogram == {k: int((found.degrees() == k).sum()) for k in found.degrees().unique().tolist()}


def zeta_by_sum(alpha, low):
    terms = sum(k**-alpha for k in range(low, 20000))
    return terms + 20000 ** (1 - alpha) / (alpha - 1) + 0.5 * 20000**-alpha


def draws(alpha, low, count, *, seed=0, top=5000):
    weights = torch.arange(low, top).double() ** -alpha
    return low + torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [1.8, 2.5, 3.5])
def test_the_exponent_maximises_the_likelihood(alpha):
    degrees = draws(alpha, 2, 4000)
    fit = fit_power_law(degrees, minimum=2)
    assert fit.exponent == pytest.approx(alpha, abs=0.15) and fit.tail == 4000
    logs = sum(math.log(k) for k in degrees.tolist())

    def likelihood(a):
        return -4000 * math.log(zeta_by_sum(a, 2)) - a * logs

    assert likelihood(fit.exponent) >= max(likelihood(fit.exponent + d) for d in (-0.02, -0.005, 0.005, 0.02))
    cumulative, gap, scale = 0.0, 0.0, zeta_by_sum(fit.exponent, 2)
    for k in range(2, int(degrees.max()) + 1):
        share = float((degrees >= k).float().mean())
        gap = max(gap, abs(share - (1 - cumulative)))
        cumulative += k**-fit.exponent / scale
    assert fit.distance == pytest.approx(gap, abs=2e-3)


def test_a_power_law_is_told_from_a_geometric_law():
    yes = fit_power_law(draws(2.2, 1, 3000))
    assert yes.ratio > 0 and yes.significance < 0.01 and yes.exponent == pytest.approx(2.2, abs=0.15)
    uniform = torch.rand(3000, generator=torch.Generator().manual_seed(1)).double()
    geometric = 1 + (uniform.log() / math.log(0.85)).floor().long()
    no = fit_power_law(geometric, minimum=1)
    assert no.ratio < 0 and no.significance < 0.01


def test_the_start_of_the_tail_is_found():
    mixed = torch.cat([draws(2.5, 8, 2000), torch.randint(1, 8, (3000,), generator=torch.Generator().manual_seed(2))])
    fit = fit_power_law(mixed)
    assert 6 <= fit.minimum <= 12 and fit.exponent == pytest.approx(2.5, abs=0.25)


def test_too_few_degrees_are_refused():
    for degrees in (torch.tensor([1, 2, 3]), torch.full((50,), 4), torch.zeros(50, dtype=torch.long)):
        with pytest.raises(ValueError, match="degrees must hold at least least_tail=10 positive ones, not all alike"):
            fit_power_law(degrees)
