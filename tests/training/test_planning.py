"""The plan against hand-worked numbers, against real routings, and against what a model really keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe.expert_parallel import shares
from tests.training.planned import BLOCKS, COUNTS, DENSE, built_model
from training.config import DataConfig, RunConfig, TrainConfig, load_config
from training.model_config import LayerOverride, ModelConfig
from training.planning import HARDWARE, Assumptions, Cluster, Mesh, count_model, meshes, predict
from training.planning.command import PlanArguments, plan_command
from training.planning.counts import Dispatch
from training.planning.hardware import GB


@pytest.mark.parametrize("experts, k, ranks", [(8, 2, 4), (7, 3, 3), (4, 4, 2), (5, 1, 5), (6, 2, 1)])
def test_rows_that_leave_are_those_of_uniform_routings(experts, k, ranks):
    """The mean over the senders' ranks of how many other ranks own one of a token's experts."""
    draws = torch.Generator().manual_seed(0)
    bounds = torch.tensor(shares(experts, ranks))
    chosen = torch.rand(20_000, experts, generator=draws).argsort(1)[:, :k]
    owner = torch.searchsorted(bounds, chosen.contiguous(), right=True) - 1
    touched = torch.zeros(len(chosen), ranks).scatter_(1, owner, 1.0)
    others = sum(float(touched.sum(1).mean() - touched[:, rank].mean()) for rank in range(ranks)) / ranks
    assert Dispatch(experts, k, 1).other_ranks(ranks) == pytest.approx(others, rel=0.02, abs=1e-9)


def test_bytes_by_hand():
    cluster = Cluster(HARDWARE["h100"], 4, per_node=4)
    whole = predict(COUNTS, cluster, Mesh(1, "none"), tokens=400)
    nothing = {"expert gradients": 0, "dispatch": 0, "combine": 0, "notes": 0}
    assert whole.sent == {"gradients": 4 * 7000 * 1.5, "weights": 0} | nothing
    sharded = predict(COUNTS, cluster, Mesh(1, "fsdp"), tokens=400, micro_batches=2, checkpointing=True, half=False)
    assert sharded.sent["gradients"] == 2 * 4 * 7000 * 0.75
    assert sharded.sent["weights"] == 2 * 4 * (2 * 7000 - 200) * 0.75
    gloo = predict(COUNTS, cluster, Mesh(1, "fsdp"), tokens=400, assumptions=Assumptions(gloo=True))
    assert gloo.sent["gradients"] == whole.sent["gradients"]
    spread = predict(COUNTS, cluster, Mesh(2, "none"), tokens=400)
    assert spread.sent["expert gradients"] == 4 * 3000 * 2 * 0.5
    # of 6 pairs of 4 experts one leaves the other rank's two alone; each way rows, then their gradients
    assert spread.sent["dispatch"] == spread.sent["combine"] == pytest.approx(2 * (5 / 6) * 100 * 8 * 2)
    # half of 200 assignments: place and expert, weight, its gradient; and four counts
    assert spread.sent["notes"] == 100 * (16 + 4 + 4) + 16


def test_fsdp_reduces_in_every_micro_batch_and_keeps_a_shard():
    cluster = Cluster(HARDWARE["h100"], 4, per_node=4)
    one, four = (predict(COUNTS, cluster, Mesh(2, "fsdp"), tokens=400, micro_batches=parts) for parts in (1, 4))
    assert four.sent["gradients"] == 4 * one.sent["gradients"] == 4 * 4 * 1000 * 0.75
    assert four.memory["weights and moments"] == one.memory["weights and moments"] == 12 * (1000 / 4 + 3000)
    whole = [predict(COUNTS, cluster, Mesh(2, "none"), tokens=400, micro_batches=parts).sent for parts in (1, 4)]
    assert whole[0]["gradients"] == whole[1]["gradients"]


def test_a_forward_pass_computed_again_sends_its_rows_again():
    cluster = Cluster(HARDWARE["h100"], 8, per_node=8)
    once, again = (predict(COUNTS, cluster, Mesh(4, "none"), tokens=8000, checkpointing=c).sent for c in (False, True))
    for kind in ("dispatch", "combine"):
        assert again[kind] == pytest.approx(1.5 * once[kind])
    assert again["gradients"] == once["gradients"] and again["notes"] == pytest.approx(
        44 / 24 * once["notes"], rel=0.01
    )


def test_a_reserve_is_left():
    """A rank whose memory is all but full does not fit; with the reserve of 8% beside it does."""
    mesh, held = Mesh(1, "none"), predict(COUNTS, Cluster(HARDWARE["h100"], 1), Mesh(1, "none"), tokens=400)

    def fits(memory):
        return predict(COUNTS, Cluster.named("h100", 1, memory=memory), mesh, tokens=400).fits

    assert not fits(1.01 * held.memory_total) and not fits(1.08 * held.memory_total)
    assert fits(1.09 * held.memory_total)


def test_slow_networks_are_felt_between_nodes_only():
    near, far = (Cluster.named("h100", gpus, per_node=8, network=5 * GB) for gpus in (8, 16))
    assert near.ring(8) == near.pairwise(8) == HARDWARE["h100"].link
    assert far.ring(16) == 40 * GB and far.ring(2, apart=8) == 5 * GB
    assert far.pairwise(8) == HARDWARE["h100"].link and far.pairwise(16) < 10 * GB


def run_config(**model):
    return RunConfig(data=DataConfig(length=32), train=TrainConfig(batch=8), model=ModelConfig(dim=64, **model))


@pytest.mark.parametrize("model", [
    {"feedforward": "dense", "hidden": 192, "layers": 3},
    {"feedforward": "moe", "hidden": 96, "num_experts": 6, "k": 2, "layers": 2, "heads": 4, "kv_heads": 2},
    {"feedforward": "moe", "hidden": 64, "num_experts": 4, "k": 1, "shared_hidden": 64, "activation": "gelu"},
    {"feedforward": "moe", "hidden": 64, "num_experts": 4, "k": 1, "activation": "relu", "expert_bias": True},
    {"feedforward": "product_key", "num_keys": 32, "memory_pool": "a", "layers": 3},
])  # fmt: skip
def test_counts_are_those_of_the_model(model):
    config = run_config(**model)
    counts = count_model(config, vocab_size=500)
    built = built_model(config, 500)
    assert counts.dense + counts.experts == built.num_parameters()
    assert counts.flops == built.flops_per_token(32)
    experts = [p for name, p in built.named_parameters() if ".experts." in name]
    assert counts.experts == sum(p.numel() for p in experts)
    k, num_experts = config.model.k, config.model.num_experts
    assert sum(m.flops for m in counts.mixtures) == 2 * k / num_experts * sum(p.numel() for p in experts if p.ndim == 3)
    assert counts.root == sum(p.numel() for name, p in built.named_parameters() if not name.startswith("layers."))
    assert counts.root > 0 and counts.root + sum(block.weights for block in counts.blocks) == counts.dense


def test_a_shared_table_is_the_last_layers_that_reads_it():
    """Whose backward pass forms its gradient first; the other layers have one of their own or the same."""
    pooled = [{"at": at, "feedforward": "product_key", "memory_pool": "a"} for at in (0, 2)]
    config = run_config(feedforward="dense", layers=4, num_keys=32, layer=tuple(LayerOverride(**o) for o in pooled))
    counts = count_model(config, vocab_size=500)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in built_model(config, 500).layers]
    assert [block.weights for block in counts.blocks] == [sizes[0] - 32**2 * 64, *sizes[1:]]
    assert counts.tables == 32**2 * 64


def test_meshes_leave_no_rank_without_experts():
    assert {mesh.expert for mesh in meshes(COUNTS, 8)} == {1, 2, 4}
    assert {str(mesh) for mesh in meshes(DENSE, 1)} == {"expert_parallel=1, shard=none"}


def test_the_command_ranks_meshes_and_says_what_does_not_fit(tmp_path, capsys):
    file = Path("examples/configs/stdlib-moe.toml")
    found = plan_command(PlanArguments(file, gpus=4, batch=16), Console(quiet=True))
    fitting = [one.step_seconds for one in found if one.fits]
    assert fitting == sorted(fitting) and len(found) == len(meshes(count_model(load_config(file)), 4))
    console = Console(record=True, width=120)
    plan_command(PlanArguments(file, gpus=4, batch=16, memory=0.01), console)
    assert "nothing fits 0 GB" in console.export_text()
    capsys.readouterr()
    plan_command(PlanArguments(file, gpus=4, batch=16, as_json=True), Console())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step_seconds"] for line in lines] == [one.step_seconds for one in found]


@pytest.mark.parametrize("change, message", [
    ({"gpu": "h10"}, "did you mean 'h100'"),
    ({"gpus": 12}, "gpus must fill whole nodes of 8, got 12"),
    ({"gpus": 3}, "batch must be a multiple of gpus=3, got 16"),
    ({"bandwidth": 0.0}, "bandwidth must be positive, got 0.0"),
    ({"gpus": 0}, "gpus must be at least 1, got 0"),
    ({"efficiency": 1.5}, r"efficiency must be in \(0, 1\], got 1.5"),
    ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
    ({"imbalance": float("nan")}, "imbalance must be at least 1, got nan"),
    ({"memory": -1.0}, "memory must be positive, got -1 GB"),
])  # fmt: skip
def test_bad_input(change, message):
    arguments = replace(PlanArguments(Path("examples/configs/stdlib-moe.toml"), gpus=4, batch=16), **change)
    with pytest.raises(ValueError, match=message):
        plan_command(arguments, Console(quiet=True))


def test_bad_meshes():
    cluster = Cluster(HARDWARE["h100"], 4, per_node=4)
    with pytest.raises(ValueError, match="expert_parallel must divide gpus=4, got 3"):
        predict(COUNTS, cluster, Mesh(3, "none"), tokens=4)
    with pytest.raises(ValueError, match="expert_parallel must be 1 for a model without experts, got 2"):
        predict(DENSE, cluster, Mesh(2, "none"), tokens=4)
    with pytest.raises(ValueError, match="expert_parallel must divide num_experts=6, got 4"):
        predict(
            replace(COUNTS, blocks=(replace(BLOCKS[0], mixture=Dispatch(6, 2, 6000)),)),
            cluster,
            Mesh(4, "none"),
            tokens=4,
        )
