"""A step's losses against a plain forward pass, and micro-batches against the big batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe.dispatch import limit_capacity
from moe.routers.top_k import choose_top_k
from tests.tolerances import close
from tests.training.models import small_batch, small_data, small_model
from training.data import IGNORED, Batch
from training.evaluation import evaluate
from training.precision import choose_precision
from training.step import SideLosses, accumulate, forward, routing_stats


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def uneven(batch: Batch) -> Batch:
    """Sequences with unequal numbers of targets, as the end of a held-out text has."""
    targets = batch.targets.clone()
    targets[0, 3:] = IGNORED
    targets[2, 10:] = IGNORED
    return Batch(batch.inputs, targets)


def test_losses_equal_those_of_all_logits_at_once() -> None:
    model, batch = small_model(), uneven(small_batch())
    output = forward(model, batch, side=SideLosses(balance=0.3, z=0.7))
    whole = model(batch.inputs)
    expected = F.cross_entropy(whole.logits.flatten(0, 1), batch.targets.flatten())
    close(output.ce, expected)
    routings = [r for r in whole.routings if r is not None]
    balance, z_loss = torch.zeros(()), torch.zeros(())
    for r in routings:
        share = torch.bincount(r.expert, minlength=4) / len(r.expert)
        balance = balance + 4 * (share * r.logits.softmax(-1).mean(0)).sum()
        z_loss = z_loss + r.logits.exp().sum(-1).log().pow(2).mean()
    close(output.loss, expected + 0.3 * balance + 0.7 * z_loss)
    assert output.targets == 3 + 10 + 16 + 16


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_gradient_equals_the_big_batch(experts: int, micro_batches: int) -> None:
    model, batch = small_model(experts=experts), uneven(small_batch())
    layers = 2 if experts else 0
    whole = accumulate(model, batch)
    expected = gradients(model)
    model.zero_grad()
    parts = accumulate(model, batch, micro_batches=micro_batches)
    close(parts.ce, whole.ce)
    for got, want in zip(gradients(model), expected, strict=True):
        close(got, want)
    assert routing_stats(parts.routings, layers=layers).loads == routing_stats(whole.routings, layers=layers).loads


def test_drops_are_means_over_micro_batches_by_hand() -> None:
    crowd, apart = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.eye(2).repeat(2, 1)
    routings = [limit_capacity(choose_top_k(logits, 1, renormalize=False), 1.0) for logits in (crowd, apart)]
    stats = routing_stats((routings[0], routings[1], routings[1], routings[1]), layers=2)
    assert stats.dropped == [0.25, 0.0] and stats.loads == [[4, 2], [4, 4]]


def test_micro_batches_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="micro_batches must divide the batch of 4 sequences, got 3"):
        accumulate(small_model(), small_batch(), micro_batches=3)


def test_evaluation_is_the_sum_over_every_token() -> None:
    model, data = small_model(), small_data(length=16)
    result = evaluate(model, data.held_out, data.tokenizer, length=16, batch=3)
    ids = torch.from_numpy(data.held_out.astype("int64"))
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = model(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / data.held_out_bytes, rel=1e-5)
    assert result.bytes == data.held_out_bytes
    assert result.tokens == len(ids) - 1
    part = evaluate(model, data.held_out, data.tokenizer, length=16, batch=3, max_batches=1)
    assert part.tokens == 48
    assert model.training


def test_evaluation_counts_the_experts_that_took_no_token() -> None:
    model, data = small_model(experts=40), small_data(length=16)
    result = evaluate(model, data.held_out, data.tokenizer, length=16, batch=1, max_batches=2)
    taken: list[set[int]] = [set(), set()]
    for start in (0, 16):
        ids = torch.from_numpy(data.held_out[start : start + 16].astype("int64"))
        for layer, routing in enumerate(model.eval()(ids[None]).routings):
            taken[layer].update(routing.expert.tolist())
    assert result.dead_experts == tuple(40 - len(experts) for experts in taken)
    assert min(result.dead_experts) > 0
    assert result.passed == result.memories == ()


def test_bfloat16_products_leave_float32_gradients_close() -> None:
    model, batch = small_model(experts=0), small_batch()
    accumulate(model, batch)
    expected = gradients(model)
    model.zero_grad()
    output = accumulate(model, batch, autocast=torch.autocast("cpu", torch.bfloat16))
    assert output.ce.dtype == torch.float32
    for got, want in zip(gradients(model), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.05 * want.norm()


def test_precision_is_a_measured_choice_that_says_why() -> None:
    device = torch.device("cpu")
    assert choose_precision("bfloat16", device=device).dtype == torch.bfloat16
    chosen = choose_precision("auto", device=device)
    assert chosen.dtype in {torch.float32, torch.bfloat16}
    assert "bfloat16" in chosen.reason
    exact = choose_precision("float64", device=device, weights=torch.float64)
    with exact.autocast(device):
        assert exact.dtype == torch.float64 and not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match=r"dtype float64 needs float64 weights, got float32: call model.double\(\)"):
        choose_precision("float64", device=device)
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, got 'half'"):
        choose_precision("half", device=device)
