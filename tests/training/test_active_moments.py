"""Moments of the weights that are there, from checkpoint to checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.training.distributed_cases import PRUNERS, make_trainer
from training.distributed.active_moments import in_rows
from training.trainer import CHECKPOINTS


@pytest.mark.parametrize("made", [True, False])
def test_the_other_kind_of_moments_is_refused_by_name(tmp_path: Path, made: bool) -> None:
    kinds = [{"sparsifiers": PRUNERS["rigl"], "optim": {"sparse_state": state}} for state in (made, not made)]
    make_trainer("dense", tmp_path, stop_at=1, **kinds[0]).run()
    other = make_trainer("dense", tmp_path / "other", **kinds[1])
    words = f"was made with optim.sparse_state = {str(made).lower()}, this run has {str(not made).lower()}: resume with"
    with pytest.raises(ValueError, match=words):
        other.resume(tmp_path / CHECKPOINTS / "step-00000001")


def test_what_has_the_shape_of_a_weight_becomes_rows_by_hand() -> None:
    """A weight [2, 3] with three entries there, and one whose moments are dense."""
    model = torch.nn.ParameterDict({"a": torch.zeros(2, 3), "b": torch.zeros(2, 2)})
    mean, active = torch.arange(6.0).view(2, 3), torch.tensor([[True, False, True], [False, False, True]])
    step = torch.tensor(4.0)
    tensors = {"step:a": step, "mean:a": mean * active, "square:a": mean**2 * active, "active:a": active,
               "step:b": step, "mean:b": torch.ones(2, 2), "square:b": torch.ones(2, 2)}  # fmt: skip
    rows = in_rows(tensors, model, {})
    found = {key: value.tolist() for key, value in rows.items()}
    assert found == {"step:a": 4.0, "mean:a": [0.0, 2.0, 5.0], "square:a": [0.0, 4.0, 25.0], "index:a": [0, 2, 5],
                     "step:b": 4.0, "mean:b": [1.0] * 4, "square:b": [1.0] * 4}  # fmt: skip
    assert rows["index:a"].dtype == torch.int32
    again = in_rows(rows, model, {})
    assert all(again[key].equal(value) for key, value in rows.items()), "rows stay rows"
