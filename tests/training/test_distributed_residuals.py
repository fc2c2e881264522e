"""What four ranks had not sent of their gradients, two take over: the sum over ranks stays, for every method."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tolerances import close
from tests.training.distributed_cases import UNSENT
from tests.training.spawning import spawn


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    spawn("tests.training.distributed_ranks", 4, folder, "keeps_unsent")
    (folder / "store").unlink(missing_ok=True)
    spawn("tests.training.distributed_ranks", 2, folder, "shares_unsent")
    return folder


def held(runs: Path, method: str, world: int) -> list[dict[str, Tensor]]:
    return [load_file(runs / f"{method}-{rank}-of-{world}.safetensors") for rank in range(world)]


def total(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([part[name].double() for part in parts if name in part]).sum(0).float()


@pytest.mark.parametrize("method", UNSENT)
def test_two_ranks_take_over_what_four_had_not_sent(runs: Path, method: str) -> None:
    four, two = held(runs, method, 4), held(runs, method, 2)
    names = {name for part in four for name in part}
    assert names and all(part.keys() == names for part in two)
    assert any(name.startswith("velocities/") for name in names) == (method == "dgc")
    for name in names:
        wanted = total(four, name)
        assert wanted.any(), name
        close(total(two, name), wanted)
        assert two[0][name].equal(two[1][name]), "equal shares"
        assert not four[0][name].equal(four[2][name]), "each rank had its own"
