"""Whole experts and whole layers pruned: the smaller model is what is left of the larger one."""

import pytest
import torch

from moe import MoE
from pruning import (
    expert_importance,
    layer_importance,
    prunable_axes,
    prune_experts,
    prune_layers,
    random_importance,
)
from tests.tolerances import close
from transformer import AttentionConfig, DenseConfig, LayerConfig, MoEConfig, Transformer, TransformerConfig, generate

KINDS = {
    "top_k": MoEConfig(12, 6, k=2),
    "switch": MoEConfig(12, 6, k=1, router="switch"),
    "noisy": MoEConfig(12, 6, k=2, router="noisy_top_k"),
    "sigmoid": MoEConfig(12, 6, k=2, router="sigmoid", shared_hidden=4),
    "groups": MoEConfig(12, 6, k=2, router="sigmoid", num_groups=3, top_groups=2),
    "sinkhorn": MoEConfig(12, 6, k=2, router="sinkhorn"),
    "top_2": MoEConfig(12, 6, k=2, router="top_2"),
    "biases": MoEConfig(12, 6, k=2, shared_hidden=4, activation="relu", expert_bias=True),
}


def build(feedforward=KINDS["top_k"], *, layers=3) -> Transformer:
    torch.manual_seed(0)
    attention = AttentionConfig(2, 2, 8)
    model = Transformer(TransformerConfig(40, 16, (LayerConfig(attention, feedforward),) * layers, max_length=32))
    for name, parameter in model.named_parameters():
        if name.endswith(("up_bias", "down_bias")):
            torch.nn.init.normal_(parameter)
    return model.eval()


def ids(batch=3, length=9):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


def axes_of(model, kind):
    return [axis for axis in prunable_axes(model) if axis.kind == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_computes_as_before_among_itself(kind, tmp_path):
    model = build(KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = prune_experts(model, random_importance(axes_of(model, "expert")), fraction=0.34)
    assert report.parameters_after == report.parameters_predicted < report.parameters_before
    for index, layer in enumerate(model.layers):
        kept = list(report.kept[f"layers.{index}.feedforward.experts"])
        experts, where = layer.feedforward.experts, f"layers.{index}.feedforward"
        assert experts.num_experts == len(kept) == model.config.layers[index].feedforward.num_experts
        for name, tensor in experts.state_dict().items():
            assert tensor.equal(before[f"{where}.experts.{name}"][kept])
        for name, tensor in layer.feedforward.router.state_dict().items():
            assert tensor.equal(before[f"{where}.router.{name}"][kept])
    logits = model(ids()).logits
    model.save_pretrained(tmp_path)
    close(Transformer.from_pretrained(tmp_path)(ids()).logits, logits)
    assert generate(model, ids(1, 3), max_new_tokens=3).shape == (1, 6)
    model.train()(ids(), labels=ids()).loss.backward()


def test_the_softmax_is_over_the_experts_that_stay():
    model = build(layers=1)
    layer: MoE = model.layers[0].feedforward
    x = torch.randn(20, 16)
    logits = x @ layer.router.weight.T
    kept = [0, 2, 5]
    probabilities = logits[:, kept].softmax(-1)
    wanted = torch.zeros_like(x)
    for t in range(20):
        best = probabilities[t].topk(2)
        gates = best.values / best.values.sum()
        for gate, place in zip(gates, best.indices, strict=True):
            wanted[t] += gate * layer.experts.forward_one(kept[place], x[t : t + 1])[0]
    scores = {"layers.0.feedforward.experts": torch.tensor([9.0, 0, 9, 1, 2, 9])}
    prune_experts(model, scores, fraction=0.5)
    close(layer(x)[0], wanted)


def test_as_many_experts_stay_as_a_token_needs():
    model = build(MoEConfig(12, 6, k=4))
    report = prune_experts(model, random_importance(axes_of(model, "expert")), fraction=0.9)
    assert [len(kept) for kept in report.kept.values()] == [4, 4, 4]
    assert report.achieved == pytest.approx(1 / 3)


def test_a_hash_router_has_no_part_for_each_expert():
    model = build(MoEConfig(12, 6, k=1, router="hash"))
    assert not axes_of(model, "expert")
    with pytest.raises(ValueError, match="must have axes of kind 'expert'"):
        prune_experts(model, {}, fraction=0.5)


def test_scores_of_experts_by_hand():
    model = build(layers=1)
    layer: MoE = model.layers[0].feedforward
    seen = []
    handle = layer.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output[1])))
    model(ids())
    handle.remove()
    x, routing = seen[0][0].flatten(0, 1), seen[0][1]
    counts, sums = [0.0] * 6, [0.0] * 6
    for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True):
        counts[expert] += 1
        sums[expert] += float((weight * layer.experts.forward_one(int(expert), x[token : token + 1]).norm()).detach())
    name = "layers.0.feedforward.experts"
    close(expert_importance(model, [ids()], method="frequency")[name], torch.tensor(counts).double() / sum(counts))
    means = torch.tensor([s / max(c, 1) for s, c in zip(sums, counts, strict=True)]).double()
    close(expert_importance(model, [ids()])[name], means, torch.float32)


def test_layers_go_and_the_rest_run_on(tmp_path):
    model = build()
    blocks = list(model.layers)
    scores = {"layers": torch.tensor([2.0, 1.0, 3.0])}
    report = prune_layers(model, scores, fraction=0.34)
    assert report.kept["layers"] == (0, 2) and report.parameters_after == report.parameters_predicted
    assert list(model.layers) == [blocks[0], blocks[2]] and len(model.config.layers) == 2
    assert model.layers[1].feedforward.name == "layers.1.feedforward"
    logits = model(ids()).logits
    model.save_pretrained(tmp_path)
    close(Transformer.from_pretrained(tmp_path)(ids()).logits, logits)
    assert generate(model, ids(1, 3), max_new_tokens=3).shape == (1, 6)


def test_one_layer_stays():
    model = build(DenseConfig(8))
    prune_layers(model, {"layers": torch.ones(3)}, fraction=0.99)
    assert len(model.layers) == 1


def test_a_layer_that_does_nothing_has_no_influence():
    model = build(DenseConfig(8))
    with torch.no_grad():
        for weight in (model.layers[1].attention.output.weight, model.layers[1].feedforward.down.weight):
            weight.zero_()
    scores = layer_importance(model, [ids()])["layers"]
    assert scores.argmin() == 1 and abs(scores[1]) < 1e-9


def test_influence_by_hand_without_padding():
    model = build(DenseConfig(8), layers=1)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = False
    before = model.embedding(ids())
    after = []
    handle = model.layers[0].register_forward_hook(lambda _, arguments, output: after.append(output[0]))
    model(ids(), attention_mask=mask)
    handle.remove()
    cosines = [
        float(before[b, t] @ after[0][b, t] / before[b, t].norm() / after[0][b, t].norm())
        for b in range(3)
        for t in range(9)
        if mask[b, t]
    ]
    found = layer_importance(model, [{"input_ids": ids(), "attention_mask": mask}])["layers"]
    close(found, torch.tensor([1 - sum(cosines) / len(cosines)]).double(), torch.float32)
