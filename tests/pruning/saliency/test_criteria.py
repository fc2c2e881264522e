"""Methods, allocations and structures by name: no two alike, exact counts in all pairs, and refusals by name."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import Sparsifier, cubic, one_shot, prunable_weights, sparsify
from pruning.allocation import global_ranking, keep_dense, min_density, uniform
from pruning.criteria import ALLOCATIONS, CALIBRATED, CRITERIA, METHODS
from pruning.mask_selection import select_masks
from pruning.saliency import correlation_scores, snip_scores
from pruning.structure import block, columns, named_structure, rows
from pruning.weights import matrices
from tests.pruning.test_transformer import build, ids
from tests.pruning.toy import tokens, toy

BATCHES = [ids(3, 9), ids(2, 7, seed=5)]


def pruned(method, *, kind="dense", **options):
    model = build(kind, layers=1).float()
    data = BATCHES if method in CALIBRATED or CRITERIA[method].data or options.get("allocation") in DATA else None
    generator = torch.Generator().manual_seed(0)
    return model, sparsify(model, method=method, calibration=data, generator=generator, **options)


DATA = ("owl", "sensitivity")


def test_no_two_methods_are_one_computation():
    found = {method: pruned(method, sparsity=0.5)[1].kept for method in METHODS
             if method not in ("exact_obs", "descent")}  # fmt: skip
    for first, second in combinations(found, 2):
        same = all(mask.equal(found[second][name]) for name, mask in found[first].items())
        assert not same, f"{first} and {second} choose the same weights"
    by_ranking = {m: pruned(m, sparsity=0.5, allocation="global")[1].kept for m in CRITERIA}
    for first, second in combinations(by_ranking, 2):
        same = all(mask.equal(by_ranking[second][name]) for name, mask in by_ranking[first].items())
        assert not same, f"{first} and {second} rank weights alike"


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("allocation", [a for a in ALLOCATIONS if a != "loss"])
def test_every_allocation_by_name_removes_what_is_asked(kind, allocation):
    model, masks = pruned("magnitude", kind=kind, sparsity=0.37, allocation=allocation)
    parts = matrices(prunable_weights(model))
    if allocation == "uniform":
        assert masks.zeros == sum(37 * part.numel() // 100 for part in parts.values())
    else:
        assert masks.zeros == 37 * masks.total // 100
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model).values())
    assert zeros == masks.zeros


@pytest.mark.parametrize("method", [m for m in CRITERIA if m != "lamp"])
@pytest.mark.parametrize("structure, share", [("2:4", None), ("block 4x8", 0.5), ("row", 0.25), ("column", 0.5)])
def test_every_method_with_every_structure(method, structure, share):
    model, masks = pruned(method, kind="moe", sparsity=share, structure=structure, allocation="uniform",
                          rounds=2 if CRITERIA[method].rounds and structure != "2:4" else None)  # fmt: skip
    for part in matrices(masks.kept).values():
        if structure == "2:4":
            assert (part.unflatten(1, (-1, 4)).sum(-1) == 2).all()
            continue
        tile = {"block 4x8": (4, 8), "row": (1, part.shape[1]), "column": (part.shape[0], 1)}[structure]
        tiles = part.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).transpose(1, 2).flatten(2)
        assert ((tiles.all(-1)) | (~tiles).all(-1)).all()
        whole = tiles[..., 0]
        assert int((~whole).sum()) == int(share * whole.numel())
    assert all(torch.isfinite(weight).all() for weight in prunable_weights(model).values())


@given(
    st.lists(st.integers(-2, 2), min_size=24, max_size=24),
    st.integers(0, 99),
    st.sampled_from([(1, 2), (2, 3), (4, 6)]),
)
def test_tiles_go_by_their_sum_and_then_their_place(values, percent, size):
    scores = torch.tensor(values, dtype=torch.float32).view(4, 6)
    kept = select_masks({"w": scores}, sparsity=percent / 100, structure=block(*size)).kept["w"]
    tiles = [(i, j) for i in range(0, 4, size[0]) for j in range(0, 6, size[1])]
    order = sorted(tiles, key=lambda t: (float(scores[t[0] : t[0] + size[0], t[1] : t[1] + size[1]].sum()), t))
    gone = order[: percent * len(tiles) // 100]
    expected = torch.ones(4, 6, dtype=torch.bool)
    for i, j in gone:
        expected[i : i + size[0], j : j + size[1]] = False
    assert kept.equal(expected)
    assert block(*size)(scores, len(gone) * size[0] * size[1]).equal(expected)


def test_tiles_that_hold_zeros_do_not_go_for_that_and_empty_ones_go_first():
    scores = torch.tensor([[-torch.inf, 9.0, 1.0, 1.0, -torch.inf, -torch.inf]])
    kept = select_masks({"w": scores}, sparsity=0.4, structure=block(1, 2)).kept["w"]
    assert kept.tolist() == [[True, True, True, True, False, False]]
    assert block(1, 2)(scores, 4).tolist() == [[True, True, False, False, False, False]]


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"w: block 2x4 needs a matrix \[out, in\] divisible by 2x4, got \[4, 6\]"):
        select_masks({"w": torch.rand(4, 6)}, sparsity=0.5, structure=block(2, 4))
    with pytest.raises(ValueError, match="block 2x3 removes a multiple of 6 weights, got count 7"):
        block(2, 3)(torch.rand(4, 6), 7)
    with pytest.raises(ValueError, match="height of a block must be >= 1, got 0"):
        block(0, 3)
    unlike = {"a": torch.rand(2, 3), "b": torch.rand(2, 4)}
    with pytest.raises(ValueError, match="structure row has tiles of 3 to 4 weights .* allocation must be 'uniform'"):
        select_masks(unlike, sparsity=0.5, structure=rows(), allocation=keep_dense(uniform))
    assert select_masks(unlike, sparsity=0.5, structure=columns()).zeros == 2 + 4


def test_structures_by_name():
    assert str(named_structure("block 16x8")) == "block 16x8" and named_structure("row") == rows()
    for text in ("block 16", "blok 4x4", "rows", "block 4x4x4", "2-4"):
        with pytest.raises(ValueError, match=f"'row' or 'column', got '{text}'"):
            named_structure(text)


@pytest.mark.parametrize("options, message", [
    ({"method": "synflo"}, "did you mean 'synflow'"),
    ({"method": "sparsegtp"}, "did you mean 'sparsegpt'"),
    ({"allocation": "owel"}, "allocation must be one of .*did you mean 'owl'"),
    ({"structure": "blok 4x4"}, "structure must be None, 'n:m'"),
    *[({"method": name}, f"method='{name}' needs calibration batches, got None")
      for name in METHODS if name in CALIBRATED or CRITERIA[name].data],
    ({"allocation": "owl"}, "allocation='owl' needs calibration batches, got None"),
    ({"allocation": "sensitivity"}, "allocation='sensitivity' needs calibration batches, got None"),
    ({"method": "lamp", "allocation": "uniform"}, "method='lamp' orders each matrix as 'magnitude' .* got 'uniform'"),
    ({"method": "lamp", "structure": "2:4"}, "structure='2:4' fixes every matrix's sparsity: .* got 'global'"),
    ({"structure": "2:4", "allocation": "erk"}, "allocation must be 'uniform', got 'erk'"),
    ({"method": "snip", "structure": "2:4", "rounds": 3, "calibration": BATCHES}, "rounds must be 1, got 3"),
    ({"method": "grasp", "rounds": 3, "calibration": BATCHES}, "rounds must be None, got 3; snip, synflow take rounds"),
    ({"method": "grasp", "allocation": "lamp", "calibration": BATCHES}, "squares scores, and those of method='grasp'"),
    ({"method": "obs", "structure": "row", "calibration": BATCHES}, "method='obs' chooses weights or n:m groups"),
    ({"method": "wanda", "structure": "row", "allocation": "owl", "calibration": BATCHES}, "has tiles of 16 to 24"),
    ({"method": "wanda", "structure": "2:4", "allocation": "owl", "calibration": BATCHES}, "fixes every matrix's"),
    ({"method": "wanda", "structure": "block 4x4", "allocation": "loss", "calibration": BATCHES}, "takes whole tiles"),
    ({"method": "wanda", "structure": "blok 4x4", "calibration": BATCHES}, "structure must be None, 'n:m'"),
    ({"method": "wanda", "rounds": 2, "calibration": BATCHES}, "goes block by block: rounds must be None, got 2"),
    ({"method": "synflow", "loss": lambda model, batch: batch}, "method='synflow' .* takes no loss"),
    ({"method": "taylor", "calibration": ids()}, r"got one Tensor; pass \[batch\]"),
    ({"structure": "block 5x5"}, r"block 5x5 needs a matrix \[out, in\] divisible by 5x5, got \[16, 16\]"),
    ({"structure": "row", "allocation": "global"}, "structure row has tiles of 16 to 24 weights here"),
    ({"method": "synflow", "sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
    ({"sparsity": None}, "sparsity must be in .* got None"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_and_changes_nothing(options, message):
    model = build("dense", layers=1)
    before = copy.deepcopy(model.state_dict())
    given = {"sparsity": None if options.get("structure") == "2:4" else 0.5} | options
    with pytest.raises(ValueError, match=message):
        sparsify(model, **given)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_default_allocation_is_the_papers():
    for method in ("snip", "synflow", "grasp", "lamp"):
        masks = pruned(method, sparsity=0.31)[1]
        assert masks.zeros == 31 * masks.total // 100
    function = pruned("magnitude", sparsity=0.5, allocation=uniform)[1]
    assert all(m.equal(function.kept[n]) for n, m in pruned("magnitude", sparsity=0.5)[1].kept.items())


def test_functions_of_allocations_go_where_their_names_go():
    guarded = pruned("lamp", sparsity=0.9, allocation=min_density(global_ranking))[1]
    assert guarded.zeros == int(0.9 * guarded.total) and all(mask.any() for mask in guarded.kept.values())
    one, other = (pruned("wanda", sparsity=0.5, allocation=rule)[1].kept for rule in ("uniform", uniform))
    assert all(mask.equal(other[name]) for name, mask in one.items())
    with pytest.raises(ValueError, match="method='lamp' orders each matrix"):
        pruned("lamp", sparsity=0.5, allocation=uniform)


def test_rounds_change_what_snip_chooses():
    one, many = (pruned("snip", sparsity=0.8, rounds=rounds)[1] for rounds in (1, 6))
    assert one.zeros == many.zeros and any(not mask.equal(many.kept[name]) for name, mask in one.kept.items())


@pytest.mark.parametrize("method", list(CRITERIA))
def test_pruning_on_keeps_what_is_zero(method):
    model = build("dense", layers=1).float()
    first = sparsify(model, sparsity=0.4, allocation="global")
    second = sparsify(model, sparsity=0.6, method=method, allocation="global", calibration=BATCHES,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert second.zeros == int(0.6 * second.total)
    assert not any((second.kept[name] & ~mask).any() for name, mask in first.kept.items())


def test_a_sparsifier_takes_the_same_names():
    model, batch = toy((2, 1, 4)), tokens()
    other = copy.deepcopy(model)
    sparsifier = Sparsifier(model, schedule=one_shot(0.5), saliency="taylor", allocation="global", calibration=[batch])
    expected = sparsify(other, sparsity=0.5, method="taylor", allocation="global", calibration=[batch])
    assert all(mask.equal(expected.kept[name]) for name, mask in sparsifier.masks().kept.items())
    names = [m for m in CRITERIA if m not in ("lamp", "synflow")]
    for method in names:
        model = toy((2, 1, 4))
        keeper = Sparsifier(model, schedule=cubic(0.5, begin=0, end=4), saliency=method, structure="block 4x4",
                            allocation="uniform", calibration=[batch])  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(4):
            keeper.after_step(optimizer)
        assert keeper.masks().zeros == sum(16 * (w.numel() // 16 // 2) for w in prunable_weights(model).values())


@pytest.mark.parametrize("options, message", [
    ({"saliency": "taylr"}, "saliency must be one of .*did you mean 'taylor'"),
    ({"saliency": "wanda"}, "saliency='wanda' needs calibration batches, got None"),
    ({"saliency": "sparsegpt"}, "saliency must be one of .* got 'sparsegpt'"),
    ({"saliency": "obd"}, "saliency='obd' needs calibration batches, got None"),
    ({"allocation": "owl"}, "allocation='owl' needs calibration"),
    ({"structure": "2:4", "allocation": "global"}, "allocation must be 'uniform'"),
])  # fmt: skip
def test_a_sparsifier_refuses_the_same_pairs(options, message):
    with pytest.raises(ValueError, match=message):
        Sparsifier(toy((2, 1, 4)), schedule=one_shot(0.5), **options)


def test_scores_as_functions_are_those_behind_the_names():
    model = build("dense", layers=1).float()
    weights = prunable_weights(model)
    scores = snip_scores(model, weights, BATCHES)
    by_function = select_masks(scores, sparsity=0.5)
    by_name = sparsify(
        copy.deepcopy(model), sparsity=0.5, method="snip", rounds=1, allocation="uniform", calibration=BATCHES
    )
    assert all(mask.equal(by_name.kept[name]) for name, mask in by_function.kept.items())
    assert correlation_scores(model, weights, BATCHES).keys() == weights.keys()
