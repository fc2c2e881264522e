"""What the benchmarks of removed heads and of layer collapse are made of."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import layer_collapse, smollm2_together
from benchmarks.layer_collapse import BYTES, CONTEXT, MODELS, is_cut, measured, new_chain, prune
from benchmarks.smollm2_heads import kept_scores, learned_gates
from benchmarks.smollm2_together import EXACT, Setting
from pruning import prunable_axes, prunable_weights
from pruning.batches import next_token_loss
from training.precision import Precision
from transformer import DenseConfig, Transformer, TransformerConfig


def _model() -> Transformer:
    config = TransformerConfig.uniform(
        vocab_size=11, dim=8, num_layers=2, num_heads=2, max_length=16, feedforward=DenseConfig(hidden=8)
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def _ids(count: int = 12) -> Tensor:
    return torch.randint(11, (count, 16), generator=torch.Generator().manual_seed(1))


def test_a_gate_closes_further_on_a_head_that_says_nothing():
    model = _model()
    for _ in range(60):
        # the text is learned first, so that heads carry something
        slopes = torch.autograd.grad(next_token_loss(model, _ids()) / 12, list(model.parameters()))
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            parameter.data -= 0.2 * slope
    with torch.no_grad():
        model.layers[0].attention.output.weight[:, 4:] = 0
    before = [parameter.clone() for parameter in model.parameters()]
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    found = learned_gates(model, [_ids()] * 30, axes=axes, loss=next_token_loss, strength=0.5)
    gates = found[axes[0].name]
    assert gates[1] < gates[0] and gates[1] < 1.2  # from log(0.8 / 0.2) = 1.39
    assert all(a.equal(b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_scores_that_were_kept_are_not_made_again(tmp_path):
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"layer": torch.tensor([0.1, 1 / 3], dtype=torch.float64)}

    found = [kept_scores(tmp_path / "scores", "by hand", make)["layer"].tolist() for _ in range(2)]
    assert found == [[0.1, 1 / 3]] * 2 and len(made) == 1


def test_every_step_of_recovery_sees_the_weights_of_the_step_before(monkeypatch):
    seen = []

    def step(model: nn.Module, dense: nn.Module, batches: list[Tensor], optimizer: object, *, masks: object) -> None:
        seen.append(model(batches[0]).logits.detach().float().norm().item())
        with torch.no_grad():
            model.embedding.weight.mul_(2)

    monkeypatch.setattr(smollm2_together, "distill", step)
    precision = Precision(torch.bfloat16, "asked")
    ids = _ids(1)
    model = _model()
    setting = Setting(_model(), ids, ids, precision, steps=2, batch=1, common={})
    smollm2_together._learn(model, setting, torch.optim.SGD(model.parameters()), None)
    assert len(seen) == 2 and seen[1] > 1.5 * seen[0]
    assert EXACT.dtype == torch.float32


@pytest.fixture
def small(monkeypatch):
    """Fewer weights, and less text."""
    monkeypatch.setattr(layer_collapse, "WIDTHS", (32, 48, 64, 64, 32))
    monkeypatch.setattr(layer_collapse, "EVALUATED", 64)
    monkeypatch.setattr(layer_collapse, "BATCH", 8)


def test_magnitude_empties_a_matrix_where_synflow_does_not_and_counts_are_exact(small):
    windows = torch.randint(BYTES, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    empty = {}
    for method in ("magnitude", "synflow", "chance", "snip"):
        model = new_chain(0)
        prune(model, method, 100.0, windows, seed=0)
        kept = [int((weight != 0).sum()) for weight in prunable_weights(model).values()]
        total = sum(weight.numel() for weight in prunable_weights(model).values())
        assert sum(kept) == total - int((1 - 1 / 100.0) * total) and len(kept) == 5
        empty[method] = kept.count(0)
    assert empty["magnitude"] > 0 and empty["synflow"] == 0


def test_a_record_holds_what_is_left_and_the_loss_of_it(small):
    text = torch.arange(2000, dtype=torch.uint8) % 7
    for kind in MODELS:
        line = measured(kind, "chance", 10.0, 0, text, text[:200], steps=3)
        again = measured(kind, "chance", 10.0, 0, text, text[:200], steps=3)
        assert line == again and 0 < line["kept"] < line["weights"] / 9 and line["nats"] > 0
        assert measured(kind, "dense", 1.0, 0, text, text[:200], steps=3)["kept"] == line["weights"]


def test_a_chain_is_cut_where_no_path_leads_through():
    first, second = torch.tensor([[True, False], [False, False]]), torch.tensor([[False, True]])
    assert is_cut([first, second]) and not is_cut([first, ~second]) and not is_cut([~first, second])
