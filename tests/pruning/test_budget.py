"""A budget is met with the fewest units: against a scan over all counts, and with a clock that tells what it should."""

import copy
import weakref

import pytest
import torch

from pruning import (
    count_parameters,
    head_importance,
    magnitude_importance,
    neuron_importance,
    prunable_axes,
    random_importance,
    shrink,
)
from pruning.budget import prune_to_budget
from pruning.selection import select_units
from tests.pruning.adapters.models import peer
from tests.pruning.test_merge import ids, own
from tests.pruning.toy import tokens, toy
from transformer import DenseConfig, MoEConfig


def scores_of(model, kinds=("head", "neuron")):
    axes = {kind: [axis for axis in model.prunable_axes() if axis.kind == kind] for kind in kinds}
    return {kind: magnitude_importance(model, found) for kind, found in axes.items()}


def scanned(model, scores, cost, asked):
    """Removed units of each kind: the first of all counts, in order of the share lost, that costs at most `asked`."""
    axes = {kind: [axis for axis in model.prunable_axes() if axis.kind == kind] for kind in scores}
    sizes = {kind: sum(axis.size for axis in found) for kind, found in axes.items()}
    steps = [dict.fromkeys(sizes, 0)]
    for _, kind in sorted((unit / size, kind) for kind, size in sizes.items() for unit in range(1, size + 1)):
        steps.append(steps[-1] | {kind: steps[-1][kind] + 1})
    whole = cost(model)
    for counts in steps:
        other, kept = copy.deepcopy(model), {}
        for kind, count in counts.items():
            kept |= select_units(scores[kind], axes[kind], count=count, min_units=1)
        shrink(other, [axis for axis in other.prunable_axes() if axis.kind in scores], kept)
        if cost(other) <= asked * whole:
            return kept, other
    raise AssertionError("no count meets the budget")


def same_weights(model, other):
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(name == also and a.equal(b) for (name, a), (also, b) in pairs)


@pytest.mark.parametrize("asked", [0.95, 0.7, 0.52])
@pytest.mark.parametrize("kinds", [("neuron",), ("head", "neuron")])
def test_parameters_are_met_with_the_fewest_units(kinds, asked):
    model = toy((4, 4, 9), (2, 2, 14))
    scores = scores_of(model, kinds)
    if asked < 0.6 and kinds == ("neuron",):
        asked = 0.75
    kept, expected = scanned(model, scores, lambda m: count_parameters(m)[0], asked)
    report = prune_to_budget(model, scores, params=asked)
    assert {name: list(units) for name, units in report.kept.items()} == kept and same_weights(model, expected)
    assert report.achieved == report.parameters_after / report.parameters_before <= asked
    assert report.parameters_after == count_parameters(model)[0] and report.steps < 12
    assert str(report).startswith(f"params {report.achieved:.2%} of the dense model's (asked {asked:.2%}), without")


@pytest.mark.parametrize("feedforward", [DenseConfig(hidden=20), DenseConfig(hidden=20, activation="gelu")])
def test_flops_are_the_models_own(tmp_path, feedforward):
    model = own(feedforward)
    scores = scores_of(model, ("neuron",))
    _, expected = scanned(model, scores, lambda m: m.flops_per_token(16), 0.8)
    before = model.flops_per_token(16)
    report = prune_to_budget(model, scores, flops=0.8, length=16)
    assert report.achieved == model.flops_per_token(16) / before <= 0.8 and same_weights(model, expected)
    assert model(ids()).logits.isfinite().all()


def test_grouped_heads_and_neurons_meet_the_budget():
    model = own(DenseConfig(hidden=20))
    scores = {"head": head_importance(model, [ids()]), "neuron": neuron_importance(model, [ids()])}
    report = prune_to_budget(model, scores, params=0.7)
    assert 0.5 < report.achieved <= 0.7 and report.removed["head"] and report.removed["neuron"]
    assert report.total == {"head": 8, "neuron": 40}
    assert model(ids()).logits.isfinite().all()


def test_whole_layers_go_with_neurons():
    model = own(DenseConfig(hidden=20))
    scores = {"layer": {"layers": torch.tensor([1.0, 0.0])}, **scores_of(model, ("neuron",))}
    report = prune_to_budget(model, scores, params=0.6)
    assert len(model.layers) == 1 and report.achieved <= 0.6 and model(ids()).logits.isfinite().all()


def test_experts_meet_a_budget():
    model = own(MoEConfig(hidden=8, num_experts=6, k=2))
    report = prune_to_budget(model, scores_of(model, ("expert",)), params=0.6)
    assert report.achieved <= 0.6 and all(layer.feedforward.num_experts >= 2 for layer in model.config.layers)


def test_hugging_face_flops_count_the_linears():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    neurons = [axis for axis in prunable_axes(model) if axis.kind == "neuron"]

    def linears():
        return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))

    before = linears()
    with pytest.warns(UserWarning):
        report = prune_to_budget(model, {"neuron": magnitude_importance(model, neurons)}, flops=0.73)
    assert report.achieved == linears() / before <= 0.73
    # one neuron more would be 3 · 16 weights
    assert (linears() + 48) / before > 0.73 and model(ids()).logits.isfinite().all()


class Clock:
    """Time passes with the parameters that run: a second each, and a fixed part that nothing removes."""

    def __init__(self, fixed=0.0):
        self.now, self.fixed = 0.0, fixed

    def __call__(self):
        return self.now

    def run(self, model):
        self.now += self.fixed + count_parameters(model)[0]


def test_latency_is_bisected_to_its_resolution():
    model, clock = toy((4, 4, 64)), Clock()
    scores, before = scores_of(model, ("neuron",)), count_parameters(model)[0]
    report = prune_to_budget(model, scores, latency=0.6, run=clock.run, clock=clock, resolution=1 / 32, rounds=2)
    assert report.budget == "latency" and report.achieved == count_parameters(model)[0] / before <= 0.6
    # a step of the grid is two neurons, 26 parameters each
    assert report.achieved > 0.6 - 2 * 26 / before and report.steps <= 2 * 7
    assert model(tokens()).isfinite().all()


class Disturbed(Clock):
    """A clock that some runs hold up a hundredfold."""

    def __init__(self, held_up):
        super().__init__()
        self.runs, self.held_up = 0, held_up

    def run(self, model):
        before = self.now
        super().run(model)
        self.runs += 1
        self.now += 99 * (self.now - before) if self.runs in self.held_up else 0


@pytest.mark.parametrize("first", range(3, 15, 4))
def test_one_disturbed_look_does_not_decide(first):
    """All runs of one look at a smaller model are slow: the first bisection goes wrong, the others set it right."""
    undisturbed, model = toy((4, 4, 64)), toy((4, 4, 64))
    options = {"latency": 0.6, "resolution": 1 / 32, "rounds": 1}
    clock, disturbed = Clock(), Disturbed({first})
    wanted = prune_to_budget(undisturbed, scores_of(model, ("neuron",)), run=clock.run, clock=clock, **options)
    found = prune_to_budget(model, scores_of(model, ("neuron",)), run=disturbed.run, clock=disturbed, **options)
    assert abs(found.removed["neuron"] - wanted.removed["neuron"]) <= 2
    assert found.quartiles[0] <= found.achieved <= found.quartiles[1]
    assert "quartiles" in str(found)


class Cold(Clock):
    """The first run of each model takes a hundredfold."""

    def __init__(self):
        super().__init__()
        self.warm = weakref.WeakSet()

    def run(self, model):
        self.now += count_parameters(model)[0] * (1 if model in self.warm else 100)
        self.warm.add(model)


class Hasty(Clock):
    """Two of five runs of a smaller model take a tenth."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.runs = whole, 0

    def run(self, model):
        size = count_parameters(model)[0]
        self.runs += size < self.whole
        # the sixth run of each look is the first, which only warms up
        self.now += size * (0.1 if size < self.whole and self.runs % 6 in (2, 4) else 1)


@pytest.mark.parametrize(("clock", "rounds"), [("cold", 1), ("hasty", 5)])
def test_first_runs_and_hasty_ones_have_no_part(clock, rounds):
    model, plain = toy((4, 4, 64)), toy((4, 4, 64))
    before, steady = count_parameters(model)[0], Clock()
    clock = Cold() if clock == "cold" else Hasty(before)
    options = {"latency": 0.6, "resolution": 1 / 32, "rounds": rounds}
    wanted = prune_to_budget(plain, scores_of(model, ("neuron",)), run=steady.run, clock=steady, **options)
    found = prune_to_budget(model, scores_of(model, ("neuron",)), run=clock.run, clock=clock, **options)
    assert found.removed == wanted.removed and found.steps == wanted.steps
    assert found.achieved == count_parameters(model)[0] / before


def flops_by_hand(model):
    """2 · the weights that a token meets: all matrices, of stacked experts k of E."""
    return 2 * sum(
        (model.config.num_experts_per_tok / len(p) if p.ndim == 3 else 1) * p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and "embed" not in name and "wte" not in name and "wpe" not in name
    ) + 2 * (model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0)


@pytest.mark.parametrize(("name", "kind"), [("GPT2", "neuron"), ("Mixtral", "head"), ("Olmoe", "layer")])
def test_flops_of_transformers_models_count_all_that_a_token_meets(name, kind):
    model = peer(name)
    whole = flops_by_hand(model)
    axes = [axis for axis in prunable_axes(model) if axis.kind == kind]
    scores = random_importance(axes)
    report = prune_to_budget(model, {kind: scores}, flops=0.9)
    assert report.achieved == pytest.approx(flops_by_hand(model) / whole)
    assert report.achieved <= 0.9


def test_experts_that_go_save_a_token_only_their_rows_of_the_router():
    model = peer("Mixtral")
    axes = [axis for axis in prunable_axes(model) if axis.kind == "expert"]
    with pytest.raises(ValueError, match="flops must be at least 0.9.*, all that may be removed, got 0.7"):
        prune_to_budget(model, {"expert": random_importance(axes)}, flops=0.7)


def test_time_that_nothing_removes_is_said():
    model, clock = toy((2, 2, 8)), Clock(fixed=1e6)
    with pytest.raises(ValueError, match="latency must be at least 0.99.., all that may be removed, got 0.6"):
        prune_to_budget(model, scores_of(model, ("neuron",)), latency=0.6, run=clock.run, clock=clock)
    assert model.feedforward[0].down.in_features == 8


class Floored(Clock):
    """A smaller model takes at best 0.62 of the whole one's time, the smallest in turn 0.65 and 0.59."""

    def __init__(self, whole, least):
        super().__init__()
        self.whole, self.least, self.runs = whole, least, 0

    def run(self, model):
        size = count_parameters(model)[0]
        self.runs += size == self.least
        # every other run of a model only warms up
        shares = {self.whole: 1.0, self.least: 0.59 if self.runs % 4 == 0 else 0.65}
        self.now += shares.get(size, 0.62)


def test_lucky_looks_at_the_smallest_model_are_not_called_a_met_budget():
    """Every bisection sees 0.65, then 0.59; the median of all looks is 0.62."""
    model = toy((4, 4, 64))
    before, whole = copy.deepcopy(model.state_dict()), count_parameters(model)[0]
    clock = Floored(whole, whole - 63 * 26)  # 26 parameters a neuron, one of which stays
    options = {"latency": 0.6, "run": clock.run, "clock": clock, "rounds": 1, "resolution": 1 / 32}
    with pytest.raises(ValueError, match="latency must be at least 0.62.., all that may be removed, got 0.6$"):
        prune_to_budget(model, scores_of(model, ("neuron",)), **options)
    assert clock.runs == 8 and all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of params, flops, latency must be given, got none"),
        ({"params": 0.5, "flops": 0.5}, "exactly one of params, flops, latency must be given, got params, flops"),
        ({"params": 1.0}, "params must be in \\(0, 1\\), a share of what the model takes now, got 1.0"),
        ({"flops": 0.0}, "flops must be in \\(0, 1\\)"),
        ({"latency": 0.5}, "latency is measured: run must be a function of the model, got None"),
        ({"params": 0.1}, "params must be at least 0\\.\\d+, all that may be removed, got 0.1"),
        ({"params": 0.5, "rounds": 0}, "rounds must be >= 1 and resolution in \\(0, 1\\), got 0"),
    ],
)
def test_bad_budgets_change_nothing(options, message):
    model = toy((2, 1, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_to_budget(model, scores_of(model), **options)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_bad_scores_are_refused():
    model = toy((2, 1, 6))
    with pytest.raises(ValueError, match="must name at least one kind, got none"):
        prune_to_budget(model, {}, params=0.5)
    with pytest.raises(ValueError, match="must have axes of kind 'expert'"):
        prune_to_budget(model, {"expert": {}}, params=0.5)
    with pytest.raises(ValueError, match=r"scores of 'feedforward.0.neurons' must have shape \[6\], got \[5\]"):
        prune_to_budget(model, {"neuron": {"feedforward.0.neurons": torch.ones(5)}}, params=0.5)
