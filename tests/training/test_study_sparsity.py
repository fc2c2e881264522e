"""Studies of sparsity: what cells cost and measure, questions answered from records, and the parts of their pages."""

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pruning import prunable_weights
from tests.training.models import small_data, small_model
from tests.training.toy_study import DENSE_BASE
from training.config import RunConfig, from_dict
from training.sparsity import make_sparsifiers
from training.study import load_study, page_text, run_study, write_page
from training.study import measures as measures_module
from training.study import retraining as retraining_module
from training.study import runner as runner_module
from training.study.answers import answers
from training.study.cell import run_cell
from training.study.cost import run_densities, sparse_cost
from training.study.fitting import Fit, HeldZeros
from training.study.panels import Panel, Point, panels_svg
from training.study.progress import cells_left
from training.study.records import open_records
from training.study.retraining import retraining_part
from training.study.spec import Cell, cell_key, measures_of, sweep_cells
from training.study.summary import best_rates, results
from training.trainer import Outcome
from transformer.accounting import used_shares

STEPS = 8
TOML = (
    """
name = "toy"
question = "Does it run?"
reference = "dense"
budget_minutes = 5
lrs = [1e-2]
seeds = [0, 1]
speeds = false
sections = ["cost", "measured", "retraining"]
measures = ["gap", "less_data", "random_labels", "transfer", "robustness"]
grid = {{ "sparsify.sparsity" = [0.5, 0.75] }}
{top}
"""
    + DENSE_BASE
    + """[[arm]]
name = "dense"
label = "Dense"
measures = ["retraining"]
[[arm]]
name = "gradual"
label = "Gradual"
changes = {{ "sparsify.method" = "magnitude", "sparsify.end" = 6, "sparsify.every" = 2 }}
[[arm]]
name = "static"
label = "Static, ERK"
changes = {{ "sparsify.method" = "static" }}
[[ask]]
text = "Is it in order?"
order = ["gradual", "static"]
[[ask]]
text = "Is the gap smaller?"
label = "gap"
metric = "measures.gap.gap"
{extra}
"""
)


@pytest.fixture
def toy(tmp_path):
    """toy(extra="", top="") → the study above on thirty short texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"line {number} of text\n" * 20)

    def make(extra="", top=""):
        path = tmp_path / "toy.toml"
        path.write_text(TOML.format(corpus=texts, extra=extra, top=top))
        return load_study(path)

    return make


@pytest.fixture
def quickly(monkeypatch):
    """Cells in this process, and measurements of a few batches."""

    def completed(jobs, *, at_once, threads):
        for job in jobs:
            assert run_cell(job) == 0
            yield job.parent

    monkeypatch.setattr(runner_module, "completed", completed)
    for name, value in {"SAMPLE": 3, "FEW": 2, "TRANSFER_STEPS": 2, "RETRAINING": 3, "COUNTS": (1, 2)}.items():
        monkeypatch.setattr(measures_module, name, value)
    for name, value in {"SPARSITIES": (0.5,), "BUDGETS": (1, 3), "FACTORS": (0.1, 1.0), "CALIBRATION": 2}.items():
        monkeypatch.setattr(retraining_module, name, value)


def test_a_study_of_sparsity_measures_every_full_cell_and_its_page_has_every_part(toy, tmp_path, quickly):
    study = toy()
    lines = run_study(study, out=tmp_path / "out", records=tmp_path / "records.jsonl")
    assert all(line["kind"] == "cell" for line in lines) and len(lines) == 5 * 2
    for line in lines:
        measured, sparsity = line["measures"], float(line["arm"].rpartition(" ")[2]) if " " in line["arm"] else 0.0
        assert line["cost"]["sparsity"] == pytest.approx(sparsity, abs=0.002)
        assert (
            line["cost"]["inference_flops"]
            == line["flops_per_token"] - 2 * line["prunable_weights"] * line["cost"]["sparsity"]
        )
        assert measured["gap"]["gap"] == measured["gap"]["held_out"] - measured["gap"]["train"]
        assert set(measured["less_data"]) == {"batches_1", "batches_2"}
        assert measured["random_labels"]["chance"] == math.log(257)
        assert 0 <= measured["random_labels"]["forgotten"] <= 1
        assert measured["robustness"]["radius_10"] > measured["robustness"]["radius_3"] > 0
        assert measured["transfer"]["before"] > 0 and measured["transfer"]["after"] > 0
        assert ("retraining" in measured) == (line["arm"] == "dense")
    text = page_text(study, open_records(tmp_path / "records.jsonl"))
    for part in ("## Answers", "## Loss against FLOPs", "## Measured", "## Hessian methods against magnitude"):
        assert part in text
    assert "Unfinished" not in text and "Step time" not in text
    write_page(study, lines, folder=tmp_path / "page")
    assert {file.name for file in (tmp_path / "page").iterdir()} == {
        "toy.md", "toy.svg", "toy-flops.svg", "toy-measured.svg"
    }  # fmt: skip


def config(method, *, steps=100, **sparsify):
    values = {"sparsify": {"method": method, "sparsity": 0.8, **sparsify}, "train": {"steps": steps}}
    return from_dict(RunConfig, values, where="test")


def outcome(*sparsifiers):
    return Outcome(100, 0, 0.0, 0.0, None, Path(), None, sparsifiers)


@pytest.mark.parametrize(
    "settings, forward, gradient",
    [
        ({"method": "static"}, {0: 0.2, 99: 0.2}, {0: 0.2, 10: 0.2}),
        ({"method": "set", "every": 10}, {0: 0.2, 99: 0.2}, {0: 0.2, 10: 0.2}),
        ({"method": "rigl", "every": 10, "end": 50}, {10: 0.2}, {0: 0.2, 10: 1.0, 11: 0.2, 40: 1.0, 50: 0.2}),
        ({"method": "snfs", "every": 10}, {0: 0.2}, {0: 1.0, 99: 1.0}),
        ({"method": "top_kast", "every": 1}, {0: 0.2}, {0: 0.4, 99: 0.4}),
        ({"method": "magnitude", "begin": 30, "end": 30}, {29: 1.0, 30: 0.2}, {29: 1.0, 30: 0.2}),
        ({"method": "lottery", "begin": 10, "rounds": 2}, {39: 1.0, 40: 0.2**0.5, 70: 0.2}, {39: 1.0, 99: 0.2}),
        ({"method": "early_bird", "every": 1, "end": 9, "distance": "relative"}, {5: 1.0, 6: 0.2}, {5: 1.0, 6: 0.2}),
        ({"method": "dnw"}, {0: 0.2, 99: 0.2}, {0: 1.0, 99: 1.0}),
        ({"method": "feedback", "begin": 10, "end": 10}, {9: 1.0, 10: 0.2}, {9: 1.0, 10: 1.0}),
        ({"method": "dsd", "begin": 20, "end": 60}, {19: 1.0, 20: 0.2, 60: 1.0}, {19: 1.0, 59: 0.2, 60: 1.0}),
        ({"method": "iht", "every": 10}, {0: 1.0, 9: 1.0, 10: 0.2, 20: 1.0}, {9: 1.0, 10: 0.2}),
        ({"method": "l1"}, {0: 1.0, 99: 1.0}, {0: 1.0, 99: 1.0}),
        ({"method": "robust_rewiring"}, {0: 0.2}, {0: 0.2}),
    ],
)  # fmt: skip
def test_the_densities_of_each_method(settings, forward, gradient):
    run = config(**settings)
    model = small_model(experts=0)
    (method,) = make_sparsifiers(run.sparsify, model, steps=100)
    for _ in range(10):
        method.after_step(torch.optim.SGD(model.parameters(), lr=0.0))
    found = run_densities(run, outcome(method))
    assert {step: found.forward(step) for step in forward} == pytest.approx(forward)
    assert {step: found.gradient(step) for step in gradient} == pytest.approx(gradient)


def test_the_zeros_of_experts_save_what_their_tokens_cost():
    run, model = config("static", sparsity=0.5), small_model()
    (method,) = make_sparsifiers(run.sparsify, model, steps=100)
    weights, shares = prunable_weights(model), used_shares(model)
    experts = [name for name in weights if ".experts." in name]
    assert experts and all(shares[name] == 0.5 for name in experts) and set(shares) >= set(experts)
    facts = {
        "parameters": model.num_parameters(),
        "prunable_weights": sum(w.numel() for w in weights.values()),
        "prunable_flops": sum(2 * w.numel() * shares.get(name, 1.0) for name, w in weights.items()),
        "shares": shares,
        "flops_per_token": model.flops_per_token(16),
    }
    zeros = sum(2 * int((w == 0).sum()) * (0.5 if name in experts else 1.0) for name, w in weights.items())
    found = sparse_cost(run, outcome(method), facts)["cost"]
    assert found["inference_flops"] == facts["flops_per_token"] - zeros
    tokens = 100 * run.train.batch * run.data.length
    assert found["training_flops"] == pytest.approx(3 * tokens * found["inference_flops"])
    assert found["dense_flops"] == pytest.approx(3 * tokens * facts["flops_per_token"])


def test_a_dense_run_has_all_weights_and_an_unknown_method_no_cost():
    assert run_densities(config("static"), outcome()).forward(3) == 1.0
    assert run_densities(config("generalization", steps=400), outcome(HeldZeros(small_model()))) is None


def test_measures_are_of_whole_runs_and_part_of_the_cells_key(toy):
    study = toy()
    assert measures_of(study, Cell(study.arm[0], 1e-2, 0)) == (*study.measures, "retraining")
    assert measures_of(study, Cell(study.arm[1], 1e-2, 0, 4)) == ()
    unmeasured = replace(study, measures=())
    assert cell_key(study, Cell(study.arm[1], 1e-2, 0)) != cell_key(unmeasured, Cell(study.arm[1], 1e-2, 0))
    assert cell_key(study, Cell(study.arm[1], 1e-2, 0, 4)) == cell_key(unmeasured, Cell(study.arm[1], 1e-2, 0, 4))


def _record(study, arm, seed, bits, gap):
    cell = Cell(study.named(arm), 1e-2, seed)
    return {
        "kind": "cell", "key": cell_key(study, cell), "arm": arm, "lr": 1e-2, "seed": seed, "status": "done",
        "bits_per_byte": bits, "steps": STEPS, "tokens": 128, "parameters": 1000, "active_parameters": 1000,
        "prunable_weights": 600, "flops_per_token": 2000.0, "training_flops": 1.0, "measures": {"gap": {"gap": gap}},
    }  # fmt: skip


def _records(study, values):
    """values: arm → (bits, gaps) of the two seeds."""
    return [
        _record(study, arm, seed, bits[seed], gaps[seed]) for arm, (bits, gaps) in values.items() for seed in (0, 1)
    ]


def test_questions_are_answered_by_the_records_alone(toy):
    study = toy()
    values = {
        "dense": ((2.0, 2.0), (0.5, 0.6)),
        "gradual sparsity 0.5": ((2.1, 2.2), (0.1, 0.2)),
        "static sparsity 0.5": ((2.4, 2.5), (0.5, 0.61)),
        "gradual sparsity 0.75": ((2.4, 2.5), (0.9, 1.0)),
        "static sparsity 0.75": ((2.2, 2.3), (0.2, 0.1)),
    }
    order, gap = answers(study, results(study, _records(study, values)))
    assert order == (
        "**Is it in order?**\n\n"
        "- sparsity 0.5: the order holds. Gradual against Static, ERK: lower (-0.3000, spread 0.1000).\n"
        "- sparsity 0.75: the order is contradicted. Gradual against Static, ERK: higher (+0.2000, spread 0.1000)."
    )
    assert gap.splitlines()[2:] == [
        "- Lower than Dense (0.5500 ± 0.0707): Gradual, sparsity 0.5 (-0.4000, spread 0.1000), "
        "Static, ERK, sparsity 0.75 (-0.4000, spread 0.1000).",
        "- No difference beyond the seeds' spread: Static, ERK, sparsity 0.5 (+0.0050, spread 0.1051).",
        "- Higher: Gradual, sparsity 0.75 (+0.4000, spread 0.1000).",
    ]
    close_by = values | {"static sparsity 0.5": ((2.15, 2.16), (0.5, 0.6))}
    assert "sparsity 0.5: the order is not decided." in answers(study, results(study, _records(study, close_by)))[0]


def test_a_sweep_at_one_value_gives_its_rate_to_the_others(toy):
    study = toy(top='sweep_at = { "sparsify.sparsity" = 0.75 }')
    assert [arm.rate_of for arm in study.arm] == [
        None, "gradual sparsity 0.75", None, "static sparsity 0.75", None
    ]  # fmt: skip
    assert [cell.arm.name for cell in sweep_cells(study)] == ["dense", "gradual sparsity 0.75", "static sparsity 0.75"]
    lines = [_record(study, "gradual sparsity 0.75", 0, 2.0, 0.1)]
    assert best_rates(study, lines) == {"gradual sparsity 0.75": 1e-2, "gradual sparsity 0.5": 1e-2}
    # dense and static still to sweep; then two seeds of five arms, three of which have had their first
    assert cells_left(study, lines) == 2 + 5 * 2 - 3
    values = {arm.name: ((2.0, 2.1), (0.1, 0.1)) for arm in study.arm}
    assert cells_left(study, _records(study, values)) == 0
    assert "The sweep was made at sparsity 0.75" in page_text(study, _records(study, values))


@pytest.mark.parametrize(
    "top, extra, message",
    [
        ('sweep_at = { "sparsify.sparsity" = 0.8 }', "", "sweep_at must be of the grid's values, got .* = 0.8"),
        ("", '[[arm]]\nname = "a"\nlabel = "A"\ngrid = false\nrate_of = "a"', "must be an arm with a sweep of its own"),
        ("", '[[arm]]\nname = "a"\nlabel = "A"\ngrid = false\nrate_of = "b"', "arm must be one of .*, got 'b'"),
    ],
)
def test_a_rate_of_no_sweep_is_refused(toy, top, extra, message):
    with pytest.raises(ValueError, match=message):
        toy(extra, top)


@pytest.mark.parametrize(
    "extra, message",
    [
        ('[[ask]]\ntext = "x"\narms = ["static"]', "must name arms of the study, got 'static'"),
        ('[[ask]]\ntext = "x"\norder = ["static", "moved"]', "must order arms of the study, got 'moved'"),
        ('[[ask]]\ntext = "x"\norder = ["static"]', "must give order"),
    ],
)
def test_a_question_about_no_arm_is_refused(toy, extra, message):
    with pytest.raises(ValueError, match=message):
        toy(extra)


def test_a_fit_trains_by_the_method_of_the_cell_or_holds_the_zeros_that_are_there():
    run = config("magnitude", steps=6, begin=2, end=2)
    batches = [torch.from_numpy(small_data().train[:34].astype("int64")).view(2, 17)[:, :16]]
    model = small_model(experts=0)
    Fit(run, steps=6)(model, batches)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name}
    assert sum(int(z.sum()) for z in zeros.values()) == sum(int(0.8 * z.numel()) for z in zeros.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Fit(run, steps=3, hold=True, lr=0.1)(model, batches)
    for name, parameter in model.named_parameters():
        assert not parameter.equal(before[name])
        if name in zeros:
            assert (parameter == 0).equal(zeros[name])


def test_held_zeros_have_no_gradient_in_the_norm_that_clips():
    model = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight[:, 0] = 0
    model.weight.grad = torch.ones(2, 4)
    assert HeldZeros(model).before_step(None)
    assert model.weight.grad.equal((model.weight != 0).float())


def test_the_retraining_part_says_what_its_numbers_say():
    def line(shift):
        rows = {
            name: {"after_0": 4.0 + worse + shift}
            | {f"after_{n}": {"0.1": 3.0, "1": 2.0 + late + shift} for n in (8, 320)}
            for name, worse, late in (
                ("magnitude", 0.5, 0),
                ("obd", 0.5, 0.5),
                ("woodfisher", 0, 0),
                ("sparsegpt", 0, 0),
            )
        }
        return {"measures": {"retraining": {f"sparsity_{n}": rows for n in (50, 90)}}}

    text = retraining_part({0: line(0.0), 1: line(0.01)})
    assert (
        "- 90% at once: OBD no difference from magnitude (+0.000, spread 0.010); "
        "WoodFisher below magnitude (-0.500, spread 0.010); SparseGPT below magnitude (-0.500, spread 0.010)."
    ) in text
    assert "- 90% after 320 steps: OBD above magnitude (+0.500, spread 0.010); WoodFisher no difference" in text
    assert (
        "- 90%, the gap to magnitude from at once to 320 steps: OBD's turns against it (+0.000, then +0.500); "
        "WoodFisher's closes (-0.500, then +0.000); SparseGPT's closes"
    ) in text
    assert "| 90% | Magnitude | 4.505 ± 0.007 | 2.005 ± 0.007 | 2.005 ± 0.007 |" in text


def test_panels_draw_every_point_in_one_colour_a_curve():
    curves = {"a": [Point(1e6, 2.0, 0.1), Point(1e5, 3.0)], "b": [Point(1e6, 2.5)]}
    panels = [Panel("one", "FLOPs", curves, log=True), Panel("two", "sparsity", {"b": [Point(0.5, 1.0)]})]
    svg = ElementTree.fromstring(panels_svg(panels, title="t"))
    kinds = [element.get("class") for element in svg.iter()]
    assert kinds.count("mark") == 4 + 2 and kinds.count("bar") == 4
    lines = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert lines[1].get("stroke") == lines[2].get("stroke") != lines[0].get("stroke")
    xs = [float(place.split(",")[0]) for place in lines[0].get("points").split()]
    assert xs == sorted(xs)
    with pytest.raises(ValueError, match="at least one point"):
        panels_svg([Panel("none", "x", {})], title="t")
