"""What a run spends beside its steps, each count by hand, and the counts of passes against torch's FLOP counter."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pruning import Masks, prunable_weights
from pruning.diagnostics import fisher_penalty, low_fisher_first
from pruning.prescribed import masks_before_training
from pruning.saliency.flow import total_flow
from pruning.saliency.products import twice_differentiable
from tests.training.models import small_model
from training.config import RunConfig, from_dict
from training.data import Batches
from training.fisher_control import Penalised
from training.sparsity import make_sparsifiers
from training.study.cost import run_densities, sparse_cost
from training.study.search_cost import found_elsewhere
from training.trainer import Outcome

STEPS, TOKENS = 20, 4 * 16  # of a step: batch × length


def ids(count):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 200, (4, 16), generator=draw) for _ in range(count)]


def facts_of(model):
    weights = prunable_weights(model)
    count = sum(w.numel() for w in weights.values())
    return {
        "parameters": model.num_parameters(), "prunable_weights": count, "prunable_flops": 2 * count, "shares": {},
        "flops_per_token": model.flops_per_token(16),
    }  # fmt: skip


def cost_of(*, optim=None, train=None, beside=(), **sparsify):
    """The cost of a run of 20 steps, and (f, o, w, w'): its FLOPs and weights, prunable and others."""
    values = {"sparsify": sparsify, "train": {"steps": STEPS, "batch": 4, **(train or {})}, "data": {"length": 16}}
    run = from_dict(RunConfig, {**values, "optim": optim or {}}, where="test")
    torch.manual_seed(0)
    model = small_model(experts=0)
    methods = make_sparsifiers(run.sparsify, model, steps=STEPS, calibration=lambda: ids(8))
    facts = facts_of(model)
    outcome = Outcome(STEPS, 0, 0.0, 0.0, None, Path(), None, (*beside, *methods))
    f, w = facts["prunable_flops"], facts["prunable_weights"]
    sizes = f, facts["flops_per_token"] - f, w, facts["parameters"] - w
    return sparse_cost(run, outcome, facts)["cost"], sizes, run_densities(run, outcome)


def joules(flops, moved):
    return (2.3 * flops + 160 * moved) * 1e-12


def test_random_looks_for_nothing():
    cost, (f, o, _, _), _ = cost_of(method="random", sparsity=0.5)
    assert cost["search_flops"] == 0 and cost["training_flops"] == pytest.approx(20 * 3 * TOKENS * (f / 2 + o))


def test_snip_pays_for_a_gradient_on_eight_batches_in_each_of_ten_rounds():
    found, (f, o, w, rest), _ = cost_of(method="snip", sparsity=0.75)
    plain, _, _ = cost_of(method="random", sparsity=0.75)
    flops = moved = 0.0
    for finished in range(10):
        density = 0.25 ** (finished / 10)
        for _ in range(8):
            flops += 3 * TOKENS * (density * f + o)
            moved += 4 * 3 * (density * w + rest)
    assert found["search_flops"] == pytest.approx(flops)
    assert found["training_flops"] == pytest.approx(plain["training_flops"] + flops)
    assert found["energy"] == pytest.approx(plain["energy"] + joules(flops, moved))
    assert found["dense_flops"] == plain["dense_flops"] == pytest.approx(20 * 3 * TOKENS * (f + o))


def test_grasp_pays_for_a_gradient_then_for_one_of_a_gradient():
    found, (f, o, w, rest), _ = cost_of(method="grasp", sparsity=0.5)
    plain, _, _ = cost_of(method="random", sparsity=0.5)
    flops = 8 * (3 + 3 + 6) * TOKENS * (f + o)
    assert found["search_flops"] == pytest.approx(flops)
    assert found["training_flops"] - plain["training_flops"] == pytest.approx(flops)
    assert found["energy"] - plain["energy"] == pytest.approx(joules(flops, 8 * 12 * 4 * (w + rest)))


def test_synflow_pays_for_a_hundred_flows_of_two_tokens_in_double_precision():
    found, (f, o, w, rest), _ = cost_of(method="synflow", sparsity=0.75)
    plain, _, _ = cost_of(method="random", sparsity=0.75)
    flops, moved = (2 + 3) * 2 * (f + o), 8 * (2 + 3) * (w + rest)
    for finished in range(100):
        density = 0.25 ** (finished / 100)
        flops += 3 * 2 * (density * f + o)
        moved += 8 * 3 * (density * w + rest)
    assert found["search_flops"] == pytest.approx(flops)
    assert found["energy"] - plain["energy"] == pytest.approx(joules(flops, moved))


def test_a_method_that_is_not_asked_for_sparsity_looks_for_nothing():
    assert "search_flops" not in cost_of(method="snip", sparsity=0.0)[0]
    assert "search_flops" not in cost_of(method="static", sparsity=0.5)[0]


def test_the_fisher_penalty_pays_on_a_micro_batch_in_every_step_that_it_is_taken():
    plain, (f, o, w, rest), _ = cost_of(method="static", sparsity=0.5)
    train = {"accumulation": 2}
    found, _, _ = cost_of(method="static", sparsity=0.5, fisher_penalty=0.01, fisher_every=8, train=train)
    flops = moved = 0.0
    for _ in (0, 8, 16):  # labels, loss, two of a gradient, six of its square's
        flops += (1 + 1 + 2 + 6) * 2 * 16 * (f / 2 + o)
        moved += 10 * 4 * (w / 2 + rest)
    assert found["training_flops"] - plain["training_flops"] == pytest.approx(flops)
    assert found["energy"] - plain["energy"] == pytest.approx(joules(flops, moved))
    assert "search_flops" not in found


def test_a_dense_run_under_a_fisher_penalty_has_a_cost():
    model = small_model(experts=0)
    text = Batches(torch.arange(500).remainder(200).numpy(), batch=4, length=16, seed=0)
    beside = Penalised(model, text, strength=0.1, every=1, weights=list(prunable_weights(model)), seed=0)
    found, (f, o, _, _), _ = cost_of(sparsity=0.0, fisher_penalty=0.1, fisher_every=1, beside=[beside])
    assert found["training_flops"] == pytest.approx(20 * (3 + 10) * TOKENS * (f + o)) and found["sparsity"] == 0


def test_the_curriculum_pays_for_every_sample_of_its_pool_once_and_its_control_for_none():
    plain, (f, o, w, rest), _ = cost_of(method="static", sparsity=0.5)
    words = {"curriculum_pool": 7, "curriculum_begin": 3}
    found, _, _ = cost_of(method="static", sparsity=0.5, curriculum="low_fisher", **words)
    flops = moved = 0.0
    for _ in range(7):  # labels, loss, two of its gradient
        flops += 4 * 16 * (f / 2 + o)
        moved += 4 * 4 * (w / 2 + rest)
    assert found["training_flops"] - plain["training_flops"] == pytest.approx(flops)
    assert found["energy"] - plain["energy"] == pytest.approx(joules(flops, moved))
    assert cost_of(method="static", sparsity=0.5, curriculum="random", **words)[0] == plain


@pytest.mark.parametrize("method", ["static", "rigl", "snfs"])
def test_sparse_optimiser_state_moves_fewer_bytes(method):
    words = {"method": method, "sparsity": 0.75, **({} if method == "static" else {"every": 5})}
    (wide, (_, _, w, _), _), (compact, _, densities) = cost_of(**words), cost_of(**words, optim={"sparse_state": True})
    assert wide["training_flops"] == compact["training_flops"] and densities.moments(3) == 0.25
    assert wide["energy"] - compact["energy"] == pytest.approx(20 * 160e-12 * 4 * 6 * 0.75 * w)


def test_a_mask_of_another_run_is_priced_by_its_record_or_said_not_to_be(tmp_path):
    model = small_model(experts=0)
    masks = Masks({n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in prunable_weights(model).items()})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = masks.save(tmp_path / "run" / "checkpoints" / "masks.safetensors")
    plain, _, _ = cost_of(method="random", sparsity=0.5)
    found, _, _ = cost_of(method="mask", mask=str(path))
    assert found["search_flops"] is None and found["search"].startswith("not included: no record.json")
    assert found["training_flops"] == pytest.approx(plain["training_flops"], rel=0.01)
    (tmp_path / "run" / "record.json").write_text(json.dumps({"cost": {"training_flops": 7e9, "energy": 3.0}}))
    priced, _, _ = cost_of(method="mask", mask=str(path))
    assert priced["search_flops"] == 7e9 and "search" not in priced
    assert priced["training_flops"] == found["training_flops"] + 7e9 and priced["energy"] == found["energy"] + 3
    (tmp_path / "run" / "record.json").write_text(json.dumps({"status": "done"}))
    assert found_elsewhere(path) is None and found_elsewhere(path.parent) is None


def measured(call):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_the_numbers_of_passes_are_what_torch_counts():
    """Of a deep model of mostly prunable matrices: none takes a gradient of the head, nor of the first inputs."""

    def wide():
        return small_model(experts=0, dim=64, layers=6, vocab_size=17)

    model, batch = wide(), [ids(1)[0] % 17]
    with torch.no_grad():
        once = measured(lambda: model(batch[0]))
        one = measured(lambda: model(batch[0][:1]))

    def search(method, **options):
        return measured(lambda: masks_before_training(wide(), method=method, sparsity=0.01, **options))

    def penalise():
        with twice_differentiable(model):
            fisher_penalty(model, batch[0], generator=torch.Generator()).backward()

    assert search("random") == 0
    assert search("snip", calibration=batch) / once == pytest.approx(10 * 3, rel=0.1)
    assert search("grasp", calibration=batch) / once == pytest.approx(3 + 3 + 6, rel=0.15)
    assert measured(penalise) / once == pytest.approx(1 + 1 + 2 + 6, rel=0.15)
    ranked = measured(lambda: low_fisher_first(model, batch, generator=torch.Generator()))
    assert ranked / one == pytest.approx(4 * 4, rel=0.1)


def test_synflow_looks_at_the_flow_of_two_tokens_once_more_than_it_has_rounds(monkeypatch):
    seen = []

    def watched(model, given):
        seen.append((given.shape, next(model.parameters()).dtype))
        return total_flow(model, given)

    monkeypatch.setattr("pruning.saliency.synflow.total_flow", watched)
    masks_before_training(small_model(experts=0), method="synflow", sparsity=0.5)
    assert seen == [((1, 2), torch.float64)] * (1 + 100)
