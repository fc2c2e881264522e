"""Calibration of layers that only some tokens pass: a padded batch counts what its sequences, one by one, do."""

import copy

import pytest
import torch
from torch import nn

from moe import calibrate_teal
from pruning import prunable_weights
from pruning.batches import row_batches, samples_of
from pruning.calibrated import prune_calibrated
from pruning.merge import activation_moments
from pruning.model_axes import axes_of
from pruning.saliency import (
    activation_importance,
    attention_confidence,
    correlation_scores,
    dense_wanda_scores,
    expert_neuron_importance,
)
from tests.tolerances import close
from transformer import AttentionConfig, Transformer, TransformerConfig
from transformer.feedforward_config import DenseConfig, MoEConfig
from transformer.layer_config import DepthConfig, LayerConfig


def case(*, passing="all", side="right", experts=False):
    """Eight sequences, one of them whole: where all tokens pass, its length is that of the gathered rows."""
    torch.manual_seed(0)
    feedforward = MoEConfig(hidden=12, num_experts=3, k=2, shared_hidden=8) if experts else DenseConfig(24)
    layers = tuple(LayerConfig(AttentionConfig(2, 1, 8), feedforward, depth=d) for d in (DepthConfig(0.5), None))
    model = Transformer(TransformerConfig(vocab_size=50, dim=16, max_length=32, layers=layers)).double().eval()
    for parameter in prunable_weights(model).values():
        nn.init.normal_(parameter, std=0.3)
    predictor = model.layers[0].depth.predictor
    nn.init.constant_(predictor[2].bias, 100.0 if passing == "all" else 0.0)
    nn.init.normal_(predictor[2].weight)
    ids = torch.randint(0, 50, (8, 12))
    mask = torch.arange(12) < torch.tensor([12, 1, 5, 3, 9, 2, 7, 4])[:, None]
    mask = mask.long() if side == "right" else mask.long().flip(1)
    alone = [ids[i : i + 1, mask[i].bool()] for i in range(8)]
    return model, {"input_ids": ids, "attention_mask": mask}, alone


CASES = [("all", "right"), ("all", "left"), ("some", "right"), ("some", "left")]


@pytest.mark.parametrize(("passing", "side"), CASES)
@pytest.mark.parametrize("options", [{"method": "wanda"}, {"method": "sparsegpt", "allocation": "loss"}], ids=str)
def test_masks_of_a_padded_batch_are_those_of_its_sequences(passing, side, options):
    model, padded, alone = case(passing=passing, side=side)
    # a loss of any length: one token alone has no next
    options = options | ({"loss": squares} if "allocation" in options else {})
    found, want = (
        prune_calibrated(copy.deepcopy(model), batches, sparsity=0.5, **options) for batches in ([padded], alone)
    )
    assert [one.rows for one in found.matrices] == [one.rows for one in want.matrices]
    assert all(found.masks.kept[name].equal(kept) for name, kept in want.masks.kept.items())


def squares(model, batch):
    """Σ of squared logits at real tokens."""
    batch = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    logits = model(**batch).logits
    return logits[batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()].square().sum()


@pytest.mark.parametrize(("passing", "side"), CASES)
def test_what_criteria_see_of_a_padded_batch_is_what_its_sequences_show(passing, side):
    model, padded, alone = case(passing=passing, side=side)
    neurons, weights = axes_of(model, "neuron"), prunable_weights(model)

    def scores(batches):
        statistics = [activation_importance(model, batches, axes=neurons, statistic=s) for s in ("energy", "firing")]
        moments = activation_moments(model, neurons, batches)
        return [
            *(value for one in (*statistics, attention_confidence(model, batches)) for value in one.values()),
            *(part for one in moments.values() for part in (one.products, one.mean)),
            *dense_wanda_scores(model, weights, batches).values(),
            *correlation_scores(model, weights, batches).values(),
        ]

    for found, want in zip(scores([padded]), scores(alone), strict=True):
        # rotary angles, float32, are those of places further on where padding stands to the left
        close(found, want, torch.float32)


@pytest.mark.parametrize("passing", ["all", "some"])
def test_neurons_of_experts_too(passing):
    model, padded, alone = case(passing=passing, experts=True)
    found, want = (expert_neuron_importance(model, batches) for batches in ([padded], alone))
    for name in want:
        close(found[name], want[name])


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_teal_thresholds_too(allocation):
    model, padded, alone = case(passing="some", side="left")
    options = {"sparsity": 0.2, "allocation": allocation, "step": 1.0, "rows": 1000}
    found, want = (calibrate_teal(model, batches, **options) for batches in ([padded], alone))
    for kind in ("feedforward", "attention"):
        for name, limits in getattr(want, kind).items():
            for part, value in vars(limits).items():
                assert getattr(getattr(found, kind)[name], part) == pytest.approx(value), (name, part)


def test_samples_without_tokens_are_left_out_and_what_is_no_sample_goes_along():
    model, padded, _ = case()
    padded |= {"position_ids": torch.arange(12)[None], "words": "kept", "cut": torch.arange(8)}
    padded["attention_mask"][3] = 0
    parts = list(row_batches(model, [padded]))
    assert [int(part["cut"]) for part in parts] == [0, 1, 2, 4, 5, 6, 7]
    assert all(part["position_ids"].shape == (1, 12) and part["words"] == "kept" for part in parts)
    assert len(list(samples_of(padded))) == 8
    model.layers[0].depth = None
    assert len(list(row_batches(model, [padded]))) == 1


def test_keys_cannot_be_skipped_by_place_in_gathered_rows():
    model, padded, _ = case()
    with pytest.raises(ValueError, match="skip_first and skip_ids must be 0"):
        attention_confidence(model, [padded], skip_first=1)
