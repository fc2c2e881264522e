import math

import pytest
import torch
from torch import nn

from tests.tolerances import close
from tests.training.spawning import spawn
from tests.typecheck import unchecked
from training import compress_gradients
from training.compression import GradientCompressor, draw_seed, promise
from training.unsent import return_unsent


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_reduce_what_the_loops_say(world, tmp_path):
    """Every method against loops over ranks and entries, six steps of training: see compression_ranks.py."""
    spawn("tests.training.compression_ranks", world, tmp_path)


def compressor(method, **options):
    settings = {"density": 0.5, "threshold": 1.0, "bin_size": 4, "momentum": 0.9, "clip": None, "warmup": 0, "seed": 0}
    return GradientCompressor({}, method, **(settings | options))


def test_the_largest_go_by_size_and_not_by_place():
    sent = compressor("topk").compress("w", torch.tensor([0.1, -5.0, 0.2, 4.0]))
    assert sorted(sent.index.tolist()) == [1, 3]


def test_dgc_falls_to_its_density():
    made = compressor("dgc", density=0.001, warmup=10)
    shares = []
    for made.step in range(12):
        shares.append(made.present_density())
    assert shares == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.004] * 2 + [0.001] * 4


def test_every_method_with_a_density_can_warm_up():
    made = compressor("topk", density=0.1, warmup=5)
    counts = []
    for made.step in range(6):
        counts.append(len(made.compress("w", torch.randn(100)).index))
    assert counts == [25, 10, 10, 10, 10, 10]


def test_a_limit_of_infinity_holds_nothing_back():
    assert compressor("topk", clip=math.inf).clip is None and compressor("topk", clip=2.0).clip == 2.0


def test_random_entries_differ_between_steps_and_parameters_but_not_between_processes():
    made = compressor("randomk", density=0.2)
    first = made.compress("a", torch.randn(50)).index
    again = compressor("randomk", density=0.2).compress("a", torch.randn(50)).index
    assert first.equal(again) and not first.equal(made.compress("b", torch.randn(50)).index)
    made.step = 1
    assert not first.equal(made.compress("a", torch.randn(50)).index)


def test_every_matrix_of_a_model_has_places_of_its_own():
    names = [
        f"model.layers.{i}.attention.{part}.weight" for i in range(8) for part in ("query", "key", "value", "output")
    ]
    made = compressor("randomk", density=0.1)
    drawn = {tuple(made.compress(name, torch.randn(400)).index.tolist()) for name in names}
    assert len(drawn) == len(names)
    seeds = {draw_seed(seed, step, name) for seed in range(3) for step in range(5) for name in names}
    assert len(seeds) == 15 * len(names) and all(0 <= seed < 2**63 for seed in seeds)


def state(**residuals):
    return {"step": 1, "residuals": residuals, "velocities": {}}


def test_a_state_of_another_model_is_refused():
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    made = compressor("topk")
    for load in (made.load_state_dict, lambda held: return_unsent(frozen, held, ranks=1)):
        with pytest.raises(ValueError, match="residuals must be of the model's parameters .*, got 'weight'"):
            load(state(weight=torch.zeros(6)))
    made.parameters = dict(layer.named_parameters())
    for load in (made.load_state_dict, lambda held: return_unsent(layer, held, ranks=1)):
        with pytest.raises(ValueError, match="residuals of 'weight' must have 6 entries, got 12"):
            load(state(weight=torch.zeros(12)))


def test_residuals_come_to_the_device_of_their_parameter():
    made = compressor("topk")
    made.parameters = {"w": torch.empty(3, device="meta")}
    made.load_state_dict(state(w=torch.zeros(3)))
    assert made.residuals["w"].device.type == "meta"


def test_a_future_on_an_accelerator_knows_its_device(monkeypatch):
    asked, future = [], torch.futures.Future()
    monkeypatch.setattr(torch.futures, "Future", lambda **options: asked.append(options) or future)
    promise(torch.device("cuda", 1))
    promise(torch.device("cpu"))
    assert asked == [{"devices": [torch.device("cuda", 1)]}, {}]


def test_a_checkpoint_is_not_changed_by_the_steps_after_it():
    made = compressor("dgc")
    made.parameters = {"w": torch.zeros(4)}
    made.load_state_dict(state(w=torch.ones(4)) | {"velocities": {"w": torch.ones(4)}})
    saved = made.state_dict()
    made.residuals["w"].zero_()
    made.velocities["w"].zero_()
    assert saved["residuals"]["w"].sum() == saved["velocities"]["w"].sum() == 4
    assert (saved["method"], saved["momentum"], saved["step"]) == ("dgc", 0.9, 1)


def test_what_was_not_sent_joins_one_gradient_of_one_process():
    layer = nn.Linear(3, 1, bias=False)
    left = {"model.weight": torch.tensor([1.0, 2, 3])}
    held = {"step": 4, "momentum": 0.75, "residuals": left, "velocities": {"model.weight": torch.tensor([1.0, 0, 0])}}
    return_unsent(layer, held, ranks=1)
    return_unsent(layer, None, ranks=1)
    for expected in ([[5.0, 3, 4]], [[1.0, 1, 1]]):  # 1 + (¾ / ¼) · 1 of the first
        layer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        close(layer.weight.grad, torch.tensor(expected))


def test_only_data_parallel_models_have_a_hook():
    with unchecked(), pytest.raises(TypeError, match="a DistributedDataParallel or of fully_shard, got Linear"):
        compress_gradients(nn.Linear(2, 2))
