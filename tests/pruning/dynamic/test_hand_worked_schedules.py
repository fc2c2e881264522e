"""Methods that prune and train in turn, by hand: gradual, with feedback, in phases, from tickets.

Without a mask the layer is −31 37 −28 12 | 11 41 52 −5 | −2 −46 −42 −17 | −37 −6 −22 27 after −G1 (θ₁), and
−9 61 −16 19 | −7 22 35 3 | 1 −30 −62 −4 | −52 −29 −17 23 after −G2 too (θ₂).
"""

import pytest

from pruning import Sparsifier, cubic, uniform
from pruning.retraining import (
    DenseSparseDense,
    EarlyBirdPruning,
    Feedback,
    GeneralizationDriven,
    HardThresholding,
    LearningCompression,
    NeuralWirings,
    Rewinding,
)
from tests.pruning.dynamic.hand_worked import G1, G2, Trace, Worked, follow, pair, picture

# ½ (1 − (2/3)³) = .352 of 16 is 5, ½ (1 − (1/3)³) = .481 is 7
GRADUAL = cubic(0.5, begin=0, end=3)


def prechelt() -> Trace:
    """Held-out losses 1, 1.005 and 1.01: GL 0, ½ and 1 per cent."""

    def begun(model):
        method = GeneralizationDriven(model, sparsity=0.75, most=0.5, alpha=2.0, when="high")
        method.observe(1.0)
        return method

    return follow(begun, (G1, G2), after=lambda method, step: method.observe((1.005, 1.01)[step]))


def lprune() -> Trace:
    """Looks before the first step, after the second (GL 1 per cent) and after the fourth (2)."""

    def begun(model):
        method = GeneralizationDriven(model, sparsity=0.75, most=2 / 3, alpha=2.0, criterion="statistic")
        method.observe(1.0)
        return method

    def look(method, step):
        if step % 2:
            method.observe((1.01, 1.02)[step // 2])

    return follow(begun, (G1, G2, G1, G2), at=(1, 3), after=look)


WORKED = {
    # 1: the five least of θ₁: 2 5 6 11 12.
    # 2: what is left, −G2: −9 61 −16 | 22 35 | −30 −62 −4 | −52 −17 23; 4 and 9 go too.
    "gradual": Worked(
        lambda: follow(lambda m: Sparsifier(m, schedule=GRADUAL), (G1, G2)),
        masks=("###. .##. .### #.##", ".##. .##. .##. #.##"),
        weights=((0, 61, -16, 0), (0, 22, 35, 0), (0, -30, -62, 0), (-52, 0, -17, 23)),
    ),
    # 1: the same. 2: the seven least of θ₂, which went on dense: 1 3 4 7 9 16 17; 19 and 29 are back.
    "feedback": Worked(
        lambda: follow(lambda m: Feedback(m, schedule=GRADUAL, every=1), (G1, G2)),
        masks=("###. .##. .### #.##", ".#.# .##. .##. ##.#"),
        weights=((-9, 61, -16, 19), (-7, 22, 35, 3), (1, -30, -62, -4), (-52, -29, -17, 23)),
    ),
    # One ranking with the companion, 16 of 32.
    # 1: 13.5 −11 −3 −18.5 | −8.5 −21 −23 −1 | −2.5 26 20.5 5.5 | 6 −14 18.5 −15.5 there; from 18.5 on they stay.
    # 2: 11.5 −8.5 −14.5 −26 | −2 −31 −15 .5 | 1.5 17.5 11 −3.5 | 9.5 −8 30.5 −4.5; from 15 on.
    "wirings": Worked(
        lambda: follow(lambda m: NeuralWirings(m, sparsity=0.5), (G1, G2), model=pair),
        masks=("###. .##. .##. #.##", ".### .##. .##. ####"),
        weights=((-9, 61, -16, 19), (-7, 22, 35, 3), (1, -30, -62, -4), (-52, -29, -17, 23)),
        companion=("...# .##. .##. ..#.", "...# .##. .#.. ..#."),
        companion_weights=((11.5, -8.5, -14.5, -26), (-2, -31, -15, 0.5), (1.5, 17.5, 11, -3.5), (9.5, -8, 30.5, -4.5)),
    ),
    # 1: dense on G1, then the eight largest of θ₁: 52 46 42 41 37 37 31 28.
    # 2: these alone on G2; then all on G1 again, what was pruned from 0: 18 | 21 20 | −14 −13 | 24 −8 −7.
    "dense-sparse-dense": Worked(
        lambda: follow(lambda m: DenseSparseDense(m, sparsity=0.5, begin=1, end=2), (G1, G2, G1), at=(0, 2)),
        masks=("###. .##. .##. #...", "#### #### #### ####"),
        weights=((-5, 77, -13, 18), (21, 24, 58, 20), (-14, -49, -72, -13), (-51, 24, -8, -7)),
    ),
    # 1: the eight largest to begin with: 39 38 35 34 32 31 30 29, alone on G1.
    # 2: all on G2, what was pruned from 0: −9 24 −16 7 | −18 22 35 8 | 3 16 −62 13 | −52 −29 5 23; the eight largest.
    "thresholding": Worked(
        lambda: follow(lambda m: HardThresholding(m, sparsity=0.5, sparse_steps=1, dense_steps=1), (G1, G2)),
        masks=("#.#. .##. ..#. ##.#", ".#.. ###. ..#. ##.#"),
        weights=((0, 24, 0, 0), (-18, 22, 35, 0), (0, 0, -62, 0), (-52, -29, 0, 23)),
    ),
    # μ = ¼, then ½. Weights that c keeps move by g, the others by g + μw − λ.
    # 1: c: the eight largest, λ = 0: ¾w − g elsewhere: −31 31.75 −28 13.5 | 13.5 41 52 1.25 | −5 −39.25 −42 −16 |
    #    −37 −6 −18.5 27. Then λ = −¼w outside the new c.
    # 2: w − g − ½w − ¼w outside: 10.375 | −14.625 8.3125 | 1.75 9 | −24.5 .375 2.75; inside −9 55.75 −16 | 22 35 |
    #    −23.25 −62 | −52.
    "learning-compression": Worked(
        lambda: follow(lambda m: LearningCompression(m, sparsity=0.5, mu=1 / 4, growth=2.0, every=1), (G1, G2)),
        masks=("###. .##. .##. #...", ".##. .##. .##. ##.."),
        weights=(
            (-9, 55.75, -16, 10.375),
            (-14.625, 22, 35, 8.3125),
            (1.75, -23.25, -62, 9),
            (-52, -24.5, 0.375, 2.75),
        ),
    ),
    # 1: a share ½ (1 − 1/(1 + 2 · ½)) = ¼ goes: 2 5 6 11 of θ₁.
    # 2: ½ (1 − 1/(1 + 2 · 1)) = ⅓ of the twelve: of −9 61 −16 19 | 22 35 | −30 −62 −4 | −52 −17 23 the four least.
    "Prechelt": Worked(
        prechelt,
        masks=("#### .##. .### #.##", ".#.# .##. .##. #..#"),
        weights=((0, 61, 0, 19), (0, 22, 35, 0), (0, -30, -62, 0), (-52, 0, 0, 23)),
    ),
    # T = log(√2 · |θ + θ'| / |g − g'|) of two steps with g and g' to θ and θ'; g − g' is 18 8 9 11 | 39 21 40 12 |
    # 17 35 10 26 | 16 47 13 3.
    # 1: θ₁ + θ₂ is 40 98 44 31 | 4 63 87 2 | 1 76 104 21 | 89 35 39 50: logs of the quotients .80 2.51 1.59 1.04 |
    #    −2.28 1.10 .78 −1.79 | −2.83 .78 2.34 −.21 | 1.72 −.30 1.10 2.81, .57 on average, each + log √2 = .35. λ =
    #    ⅔ (1 − 1/(1 + 2 · 1)) = 4/9 of .92 is .41: below .06 are five, −29 among them; −9 of θ₂ stays, which is less.
    # 2: on G1 and G2 to −5 77 −13 37 | 24 58 | −49 −72 | −51 −25 16 and 17 101 −1 44 | 5 41 | −33 −92 | −66 −20 12:
    #    logs −.41 3.10 .44 2.00 | .32 .91 | .85 2.80 | 1.99 1.24 2.23, 1.41 on average; λ = ⅔ · 4/5 = 8/15 of 1.75 is
    #    .94: below .59 are 17, −1 and 5, and 12 stays.
    "lprune": Worked(
        lprune,
        masks=("#### .##. .##. #.##", ".#.# ..#. .##. #.##"),
        weights=((0, 101, 0, 44), (0, 0, 41, 0), (0, -33, -92, 0), (-66, 0, -20, 12)),
    ),
    # 1: the first mask, ###. .##. .##. #..., has none to be near to. 2: that of θ₂ differs from it in 4 of 16.
    "early bird": Worked(
        lambda: follow(lambda m: EarlyBirdPruning(m, sparsity=0.5, every=1, end=10, window=1, threshold=0.3), (G1, G2)),
        masks=("#### #### #### ####", ".#.. .##. .##. ##.#"),
        weights=((0, 61, 0, 0), (0, 22, 35, 0), (0, -30, -62, 0), (-52, -29, 0, 23)),
    ),
    # 1: 1 − √½ = .293 of 16 is 4: 2 5 6 11 of θ₁ go, the others go back to where they started.
    # 2: on G2 from there: −13 45 −19 1 | 20 12 | −11 −52 9 | −53 −9 30; 1 9 9 11 go too.
    "lottery": Worked(
        lambda: follow(lambda m: Rewinding(m, sparsity=0.5, every=1, rounds=2), (G1, G2)),
        masks=("#### .##. .### #.##", "###. .##. ..#. #..#"),
        weights=((-35, 21, -31, 0), (0, 39, 29, 0), (0, 0, -32, 0), (-38, 0, 0, 34)),
    ),
    # A step on G2 first: W₁ = −13 45 −19 1 | −28 20 12 −17 | 15 −11 −52 9 | −53 −53 −9 30.
    # 1: on G1 to θ₂, of which 1 3 4 7 go; back to W₁.
    # 2: on G2: 9 69 −7 8 | 1 −5 | 5 −72 | −68 −76 −4 26; 1 4 5 5 go too; back to W₁.
    "rewinding": Worked(
        lambda: follow(
            lambda m: Rewinding(m, sparsity=0.5, every=1, rounds=2, rewind=1, allocation=uniform), (G2, G1, G2)
        ),
        masks=("#### .##. .##. ####", "#### .... ..#. ##.#"),
        weights=((-13, 45, -19, 1), (0, 0, 0, 0), (0, 0, -52, 0), (-53, -53, 0, 30)),
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_the_masks_of_two_updates(name):
    WORKED[name].check()


def test_the_early_bird_is_settled_and_not_forced():
    assert WORKED["early bird"].run().method.bird.distances == [(), (0.25,)]


def test_the_second_c_step_sees_the_multipliers():
    """w + ½ w₁ where c was 0: 10.375 + 6.75 = 17.125 enters c for −16. Then λ ← λ − ½ (w − c): 0 in c, ½ · 16 where −16
    left it, −27/4 − 2.75/2 where c stays 0."""
    state = WORKED["learning-compression"].run().method.extra_state()
    assert state["mu"] == 1.0
    assert picture(state["compressed"]["weight"] != 0) == ".#.# .##. .##. ##.."
    multipliers = state["multipliers"]["weight"] * 16
    assert state["compressed"]["weight"][0, 3] * 16 == 17.125
    assert multipliers[0].tolist() == [4.5, 0, 8, 0] and multipliers[3, 3] == -27 / 4 - 2.75 / 2
