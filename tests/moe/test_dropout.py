"""The dropout family: what is dropped together, the expectation, evaluation, seeds and bounds."""

import pytest
import torch
from torch import nn

from moe.dropout import DropConnect, HeadDropout, LayerDrop, PathDropout, keep_mask
from moe.noise import Noise
from tests.tolerances import close
from tests.typecheck import unchecked

N = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def near(mean, expected, deviation):
    """Within five standard deviations of the mean of N draws."""
    assert abs(mean - expected) < 5 * deviation / N**0.5


def test_drop_connect_drops_weights_and_not_activations():
    layer = DropConnect(nn.Linear(40, 500), 0.25).double()
    w, b = layer.linear.weight, layer.linear.bias
    seen = layer(torch.eye(40, dtype=torch.float64), generator=seeded()) - b
    ratio = (seen.T / w).detach()
    kept = ratio.abs() > 1e-6
    close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    near(kept.double().mean().item(), 0.75, (0.25 * 0.75) ** 0.5)
    assert kept.any(0).all() and kept.any(1).all() and not kept.all(0).any(), "no unit is dropped whole"
    one, two = layer(torch.ones(2, 40, dtype=torch.float64), generator=seeded())
    assert one.equal(two), "one mask a call"


def test_drop_connect_passes_gradients_through_the_kept_weights():
    layer = DropConnect(nn.Linear(4, 3, bias=False), 0.5).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mask = (layer(torch.eye(4, dtype=torch.float64), generator=seeded()).T / layer.linear.weight).detach()
    y = layer(x, generator=seeded())
    d_y = torch.randn_like(y)
    d_x, d_w = torch.autograd.grad(y, [x, layer.linear.weight], d_y)
    close(d_x, d_y @ (layer.linear.weight * mask))
    close(d_w, (d_y.T @ x) * mask)


def test_head_dropout_drops_heads_of_samples():
    x = torch.randn(N // 4, 4, 3, 2, dtype=torch.float64)
    ratio = HeadDropout(0.3)(x, generator=seeded()) / x
    for value in ratio.unique():
        assert min(abs(value), abs(value - 1 / 0.7)) < 1e-9
    assert (ratio.amax((2, 3)) - ratio.amin((2, 3))).max() < 1e-9, "a head is dropped whole"
    near(ratio[:, :, 0, 0].mean().item(), 1.0, (0.3 / 0.7) ** 0.5)
    kept = ratio[:, :, 0, 0] > 0
    assert (kept.any(1) & ~kept.all(1)).any() and kept.any(0).all() and not kept.all(0).any()


def test_path_dropout_drops_samples():
    x = torch.randn(N, 2, 2, dtype=torch.float64)
    ratio = PathDropout(0.4)(x, generator=seeded()) / x
    assert (ratio.amax((1, 2)) - ratio.amin((1, 2))).max() < 1e-9, "a sample is dropped whole"
    near(ratio[:, 0, 0].mean().item(), 1.0, (0.4 / 0.6) ** 0.5)
    assert PathDropout(0.4)(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("rescale", [False, True])
def test_layer_drop_skips_the_layer_for_the_batch(rescale):
    drop, calls, generator = LayerDrop(0.2, rescale=rescale), [], seeded()
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def layer(rows):
        calls.append(1)
        return rows + 3

    outputs = torch.stack([drop(layer, x, generator=generator) for _ in range(N)]) - x
    assert (outputs[:, 0] == outputs[:, 1]).all(), "all of the batch or none"
    kept = outputs[:, 0] > 0
    assert len(calls) == int(kept.sum()), "a skipped layer does not run"
    near(kept.double().mean().item(), 0.8, (0.2 * 0.8) ** 0.5)
    step = 3 / 0.8 if rescale else 3.0
    close(outputs[kept], torch.full_like(outputs[kept], step))
    near(outputs[:, 0].mean().item(), 3.0 if rescale else 2.4, step * (0.2 * 0.8) ** 0.5)


def applied(module, x, **options):
    return module(lambda rows: rows * 2 + 1, x, **options) if isinstance(module, LayerDrop) else module(x, **options)


BUILDS = [
    lambda p: DropConnect(nn.Linear(2, 2), p),
    HeadDropout,
    PathDropout,
    LayerDrop,
    lambda p: LayerDrop(p, rescale=True),
]


@pytest.mark.parametrize("build", BUILDS)
def test_evaluation_and_p_zero_change_nothing_and_draw_nothing(build):
    x = torch.randn(5, 3, 4, 2)
    state = torch.get_rng_state()
    for module in (build(0.9).eval(), build(0.0)):
        plain = module.linear(x) if isinstance(module, DropConnect) else x
        expected = x * 2 + 1 if isinstance(module, LayerDrop) else plain
        torch.set_rng_state(state)
        assert applied(module, x).equal(expected) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("build", BUILDS)
def test_seeds_decide_and_the_global_generator_is_the_default(build):
    module, x = build(0.5), torch.randn(5, 3, 4, 2)
    runs = [[applied(module, x, generator=g) for _ in range(9)] for g in (seeded(1), seeded(1), seeded(2))]
    same = [[a.equal(b) for a, b in zip(runs[0], other, strict=True)] for other in runs[1:]]
    assert all(same[0]) and not all(same[1])
    torch.manual_seed(1)
    assert all(a.equal(applied(module, x)) for a in runs[0])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half(build, dtype):
    assert applied(build(0.5).to(dtype), torch.randn(5, 3, 4, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [lambda: seeded(1), lambda: Noise("dropout", sequences=2)], ids=["seed", "noise"])
def test_a_small_rate_is_kept_in_every_dtype(source, dtype):
    """A uniform number of bfloat16 is a multiple of 1/256: below 0.001 are three times as many as should be."""
    kept = keep_mask(torch.zeros((), dtype=dtype), [2, 500_000], 0.001, source())
    assert (kept == 0).float().mean().item() == pytest.approx(0.001, abs=2e-4), "6 deviations of a mean of 10^6"


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_p_is_checked(build, p):
    with unchecked(), pytest.raises(ValueError, match=rf"p must be in \[0, 1\), got {p}"):
        build(p)


def test_head_dropout_wants_heads():
    with unchecked(), pytest.raises(ValueError, match=r"heads must have shape \[B, H, L, d\], got \[2, 3\]"):
        HeadDropout(0.5)(torch.zeros(2, 3))
