"""Learned scores and thresholds, and masks from before training, by hand.

θ₁ = −31 37 −28 12 | 11 41 52 −5 | −2 −46 −42 −17 | −37 −6 −22 27 is the layer after −G1.
"""

import math

import pytest
import torch
from torch import nn

from pruning import Sparsifier, one_shot, sparsify
from pruning.learned import STR, Movement, SoftMovement
from tests.pruning.dynamic.hand_worked import G1, G2, WEIGHT, Trace, Worked, follow, layer, pair, picture, tensor

SLOPES = torch.tensor([1.0, -2.0, 3.0, -1.0])


def quadratic(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Σ G1 ∘ w + ½ Σ over rows of (a · (w − WEIGHT))²: at the layer's weights gradient G1, Hessian a aᵀ in each row."""
    weight = next(model.parameters())
    return (weight * batch[0]).sum() + ((weight - tensor(WEIGHT)) @ SLOPES).square().sum() / 2


def before_training(method: str) -> Trace:
    """The mask of the first batch, trained and held."""
    return follow(
        lambda m: Sparsifier(
            m, schedule=one_shot(0.5), saliency=method, calibration=[tensor(G1)[None]], loss=quadratic
        ),
        (G1, G2),
    )  # fmt: skip


def flow_in_rounds() -> Trace:
    """The masks after one round, and after two, of the layer and its companion."""
    found = [
        [picture(mask) for mask in sparsify(pair(), method="synflow", sparsity=share, rounds=rounds).kept.values()]
        for share, rounds in ((1 - math.sqrt(0.5), 1), (0.5, 2))
    ]
    first, other = ([masks[n] for masks in found] for n in (0, 1))
    return Trace("synflow", first, other)


WORKED = {
    # Scores S ← S − g · θ, of 1/256.
    # 1: S = −140 336 −93 −108 | −210 78 667 −500 | −168 513 320 52 | −38 −720 112 −238: the eight highest, to −38.
    # 2: S − G2 · θ₁ = −822 1224 −429 −24 | −408 −701 −217 −540 | −174 −223 1160 −169 | 517 −582 2 −346, to −217.
    #    What the first mask kept moves by −G2.
    "movement": Worked(
        lambda: follow(lambda m: Movement(m, schedule=one_shot(0.5, step=1)), (G1, G2)),
        masks=(".#.. .##. .### #.#.", ".#.# ..#. #.## #.#."),
        weights=((-31, 61, -28, 12), (11, 22, 35, -5), (-2, -30, -62, -4), (-52, -6, -17, 27)),
    ),
    # σ(S) > .4 where S > ln ⅔ = −104/256. The side loss takes 1 · σ'(0)/16 = 4/256 from every score.
    # 1: −144 332 −97 −112 | −214 74 663 −504 | −172 509 316 48 | −42 −724 108 −242.
    # 2: −826 1220 −433 −28 | −412 −705 −221 −544 | −178 −227 1156 −173 | 513 −586 −2 −350, less another 1 to 4.
    "soft movement": Worked(
        lambda: follow(lambda m: SoftMovement(m, strength=1.0, threshold=0.4), (G1, G2)),
        masks=(".##. .##. .### #.#.", ".#.# .... ..#. #.#."),
        weights=((-31, 61, -16, 12), (11, 22, 35, -5), (-2, -30, -62, -4), (-52, -6, -17, 27)),
    ),
    # s ← s + σ'(s) · Σ sign(θ) g over what is above the threshold − .1 s, from −1.5, a threshold 16 σ(s) of 2.92.
    # 1: all are above: Σ = 21/16, s = −1.5 + .149 · 21/16 + .15 = −1.154, the threshold 3.84: −2 goes.
    # 2: Σ = 45/16 without it, s = −1.154 + .182 · 45/16 + .115 = −.526, the threshold 5.94: 3 and −4 go, −2 has stood
    #    still.
    "STR": Worked(
        lambda: follow(lambda m: STR(m, strength=0.1, start=-1.5), (G1, G2)),
        masks=("#### #### .### ####", "#### ###. .##. ####"),
        weights=((-9, 61, -16, 19), (-7, 22, 35, 3), (-2, -30, -62, -4), (-52, -29, -17, 23)),
    ),
    # |w · g|: 140 336 93 108 | 210 78 667 500 | 168 513 320 52 | 38 720 112 238: the eight highest, to 210.
    "SNIP": Worked(
        lambda: before_training("snip"),
        masks=(".#.. #.## .##. .#.#", ".#.. #.## .##. .#.#"),
        weights=((0, 61, 0, 0), (-7, 0, 35, 3), (0, -30, -62, 0), (0, -29, 0, 23)),
    ),
    # a · g of the rows: 37 −66 −7 64; w · a · (a · g): −1295 −1554 −3441 222 | 660 5148 −5742 −1650 | −84 −378 672
    # −28 | −2432 3840 −2688 −2176: the eight highest, to −378.
    "GraSP": Worked(
        lambda: before_training("grasp"),
        masks=("...# ##.. #### .#..", "...# ##.. #### .#.."),
        weights=((0, 0, 0, 19), (-7, 22, 0, 0), (1, -30, -62, -4), (0, -29, 0, 0)),
    ),
    # Score of a weight: its magnitude times the companion's column that reads its output (34.5 53 58.5 47.5), of the
    # companion's: times the layer's row that it reads (93 103 75 116).
    # 1: (1 − √½) · 32: nine go: 6 · 34.5, 10 · 53, 12 · 58.5, 4 · 58.5, 14 · 47.5 and 3 · 93, 2 · 93, 6 · 116,
    #    5 · 116 there.
    # 2: columns 29.5 53 58.5 36.5, rows 87 93 59 102: seven more: 35, 21 and 31 · 29.5; 7 · 93, 15 and 10.5 · 59 and
    #    13.5 · 59 there. The layer's first neuron is empty.
    "SynFlow": Worked(
        flow_in_rounds,
        masks=("###. .### .##. ##.#", ".... .### .##. ##.#"),
        companion=("#### .##. ###. .###", "#..# .#.. ###. .#.#"),
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_the_masks_of_two_updates(name):
    WORKED[name].check()


def test_the_hand_made_gradient_and_curvature():
    """What SNIP and GraSP were asked about is the gradient G1, and the Hessian a aᵀ."""
    model = layer()
    weight = next(model.parameters())
    (slope,) = torch.autograd.grad(quadratic(model, tensor(G1)[None]), weight, create_graph=True)
    assert slope.equal(tensor(G1))
    (product,) = torch.autograd.grad((slope * tensor(G1)).sum(), weight)
    assert (product[:, 0] * 16).tolist() == [37, -66, -7, 64]


def test_the_thresholds_of_str():
    threshold = WORKED["STR"].run().method.thresholds()["weight"]
    assert threshold.item() * 16 == pytest.approx(5.94, abs=0.005)
