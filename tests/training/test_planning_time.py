"""The plan's time: every message counted as the code sends it, and hidden only behind what runs beside it."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.plan_tables import GLOO, predicted, rows_of
from benchmarks.process_records import PLANS
from benchmarks.readme_tables import read
from tests.training.planned import BLOCKS, COUNTS, DENSE, built_model
from training.config import DataConfig, RunConfig, TrainConfig
from training.model_config import ModelConfig
from training.planning import HARDWARE, Assumptions, Cluster, Mesh, count_model, predict
from training.planning.counts import Dispatch
from training.planning.hardware import GB, Hardware
from training.planning.traffic import BUCKET, FIRST_BUCKET, buckets

NODE = Cluster(HARDWARE["h100"], 8, per_node=8)
PLAIN = Assumptions(overlap=0.0, imbalance=1.0)
VISIBLE = ("forward", "backward", "dispatch", "combine", "gradients", "expert gradients", "weights", "agreements",
           "optimiser")  # fmt: skip


def test_time_adds_up():
    one = predict(COUNTS, NODE, Mesh(4, "fsdp"), tokens=8000, assumptions=PLAIN)
    s = one.seconds
    assert s["forward"] == pytest.approx(1000 * 100 / (0.45 * 989e12)) and s["backward"] == 2 * s["forward"]
    total = sum(s[part] for part in VISIBLE)
    assert one.step_seconds == pytest.approx(total) and one.tokens_per_s == pytest.approx(8000 / total)
    again = predict(COUNTS, NODE, Mesh(4, "fsdp"), tokens=8000, checkpointing=True, assumptions=PLAIN)
    assert again.seconds["backward"] == 3 * s["forward"]


def test_what_takes_no_tokens_is_added():
    one, two = (
        predict(COUNTS, NODE, Mesh(1, "none"), tokens=8000, assumptions=Assumptions(host=host)) for host in (0.0, 0.5)
    )
    assert two.step_seconds == pytest.approx(one.step_seconds + 0.5) and two.seconds["host"] == 0.5
    given = Assumptions(host=1.0, host_sharded=0.1, host_spread=0.01)
    for mesh, parts, wanted in ((Mesh(1, "none"), 2, 1.0), (Mesh(1, "fsdp"), 1, 1.3), (Mesh(4, "fsdp"), 2, 1.62)):
        found = predict(COUNTS, NODE, mesh, tokens=8000, micro_batches=parts, assumptions=given)
        assert found.seconds["host"] == pytest.approx(wanted)
    for name in ("host", "host_sharded", "host_spread"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            Assumptions(**{name: -1})


def test_copies_of_fsdp_by_hand():
    """28,000 bytes of which 800 are the root's: 55,200 gathered, 28,000 reduced, at 1000 bytes/s read and written."""
    slow = Cluster(Hardware("slow", 1e9, 1e12, 1e12, 1000.0, 1e30), 4, per_node=4, near=0.0)
    plain = replace(PLAIN, read_efficiency=1.0)
    found = predict(COUNTS, slow, Mesh(1, "fsdp"), tokens=4, micro_batches=3, assumptions=plain).seconds
    assert found["weights"] == pytest.approx(3 * 2 * 55.2 * (1 / 4 + 1))
    assert found["gradients"] == pytest.approx(3 * 2 * 28)
    gloo = predict(COUNTS, slow, Mesh(1, "fsdp"), tokens=4, assumptions=replace(plain, gloo=True)).seconds
    assert gloo["weights"] == pytest.approx(2 * 55.2 * (1 / 4 + 2))
    assert gloo["gradients"] == pytest.approx(2 * 28 * (2 + 1 / 4))
    spread = predict(COUNTS, slow, Mesh(2, "fsdp"), tokens=4, assumptions=plain).seconds
    assert spread["weights"] == pytest.approx(2 * (8 - 0.8) * (1 / 4 + 1)) and spread["gradients"] == pytest.approx(8)
    whole = predict(COUNTS, slow, Mesh(1, "none"), tokens=4, assumptions=plain).seconds
    assert whole["weights"] + whole["gradients"] == pytest.approx(0)


def test_imbalance_is_of_experts_alone():
    """k/E of 6000 weights, twice for a multiply and an add: 6000 of the FLOPs of a token, of which half wait more."""
    counts = replace(COUNTS, flops=10_000.0)
    even, uneven = (
        predict(counts, NODE, Mesh(4, "none"), tokens=8000, assumptions=replace(PLAIN, imbalance=factor)).seconds
        for factor in (1.0, 1.5)
    )
    assert uneven["forward"] / even["forward"] == pytest.approx((4000 + 1.5 * 6000) / 10_000)
    for part in ("dispatch", "combine", "gradients", "optimiser"):
        assert uneven[part] == even[part]
    together = predict(counts, NODE, Mesh(1, "none"), tokens=8000, assumptions=replace(PLAIN, imbalance=1.5)).seconds
    assert together["forward"] == even["forward"]


@pytest.mark.parametrize("model", [
    {"feedforward": "moe", "hidden": 96, "num_experts": 6, "k": 2, "shared_hidden": 32},
    {"feedforward": "moe", "hidden": 64, "num_experts": 4, "k": 1, "activation": "gelu"},
    {"feedforward": "moe", "hidden": 64, "num_experts": 4, "k": 1, "depth_capacity": 0.5},
])  # fmt: skip
def test_flops_of_experts_are_what_wider_experts_add(model):
    """The experts' own share of the model's FLOPs, from a model whose experts are twice as wide."""
    model = {name: value for name, value in model.items() if name in ModelConfig.__dataclass_fields__}
    narrow, wide = (
        count_model(RunConfig(data=DataConfig(length=32), model=ModelConfig(dim=64, layers=2, **(model | change))))
        for change in ({}, {"hidden": 2 * model["hidden"]})
    )
    assert sum(one.flops for one in narrow.mixtures) == pytest.approx(wide.flops - narrow.flops)


def waits(mesh, **options):
    """Messages by part, in a node where each takes a second and bytes take nothing to speak of."""
    slow, quick = (Cluster(HARDWARE["h100"], 8, per_node=8, latency=0.0, near=near) for near in (1.0, 0.0))
    one, other = (predict(COUNTS, cluster, mesh, tokens=8000, **options).seconds for cluster in (slow, quick))
    parts = ("dispatch", "combine", "gradients", "expert gradients", "weights", "agreements")
    return {part: round(one[part] - other[part], 6) for part in parts}


def test_messages_by_hand():
    layers, mixtures = COUNTS.layers, len(COUNTS.mixtures)
    # a ring of 8: 7 steps to reduce, 7 to gather; 2 copies of two tensors of experts, and which of them there are
    replicated = {"gradients": 14, "weights": 0, "expert gradients": 3 * 2, "agreements": 4 * 14}
    # a mixture layer: 4 exchanges forward and 2 backward with 3 others to dispatch, one each to combine
    assert waits(Mesh(4, "none")) == replicated | {"dispatch": mixtures * 6 * 3, "combine": mixtures * 2 * 3}
    found = waits(Mesh(4, "fsdp"), micro_batches=2, checkpointing=True)
    gathers = 2 * (2 * layers + 1) * 7
    assert found == replicated | {
        "dispatch": 2 * mixtures * 10 * 3, "combine": 2 * mixtures * 3 * 3, "gradients": 2 * (layers + 1) * 7,
        "weights": gathers}  # fmt: skip


def test_every_bucket_and_every_expert_tensor_waits():
    large = replace(COUNTS, tensors=((30 * 2**20, False), (100, False), (2**22, False), (2**22, True)))
    # from the last parameter: 16 MiB fill the first bucket, 120 MiB and a little the second; 16 MiB of experts between
    assert buckets(large, Mesh(4, "none")) == [2**24, 400 + 120 * 2**20]
    assert buckets(large, Mesh(1, "none")) == [2**24, 2**24 + 400 + 120 * 2**20]
    small = replace(COUNTS, tensors=((10, False),) * 3)
    assert buckets(small, Mesh(1, "none")) == [120]


@pytest.mark.parametrize("model", [
    {"feedforward": "dense", "hidden": 4096, "layers": 5},
    {"feedforward": "moe", "hidden": 512, "num_experts": 8, "k": 2, "layers": 3},
])  # fmt: skip
def test_buckets_are_those_of_torch(model):
    config = RunConfig(data=DataConfig(length=32), train=TrainConfig(batch=8), model=ModelConfig(dim=512, **model))
    with torch.device("meta"):
        parameters = list(built_model(config, 5000).parameters())[::-1]
    assigned, _ = dist._compute_bucket_assignment_by_size(parameters, [FIRST_BUCKET, BUCKET])
    sizes = [sum(4 * parameters[index].numel() for index in bucket) for bucket in assigned]
    assert len(sizes) > 2 and buckets(count_model(config, vocab_size=5000), Mesh(1, "none")) == sizes


def test_what_runs_beside_a_pass_is_hidden_behind_that_pass():
    slow = Cluster(HARDWARE["h100"], 8, per_node=8, near=1e-4)

    def found(mesh, **options):
        given = replace(PLAIN, overlap=1.0)
        return predict(COUNTS, slow, mesh, assumptions=given, **options).seconds

    # gradients of spread experts are reduced when the backward pass is over, however long it was
    long = found(Mesh(4, "none"), tokens=8 * 10**12)
    assert long["exposed"] == 0 and long["gradients"] > 0 and long["expert gradients"] > 0
    whole = predict(COUNTS, slow, Mesh(4, "none"), tokens=8 * 10**12, assumptions=replace(PLAIN, overlap=1.0))
    assert whole.step_seconds == pytest.approx(sum(long[part] for part in VISIBLE) - long["gradients"])
    # replicated gradients are reduced in the last micro-batch alone
    tokens = 8 * 10**9
    one, four = (found(Mesh(1, "none"), tokens=tokens, micro_batches=parts) for parts in (1, 4))
    assert one["backward"] == four["backward"] and one["gradients"] == four["gradients"]
    assert four["exposed"] == pytest.approx(max(0.0, four["gradients"] - four["backward"] / 4))
    assert (
        one["exposed"] == pytest.approx(max(0.0, one["gradients"] - one["backward"]))
        and one["exposed"] < four["exposed"]
    )
    # FSDP2, in each of 4 micro-batches: 3 gathers forward and 2 backward, and 3 reductions, each behind its pass
    sharded = found(Mesh(1, "fsdp"), tokens=tokens, micro_batches=4)
    ahead, back = 3 / 5 * sharded["weights"], 2 / 5 * sharded["weights"] + sharded["gradients"]
    wanted = max(0.0, ahead - sharded["forward"]) + max(0.0, back - sharded["backward"])
    assert sharded["exposed"] == pytest.approx(wanted) and wanted > 0


def test_rings_and_trees_are_those_of_the_sources():
    """T = 2 (R - 1) (alpha + n / (R beta)) in a node; over nodes N - 1 of R - 1 steps are long ones, or trees."""
    near = Cluster(HARDWARE["h100"], 8, per_node=8, near=2e-6)
    size, link = 1e8, HARDWARE["h100"].link
    assert near.all_reduce(size, 8) == pytest.approx(2 * 7 * (2e-6 + size / 8 / link))
    assert near.pass_on(size, 8) == pytest.approx(near.all_reduce(size, 8) / 2)
    assert near.all_reduce(size, 1) == near.once_round(1) == near.knocks(1) == 0
    far = Cluster(HARDWARE["h100"], 64, per_node=8, network=5 * GB, latency=1e-5, near=2e-6)
    assert far.nodes(64) == 8 and far.once_round(64) == pytest.approx(7 * 1e-5 + 56 * 2e-6)
    assert far.nodes(8, apart=8) == 8 and far.nodes(4, apart=2) == 1 and far.nodes(32, apart=2) == 8
    # many bytes: a ring; few: trees of 7 steps in a node and 3 between 8 of them
    assert far.all_reduce(1e11, 64) == pytest.approx(2 * (7e-5 + 56 * 2e-6 + 63 / 64 * 1e11 / (40 * GB)))
    assert far.all_reduce(1.0, 64) == pytest.approx(2 * (7 * 2e-6 + 3 * 1e-5), rel=1e-3)
    assert far.knocks(16) == pytest.approx(7 * 2e-6 + 8 * 1e-5)


def test_latency_of_many_buckets_is_felt_where_ranks_are_many():
    """6.5 billion weights: 1000 buckets of 25 MiB, each a tree over 8 nodes; once for all was a thousandth."""
    tensors = ((6_553_600, False),) * 1000
    counts = replace(DENSE, dense=6_553_600_000, root=0, tensors=tensors)
    still, quick = (Cluster(HARDWARE["h100"], 64, per_node=8, latency=l, near=l) for l in (1e-5, 0.0))
    one, other = (predict(counts, c, Mesh(1, "none"), tokens=64).seconds["gradients"] for c in (still, quick))
    assert one - other == pytest.approx(1000 * 2 * (7 + 3) * 1e-5, rel=0.05)


def test_volume_is_that_of_zero():
    """Without a root, 2 psi by a replicated rank, 3 psi by a sharded one (Rajbhandari et al. 2020, section 7)."""
    counts = replace(DENSE, root=0, tensors=((1000, False),))
    whole, sharded = (predict(counts, NODE, Mesh(1, shard), tokens=64).sent for shard in ("none", "fsdp"))
    assert sum(whole.values()) == pytest.approx(2 * 4 * 1000 * 7 / 8)
    assert sum(sharded.values()) == pytest.approx(3 * 4 * 1000 * 7 / 8)


def test_a_layer_that_few_tokens_pass_sends_few_rows():
    halved = replace(COUNTS, blocks=(replace(BLOCKS[0], mixture=Dispatch(4, 2, 6000, share=0.5)), BLOCKS[1]))
    whole, half = (predict(counts, NODE, Mesh(4, "none"), tokens=8000).sent for counts in (COUNTS, halved))
    assert half["dispatch"] == pytest.approx(whole["dispatch"] / 2)
    assert half["notes"] - 48 == pytest.approx((whole["notes"] - 48) / 2)


def test_notes_are_what_was_counted_on_the_wire():
    """Beside rows, a rank of experts sent counts, places and weights, and a few hundred bytes of norms and metrics."""
    lines = [line for line in rows_of(read(PLANS)) if line["expert_parallel"] > 1]
    assert lines
    for line in lines:
        plan = predicted(line, GLOO)
        assert line["sent"]["other"] == pytest.approx(plan.sent["notes"], rel=0.06)
