"""SynFlow: products of matrices by hand, the conservation law, and no layer that collapses."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from pruning import global_ranking, magnitude, prunable_weights, select_masks
from pruning.saliency import snip_scores, synflow_scores
from pruning.saliency.flow import flow_input, flow_model, total_flow
from tests.pruning.adapters.models import HEADS, KNOWN, LAYERS, peer
from tests.pruning.test_transformer import build, ids
from tests.pruning.toy import toy
from tests.tolerances import close


def stack(sizes, *, activation=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation(), nn.LayerNorm(b)]
    return nn.Sequential(*layers[:-2])


def flow_by_hand(matrices):
    """Scores of each matrix: |w_ij| · (flow into j) · (flow out of i)."""
    into = [torch.ones(matrices[0].shape[1], dtype=torch.float64)]
    for matrix in matrices:
        into.append(matrix @ into[-1])
    out = [torch.ones(matrices[-1].shape[0], dtype=torch.float64)]
    for matrix in reversed(matrices):
        out.append(matrix.mT @ out[-1])
    out = out[::-1][1:]
    return [out[k][:, None] * matrix * into[k][None] for k, matrix in enumerate(matrices)], into[-1].sum()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
def test_a_stack_of_layers_by_hand_and_its_conservation_law(activation):
    model = stack([5, 7, 4, 3], activation=activation)
    before = copy.deepcopy(model.state_dict())
    found = synflow_scores(model, prunable_weights(model))
    matrices = [layer.weight.detach().abs().double() for layer in model if isinstance(layer, nn.Linear)]
    expected, total = flow_by_hand(matrices)
    first = next(iter(found.values())).sum()
    for score, wanted in zip(found.values(), expected, strict=True):
        # norms scale the flow as a whole
        close(score / first, wanted / total)
        close(score.sum(), first)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_rounds_against_a_loop():
    model, sparsity, rounds = stack([4, 5, 3]), 0.8, 5
    matrices = [layer.weight.detach().abs().double().clone() for layer in model if isinstance(layer, nn.Linear)]
    total = sum(matrix.numel() for matrix in matrices)
    gone = [torch.zeros_like(matrix, dtype=torch.bool) for matrix in matrices]
    for k in range(1, rounds + 1):
        count = int((1 - (1 - sparsity) ** (k / rounds)) * total + 1e-9)
        scores, _ = flow_by_hand(matrices)
        flat = torch.cat([s.masked_fill(g, -1).flatten() for s, g in zip(scores, gone, strict=True)])
        lost = torch.zeros(total, dtype=torch.bool)
        lost[flat.argsort(stable=True)[:count]] = True
        gone = [part.view(m.shape) for part, m in zip(lost.split([m.numel() for m in matrices]), matrices, strict=True)]
        for matrix, part in zip(matrices, gone, strict=True):
            matrix[part] = 0
    found = synflow_scores(model, prunable_weights(model), sparsity=sparsity, rounds=rounds)
    kept = select_masks(found, sparsity=sparsity, allocation=global_ranking).kept
    assert all(mask.equal(~part) for mask, part in zip(kept.values(), gone, strict=True))


@pytest.mark.parametrize("kind", ["dense", "moe", "untied"])
def test_the_same_flow_passes_every_branch_of_a_transformer(kind):
    """By query, key and value a third each, by gate and up a half; outputs carry it whole."""
    model = build(kind)
    scores = synflow_scores(model, prunable_weights(model))
    for layer in ("layers.0.", "layers.1."):
        flows = {name[len(layer) :]: score.sum() for name, score in scores.items() if name.startswith(layer)}
        whole = scores["layers.0.attention.output.weight"].sum()
        close(flows["attention.output.weight"], whole)
        for name in ("query", "key", "value"):
            close(flows[f"attention.{name}.weight"], whole / 3)
        if kind == "moe":
            close(flows["feedforward.experts.down"], whole)
            close(flows["feedforward.experts.up"], whole)
        else:
            close(flows["feedforward.down.weight"], whole)
            close(flows["feedforward.up.weight"], whole / 2)
            close(flows["feedforward.gate.weight"], whole / 2)
    assert all((score > 0).all() for score in scores.values())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_score_is_the_weight_times_the_slope_of_the_flow(kind):
    """By moving single weights of the flow model, whose norms are held at the means that they had."""
    model = build(kind, layers=1)
    scores = synflow_scores(model, prunable_weights(model))
    flow, given = flow_model(model), flow_input(model, None)
    weights, means = dict(flow.named_parameters()), {}
    norms = [flow.layers[0].attention_norm, flow.layers[0].feedforward_norm, flow.norm]

    def remember(norm, arguments):
        means.setdefault(norm, arguments[0].detach().mean())

    for norm in norms:
        norm.register_forward_pre_hook(remember)

    def flow_at(name, index, value):
        with torch.no_grad():
            before = weights[name][index].clone()
            weights[name][index] = value
            hooks = [norm.register_forward_hook(lambda n, args, y: y * args[0].mean() / means[n]) for norm in norms]
            total = total_flow(flow, given).item()
            for hook in hooks:
                hook.remove()
            weights[name][index] = before
        return total

    total_flow(flow, given)
    for name, score in scores.items():
        index = tuple(size // 2 for size in score.shape)
        value, step = weights[name][index].item(), 1e-5 * weights[name][index].item()
        slope = (flow_at(name, index, value + step) - flow_at(name, index, value - step)) / (2 * step)
        assert score[index].item() == pytest.approx(value * slope, rel=1e-4)


# of each layer's flow: what a third or a half of it passes by, and what all of it does
THIRDS = ("q_proj", "k_proj", "v_proj", "self.query", "self.key", "self.value")
HALVES = ("mlp.gate_proj", "mlp.up_proj")
# norms after the sum
POST = {"do_layer_norm_before": False}


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in KNOWN), ("OPT", POST)])
def test_all_of_the_flow_passes_every_layer_of_a_known_architecture(name, options):
    model = peer(name, **options)
    scores = synflow_scores(model, {k: w for k, w in prunable_weights(model).items() if ".layer" in k or ".h." in k})
    known = KNOWN[name]
    whole = scores[f"{known.layer(LAYERS - 1)}.{known.output}.weight"].sum()
    for key, score in scores.items():
        module = key.removesuffix(".weight")
        share = 3 if module.endswith(THIRDS) else 2 if module.endswith(HALVES) else 1
        close(score.sum(), whole / share)
        assert (score > 0).all()
        if module.endswith("c_attn"):
            close(torch.stack([part.sum() for part in score.chunk(3, -1)]), (whole / 3).expand(3))


def test_a_norm_of_queries_weighs_them():
    model = peer("Qwen3")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight[0] = 0
    scores = synflow_scores(model, prunable_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    rows = scores.view(HEADS, 6, -1)
    assert not rows[:, 0].any()
    assert (rows[:, 1:] > 0).all()


def kept_by_layer(scores, sparsity):
    kept = select_masks(scores, sparsity=sparsity, allocation=global_ranking).kept
    return [int(mask.sum()) for mask in kept.values()]


def test_no_layer_collapses_where_magnitude_and_snip_lose_one():
    """A deep stack with one wide layer, whose weights are small, at the sparsity that leaves a few weights a layer."""
    model = stack([16, 16, 16, 256, 16, 16, 16, 16])
    weights = prunable_weights(model)
    total = sum(weight.numel() for weight in weights.values())
    sparsity = 1 - 40 / total
    data, loss = [torch.randn(32, 16)], lambda model, batch: model(batch).square().sum()
    snip = snip_scores(model, weights, data, loss=loss)
    assert 0 in kept_by_layer({name: magnitude(weight) for name, weight in weights.items()}, sparsity)
    assert 0 in kept_by_layer(snip, sparsity)
    found = kept_by_layer(synflow_scores(model, weights, sparsity=sparsity), sparsity)
    assert 0 not in found and sum(found) == 40
    # the rounds are what does it: scored once, the wide layers' weights are all too small
    assert 0 in kept_by_layer(synflow_scores(model, weights), sparsity)


def test_what_cannot_be_made_linear_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), Gated())
    with pytest.raises(ValueError, match="Sequential must be of degree 1 .* SynFlow knows this library's models"):
        synflow_scores(model, prunable_weights(model))
    # its norm, a function, makes 0 of equal numbers
    unknown = toy((2, 1, 3))
    with pytest.raises(ValueError, match="got none in 'attention.0.q.weight': SynFlow knows"):
        synflow_scores(unknown, prunable_weights(unknown))
    branch = nn.Sequential(nn.Linear(3, 3), Unused())
    with pytest.raises(ValueError, match="got none in '1.idle.weight'.* weights= leaves it out"):
        synflow_scores(branch, prunable_weights(branch))
    with pytest.raises(ValueError, match="no embedding and no linear layer: pass example="):
        synflow_scores(nn.Conv1d(2, 2, 1), {})
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        synflow_scores(branch, {"0.weight": branch[0].weight}, sparsity=0.5, rounds=0)
    with pytest.raises(ValueError, match="weights must be parameters of the model, got 'w'"):
        synflow_scores(branch, {"w": nn.Linear(3, 3).weight})


class Gated(nn.Module):
    def forward(self, x):
        return x.sigmoid() * x


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return x


def test_an_example_gives_the_shape():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    scores = synflow_scores(model, prunable_weights(model), example=torch.zeros(1, 2, 6))
    assert scores["3.weight"].shape == (2, 12) and (scores["3.weight"] > 0).all()
    lm = build("dense", layers=1)
    close(synflow_scores(lm, prunable_weights(lm), example=ids(1, 2))["layers.0.attention.query.weight"],
          synflow_scores(lm, prunable_weights(lm))["layers.0.attention.query.weight"])  # fmt: skip
