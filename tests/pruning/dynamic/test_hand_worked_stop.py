"""RigL with a stop by hand: the share that an update moves falls as a half cosine, and from the stop on nothing moves.

See hand_worked for the numbers.
"""

import pytest

from pruning import uniform
from pruning.dynamic import RigL
from tests.pruning.dynamic.hand_worked import G1, G2, ZERO, Worked, follow

STEPS = (ZERO, ZERO, G1, G1, G2, ZERO, G1)


def six_steps(at):
    return lambda: follow(
        lambda m: RigL(m, sparsity=0.5, allocation=uniform, every=2, stop=6, fraction=0.7), STEPS, at=at
    )


# 2: .7/2 (1 + cos 60°) = .525 of eight are 4: −6 −10 12 21 go, and the gradients 23 21 20 18 of what is free grow, of
#    which 21 is that of −10 and 18 that of −6, which keep their values. The update takes the place of the step. 3: −G1:
#    −28 12 | 11 23 20 | −46 | −37 −6.
# 4: .7/2 (1 + cos 120°) = .175 of eight is 1: −6 goes, and 24, the gradient of the first row's second, grows. No step.
#    (A share that stayed at .7 would move five each time.)
# 6: from the stop on nothing moves, and −G1 is a step like any other: 16 −25 30 | 32 46 40 | −65 | −36.
WORKED = {
    "at 2 and 4": Worked(
        six_steps((2, 4)),
        masks=("..## #.## .#.. ##..", ".### #.## .#.. #..."),
        weights=((0, 16, -25, 30), (32, 0, 46, 40), (0, -65, 0, 0), (-36, 0, 0, 0)),
    ),
    "at 5 and 6": Worked(six_steps((5, 6)), masks=(".### #.## .#.. #...", ".### #.## .#.. #...")),
}


@pytest.mark.parametrize("name", WORKED)
def test_the_share_falls_to_the_stop(name):
    WORKED[name].check()


def test_the_share_at_the_start_half_way_and_from_the_stop_on():
    method = WORKED["at 2 and 4"].run().method
    for step, share in ((0, 0.7), (2, 0.525), (3, 0.35), (4, 0.175), (6, 0.0), (9, 0.0)):
        method.step = step
        assert method.drop_share() == pytest.approx(share, abs=1e-12)
        assert method.due() == (step in (2, 4))
