"""What NeST and pruning by the held-out loss cost: by their own records, against loops over the steps of a run."""

from pathlib import Path

import pytest
import torch

from pruning import prunable_weights, uniform
from pruning.diagnostics import recorded_run
from pruning.dynamic import Attack, NeST, RobustRewiring
from pruning.retraining import GeneralizationDriven
from tests.training.models import small_model, small_trainer
from training.config import RunConfig, from_dict
from training.study.cost import run_densities, sparse_cost
from training.trainer import Outcome

STEPS = 12


def density(method):
    """Share of the prunable weights whose connections are there, each at 0 or not."""
    kept = method.masks().kept.values()
    return sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)


def run_of(tmp_path, method, make, **sparsify):
    """(config, outcome, the density in the passes of each step, the method)."""
    trainer = small_trainer(
        tmp_path, model=small_model(experts=0), train={"steps": STEPS, "save_every": 100, "eval_every": 3}
    )
    found = make(trainer.model)
    trainer.sparsifiers, seen, step = (found,), [], trainer.train_step

    def watched():
        seen.append(density(found))
        return step()

    trainer.train_step = watched
    outcome = trainer.run()
    train = {"steps": STEPS, "batch": 4, "eval_every": 3}
    values = {"sparsify": {"method": method, "sparsity": 0.5, **sparsify}, "train": train, "data": {"length": 16}}
    return from_dict(RunConfig, values, where="test"), outcome, seen, found


def facts_of(model):
    weights = prunable_weights(model)
    count = sum(w.numel() for w in weights.values())
    return {
        "parameters": model.num_parameters(), "prunable_weights": count, "prunable_flops": 2 * count, "shares": {},
        "flops_per_token": model.flops_per_token(16),
    }  # fmt: skip


def test_pruning_by_the_held_out_loss_is_counted_as_it_came(tmp_path):
    def make(model):
        return GeneralizationDriven(model, sparsity=0.5, most=0.3, when="low")

    config, outcome, seen, method = run_of(tmp_path, "generalization", make)
    found = run_densities(config, outcome)
    assert len(set(seen)) > 2, "it pruned more than once"
    assert [found.forward(step) for step in range(STEPS)] == pytest.approx(seen)
    assert [found.gradient(step) for step in range(STEPS)] == pytest.approx(seen)
    facts = facts_of(method.model)
    other = facts["flops_per_token"] - facts["prunable_flops"]
    cost = sparse_cost(config, outcome, facts)["cost"]
    assert cost["training_flops"] == pytest.approx(sum(3 * 64 * (d * facts["prunable_flops"] + other) for d in seen))
    again = make(small_model(experts=0))
    again.load_state_dict(method.state_dict())
    assert again.history == method.history


def test_growth_and_pruning_of_nest_are_counted_as_they_came_dense_gradients_and_bridging_ones_too(tmp_path):
    def make(model):
        return NeST(model, sparsity=0.75, every=2, growths=2, prunings=2)

    config, outcome, seen, method = run_of(tmp_path, "nest", make, every=2, sparsity=0.75)
    found = run_densities(config, outcome)
    assert [found.forward(step) for step in range(STEPS)] == pytest.approx(seen, abs=1e-12)
    dense = [step for step in range(STEPS) if found.gradient(step) == 1]
    assert dense == [2, 4], "updates that grow, not those that prune"
    facts = facts_of(method.model)
    other, bridging = facts["flops_per_token"] - facts["prunable_flops"], method.bridging_flops()
    by_hand = 0.0
    for step, d in enumerate(seen):
        gradient = 1.0 if step in (2, 4) else d
        extra = bridging if step in (2, 4) else 0
        by_hand += 64 * ((2 * d + gradient) * facts["prunable_flops"] + 3 * other + extra)
    assert sparse_cost(config, outcome, facts)["cost"]["training_flops"] == pytest.approx(by_hand)
    again = make(small_model(experts=0))
    again.load_state_dict(method.state_dict())
    assert again.history == method.history


def test_a_record_begins_at_step_0_and_the_last_entry_of_a_step_counts():
    found = recorded_run([(0, 1.0), (3, 0.5), (3, 0.4), (7, 0.2)])
    assert [found.forward(step) for step in (0, 2, 3, 6, 7, 99)] == [1.0, 1.0, 0.4, 0.4, 0.2, 0.2]
    with pytest.raises(ValueError, match="history must begin at step 0, got 3"):
        recorded_run([(3, 1.0)])
    with pytest.raises(ValueError, match="history must begin at step 0, got nothing"):
        recorded_run([])


def test_a_method_that_never_ran_is_as_it_began():
    config = from_dict(
        RunConfig, {"sparsify": {"method": "generalization", "sparsity": 0.5}, "train": {"steps": 300}}, where="test"
    )
    outcome = Outcome(0, 0, 0.0, 0.0, None, Path(), None, (GeneralizationDriven(small_model(), sparsity=0.5),))
    found = run_densities(config, outcome)
    assert found.forward(0) == found.gradient(99) == 1.0
    assert torch.tensor(found.moments(0)) == 1


def test_the_attacks_of_robust_rewiring_are_passes_forward_and_back_to_the_inputs(tmp_path):
    """Each of the attack's three is one pass forward and one back to the inputs, before the step's own three."""
    costs = {}
    for name, attack in (("plain", None), ("attacked", Attack(0.05, steps=3))):
        model = small_model(experts=0)
        method = RobustRewiring(model, sparsity=0.5, attack=attack, allocation=uniform)
        values = {"sparsify": {"method": "robust_rewiring", "sparsity": 0.5}, "train": {"steps": STEPS, "batch": 4},
                  "data": {"length": 16}}  # fmt: skip
        config = from_dict(RunConfig, values, where="test")
        outcome, facts = Outcome(STEPS, 0, 0.0, 0.0, None, tmp_path, None, (method,)), facts_of(model)
        once = 0.5 * facts["prunable_flops"] + facts["flops_per_token"] - facts["prunable_flops"]
        costs[name] = sparse_cost(config, outcome, facts)["cost"]["training_flops"] / (STEPS * 64 * once)
    assert costs == {"plain": pytest.approx(3), "attacked": pytest.approx(3 + 2 * 3)}
