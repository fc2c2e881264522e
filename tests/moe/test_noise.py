"""Keyed noise: what a sequence draws depends on key, site and its place in the whole batch, and on nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe import (
    GumbelTop2Router,
    HeadDropout,
    LayerDrop,
    MoE,
    Noise,
    NoisyTopKRouter,
    PathDropout,
    SwitchRouter,
    Top2Router,
    drop_connect,
)
from tests.tolerances import close

B, L, D, E = 6, 5, 4, 3
ROUTERS = {
    "noisy_top_k": lambda: NoisyTopKRouter(D, E, k=2),
    "switch": lambda: SwitchRouter(D, E, jitter=0.3),
    "top_2": lambda: Top2Router(D, E),
    "gumbel": lambda: GumbelTop2Router(D, E, capacity_factor=None),
}


def normal(part, generator):
    part.normal_(generator=generator)


def layer(name):
    torch.manual_seed(0)
    return MoE(D, 6, E, ROUTERS[name]()).double()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 3))
def test_a_batch_draws_the_same_in_any_parts(parts, width):
    whole, start, found = Noise("s", sum(parts), first=2), 0, []
    expected = whole.draw("x", torch.empty(2 * sum(parts), width, dtype=torch.float64), normal)
    for size in parts:
        part = whole.rows(start, start + size)
        found.append(part.draw("x", torch.empty(2 * size, width, dtype=torch.float64), normal))
        start += size
    assert torch.cat(found).equal(expected)


def test_other_keys_layers_sites_and_sequences_draw_other_numbers():
    def numbers(noise, site="x"):
        return noise.draw(site, torch.empty(2, 50), normal)

    noise = Noise("0", 2)
    drawn = [numbers(n) for n in (noise, Noise("1", 2), noise.at(0), noise.at(1), Noise("0", 2, first=2))]
    drawn.append(numbers(noise, "y"))
    rows = torch.cat(drawn)
    assert len(rows.unique(dim=0)) == len(rows)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.6
    assert numbers(noise).equal(numbers(noise)), "there is no state"
    assert torch.rand(5, generator=noise.shared("x")).equal(torch.rand(5, generator=Noise("0", 1, 7).shared("x")))


def test_the_numbers_are_normal_over_many_sequences():
    drawn = Noise("n", 4000).draw("x", torch.empty(4000, 3, dtype=torch.float64), normal)
    assert drawn.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (torch.cov(drawn.T) - torch.eye(3)).abs().max() < 0.1


def test_rows_that_are_no_equal_runs_are_refused():
    with pytest.raises(ValueError, match="noise of 2 sequences must fill equal runs of rows, got 3 rows"):
        Noise("", 2).draw("x", torch.empty(3, 1), normal)
    with pytest.raises(ValueError, match="noise of 0 sequences"):
        Noise("", 0).draw("x", torch.empty(3, 1), normal)
    assert Noise("", 0).draw("x", torch.empty(0, 1), normal).shape == (0, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_parts_of_a_batch_are_routed_as_the_whole_with_all_gradients(name, padded):
    moe, noise = layer(name), Noise("7", B)
    x, d_y = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, L, D, dtype=torch.float64)
    mask = torch.rand(B, L) > 0.3 if padded else torch.ones(B, L, dtype=torch.bool)
    whole = x.clone().requires_grad_()
    y, routing = moe(whole, padding_mask=mask, generator=noise)
    wanted = torch.autograd.grad((y * d_y).sum(), [whole, *moe.parameters()], materialize_grads=True, allow_unused=True)
    parts = x.clone().requires_grad_()
    found = []
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        rows = slice(start, stop)
        found.append(moe(parts[rows], padding_mask=mask[rows], generator=noise.rows(start, stop)))
    close(torch.cat([part for part, _ in found]), y)
    assert sum(part.loads() for _, part in found).equal(routing.loads())
    total = (torch.cat([part for part, _ in found]) * d_y).sum()
    gradients = torch.autograd.grad(total, [parts, *moe.parameters()], materialize_grads=True, allow_unused=True)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want)
    other, _ = moe(x, padding_mask=mask, generator=Noise("8", B))
    assert not other.equal(y)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_replay_draws_what_was_recorded(name):
    moe, x = layer(name), torch.randn(B, L, D, dtype=torch.float64)
    state = torch.get_rng_state()
    y, routing = moe(x, generator=Noise("7", B))
    again, replayed = moe(x, replay=routing.detach())
    close(again, y)
    assert replayed.expert.equal(routing.expert)
    assert torch.get_rng_state().equal(state), "the global generator is left alone"


@pytest.mark.parametrize(
    "module",
    [HeadDropout(0.4), PathDropout(0.4), LayerDrop(0.5), nn.Linear(3, 3).double()],
    ids=lambda m: type(m).__name__,
)
def test_what_dropout_drops_of_a_sequence_is_the_same_in_every_part(module):
    def run(x, noise):
        if isinstance(module, nn.Linear):
            return drop_connect(module, x, 0.4, generator=noise)
        if isinstance(module, LayerDrop):
            return module(lambda rows: 2 * rows, x, generator=noise)
        return module(x, generator=noise)

    x, seen = torch.randn(B, 2, 3, 3, dtype=torch.float64), []
    for step in range(8):
        noise = Noise(str(step), B)
        whole = run(x, noise)
        assert torch.cat([run(x[:2], noise.rows(0, 2)), run(x[2:], noise.rows(2, B))]).allclose(whole)
        seen.append(whole)
    assert any(not other.equal(seen[0]) for other in seen), "steps differ"
