"""OWL: outliers counted by a loop, densities by the formula, on this library's models and Llama."""

import pytest
import torch

from pruning import prunable_weights
from pruning.allocation import equal_loss, loss_curves, owl
from pruning.saliency import magnitude, outlier_shares
from pruning.structure import removal_count
from pruning.weights import matrices
from tests.pruning.saliency.models import llama, padded_batch
from tests.pruning.test_transformer import build, ids
from tests.tolerances import close


@pytest.mark.parametrize("make", [build, llama])
def test_shares_of_outliers_block_by_block(make):
    model, batch = make(), padded_batch()
    weights = prunable_weights(model)
    seen = {}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].detach()})
        )
        for name in weights
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    found = outlier_shares(model, weights, [batch], times=2.0)
    real = batch["attention_mask"].bool()
    for layer in ("layers.0.", "layers.1."):
        metric = {}
        for name in (name for name in weights if layer in name):
            norms = seen[name][real].square().mean(0).sqrt()
            metric[name] = [
                abs(float(w)) * float(norms[j]) for row in weights[name].tolist() for j, w in enumerate(row)
            ]
        values = [value for part in metric.values() for value in part]
        mean = sum(values) / len(values)
        share = sum(value > 2.0 * mean for value in values) / len(values)
        assert share > 0 and all(found[name] == pytest.approx(share, abs=2 / len(values)) for name in metric)


def test_experts_are_named_one_by_one():
    model = build("moe")
    weights = prunable_weights(model)
    shares = outlier_shares(model, weights, [ids(8, 9)], times=3.0)
    assert shares.keys() == matrices(weights).keys()
    counts = owl(shares)(matrices({name: w.detach() for name, w in weights.items()}), 0.5)
    assert sum(counts.values()) == sum(w.numel() for w in weights.values()) // 2
    with pytest.raises(ValueError, match=r"must reach .*\[\d\], got no row"):
        outlier_shares(model, weights, [ids(1, 1)])
    with pytest.raises(ValueError, match="times must be > 0, got 0.0"):
        outlier_shares(model, weights, [ids()], times=0.0)


def test_densities_by_the_formula():
    """D = 0, 0.02, 0.01 of layers of equal size, λ = 0.1: densities 0.3 + (0, 0.2, 0.1) − 0.1."""
    scores = {n: torch.rand(10, 10) for n in "abc"}
    rule = owl({"a": 0.0, "b": 0.02, "c": 0.01}, spread=0.1)
    assert rule(scores, 0.7) == {"a": 80, "b": 60, "c": 70}
    assert owl(dict.fromkeys("abc", 0.01))(scores, 0.7) == dict.fromkeys("abc", 70)
    uneven = {"a": torch.rand(10, 30), "b": torch.rand(10, 10), "c": torch.rand(3, 7)}
    for percent in range(0, 100, 7):
        counts = rule(uneven, percent / 100)
        assert sum(counts.values()) == removal_count(percent / 100, 421)
    with pytest.raises(ValueError, match="none for 'd'"):
        rule({"d": torch.rand(2, 2)}, 0.5)
    with pytest.raises(ValueError, match=r"spread must be in \[0, 0.5\], got 0.6"):
        owl({}, spread=0.6)


def test_loss_curves_prune_one_matrix_at_a_time_and_put_it_back():
    from pruning import sparsify
    from pruning.batches import next_token_loss

    model, batches = build("moe", layers=1), [ids(2, 6), ids(1, 6, seed=1)]
    weights = prunable_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    scores = {name: magnitude(weight) for name, weight in weights.items()}
    curves = loss_curves(model, scores, batches, sparsities=(0.0, 0.5))
    assert all(weight.equal(before[name]) for name, weight in weights.items())
    assert curves.keys() == matrices(weights).keys() and all(curve[0] == 0 for curve in curves.values())

    def mean_loss(model):
        with torch.no_grad():
            return sum(next_token_loss(model, batch).item() for batch in batches) / 3

    whole, name = mean_loss(model), "layers.0.attention.value.weight"
    sparsify(model, sparsity=0.5, weights=[name])
    close(curves[name][1], torch.tensor(mean_loss(model) - whole, dtype=torch.float64), torch.float32)
    weights[name].data.copy_(before[name])
    expert = weights["layers.0.feedforward.experts.up"]
    part = expert.detach()[1]
    threshold = part.abs().flatten().sort().values[part.numel() // 2]
    with torch.no_grad():
        expert[1] = part.where(part.abs() >= threshold, 0)
    rise = torch.tensor(mean_loss(model) - whole, dtype=torch.float64)
    close(curves["layers.0.feedforward.experts.up[1]"][1], rise, torch.float32)
    counts = equal_loss(curves, (0.0, 0.5))(matrices(scores), 0.3)
    assert sum(counts.values()) == removal_count(0.3, sum(w.numel() for w in weights.values()))


def test_curves_of_unknown_weights():
    with pytest.raises(ValueError, match="scores must name parameters of the model, got 'w'"):
        loss_curves(build(), {"w": torch.rand(2, 2)}, [ids()], sparsities=(0.5,))
