"""Heads, neurons, experts and layers of every architecture: what remains equals the model that leaves them out."""

import copy

import pytest
import torch

from pruning import (
    count_parameters,
    expert_importance,
    head_importance,
    layer_importance,
    neuron_importance,
    predict_parameters,
    prunable_axes,
    prune_experts,
    prune_heads,
    prune_layers,
    prune_neurons,
    random_importance,
    shrink,
)
from tests.pruning.adapters.models import DENSE, HEADS, KNOWN, LAYERS, MIXTURES, answer, ids, peer, silence
from tests.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")
# heads that stay in each layer: none, one of each group, one group
KEPT_HEADS = ([], [1, 3], [0, 1])
KEPT_NEURONS = ([0, 5, 23], [7], list(range(24)))
WITH_HEADS = [name for name, known in KNOWN.items() if known.heads]


def by_kind(model, kind):
    return [axis for axis in prunable_axes(model) if axis.kind == kind]


def silenced(model, known):
    for index, (heads, neurons) in enumerate(zip(KEPT_HEADS, KEPT_NEURONS, strict=True)):
        where = known.layer(index)
        if known.heads:
            silence(model, f"{where}.{known.output}", set(range(HEADS)) - set(heads), 6)
        if not known.experts:
            silence(model, f"{where}.{known.hidden}", set(range(24)) - set(neurons), 1)
    return model


def cut(model):
    """Heads and neurons together, in one surgery."""
    kept = {axis.name: KEPT_HEADS[axis.layer] for axis in by_kind(model, "head")}
    kept |= {axis.name: KEPT_NEURONS[axis.layer] for axis in by_kind(model, "neuron")}
    predicted = predict_parameters(model, prunable_axes(model), kept)
    shrink(model, prunable_axes(model), kept)
    assert count_parameters(model) == predicted
    return model


def caching(model, tokens):
    """Logits of all tokens, seen in three pieces through the cache."""
    cache, pieces = None, []
    for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        with torch.no_grad():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WITH_HEADS)
def test_shrunk_equals_silenced(name, attention):
    dense = peer(name, attention=attention)
    expected = answer(silenced(copy.deepcopy(dense), KNOWN[name]), ids())
    assert not torch.allclose(expected, answer(dense, ids()), atol=1e-2)
    model = cut(copy.deepcopy(dense))
    close(answer(model, ids()), expected)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    padded = answer(silenced(copy.deepcopy(dense), KNOWN[name]), ids(), attention_mask=mask)
    close(answer(model, ids(), attention_mask=mask)[1, 3:], padded[1, 3:])
    assert len(by_kind(model, "head")) == LAYERS - 1


@pytest.mark.parametrize("name", [name for name in WITH_HEADS if name != "Bert"])
def test_caches_work_where_layers_differ(name):
    model = cut(peer(name))
    close(caching(model, ids()), answer(model, ids()))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    written = model.generate(ids(), **options)
    assert model.generate(ids(), use_cache=False, **options).equal(written)
    for place in range(7, 12):
        assert answer(model, written[:, :place])[:, -1].argmax(-1).equal(written[:, place])


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_gradients_of_what_stays_are_those_of_the_silenced_model(name):
    dense = peer(name)
    whole, model = silenced(copy.deepcopy(dense), KNOWN[name]), cut(copy.deepcopy(dense))
    for one in (whole, model):
        one(ids()).logits.square().mean().backward()
    where = f"{KNOWN[name].layer(1)}.{KNOWN[name].output}.weight"
    rows = torch.tensor([*range(6, 12), *range(18, 24)])
    expected = whole.get_parameter(where).grad
    close(model.get_parameter(where).grad, expected[rows] if name == "GPT2" else expected[:, rows])
    fused = "transformer.h.1.attn.c_attn.weight" if name == "GPT2" else "model.layers.1.self_attn.q_proj.weight"
    expected = whole.get_parameter(fused).grad
    columns = torch.cat([rows, rows + 24, rows + 48])
    close(model.get_parameter(fused).grad, expected[:, columns] if name == "GPT2" else expected[rows])


@pytest.mark.parametrize("name", KNOWN)
def test_layers_go_whole(name):
    dense, known = peer(name), KNOWN[name]
    model, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    whole.get_submodule(known.layer(1)).forward = lambda hidden_states, *_, **__: hidden_states
    (axis,) = by_kind(model, "layer")
    predicted = predict_parameters(model, [axis], {axis.name: [0, 2]})
    shrink(model, [axis], {axis.name: [0, 2]})
    assert count_parameters(model) == predicted and model.config.num_hidden_layers == 2
    close(answer(model, ids()), answer(whole, ids()))
    if name != "Bert":
        close(caching(model, ids()), answer(model, ids()))
    scores = layer_importance(model, [ids()])
    assert prune_layers(model, scores, fraction=0.5).parameters_after < predicted[0]
    with pytest.raises(ValueError, match="must keep at least 1 units, got 0"):
        shrink(model, by_kind(model, "layer"), {axis.name: []})


def test_layers_keep_their_kind_of_attention():
    dense = peer("Qwen2")
    assert dense.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    model, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    whole.model.layers[0].forward = lambda hidden_states, *_, **__: hidden_states
    (axis,) = by_kind(model, "layer")
    shrink(model, [axis], {axis.name: [1, 2]})
    close(answer(model, ids()), answer(whole, ids()))
    close(caching(model, ids()), answer(model, ids()))


def mixture(block, kept, x, renormalize):
    """The layer token by token, over the experts that stay."""
    rows = x.flatten(0, 1).double()
    out = torch.zeros_like(rows)
    router, experts = block.gate.weight.double()[kept], block.experts
    for token, row in enumerate(rows):
        shares = (router @ row).softmax(0)
        best = shares.topk(2)
        weights = best.values / best.values.sum() if renormalize else best.values
        for weight, choice in zip(weights, best.indices, strict=True):
            gate, up = (experts.gate_up_proj[kept[choice]].double() @ row).chunk(2)
            out[token] += weight * (experts.down_proj[kept[choice]].double() @ (torch.nn.functional.silu(gate) * up))
    return out.view_as(x).to(x.dtype)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_go_with_their_router_rows(name):
    dense = peer(name)
    kept = ([0, 2, 4], [1, 3], [0, 1, 2, 3, 4])
    model, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    for index, units in enumerate(kept):
        block = whole.model.layers[index].mlp
        block.forward = lambda x, block=block, units=units: mixture(block, units, x, name == "Mixtral")
    axes = by_kind(model, "expert")
    names = {axis.name: kept[axis.layer] for axis in axes}
    predicted = predict_parameters(model, axes, names)
    shrink(model, axes, names)
    assert count_parameters(model) == predicted and [axis.least for axis in axes] == [2] * LAYERS
    close(answer(model, ids()), answer(whole, ids()))
    scores = expert_importance(model, [ids(), ids(2, 5, 3)])
    report = prune_experts(model, scores, fraction=0.8)
    assert [len(units) for units in report.kept.values()] == [2, 2, 2]
    assert model.config.num_local_experts == model.num_experts == 2
    assert not hasattr(model.config, "pruned_layers") and answer(model, ids()).isfinite().all()
    assert model(ids(), labels=ids(), output_router_logits=True).loss.isfinite()


@pytest.mark.parametrize("name", MIXTURES)
def test_expert_scores_are_counts_and_weighted_norms(name):
    model, seen = peer(name), []
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    counts, sums = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    frequency = expert_importance(model, [ids()], method="frequency")["model.layers.1.mlp.experts"]
    norms = expert_importance(model, [ids()])["model.layers.1.mlp.experts"]
    for row in seen[0].flatten(0, 1):
        best = (block.gate.weight @ row).softmax(0).topk(2)
        shares = best.values / best.values.sum() if name == "Mixtral" else best.values
        for share, expert in zip(shares, best.indices, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ row).chunk(2)
            counts[expert] += 1
            sums[expert] += share * (block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)).norm()
    close(frequency, counts / counts.sum())
    close(norms, sums / counts.clamp(min=1), torch.float32)


def squares(model, batch):
    """A loss for models that predict no next token: a sum over samples."""
    return answer_with_gradient(model, batch).square().sum()


def answer_with_gradient(model, batch):
    output = model(batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("name", KNOWN)
def test_importance_of_a_batch_is_the_mean_over_its_samples(name):
    model, known = peer(name), KNOWN[name]
    for wanted, score, prune in (
        (known.heads, head_importance, prune_heads), (not known.experts, neuron_importance, prune_neurons),
    ):  # fmt: skip
        if not wanted:
            continue
        both = score(model, [ids()], loss=squares, normalize=None)
        each = [score(model, [row[None]], loss=squares, normalize=None) for row in ids()]
        for axis in both:
            close(both[axis], torch.stack([one[axis] for one in each]).mean(0), torch.float32)
        report = prune(model, both, fraction=0.25)
        assert report.parameters_predicted == report.parameters_after < report.parameters_before
        assert report.achieved == 0.25 and answer(model, ids()).isfinite().all()


def test_a_model_without_a_next_token_asks_for_a_loss():
    for task in ("ForMaskedLM", "Model"):
        with pytest.raises(ValueError, match=f"needs a model that generates, got Bert{task}: pass loss="):
            head_importance(peer("Bert", task=task), [ids()])


@pytest.mark.parametrize(
    ("name", "task"),
    [("Llama", "Model"), ("Llama", "ForSequenceClassification"), ("Qwen2", "ForTokenClassification"), ("GPT2", "Model"),
     ("OPT", "Model"), ("OPT", "ForSequenceClassification"), ("Bert", "Model"), ("Bert", "ForSequenceClassification"),
     ("Mistral", "ForQuestionAnswering")],
)  # fmt: skip
def test_bare_models_and_other_tasks(name, task):
    dense = peer(name, task=task)
    known = KNOWN[name]
    prefix = "" if task == "Model" else f"{dense.base_model_prefix}."
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    silence(whole, f"{prefix}{known.layers}.0.{known.output}", {1, 2, 3}, 6)
    silence(whole, f"{prefix}{known.layers}.0.{known.hidden}", {0}, 1)
    axes = {axis.kind: axis for axis in reversed(prunable_axes(model)) if axis.layer == 0}
    kept = {axes["head"].name: [0], axes["neuron"].name: list(range(1, 24))}
    shrink(model, list(axes.values()), kept)
    with torch.no_grad():
        close(model(ids())[0], whole(ids())[0])


@pytest.mark.parametrize("name", KNOWN)
def test_axes_name_every_tensor(name):
    """What no axis names has nothing to do with heads, neurons, experts or the width."""
    model = peer(name)
    axes = prunable_axes(model)
    named = {piece.parameter for axis in axes for piece in axis.slices} | {n for axis in axes for n in axis.orphans}
    left = {parameter for parameter, _ in model.named_parameters() if parameter not in named}
    expected = {
        "Olmoe": {f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(3) for n in "qk"},
        "OPT": {"model.decoder.embed_tokens.weight"},
        "Bert": {"cls.predictions.bias"},
    }
    assert left == expected.get(name, set())


@pytest.mark.parametrize("name", DENSE)
def test_pruned_again_until_little_is_left(name):
    model, generator = peer(name), torch.Generator().manual_seed(3)
    for _ in range(3):
        for prune, kind in ((prune_heads, "head"), (prune_neurons, "neuron")):
            report = prune(model, random_importance(by_kind(model, kind), generator=generator), fraction=0.5)
            assert report.parameters_after == report.parameters_predicted
    assert answer(model, ids()).isfinite().all()


@pytest.mark.parametrize("name", DENSE)
def test_a_layer_may_lose_all_its_neurons_but_for_gpt2(name):
    dense = peer(name)
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    axis = by_kind(model, "neuron")[1]
    if name == "GPT2":
        with pytest.raises(ValueError, match="axis 'transformer.h.1.mlp.neurons' must keep at least 1 units, got 0"):
            shrink(model, [axis], {axis.name: []})
        assert answer(model, ids()).equal(answer(dense, ids()))
        return
    silence(whole, f"{KNOWN[name].layer(1)}.{KNOWN[name].hidden}", range(24), 1)
    shrink(model, [axis], {axis.name: []})
    close(answer(model, ids()), answer(whole, ids()))
    assert len(by_kind(model, "neuron")) == LAYERS - 1


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_finds_its_k_experts(name):
    model = peer(name)
    axis = by_kind(model, "expert")[0]
    with pytest.raises(ValueError, match="mlp.experts' must keep at least 2 units, got 1"):
        shrink(model, [axis], {axis.name: [3]})
