"""A calibrated run that was ended goes on behind the blocks that its journal has, to the bit."""

import copy

import pytest

from pruning.calibrated import Finished, prune_calibrated
from tests.pruning.test_calibrated_models import BATCHES, language_model


class Ended(Exception):
    pass


class Memory:
    """Keeps blocks as copies; ends the run once it has `most` of them."""

    def __init__(self, most=99):
        self.blocks, self.most, self.written = {}, most, []

    def read(self, index):
        return self.blocks.get(index)

    def write(self, index, matrices):
        self.blocks[index] = [Finished(one.report, one.weight.clone(), one.kept.clone()) for one in matrices]
        self.written.append(index)
        if len(self.blocks) == self.most:
            raise Ended


@pytest.mark.parametrize("method, experts", [("wanda", 3), ("sparsegpt", 0), ("obs", 0)])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(method, experts):
    dense = language_model(experts=experts)
    whole, ended, resumed = (copy.deepcopy(dense) for _ in range(3))
    report = prune_calibrated(whole, BATCHES, method=method, sparsity=0.5)
    journal = Memory(most=1)
    with pytest.raises(Ended):
        prune_calibrated(ended, BATCHES, method=method, sparsity=0.5, journal=journal)
    journal.most, first = 99, journal.written
    again = prune_calibrated(resumed, BATCHES, method=method, sparsity=0.5, journal=journal)
    assert first[0] == 0 and journal.written == list(range(len(journal.written)))
    assert again.matrices == report.matrices
    assert all(again.masks.kept[name].equal(kept) for name, kept in report.masks.kept.items())
    state = resumed.state_dict()
    assert all(value.equal(state[name]) for name, value in whole.state_dict().items())
    assert any(not value.equal(state[name]) for name, value in dense.state_dict().items())


def test_the_journal_of_another_model_is_refused():
    journal = Memory()
    prune_calibrated(language_model(), BATCHES, sparsity=0.5, journal=journal)
    journal.blocks[0] = journal.blocks[0][1:]
    with pytest.raises(ValueError, match=r"journal of block 0 must hold \[.*\], got \["):
        prune_calibrated(language_model(), BATCHES, sparsity=0.5, journal=journal)
