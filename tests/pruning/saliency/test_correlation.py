"""Correlations between connected neurons against numpy's, on what the modules really get and give."""

import numpy as np
import pytest
import torch

from pruning import prunable_weights
from pruning.saliency import correlation_scores
from tests.pruning.saliency.models import MODELS, padded_batch
from tests.pruning.test_transformer import build, ids


def by_numpy(x, y):
    """abs(corr) of every output with every input: rows are tokens."""
    joint = np.corrcoef(np.concatenate([x, y], axis=1).T)
    return np.abs(joint[x.shape[1] :, : x.shape[1]])


@pytest.mark.parametrize("name", list(MODELS))
def test_linear_layers_of_three_models(name):
    model, batch = MODELS[name](), padded_batch()
    weights = prunable_weights(model)
    seen = {}

    def keep(label):
        return lambda _, arguments, output: seen.update({label: (arguments[0], output)})

    hooks = [model.get_submodule(label.removesuffix(".weight")).register_forward_hook(keep(label)) for label in weights]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    found = correlation_scores(model, weights, [batch])
    real = batch["attention_mask"].bool()
    for label in weights:
        x, y = (part[real].double().numpy() if part.shape[:2] == real.shape else part.double().numpy()
                for part in seen[label])  # fmt: skip
        np.testing.assert_allclose(found[label].numpy(), by_numpy(x, y), atol=1e-6)


def test_each_expert_sees_its_own_rows():
    model, batch = build("moe", layers=1), ids(6, 9)
    weights = prunable_weights(model)
    layer, seen = model.layers[0].feedforward, {}
    hook = layer.register_forward_hook(lambda _, a, out: seen.update(x=a[0].flatten(0, 1), routing=out[1]))
    with torch.no_grad():
        model(batch[:3])
        first = dict(seen)
        model(batch[3:])
    hook.remove()
    found = correlation_scores(model, weights, [batch[:3], batch[3:]])
    for expert in range(4):
        rows = torch.cat([part["x"][part["routing"].token[part["routing"].expert == expert]] for part in (first, seen)])
        up = layer.experts.up[expert].detach()
        hidden = layer.experts.hidden_one(expert, rows).detach()
        expected = by_numpy(rows.double().numpy(), (rows @ up).double().numpy()).T
        np.testing.assert_allclose(found["layers.0.feedforward.experts.up"][expert].numpy(), expected, atol=1e-4)
        y = (hidden @ layer.experts.down[expert].detach().mT).double().numpy()
        expected = by_numpy(hidden.double().numpy(), y)
        np.testing.assert_allclose(found["layers.0.feedforward.experts.down"][expert].numpy(), expected, atol=1e-4)


def test_a_constant_input_and_a_silent_output_score_zero():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(20, 3, dtype=torch.float64)
    x[:, 2] = 5
    found = correlation_scores(model, prunable_weights(model), [x])["0.weight"]
    assert (found[1] == 0).all() and found[0, 2] == 0 and (found[0, :2] > 0).all() and (found <= 1 + 1e-12).all()


def test_an_expert_without_tokens_is_named():
    model = build("moe", layers=1)
    with pytest.raises(ValueError, match=r"must reach .*experts\.(up|down)\[\d\], got no row"):
        correlation_scores(model, prunable_weights(model), [ids(1, 1)])
