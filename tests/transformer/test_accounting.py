import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_attn import parse_pattern
from tests.transformer.test_model import MIXTURE, WINDOW, unequal, uniform
from transformer import DenseConfig, MoEConfig, Transformer


def test_active_parameters_of_a_mixture_by_hand():
    model = Transformer(uniform(num_layers=1, feedforward=MIXTURE))
    attention = 12 * 6 * (4 + 2 + 2 + 4)
    router, expert = 4 * 12, 3 * 12 * 6
    rest = 13 * 12 + 3 * 12 + attention + router
    assert model.num_parameters() == rest + 4 * expert
    assert model.num_parameters(active=True) == rest + 2 * expert


def test_shared_experts_are_active():
    model = Transformer(uniform(num_layers=1, feedforward=MoEConfig(6, 4, k=1, shared_hidden=5)))
    assert model.num_parameters() - model.num_parameters(active=True) == 3 * 3 * 12 * 6


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("feedforward", [DenseConfig(10), DenseConfig(10, "gelu"), MIXTURE])
def test_flops_equal_torchs_counter_away_from_attention(length, feedforward, monkeypatch):
    config = uniform(feedforward=feedforward, pattern=WINDOW)
    model = Transformer(config)
    # attention counted by hand, so that only plain matrix products remain for the counter
    monkeypatch.setattr("transformer.attention.attend", lambda q, k, v, **_: q)
    if feedforward is MIXTURE:
        monkeypatch.setattr(
            "moe.experts.Experts.forward",
            lambda self, rows, routing: sum(self.forward_one(e, rows) for e in range(2)),
        )
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    pattern = parse_pattern(WINDOW)
    pairs = sum(bool(pattern.visible(torch.tensor(i), torch.tensor(j))) for i in range(length) for j in range(length))
    attention = 2 * (4 * 4 * 6 * pairs)
    assert model.flops_per_token(length) * length == pytest.approx(counter.get_total_flops() + attention, rel=1e-12)


def test_a_shared_expert_costs_flops():
    counts = [
        Transformer(uniform(num_layers=1, feedforward=MoEConfig(6, 4, k=2, shared_hidden=shared))).flops_per_token(8)
        for shared in (0, 5)
    ]
    assert counts[1] - counts[0] == 2 * 3 * 12 * 5


def test_all_experts_or_the_active_ones():
    config = uniform(num_layers=1, feedforward=MIXTURE)
    model = Transformer(config)
    assert model.flops_per_token(8, active=False) - model.flops_per_token(8) == 2 * (2 * 3 * 12 * 6)


def test_unequal_layers_and_bad_length():
    model = Transformer(unequal())
    assert model.flops_per_token(4) > 2 * 12 * 13
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        model.flops_per_token(0)
