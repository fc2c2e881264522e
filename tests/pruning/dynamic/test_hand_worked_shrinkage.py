"""Weights that shrink to 0 or drown in noise, gates that close, and graphs that are drawn, by hand: see hand_worked."""

import math

import pytest
import torch
from torch import nn

from pruning import uniform
from pruning.dynamic import StaticSparsity, Topology, block_diagonal, small_world
from pruning.learned import L0, Proximal, Regularized, VariationalDropout, l1
from tests.pruning.dynamic.hand_worked import G1, G2, U1, U2, ZERO, Draws, Worked, drawing, follow


def designed(model: nn.Module, topology: Topology, *, sparsity: float) -> StaticSparsity:
    """The connections that a topology lays out where every draw is U1."""
    with drawing(Draws(U1)):
        return StaticSparsity(model, sparsity=sparsity, allocation=uniform, topology=topology)


def gated(model: nn.Module) -> L0:
    """Gates that all start at log α = −2.2, and draw U1, then U2."""
    method = L0(model, strength=6.0, keep=1 / (1 + math.exp(2.2)))
    method.noise = lambda name, shape, kind: torch.tensor((U1, U2)[method.step])
    return method


WORKED = {
    # Every weight moves by −g, then by 8 towards 0, and no further.
    # 1: −31 37 −28 12 | 11 41 52 −5 | −2 −46 −42 −17 | −37 −6 −22 27 lose 8 each: −5, −2 and −6 are 0.
    # 2: −G2: −1 53 −8 11 | −15 14 27 8 | 3 −22 −54 4 | −44 −23 −9 15 lose 8 each: −1, −8, 8, 3 and 4 are 0, and the
    #    last row's second, which was 0, has come back.
    "proximal": Worked(
        lambda: follow(lambda m: Proximal(m, strength=8 / 16), (G1, G2)),
        masks=("#### ###. .### #.##", ".#.# ###. .##. ####"),
        weights=((0, 45, 0, 3), (-7, 6, 19, 0), (0, -14, -46, 0), (-36, -15, -1, 7)),
    ),
    # The penalty's gradient is 6 · sign(w)/16, 6 sixteenths of each weight's own sign before the step.
    # 1: −25 31 −22 18 | 17 35 46 1 | −8 −40 −36 −11 | −31 0 −16 21: the eight largest, to −22. All train on.
    # 2: −G2 and 6 towards 0, of which what stands at 0 has none: 3 49 −4 19 | −7 10 23 3 | 1 −18 −50 8 | −40 −23 −5 11:
    #    the eight largest, to 11.
    "L1": Worked(
        lambda: follow(lambda m: Regularized(m, sparsity=0.5, penalty=l1, strength=6.0), (G1, G2)),
        masks=("###. .##. .##. #...", ".#.# ..#. .##. ##.#"),
        weights=((3, 49, -4, 19), (-7, 10, 23, 3), (1, -18, -50, 8), (-40, -23, -5, 11)),
    ),
    # Open where log α > −ln 11 = −2.398. log α −= θ · g · dz/dlog α + 6/16 · p (1 − p), p = σ(log α + ⅔ ln 11).
    # 1: p = .354, so that all fall by .086 to −2.286. A draw moves a gate where it opens it, from u = .646 on: .69 and
    #    .93 (θ g = 93/256 and 108/256, down) to −2.349 and −2.460, which closes; .81, .75 and .87 (θ g < 0, up) to
    #    −1.418, −1.982 and −2.098.
    # 2: p = .335, all others fall by .084 to −2.369; .93 goes up to −1.216 and .87 to −.919; .69 falls from −1.418 to
    #    −2.324, and .75 and .81 to −2.744 and −2.534, which close, as does −2.431, the .69 of the first draw.
    "L0": Worked(
        lambda: follow(gated, (G1, G2)),
        masks=("###. #### #### ####", "##.. #### #.## ###."),
    ),
    # Kept where log α = log σ² − log θ² ≤ 3, log σ² from .9: at first all from 5.6 sixteenths on. The penalty's 4/16 ·
    # dKL/dlog α (−.36 at log α = 0) raises log σ² and draws θ to 0.
    # 1: log α −.16 −.61 .04 1.38 | 1.50 −.75 −1.27 4.23 | 4.17 −1.03 −.82 .83 | −.53 3.74 .42 .13: −5 −2 −6 of θ₁ go.
    # 2: 3.33 −1.46 1.62 .66 | 2.56 .91 −.19 3.27 | 8 .15 −1.43 5.00 | −1.05 −.01 1.26 .73: −9 3 1 −4 of θ₂ go; the last
    #    row's second, −29, is back.
    "variational": Worked(
        lambda: follow(lambda m: VariationalDropout(m, strength=4.0, start=0.9), (G1, G2)),
        masks=("#### ###. .### #.##", ".### ###. .##. ####"),
    ),
    # Seven connections: three blocks (of outputs and inputs 0 1, 2 and 3) hold six, two hold eight, of which the least
    # draw goes: of .51 .09 .39 .21 and .75 .33 .87 .57 it is .09.
    "block diagonal": Worked(
        lambda: follow(lambda m: designed(m, block_diagonal, sparsity=9 / 16), (ZERO, G1, G2)),
        masks=("#... ##.. ..## ..##", "#... ##.. ..## ..##"),
        weights=((-9, 0, 0, 0), (-7, 22, 0, 0), (0, 0, -62, -4), (0, 0, -17, 23)),
    ),
    # Two inputs each on a ring, around i − ½: 3 0 | 0 1 | 1 2 | 2 3. Those drawn below .6 move: .51 of the first, .39
    # and .21, .15, and .57 of the last, to the free places of the row with the least draws: .09 of .09 .69, both, .27
    # of .27 .33, and .03 of .63 .03.
    "small world": Worked(
        lambda: follow(lambda m: designed(m, small_world(0.6), sparsity=0.5), (ZERO, G1, G2)),
        masks=(".#.# ..## #.#. .##.", ".#.# ..## #.#. .##."),
        weights=((0, 61, 0, 19), (0, 0, 35, 3), (1, 0, -62, 0), (0, -29, -17, 0)),
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_the_masks_of_two_updates(name):
    WORKED[name].check()


def test_the_noise_levels_of_the_second_row_and_the_gates_of_the_last():
    levels = WORKED["variational"].run().method.noise_levels()["weight"]
    assert levels[1].tolist() == pytest.approx([2.56, 0.91, -0.19, 3.27], abs=0.006)
    gates = WORKED["L0"].run().method.state_dict()["gates"]["weight"]
    assert gates[3].tolist() == pytest.approx([-2.369, -1.216, -2.187, -2.534], abs=0.0006)
