"""Neurons inside stacked experts: what is cut against columns set to zero, scores against loops, choices by hand."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import (
    Axis,
    Slice,
    activation_importance,
    expert_neuron_importance,
    gate_importance,
    leave_one_out,
    load_pruned,
    magnitude_importance,
    prunable_axes,
    prune_expert_neurons,
    prune_to_budget,
    random_importance,
    select_units,
    shrink,
)
from pruning.gates import masked
from pruning.learned import L0Units, UnitGates
from pruning.saliency.experts import expert_importance
from pruning.selection import completed
from tests.pruning.adapters.models import MIXTURES, ids, peer
from tests.tolerances import close
from transformer import MoEConfig, Transformer, TransformerConfig

EVERY = ("own", *MIXTURES)


def make(name, **options):
    if name != "own":
        return peer(name, **options)
    torch.manual_seed(0)
    feedforward = MoEConfig(hidden=10, num_experts=4, k=2, shared_hidden=6, **options)
    model = Transformer(
        TransformerConfig.uniform(
            vocab_size=31, dim=24, num_layers=2, num_heads=4, max_length=16, feedforward=feedforward
        )
    ).eval()
    for key, parameter in model.named_parameters():
        if key.endswith(("up_bias", "down_bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def neurons(model):
    return [axis for axis in prunable_axes(model) if axis.kind == "expert_neuron"]


def down_of(model, axis):
    return model.get_parameter(f"{axis.gate}.{'down' if isinstance(model, Transformer) else 'down_proj'}")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def without(model, report):
    """A copy in which the columns that read the removed neurons are zero."""
    other = copy.deepcopy(model)
    for axis in neurons(model):
        down = down_of(other, axis)
        for unit in report.removed[axis.name]:
            down.data[unit // axis.group_size, :, unit % axis.group_size] = 0
    return other


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_each_expert_loses_its_own_and_the_result_is_the_model_with_zero_columns(name, layerwise):
    model, tokens = make(name), ids()
    before = copy.deepcopy(model)
    report = prune_expert_neurons(model, expert_neuron_importance(model, [tokens]), fraction=0.4, layerwise=layerwise)
    close(logits(model, tokens), logits(without(before, report), tokens))
    with masked(before, neurons(before), report.kept):
        close(logits(before, tokens), logits(model, tokens))
    assert (logits(before, tokens) - logits(model, tokens)).abs().max() > 1e-3
    for axis in neurons(before):
        rows = [[u % axis.group_size for u in report.kept[axis.name] if u // axis.group_size == e]
                for e in range(axis.groups)]  # fmt: skip
        assert len({len(row) for row in rows}) == 1
        assert axis.groups == 1 or len({tuple(row) for row in rows}) > 1
        assert down_of(model, axis).shape[2] == len(rows[0])
    assert report.parameters_predicted == report.parameters_after < report.parameters_before
    assert report.achieved <= 0.4


@pytest.mark.parametrize(("activation", "bias"), [("gelu", False), ("relu2", False), ("relu", True), ("swiglu", True)])
def test_experts_without_a_gate_or_with_biases(activation, bias, tmp_path):
    model, tokens = make("own", activation=activation, expert_bias=bias), ids()
    before = copy.deepcopy(model)
    report = prune_expert_neurons(model, fraction=0.3)
    close(logits(model, tokens), logits(without(before, report), tokens))
    assert (logits(before, tokens) - logits(model, tokens)).abs().max() > 1e-3
    assert report.parameters_predicted == report.parameters_after < report.parameters_before
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    assert logits(again, tokens).equal(logits(model, tokens))


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_what_a_neuron_adds(name):
    model, tokens = make(name), ids(2, 5)
    scores = expert_neuron_importance(model, [tokens[:1], tokens[1:]])
    calls = {}
    for axis in neurons(model):
        stack = model.get_submodule(axis.gate)
        if axis.gate.endswith(".shared"):
            continue
        stack.register_forward_pre_hook(lambda _, args, name=axis.name: calls.__setitem__(name, args))
    logits(model, tokens)
    for axis in neurons(model):
        if axis.name not in calls:
            continue
        stack, (rows, *rest) = model.get_submodule(axis.gate), calls[axis.name]
        expected = torch.zeros(axis.groups, axis.group_size, dtype=torch.float64)
        if name == "own":
            chosen = list(zip(rest[0].token.tolist(), rest[0].expert.tolist(), rest[0].weight.tolist(), strict=True))
        else:
            chosen = [(t, int(rest[0][t, k]), float(rest[1][t, k])) for t in range(10) for k in range(2)]
        for token, expert, weight in chosen:
            up = stack.up[expert].mT if name == "own" else stack.gate_up_proj[expert]
            gate, value = (up @ rows[token]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * value
            norms = down_of(model, axis)[expert].norm(dim=0)
            expected[expert] += (weight * hidden.abs() * norms).detach().double() / 10
        close(scores[axis.name].view_as(expected), expected, dtype=torch.float32)


def test_a_shared_expert_counts_every_real_token():
    model, tokens = make("own"), ids(2, 6)
    mask = torch.ones_like(tokens).bool()
    mask[0, 4:] = False
    padded = expert_neuron_importance(model, [{"input_ids": tokens, "attention_mask": mask}])
    axis = next(axis for axis in neurons(model) if "shared" in axis.name)
    seen = []
    shared = model.layers[0].feedforward.shared
    original = shared.forward_one
    shared.forward_one = lambda e, rows: (seen.append(rows), original(e, rows))[1]
    model(tokens, attention_mask=mask)
    hidden = shared.hidden_one(0, seen[0][mask.flatten()])
    close(padded[axis.name].float(), (hidden.abs().mean(0) * shared.down[0].norm(dim=0)).detach())


@pytest.mark.parametrize("name", EVERY)
def test_gate_gradients_are_slopes_of_the_loss(name):
    """abs of the derivative by each sample, against differences in float64."""
    model, tokens = make(name).double(), ids(2, 5)
    if name != "own":
        model.set_experts_implementation("eager")  # grouped products know no float64
    axes = neurons(model)
    scores = gate_importance(model, [tokens], axes=axes)

    def loss(sample):
        found = logits(model, sample)[0, :-1]
        return torch.nn.functional.cross_entropy(found, sample[0, 1:]).item()

    # transformers takes its router's softmax in float32
    axis, step, near = axes[-1], *((1e-5, 1e-4) if name == "own" else (1e-2, 1e-2))
    for unit in range(0, axis.size, 7):
        column = down_of(model, axis).data[unit // axis.group_size, :, unit % axis.group_size]
        slopes, kept = [], column.clone()
        for sample in tokens[:, None]:
            column.copy_(kept * (1 + step))
            above = loss(sample)
            column.copy_(kept * (1 - step))
            slopes.append((above - loss(sample)) / (2 * step))
            column.copy_(kept)
        assert float(scores[axis.name][unit]) == pytest.approx(sum(map(abs, slopes)) / 2, rel=near, abs=2e-5)


def test_magnitude_and_leave_one_out_know_the_units():
    model, tokens = make("own"), ids(1, 6)
    axis = neurons(model)[0]
    stack = model.get_submodule(axis.gate)
    unit = 2 * axis.group_size + 3
    squares = stack.up[2][:, 3].square().sum() + stack.up[2][:, 13].square().sum() + stack.down[2][:, 3].square().sum()
    assert float(magnitude_importance(model, [axis])[axis.name][unit]) == pytest.approx(squares.sqrt().item())
    rises = leave_one_out(model, [tokens], axes=[axis])[axis.name]
    whole = torch.nn.functional.cross_entropy(logits(model, tokens)[0, :-1], tokens[0, 1:])
    stack.down.data[2, :, 3] = 0
    less = torch.nn.functional.cross_entropy(logits(model, tokens)[0, :-1], tokens[0, 1:])
    assert float(rises[unit]) == pytest.approx((less - whole).item(), abs=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_folders_of_equal_layers_load_in_stock_transformers(name, tmp_path):
    model, tokens = peer(name), ids()
    prune_expert_neurons(model, fraction=0.5, layerwise=True)
    assert model.config.intermediate_size == 16
    model.save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("name", EVERY)
def test_folders_of_unequal_layers_load_here(name, tmp_path):
    model, tokens = make(name), ids()
    axis = neurons(model)[0]
    kept = [e * axis.group_size + f for e in range(axis.groups) for f in range(8)]
    with pytest.warns(UserWarning, match="differ in size") if name != "own" else torch.no_grad():
        shrink(model, [axis], {axis.name: kept})
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path) if name == "own" else load_pruned(tmp_path)
    close(logits(again.eval(), tokens), logits(model, tokens))


@pytest.mark.parametrize("name", EVERY)
def test_experts_and_neurons_of_those_that_stay_go_in_one_cut(name):
    model, tokens = make(name), ids()
    axes = [axis for axis in prunable_axes(model) if axis.kind in ("expert", "expert_neuron")]
    one, apart = copy.deepcopy(model), copy.deepcopy(model)
    inside = next(axis for axis in axes if axis.kind == "expert_neuron")
    whole = next(axis for axis in axes if axis.kind == "expert" and axis.layer == inside.layer)
    units = [e * inside.group_size + f for e in range(inside.groups) for f in range(e % 2, e % 2 + 8)]
    experts = [e for e in range(whole.size) if e != 1]
    shrink(one, axes, {inside.name: units, whole.name: experts})
    shrink(apart, axes, {inside.name: units})
    shrink(apart, prunable_axes(apart), {whole.name: experts})
    close(logits(one, tokens), logits(apart, tokens))


@pytest.mark.parametrize("name", EVERY)
def test_budgets_take_experts_and_their_neurons(name):
    model, tokens = make(name), ids()
    scores = {
        "expert": expert_importance(model, [tokens]),
        "expert_neuron": expert_neuron_importance(model, [tokens]),
    }
    report = prune_to_budget(model, scores, params=0.8)
    assert sum(p.numel() for p in model.parameters()) <= 0.8 * report.parameters_before
    assert "expert neurons" in str(report)
    assert report.removed["expert_neuron"] > 0
    assert torch.isfinite(logits(model, tokens)).all()


def test_flops_of_fewer_neurons_are_counted():
    model = make("Mixtral")
    before = prune_to_budget(copy.deepcopy(model), {"expert_neuron": magnitude_importance(model, neurons(model))},
                             flops=0.8, length=7)  # fmt: skip
    assert before.achieved <= 0.8


def test_an_order_of_parameters_survives_gates_and_errors():
    model = make("own")
    names, held = [n for n, _ in model.named_parameters()], dict(model.named_parameters())
    axis = neurons(model)[0]
    with pytest.raises(RuntimeError, match="inside"), masked(model, [axis], {axis.name: list(range(0, axis.size, 2))}):
        raise RuntimeError("inside")
    assert [n for n, _ in model.named_parameters()] == names
    assert all(held[n] is p for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["own", "Mixtral"])
def test_learned_gates_end_in_surgery(name):
    model, tokens = make(name), ids()
    method = UnitGates(model, sparsity=0.3, kinds=("neuron",))
    with torch.no_grad():
        for index, gate in enumerate(method.named_gates().values()):
            gate.add_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(index)))
    kept = method.kept()
    assert set(kept) == {axis.name for axis in neurons(model)}
    method.finish()
    before = logits(model, tokens)
    shrink(model, neurons(model), kept)
    close(logits(model, tokens), before)
    assert {group.name for group in L0Units(make(name), kinds=("expert_neuron",)).groups.values()} == set(kept)


def test_what_cannot_be_is_refused():
    model = make("own")
    axis = neurons(model)[0]
    with pytest.raises(ValueError, match="must keep equally many units, got \\[10, 9, 10, 10\\]"):
        shrink(model, [axis], {axis.name: [u for u in range(40) if u != 12]})
    with pytest.raises(ValueError, match="must keep at least 4 units, got 0"):
        shrink(model, [axis], {axis.name: []})
    with pytest.raises(ValueError, match="must keep at least one unit, got \\[5, 5, 0, 0\\]"):
        shrink(model, [axis], {axis.name: [*range(5), *range(10, 15)]})
    with pytest.raises(ValueError, match="inside stacked experts"):
        activation_importance(model, [ids()], axes=[axis])
    with pytest.raises(ValueError, match="shape \\[40\\], got \\[4, 10\\]"):
        prune_expert_neurons(model, {a.name: torch.zeros(a.groups, a.group_size) for a in neurons(model)}, fraction=0.5)
    heads = [a for a in prunable_axes(model) if a.kind == "head"]
    with pytest.raises(ValueError, match="stacked axes are chosen apart"):
        select_units(random_importance([axis, *heads]), [axis, *heads], count=3)
    with pytest.raises(ValueError, match="units of width 1"):
        Axis("expert_neuron", 0, "x", 4, 2, "x", (Slice("x", 2, 2),), lambda _: None, groups=2, stacked=True)
    dense = peer("Llama")
    with pytest.raises(ValueError, match="axes of kind 'expert_neuron'"):
        prune_expert_neurons(dense, fraction=0.5)
    with pytest.raises(ValueError, match="fraction must be in"):
        prune_expert_neurons(model, fraction=1.0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_cut_in_float32_runs_in_bfloat16(name, tmp_path):
    model, tokens = peer(name), ids()
    report = prune_expert_neurons(model, fraction=0.4, layerwise=True)
    assert {down_of(model, axis).shape[2] for axis in neurons(model)} == {16}
    assert report.achieved == pytest.approx(1 / 3)
    model.save_pretrained(tmp_path)
    for small in (type(model).from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16()):
        assert torch.isfinite(logits(small, tokens)).all()


def test_widths_that_grouped_products_refuse_run_one_by_one(tmp_path):
    model, tokens = peer("Mixtral"), ids()
    model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match="has 17 neurons in each expert now, no multiple of 8"):
        prune_expert_neurons(model, fraction=0.3, layerwise=True)
    model.save_pretrained(tmp_path)
    close(logits(load_pruned(tmp_path), tokens), logits(model, tokens))


def test_a_wish_below_one_step_is_said():
    for layerwise in (False, True):
        with pytest.warns(UserWarning, match="nothing was removed from .*the least that can go is 40 of 120"):
            prune_expert_neurons(peer("Mixtral"), fraction=0.1, layerwise=layerwise)


def test_closed_layers_keep_one_neuron_of_each_expert_or_a_step():
    axis = neurons(make("own"))[0]
    assert completed(axis, []) == [0, 10, 20, 30] and completed(axis, [11, 13]) == [0, 1, 11, 13, 20, 21, 30, 31]
    axis = neurons(peer("Mixtral"))[0]
    assert completed(axis, [3]) == [24 * e + f for e in range(5) for f in range(8)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 25), st.integers(0, 10**6))
def test_the_choice_is_the_best_of_all(groups, size, layers, count, seed):
    axes = [
        Axis("expert_neuron", i, f"a{i}", groups * size, 1, "g", (Slice("p", 2, 1),), lambda _: None, groups=groups,
             least=groups, stacked=True)
        for i in range(layers)
    ]  # fmt: skip
    scores = random_importance(axes, generator=torch.Generator().manual_seed(seed))
    kept = select_units(scores, axes, count=count)
    gone = sum(axis.size - len(kept[axis.name]) for axis in axes)
    lost = sum(float(scores[a.name].sum() - scores[a.name][kept[a.name]].sum()) for a in axes)
    best = None
    for left in itertools.product(range(1, size + 1), repeat=layers):
        removed = sum((size - n) * groups for n in left)
        if removed <= count:
            least = sum(
                float(scores[a.name].view(groups, size).sort(1).values[:, : size - n].sum())
                for a, n in zip(axes, left, strict=True)
            )
            best = min(best or (0, 0.0), (-removed, least))
    assert -gone == best[0]
    assert lost == pytest.approx(best[1], abs=1e-9)
