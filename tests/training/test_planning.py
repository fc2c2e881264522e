"""The plan against hand-worked numbers, against real routings, and against what a model really keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe.expert_parallel import shares
from training.config import DataConfig, RunConfig, TrainConfig, load_config
from training.model_config import ModelConfig
from training.planning import HARDWARE, Cluster, Mesh, count_model, meshes, predict
from training.planning.command import PlanArguments, plan_command
from training.planning.counts import Dispatch, ModelCounts, transformer_config
from training.planning.hardware import GB
from training.planning.predict import Assumptions
from transformer import Transformer

COUNTS = ModelCounts(dim=8, layers=2, dense=1000, root=200, largest=400, mixtures=(Dispatch(4, 2, 6000),), flops=100.0,
                     activations=(50.0, 20.0), boundary=(0.0, 32.0), block=(25.0, 10.0), vocabulary=50)  # fmt: skip


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


def test_bytes_and_memory_by_hand():
    cluster = Cluster(HARDWARE["h100"], 4, per_node=4)
    whole = predict(COUNTS, cluster, Mesh(1, "none"), tokens=400)
    assert whole.memory == {
        "weights, gradients, moments": 16 * 7000, "gradient buckets": 4 * 7000, "activations": 100 * (2 * 50 + 4 * 20),
        "logits": 8 * 100 * 50}  # fmt: skip
    assert whole.sent == {"gradients": 4 * 7000 * 1.5, "weights": 0, "expert gradients": 0, "all-to-all": 0}
    sharded = predict(COUNTS, cluster, Mesh(1, "fsdp"), tokens=400, micro_batches=2, checkpointing=True, half=False)
    assert sharded.memory == {
        "weights, gradients, moments": 16 * 7000 / 4, "gathered weights": 8 * (400 + 6000),
        "gathered gradients": 8 * (400 + 6000),
        "activations": 50 * (4 * 25 + 4 * 42),
        "logits": 8 * 50 * 50}  # fmt: skip
    assert sharded.sent["gradients"] == 4 * 7000 * 0.75 and sharded.sent["weights"] == 2 * 4 * (2 * 7000 - 200) * 0.75
    gloo = predict(COUNTS, cluster, Mesh(1, "fsdp"), tokens=400, assumptions=Assumptions(reduce_scatter=False))
    assert gloo.sent["gradients"] == whole.sent["gradients"]
    spread = predict(COUNTS, cluster, Mesh(2, "none"), tokens=400)
    assert spread.memory["weights, gradients, moments"] == 16 * (1000 + 3000)
    assert spread.sent["expert gradients"] == 4 * 3000 * 2 * 0.5
    # of 6 pairs of 4 experts one leaves the other rank's two alone
    assert spread.sent["all-to-all"] == pytest.approx(4 * (5 / 6) * 100 * 8 * 2)


def test_time_adds_up():
    cluster = Cluster(HARDWARE["h100"], 8, per_node=8)
    given = Assumptions(overlap=0.0, imbalance=1.0)
    one = predict(COUNTS, cluster, Mesh(4, "fsdp"), tokens=8000, assumptions=given)
    s = one.seconds
    assert s["forward"] == pytest.approx(1000 * 100 / (0.45 * 989e12)) and s["backward"] == 2 * s["forward"]
    total = sum(s[part] for part in ("forward", "backward", "all-to-all", "gradients", "weights", "optimiser"))
    assert one.step_seconds == pytest.approx(total) and one.tokens_per_s == pytest.approx(8000 / total)
    hidden = predict(COUNTS, cluster, Mesh(4, "fsdp"), tokens=8000, assumptions=replace(given, overlap=1.0))
    assert hidden.step_seconds < one.step_seconds
    again = predict(COUNTS, cluster, Mesh(4, "fsdp"), tokens=8000, checkpointing=True, assumptions=given)
    assert again.seconds["backward"] == 3 * s["forward"]


def test_messages_by_hand():
    slow, quick = (Cluster(HARDWARE["h100"], 8, per_node=8, latency=latency) for latency in (1.0, 0.0))

    def waits(mesh, **options):
        one, other = (predict(COUNTS, cluster, mesh, tokens=8000, **options).seconds for cluster in (slow, quick))
        return {part: round(one[part] - other[part], 6) for part in ("all-to-all", "gradients", "weights")}

    layers, mixtures = COUNTS.layers, len(COUNTS.mixtures)
    # a mixture layer: 5 exchanges forward and 3 backward with 3 others; a ring of 8: 7 steps to reduce, 7 to gather
    assert waits(Mesh(4, "none")) == {"all-to-all": mixtures * 8 * 3, "gradients": 14, "weights": 0}
    twice = waits(Mesh(4, "fsdp"), micro_batches=2, checkpointing=True)
    gathers = 2 * (2 * layers + 1) * 7
    assert twice == {"all-to-all": 2 * mixtures * 13 * 3, "gradients": (layers + 1) * 7, "weights": gathers}


def test_a_forward_pass_computed_again_sends_its_rows_again():
    cluster = Cluster(HARDWARE["h100"], 8, per_node=8)
    once, again = (predict(COUNTS, cluster, Mesh(4, "none"), tokens=8000, checkpointing=c).sent for c in (False, True))
    assert again["all-to-all"] == pytest.approx(1.5 * once["all-to-all"]) and again["gradients"] == once["gradients"]


def test_what_takes_no_tokens_is_added():
    cluster = Cluster(HARDWARE["h100"], 8, per_node=8)
    one, two = (
        predict(COUNTS, cluster, Mesh(1, "none"), tokens=8000, assumptions=Assumptions(host=host))
        for host in (0.0, 0.5)
    )
    assert two.step_seconds == pytest.approx(one.step_seconds + 0.5) and two.seconds["host"] == 0.5
    with pytest.raises(ValueError, match="host must be at least 0, got -1"):
        Assumptions(host=-1)


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
])  # fmt: skip
def test_counts_are_those_of_the_model(model):
    config = run_config(**model)
    counts = count_model(config, vocab_size=500)
    built = Transformer(transformer_config(config, 500))
    assert counts.dense + counts.experts == built.num_parameters()
    assert counts.flops == built.flops_per_token(32)
    experts = [p for name, p in built.named_parameters() if ".experts." in name]
    assert counts.experts == sum(p.numel() for p in experts)
    assert counts.root == sum(p.numel() for name, p in built.named_parameters() if not name.startswith("layers."))


@pytest.mark.parametrize("model", [
    {"feedforward": "dense", "hidden": 192, "layers": 3},
    {"feedforward": "moe", "hidden": 128, "num_experts": 6, "k": 2, "layers": 3},
])  # fmt: skip
def test_activations_are_about_what_the_model_keeps(model):
    """Bytes of distinct tensors that autograd saves, weights aside, within a tenth of the prediction."""
    config = run_config(**model)
    counts, built = count_model(config, vocab_size=500), Transformer(transformer_config(config, 500))
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(500, (8, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = built.hidden_states(ids)[0]
    work, wide = counts.activations
    assert sum(kept.values()) / ids.numel() == pytest.approx(4 * (work + wide), rel=0.1)
    assert hidden.requires_grad


def test_meshes_leave_no_rank_without_experts():
    assert {mesh.expert for mesh in meshes(COUNTS, 8)} == {1, 2, 4}
    assert {str(mesh) for mesh in meshes(replace(COUNTS, mixtures=()), 1)} == {"expert_parallel=1, shard=none"}


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
    ({"efficiency": 1.5}, r"efficiency must be in \(0, 1\], got 1.5"),
    ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
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
        predict(replace(COUNTS, mixtures=()), cluster, Mesh(2, "none"), tokens=4)
