"""Static layouts and methods that move connections by magnitude, by hand: see hand_worked for the numbers.

Nothing is updated at step 0, which has a zero gradient here. Weights are named by their values, which are distinct.
"""

import pytest

from pruning import uniform
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    PreferentialAttachment,
    RigL,
    StaticSparsity,
    banded,
    locally_connected,
)
from tests.pruning.dynamic.hand_worked import G1, G2, START, U1, U2, ZERO, Draws, Worked, follow, pair

STEPS = (ZERO, G1, G2)
RANDOM = {1: Draws(U1), 2: Draws(U2)}

WORKED = {
    # what stands trains: 21 + 16 + 24 = 61, −31 + 3 + 12 = −16, −6 + 18 + 7 = 19, −10 + 21 − 18 = −7, …
    "static": Worked(
        lambda: follow(lambda m: StaticSparsity(m, sparsity=0.5, allocation=uniform, every=1), STEPS),
        masks=(START, START),
        weights=((0, 61, -16, 19), (-7, 0, 0, 0), (1, -30, 0, 0), (-52, -29, 0, 0)),
    ),
    # the diagonal, and of the six places beside it, all equally near, the last four
    "banded": Worked(
        lambda: follow(lambda m: StaticSparsity(m, sparsity=0.5, allocation=uniform, topology=banded), STEPS),
        masks=("#... .##. .### ..##", "#... .##. .### ..##"),
        weights=((-9, 0, 0, 0), (0, 22, 35, 0), (0, -30, -62, -4), (0, 0, -17, 23)),
    ),
    # two neighbouring inputs each: those around i + ½ start at i − 1 (rounded down), the first moved inside
    "locally connected": Worked(
        lambda: follow(
            lambda m: StaticSparsity(m, sparsity=0.5, allocation=uniform, topology=locally_connected), STEPS
        ),
        masks=("##.. ##.. .##. ..##", "##.. ##.. .##. ..##"),
        weights=((-9, 61, 0, 0), (-7, 22, 0, 0), (0, -30, -62, 0), (0, 0, -17, 23)),
    ),
    # 1: of 21 −31 −6 −10 12 −27 −38 −30 the three least go: −6 −10 12. The highest draws of the free places are .93
    #    (that of −6, which starts again at 0), .87 and .81. After −G1: 37 −28 18 | 23 | −46 | −37 −6 −8.
    # 2: −6 −8 18 go; the highest draws: .93 (that of −6), .87, .81.
    "SET": Worked(
        lambda: follow(
            lambda m: SET(m, sparsity=0.5, allocation=uniform, every=1, fraction=3 / 8), STEPS, draws=RANDOM
        ),
        masks=(".### ..#. .#.. ###.", ".##. ..#. .##. ##.#"),
        weights=((0, 61, -16, 0), (0, 0, 6, 0), (0, -30, -20, 0), (-52, -23, 0, -4)),
    ),
    # The places of least −ln(u) / ((k_i + 1)(k_j + 1)) are drawn.
    # 1: −6 −10 12 go, which leaves outputs with 2 0 1 2 connections and inputs with 1 3 1 0. −ln .87 / (3·2) = .023,
    #    −ln .93 / (3·1) = .024, −ln .75 / (2·2) = .072 win; .81 stands at an output without connections: .211 / 2.
    #    After −G1: 37 −28 18 | | −46 −10 | −37 −6 −8.
    # 2: −6 −8 −10 go: outputs 3 0 1 1, inputs 1 2 1 1. .073 / (2·3) = .012, .139 / 4 = .035 and .211 / 4 = .053 win
    #    over −ln .33 / (4·2) = .139.
    "preferential": Worked(
        lambda: follow(
            lambda m: PreferentialAttachment(m, sparsity=0.5, allocation=uniform, every=1, fraction=3 / 8),
            STEPS,
            draws=RANDOM,
        ),
        masks=(".### .... .##. ###.", ".### .... .##. ##.#"),
        weights=((0, 61, -16, 25), (0, 0, 0, 0), (0, -30, -20, 0), (-52, -23, 0, -4)),
    ),
    # 1: −6 −10 12 go, the gradients 23 21 20 of what is free grow; 21 is that of −10, which keeps its value. The
    #    update takes the place of the step. Then −G1: 37 −28 | 11 23 20 | −46 | −37 −6.
    # 2: −6 11 20 go, the gradients 23 22 20 grow; 23 is that of −6, which keeps its value. No step.
    "RigL": Worked(
        lambda: follow(
            lambda m: RigL(m, sparsity=0.5, allocation=uniform, every=2, fraction=3 / 8),
            (ZERO, ZERO, G1, G1, G2),
            at=(2, 4),
        ),
        masks=(".##. #.## .#.. ##..", "###. ..#. .##. ##.."),
        weights=((0, 37, -28, 0), (0, 0, 23, 0), (0, -46, 0, 0), (-37, -6, 0, 0)),
    ),
    # 1: momentum ¾ G1, whose mean over the eight that are there before the drop is ¾ (16 + 3 + 18 + 21 + 14 + 19 +
    #    1 + 24)/8 = 10.875, and ¾ (8 + 24 + 1 + 13 + 20 + 23 + 18 + 3)/8/2 = 5.16 in the companion. −6 −10 12 go, and
    #    −2 −3 −7: of six places 4.07 and 1.93, so 4 and 2, where the momentum is largest: 23 21 20 18, which brings
    #    −10 and −6 back with their values. After −G1: 37 −28 12 | 11 23 20 | −46 | −37 −6.
    # 2: momentum 3/16 (G1 + 4 G2). Means: (112 + 51 + 46 + 51 + 45 + 52 + 45 + 59 + 68)/9 = 58.8 and (68 + 59 + 45 +
    #    52 + 45 + 51 + 51)/7/2 = 26.5. −6 11 12 of nine go, and −2.5 −3 of the companion's seven: of five 3.45 and
    #    1.55, so 3 and 2: momenta −92 90 74, and −112 −92 in the companion. (Over what stays the means would be (112 +
    #    51 + 45 + 52 + 45 + 59)/6 = 60.7 and (59 + 45 + 45 + 51 + 51)/5/2 = 25.1, of five 3.54 and 1.46: 4 and 1.)
    "SNFS": Worked(
        lambda: follow(
            lambda m: SNFS(m, sparsity=0.5, allocation=uniform, every=1, fraction=3 / 8, momentum=0.25),
            STEPS,
            model=pair,
        ),
        masks=(".### #.## .#.. ##..", "###. .### .##. #..."),
        weights=((22, 61, -16, 0), (0, -19, 6, 28), (0, -30, -20, 0), (-52, 0, 0, 0)),
        companion=("..## ..#. ##.# .#..", "...# ..#. .#.# .###"),
        companion_weights=((0, 0, 0, -26), (0, 0, -1.5, 0), (0, 17.5, 0, 1.5), (0, -8, 12, 11)),
    ),
    # 1: below 11 are −6 −10, and −7 −2 −3 of the companion: 5 places in proportion to the 6 and 5 that stay, 2.73 and
    #    2.27, so 3 and 2, at the highest draws .93 .87 .81 and .87 .81. 5 > 1.1 · .2 · 16: the threshold halves. After
    #    −G1: 37 −28 18 | 23 | −2 −46 | −37 −6 −8, and −3 −18.5 | −9.5 | −2.5 26 | −14 8.
    # 2: below 5.5 are −2, and −3 −2.5: of 3 places 3 · 8/13 = 1.85 and 1.15, so 2 and 1: .87 .81 and .87.
    "DSR": Worked(
        lambda: follow(
            lambda m: DSR(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.2, threshold=11 / 16),
            STEPS,
            model=pair,
            draws=RANDOM,
        ),
        masks=(".### ..#. ##.. ###.", ".### ..#. .##. ####"),
        weights=((0, 61, -16, 25), (0, 0, 6, 0), (0, -30, -20, 0), (-52, -29, -3, -4)),
        companion=("..## ..#. ##.. .##.", "...# ..#. .##. .##."),
        companion_weights=((0, 0, 0, -26), (0, 0, -1.5, 0), (0, 17.5, -9.5, 0), (0, -8, 20, 0)),
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_the_masks_of_two_updates(name):
    WORKED[name].check()


def test_the_threshold_of_dsr_halves_and_stays():
    assert WORKED["DSR"].run().method.threshold == 5.5 / 16
