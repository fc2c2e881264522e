"""The Fisher trace against a sum over every label, its curriculum and its penalty."""

import math

import pytest
import torch
from torch import nn

from pruning import Masks
from pruning.diagnostics import (
    FisherCurriculum,
    FisherHistory,
    FisherTrace,
    empirical_fisher_trace,
    fisher_penalty,
    fisher_trace,
    low_fisher_first,
)
from pruning.saliency.products import twice_differentiable
from tests.pruning.test_transformer import build, ids
from tests.tolerances import close
from transformer import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    MoBAConfig,
    ProductKeyConfig,
    Transformer,
    TransformerConfig,
)

VOCAB = 4


class Tiny(nn.Module):
    """Logits of the next token from the present one alone: so small that all labels can be summed over."""

    def __init__(self, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, 3, generator=generator).double())
        self.out = nn.Parameter(scale * torch.randn(VOCAB, 3, generator=generator).double())

    def forward(self, input_ids):
        return self.table[input_ids].tanh() @ self.out.T


def exact_by_loop(model, batch, *, masks=None):
    """Σ over samples, positions and labels of p(y) ‖∇ log p(y)‖² / (B T)."""
    total = 0.0
    for sample in batch:
        for token in sample[:-1]:
            chances = model(token[None])[0].softmax(-1)
            for label in range(VOCAB):
                gradients = torch.autograd.grad(chances[label].log(), [model.table, model.out], retain_graph=True)
                squares = [g.pow(2) for g in gradients]
                if masks is not None:
                    squares = [s * m for s, m in zip(squares, masks, strict=True)]
                total += float(chances[label]) * sum(float(s.sum()) for s in squares)
    return total / (len(batch) * (batch.shape[1] - 1))


def test_attention_that_is_differentiable_once_is_refused_by_name():
    layer = LayerConfig(AttentionConfig(2, 2, 4, selection=MoBAConfig()), DenseConfig(hidden=8))
    model = Transformer(TransformerConfig(vocab_size=VOCAB, dim=8, layers=(layer,), max_length=16))
    with twice_differentiable(model), pytest.raises(ValueError, match="differentiable twice, got _Selected of sparse_"):
        fisher_penalty(model, draw(length=12))


def test_tables_of_memories_count_like_other_weights():
    """The trace, the penalty and its gradient are the same where the tables' gradients are dense and are rows."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = LayerConfig(None, ProductKeyConfig(2, 1, 2, 4))
        model = Transformer(TransformerConfig(vocab_size=VOCAB, dim=4, layers=(layer,), max_length=8)).double()
        model.layers[0].feedforward.values.sparse = sparse
        trace = fisher_trace(model, [draw()], generator=torch.Generator().manual_seed(1))
        with twice_differentiable(model):
            value = fisher_penalty(model, draw(), generator=torch.Generator().manual_seed(2))
            value.backward()
        gradient = model.layers[0].feedforward.values.weight.grad
        assert gradient.is_sparse == sparse and trace.parts["layers.0.feedforward.values.weight"] > 0
        found.append((torch.tensor(trace.total), value.detach(), gradient.to_dense()))
    for one, two in zip(*found, strict=True):
        close(one, two)


def draw(batch=3, length=5, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_trace_is_the_sum_over_all_labels():
    model, batch = Tiny(), draw()
    found = fisher_trace(model, [batch[:2], batch[2:]], draws=400, generator=torch.Generator().manual_seed(1))
    assert found.labels == "model"
    assert found.total == pytest.approx(exact_by_loop(model, batch), rel=0.08)


def test_only_the_weights_that_are_there_count():
    model, batch = Tiny(), draw()
    mask = torch.rand(VOCAB, 3, generator=torch.Generator().manual_seed(2)) < 0.4
    masks = Masks({"out": mask})
    found = fisher_trace(model, [batch], masks=masks, draws=400, generator=torch.Generator().manual_seed(1))
    assert found.total == pytest.approx(exact_by_loop(model, batch, masks=[torch.ones(VOCAB, 3), mask]), rel=0.1)
    only = fisher_trace(model, [batch], weights=["out"], generator=torch.Generator())
    assert set(only.parts) == {"out"}


def test_the_empirical_fisher_takes_the_labels_of_the_text():
    model, batch = Tiny(), draw()
    wanted = 0.0
    for sample in batch:
        chances = model(sample[:-1]).log_softmax(-1)
        loss = -sum(chances[t, sample[t + 1]] for t in range(4)) / 4
        wanted += sum(float(g.pow(2).sum()) for g in torch.autograd.grad(loss, [model.table, model.out]))
    found = empirical_fisher_trace(model, [batch])
    assert found.labels == "data" and found.total == pytest.approx(wanted / 3)


def test_a_model_that_fits_its_data_has_an_empirical_fisher_of_nought_and_a_fisher_that_is_not():
    model = Tiny()
    with torch.no_grad():
        model.out.zero_()
        model.table.fill_(0.5)
        model.out[0] = 1.0
    batch = torch.zeros(1, 6, dtype=torch.long)
    for scale in (1.0, 4.0):
        with torch.no_grad():
            model.out.mul_(scale)
        exact = exact_by_loop(model, batch)
        empirical = empirical_fisher_trace(model, [batch]).total
    assert empirical < 0.1 * exact


def test_the_penalty_is_the_trace_in_expectation_and_has_its_gradient():
    model, batch = Tiny(), draw(batch=2, length=4)
    generator = torch.Generator().manual_seed(3)
    draws = [fisher_penalty(model, batch, generator=generator) for _ in range(1000)]
    values = torch.stack([d.detach() for d in draws])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - exact_by_loop(model, batch)) < 4 * error
    seeds = torch.Generator().manual_seed(4)
    start = seeds.get_state()
    slope = torch.autograd.grad(fisher_penalty(model, batch, generator=seeds), model.out)[0]
    numeric = torch.zeros_like(slope)
    for place in range(slope.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                model.out.view(-1)[place] += sign * 1e-5
            ends.append(float(fisher_penalty(model, batch, generator=torch.Generator().set_state(start)).detach()))
            with torch.no_grad():
                model.out.view(-1)[place] -= sign * 1e-5
        numeric.view(-1)[place] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-6)


def test_a_mask_and_its_complement_share_the_penalty_and_the_traces():
    model, batch = Tiny(), draw(batch=2, length=4)
    kept = torch.rand_like(model.out) < 0.5
    parts = [Masks({"out": kept}), Masks({"out": ~kept}), None]
    seeded = [torch.Generator().manual_seed(5) for _ in range(6)]
    values = [fisher_penalty(model, batch, weights=["out"], masks=m, generator=seeded.pop()) for m in parts]
    torch.testing.assert_close(values[0] + values[1], values[2])
    (slope,) = torch.autograd.grad(values[0], model.out)
    assert slope.any() and 0 < values[0] < values[2]
    traces = [low_fisher_first(model, [batch], weights=["out"], masks=m, generator=seeded.pop()).traces for m in parts]
    torch.testing.assert_close(traces[0] + traces[1], traces[2])


def test_a_transformer_is_penalised_with_the_mathematical_attention_and_one_with_experts_says_that_it_cannot_be():
    model = build("dense").train()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = fisher_penalty(model, ids(), weights=["layers.0.attention.query.weight"], generator=torch.Generator())
        value.backward()
        assert value > 0 and model.layers[0].attention.query.weight.grad.abs().sum() > 0
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            fisher_penalty(build("moe"), ids(), generator=torch.Generator()).backward()


def test_the_curriculum_begins_with_the_flattest_samples():
    model, batch = Tiny(), draw(batch=5, length=6, seed=5)
    found = low_fisher_first(model, [batch[:3], batch[3:]], draws=300, generator=torch.Generator().manual_seed(0))
    exact = torch.tensor([exact_by_loop(model, sample[None]) for sample in batch], dtype=torch.float64)
    torch.testing.assert_close(found.traces, exact, rtol=0.25, atol=0)
    assert found.traces[found.order].equal(found.traces.sort().values)


def test_samples_are_admitted_step_by_step():
    curriculum = FisherCurriculum(torch.tensor([3, 1, 0, 2, 4]), torch.tensor([2.0, 1.0, 3.0, 0.5, 9.0]))
    admitted = [curriculum.admitted(step, steps=10, start=0.2).tolist() for step in (0, 5, 10, 20)]
    assert admitted == [[3], [3, 1, 0], [3, 1, 0, 2, 4], [3, 1, 0, 2, 4]]
    with pytest.raises(ValueError, match=r"start must be in \(0, 1\], got 0.0"):
        curriculum.admitted(0, steps=10, start=0.0)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        curriculum.admitted(0, steps=0)


def test_the_peak_of_a_history():
    traces = {step: FisherTrace({"a": value, "b": 1.0}, "model") for step, value in ((0, 1.0), (10, 5.0), (20, 2.0))}
    assert FisherHistory(traces).peak() == (10, 6.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fisher_trace(Tiny(), [draw()], weights=["none"]), "weights must name parameters of the model, got 'n"),
        (lambda: fisher_penalty(Tiny(), draw(length=1)), r"needs input_ids \[B, L\] with L >= 2, got \[3, 1\]"),
        (lambda: fisher_penalty(Tiny(), {"input_ids": draw(), "labels": draw()}), "takes input_ids alone"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_draw_is_reproducible():
    one, two = (fisher_trace(Tiny(), [draw()], generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one == two
    close(torch.tensor(one.total), torch.tensor(sum(two.parts.values())))
