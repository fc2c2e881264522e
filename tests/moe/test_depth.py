"""Mixture-of-Depths against a loop over tokens, its causal sampling, and the compute that it skips."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.depth import DepthRouting, MixtureOfDepths
from tests.tolerances import close
from tests.typecheck import unchecked


def mixing_block(weight):
    """A causal block with residuals: each row adds the mean of the rows of its list up to its own place."""

    def run(rows, indices):
        assert torch.equal(indices, indices.sort(dim=1).values), "rows come in the order of their places"
        seen = indices[:, :, None] >= indices[:, None, :]
        mean = (seen.to(rows.dtype) / seen.sum(-1, keepdim=True)) @ rows
        return rows + torch.tanh(mean @ weight) * (1 + indices[..., None])

    return run


def oracle(x, w, weight, selected, weighting):
    """Token by token; selected: a list of places for each sequence."""
    out = []
    for sequence, places in zip(x, selected, strict=True):
        rows = list(sequence)
        for n, place in enumerate(places):
            mean = sum(sequence[p] for p in places[: n + 1]) / (n + 1)
            r = (sequence[place] * w).sum()
            gate = 1 / (1 + torch.exp(-r)) if weighting == "sigmoid" else r
            rows[place] = sequence[place] + gate * torch.tanh(mean @ weight) * (1 + place)
        out.append(torch.stack(rows))
    return torch.stack(out)


def best(x, w, real, capacity):
    """The places that pass in training, from a sort of Python numbers."""
    chosen = []
    for sequence, mask in zip(x.tolist(), real.tolist(), strict=True):
        score = [sum(a * b for a, b in zip(row, w.tolist(), strict=True)) for row in sequence]
        order = sorted((i for i in range(len(score)) if mask[i]), key=lambda i: -score[i])
        chosen.append(sorted(order[: math.ceil(capacity * len(score) - 1e-9)]))
    return chosen


@pytest.mark.parametrize("weighting", ["sigmoid", "raw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "capacity", "padded"),
    [(2, 7, 0.5, 0), (3, 5, 0.2, 4), (1, 1, 0.5, 0), (2, 6, 1.0, 2), (2, 100, 0.55, 0)],
)
def test_training_against_the_loop(batch, length, capacity, padded, dtype, weighting):
    depths = MixtureOfDepths(4, capacity=capacity, weighting=weighting).to(dtype)
    x, weight = torch.randn(batch, length, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)
    real = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        real[-1, -padded:] = False
    d_y = torch.randn_like(x)
    inputs = [x.requires_grad_(), depths.weight, weight.requires_grad_()]
    y, routing = depths(x, mixing_block(weight), padding_mask=real)
    actual = [y, *torch.autograd.grad(y, inputs, d_y)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    places = best(wide[0].detach(), wide[1][0].detach(), real, capacity)
    expected = oracle(wide[0], wide[1][0], wide[2], places, weighting)
    for got, wanted in zip(actual, [expected, *torch.autograd.grad(expected, wide, d_y.double())], strict=True):
        close(got, wanted, dtype)
    assert [row.nonzero().flatten().tolist() for row in routing.selected] == places


def test_evaluation_follows_the_predictor_and_looks_at_nothing_later():
    depths = MixtureOfDepths(4, capacity=0.5).double().eval()
    x, weight = torch.randn(3, 9, 4).double(), torch.randn(4, 4).double()
    y, routing = depths(x, mixing_block(weight))
    assert torch.equal(routing.selected, routing.predicted > 0)
    counts = routing.selected.sum(1).tolist()
    assert len(set(counts)) > 1, "the fixture must fill some sequences up"
    places = [row.nonzero().flatten().tolist() for row in routing.selected]
    close(y, oracle(x, depths.weight[0], weight, places, "sigmoid").detach())
    for length in range(1, 9):
        close(depths(x[:, :length], mixing_block(weight))[0], y[:, :length].detach())


def test_a_decoded_token_may_skip_the_block_and_only_chosen_rows_are_computed():
    depths = MixtureOfDepths(4, capacity=0.25).eval()
    seen = []

    def run(rows, indices):
        seen.append(tuple(rows.shape))
        return rows * 2

    with torch.no_grad():
        depths.predictor[2].bias.fill_(-100.0)
        x = torch.randn(2, 1, 4)
        assert torch.equal(depths(x, run)[0], x) and not seen
        depths.predictor[2].bias.fill_(100.0)
        assert not torch.equal(depths(x, run)[0], x)
        depths.train()(torch.randn(2, 16, 4), run)
    assert seen == [(2, 1, 4), (2, 4, 4)]


def test_the_block_is_called_where_no_token_passes_if_others_may_wait_in_it():
    depths = MixtureOfDepths(4, capacity=0.25).eval()
    depths.always, seen = True, []

    def run(rows, indices):
        seen.append(indices.tolist())
        assert not rows.any()
        return rows + 2

    with torch.no_grad():
        depths.predictor[2].bias.fill_(-100.0)
        x = torch.randn(2, 3, 4)
        y, routing = depths(x, run)
    assert seen == [[[3], [3]]] and torch.equal(y, x) and not routing.selected.any()


@given(st.integers(1, 3), st.integers(1, 20), st.floats(0.01, 1.0), st.integers(0, 20), st.booleans())
def test_exactly_the_capacity_passes_even_with_ties(batch, length, capacity, padded, ties):
    depths = MixtureOfDepths(3, capacity=capacity)
    x = torch.ones(batch, length, 3) if ties else torch.randn(batch, length, 3)
    real = torch.arange(length).expand(batch, length) < max(0, length - padded)
    y, routing = depths(x, lambda rows, _: rows + 1, padding_mask=real)
    expected = min(math.ceil(capacity * length - 1e-9), max(0, length - padded))
    assert routing.selected.sum(1).tolist() == [expected] * batch
    assert ((y != x).any(-1) == routing.selected).all()


def test_the_predictor_learns_the_routing_and_nothing_else_learns_from_it():
    depths = MixtureOfDepths(8, capacity=0.5)
    x = torch.randn(8, 32, 8, requires_grad=True)
    loss = depths(x, lambda rows, _: rows)[1].aux_loss()
    wrt_x, wrt_w = torch.autograd.grad(loss, [x, depths.weight], allow_unused=True)
    assert wrt_x is None and wrt_w is None
    optimizer = torch.optim.Adam(depths.predictor.parameters(), lr=0.02)
    for _ in range(150):
        routing = depths(torch.randn(8, 32, 8), lambda rows, _: rows)[1]
        optimizer.zero_grad()
        routing.aux_loss().backward()
        optimizer.step()
    assert routing.accuracy() > 0.85
    close(routing.share(), torch.tensor(0.5))


def test_the_auxiliary_loss_by_hand():
    depths = MixtureOfDepths(2, capacity=0.5)
    torch.nn.init.ones_(depths.weight)
    real = torch.tensor([[True, True, False, True]])
    # every logit is positive, and one real token does not pass all the same: the target is the choice, not the sign
    x = torch.tensor([[[0.1, 0.2], [3.0, 1.0], [9.0, 9.0], [1.0, 0.5]]])
    routing = depths(x, lambda rows, _: rows, padding_mask=real)[1]
    assert routing.selected.tolist() == [[False, True, False, True]] and (routing.logits[real] > 0).all()
    total = 0.0
    for i in (0, 1, 3):
        p = 1 / (1 + math.exp(-routing.predicted[0, i].item()))
        total -= math.log(p if routing.selected[0, i] else 1 - p)
    close(routing.aux_loss(), torch.tensor(total / 3))


def test_padding_counts_in_no_share():
    selected, real = torch.tensor([[True, False, True, False]]), torch.tensor([[True, True, True, False]])
    predicted = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    routing = DepthRouting(selected, predicted, predicted, real, torch.tensor([[0, 2]]), False)
    close(routing.share(), torch.tensor(2 / 3))
    close(routing.accuracy(), torch.tensor(1 / 3))
    assert dataclasses.replace(routing, real=torch.zeros_like(real)).accuracy() == 1


def test_a_replay_of_unequal_sequences_says_that_they_are():
    depths = MixtureOfDepths(4).eval()
    x, run = torch.randn(3, 9, 4), lambda rows, _: rows + 1
    y, record = depths(x, run)
    assert record.ragged and len(set(record.selected.sum(1).tolist())) > 1
    again, routing = depths.train()(x, run, replay=record)
    assert routing.ragged and again.equal(y)


def test_no_tokens():
    depths = MixtureOfDepths(4)
    for shape in ((0, 5, 4), (2, 0, 4)):
        for mode in (True, False):
            y, routing = depths.train(mode)(torch.randn(shape), lambda rows, _: rows)
            assert y.shape == shape
            assert routing.aux_loss() == 0 and routing.share() == 0


def test_bfloat16_stays_bfloat16():
    depths = MixtureOfDepths(4).bfloat16()
    y, routing = depths(torch.randn(2, 6, 4).bfloat16(), lambda rows, _: rows * 2)
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32


def test_errors():
    with unchecked():
        for capacity in (0.0, -0.5, 1.01, math.nan):
            with pytest.raises(ValueError, match=r"capacity must be in \(0, 1\], got"):
                MixtureOfDepths(4, capacity=capacity)
        with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
            MixtureOfDepths(0)
        with pytest.raises(ValueError, match="weighting must be 'sigmoid' or 'raw', got 'tanh'"):
            MixtureOfDepths(4, weighting="tanh")
        depths, x = MixtureOfDepths(4), torch.randn(2, 3, 4)
        with pytest.raises(ValueError, match="width dim=4, got 5"):
            depths(torch.randn(2, 3, 5), lambda rows, _: rows)
        with pytest.raises(ValueError, match=r"padding_mask must have shape \[2, 3\], got \[2, 4\]"):
            depths(x, lambda rows, _: rows, padding_mask=torch.ones(2, 4).bool())
        with pytest.raises(ValueError, match=r"run must return shape \[2, 2, 4\], got \[2, 1, 4\]"):
            depths(x, lambda rows, _: rows[:, :1])
        with pytest.raises(ValueError, match="choose must be 'auto', 'top_k' or 'predictor', got 'best'"):
            depths(x, lambda rows, _: rows, choose="best")
        with pytest.raises(FloatingPointError, match="1 of 6 tokens"):
            x[1, 1] = math.nan
            depths(x, lambda rows, _: rows)


def test_a_predictor_that_is_no_number_is_an_error_and_not_a_skipped_token():
    depths = MixtureOfDepths(4, name="layers.3").eval()
    with torch.no_grad():
        list(depths.predictor.parameters())[-1].fill_(math.nan)
    x, real = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(FloatingPointError, match=r"layers\.3: the predictor's logits must be finite.* 2 of 6 tokens"):
        depths(x, lambda rows, _: rows, padding_mask=real)
    y, _ = depths(x, lambda rows, _: rows, padding_mask=torch.zeros_like(real))
    assert torch.equal(y, x)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, torch.nan), (torch.float32, 3e38), (torch.float16, 3e4)])
def test_padding_of_any_value_reaches_no_gradient(dtype, value):
    depths = MixtureOfDepths(8, capacity=0.5).to(dtype)
    x, real = torch.randn(2, 6, 8, dtype=dtype), torch.arange(6) < torch.tensor([[6], [4]])
    found = []
    for filling in (value, 0.0):
        y, routing = depths(x.masked_fill(~real[..., None], filling), lambda rows, _: rows.tanh(), padding_mask=real)
        loss = y[real].float().sum() + routing.aux_loss()
        found.append(torch.autograd.grad(loss, list(depths.parameters())))
    for got, wanted in zip(*found, strict=True):
        assert got.equal(wanted) and wanted.any()


def test_a_replay_lets_no_padding_pass():
    layer, x = MixtureOfDepths(8), torch.randn(1, 6, 8)
    _, record = layer(x, lambda rows, places: rows + 1)
    mask = ~record.selected
    mask[0, int(record.selected[0].nonzero()[0])] = True
    with pytest.raises(
        ValueError, match="replay must let no padding pass, got 2 tokens that padding_mask calls padding"
    ):
        layer(x, lambda rows, places: rows + 1, padding_mask=mask, replay=record)
    found = layer(x, lambda rows, places: rows + 1, padding_mask=record.selected, replay=record)[1]
    assert torch.equal(found.selected, record.selected) and found.ragged
