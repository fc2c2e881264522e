"""The plan's memory against what autograd really keeps, in both precisions, and against published formulas."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.training.planned import COUNTS, built_model
from training.config import DataConfig, RunConfig, TrainConfig
from training.data import Batch
from training.model_config import ModelConfig
from training.optim import make_optimizers
from training.planning import HARDWARE, Cluster, Mesh, count_model, predict
from training.planning.assumptions import Work
from training.planning.counts import block_activations
from training.planning.memory import _Rank
from training.step import accumulate, forward
from transformer.feedforward_config import DenseConfig
from transformer.layer_config import AttentionConfig, LayerConfig

VOCABULARY = 500


def run_config(*, length, batch, checkpointing=False, **model):
    return RunConfig(data=DataConfig(length=length), train=TrainConfig(batch=batch, checkpointing=checkpointing),
                     model=ModelConfig(dim=128, **model))  # fmt: skip


def kept_bytes(config, *, half):
    """Bytes of distinct tensors that autograd saves in a forward pass of the trainer, parameters aside."""
    model = built_model(config, VOCABULARY).train()
    model.gradient_checkpointing(config.train.checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(VOCABULARY, (config.train.batch, config.data.length + 1))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = forward(model, Batch(ids[:, :-1], ids[:, 1:]))
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def planned_bytes(config, *, half):
    """What the plan counts of the same: activations, copies, and of the head its gradient and copy."""
    counts = count_model(config, vocab_size=VOCABULARY)
    work = Work(config.train.batch * config.data.length, half=half)
    held = _Rank(counts, 1, Mesh(1, "none"), work, gloo=False).loss()
    assert held["head"] == (6 if half else 4) * VOCABULARY * counts.dim
    return held["activations"] + held.get("bfloat16 weights", 0.0) + 4 * VOCABULARY * counts.dim


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("model", [
    {"feedforward": "dense", "hidden": 512, "layers": 3, "length": 32},
    {"feedforward": "dense", "hidden": 512, "layers": 3, "length": 128},
    {"feedforward": "dense", "hidden": 300, "layers": 2, "heads": 4, "kv_heads": 2, "activation": "gelu", "length": 64},
    {"feedforward": "moe", "hidden": 256, "num_experts": 8, "k": 2, "layers": 3, "length": 128},
    {"feedforward": "moe", "hidden": 128, "num_experts": 4, "k": 1, "layers": 2, "shared_hidden": 64, "length": 128},
])  # fmt: skip
def test_memory_is_about_what_a_step_keeps(model, half):
    """Within a tenth, copies of weights in bfloat16 and the head's gradient included."""
    torch.manual_seed(0)
    config = run_config(batch=8, **model)
    assert kept_bytes(config, half=half) == pytest.approx(planned_bytes(config, half=half), rel=0.1)


def test_copies_are_a_large_part_of_what_short_batches_keep():
    """The test above would not pass without them."""
    torch.manual_seed(0)
    config = run_config(batch=2, length=32, feedforward="dense", hidden=512, layers=3)
    counts = count_model(config, vocab_size=VOCABULARY)
    assert counts.copied == 3 * (4 * 128 * 128 + 3 * 128 * 512)
    kept = kept_bytes(config, half=True)
    assert kept == pytest.approx(planned_bytes(config, half=True), rel=0.1) and 2 * counts.copied > 0.4 * kept


@pytest.mark.parametrize("model", [
    {"feedforward": "moe", "hidden": 64, "num_experts": 48, "k": 1, "shared_hidden": 96},
    {"feedforward": "product_key", "num_keys": 16, "gated": True, "value_dim": 48},
    {"feedforward": "product_key", "num_keys": 24, "memory_pool": "a"},
    {"feedforward": "peer", "num_keys": 24},
    {"feedforward": "soft_moe", "hidden": 70, "num_experts": 3, "allow_future": True},
    {"feedforward": "thresholded", "hidden": 300},
    {"feedforward": "dense", "hidden": 300, "depth_capacity": 0.5},
    {"feedforward": "dense", "hidden": 300, "selection": "dsa", "select_k": 4, "select_heads": 2},
    {"feedforward": "dense", "hidden": 300, "selection": "nsa", "select_block": 4, "select_stride": 2},
    {"feedforward": "dense", "hidden": 300, "selection": "sinkhorn", "select_block": 4},
])  # fmt: skip
def test_copied_weights_are_those_that_autograd_keeps_in_bfloat16(model):
    """By value: of projections, dense layers and the shared expert, but neither of what stays float32 (routers, keys
    and tables of memories, indexers), nor of experts."""
    config = run_config(batch=2, length=16, layers=2, **model)
    model = built_model(config, VOCABULARY).train()
    # a shared expert is a stack of one
    halves = [weight.detach().bfloat16().squeeze(0) for weight in model.parameters()]
    found: set[int] = set()

    def pack(tensor):
        for index, half in enumerate(halves):
            for turned in (tensor, tensor.mT if tensor.dim() > 1 else tensor):
                if turned.dtype == half.dtype and turned.shape == half.shape and torch.equal(turned, half):
                    found.add(index)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.hidden_states(torch.randint(VOCABULARY, (2, 16)))
    counts = count_model(config, vocab_size=VOCABULARY)
    assert counts.copied == sum(halves[index].numel() for index in found) > 0


@pytest.mark.parametrize("half", [False, True])
def test_checkpointed_blocks_keep_one_residual(half):
    config = run_config(batch=8, length=64, checkpointing=True, feedforward="dense", hidden=512, layers=6)
    counts = count_model(config, vocab_size=VOCABULARY)
    wanted = 4 * (8 * 64 * (6 + 2) * counts.dim + VOCABULARY * counts.dim)
    assert kept_bytes(config, half=half) == pytest.approx(wanted, rel=0.1)


def test_activations_are_those_of_megatron():
    """34 bytes a token and number of the width (Korthikanti et al. 2022, arXiv:2205.05198, equation 1) for a block with
    16-bit numbers, hidden = 4 dim, without the 5 a s / h of scores that are kept: less two dropout masks, and more
    for the float32 inputs of both norms, the unmerged output of attention, and the log-sum-exp of each head."""
    dim, heads = 768, 12
    attention = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=dim // heads)
    work, wide = block_activations(dim, LayerConfig(attention, DenseConfig(hidden=4 * dim, activation="gelu")))
    assert 2 * work + 4 * wide == (34 - 2 + 2 * 2 + 2) * dim + 4 * heads


def test_weights_are_those_of_zero():
    """16 bytes a weight; over N ranks 16 / N (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1, K = 12)."""
    config = run_config(batch=8, length=32, feedforward="dense", hidden=512, layers=3)
    counts = count_model(config, vocab_size=VOCABULARY)
    for ranks in (1, 4, 64):
        held = rank(counts, ranks, "fsdp" if ranks > 1 else "none", tokens=64).end()
        own = held["weights and moments"] + held["gradients"]
        beside = 0 if ranks > 1 else 4 * VOCABULARY * 128  # a tied embedding's second part
        assert own - beside == pytest.approx((2 + 2 + 12) * counts.dense / ranks)


def test_tables_of_memories_have_one_moment_a_weight():
    """Against the tensors of the trainer's optimisers after a step; RowwiseAdam's second moment is one a row."""
    config = run_config(batch=2, length=16, feedforward="product_key", num_keys=24, memory_pool="a", layers=2)
    model, counts = built_model(config, VOCABULARY).train(), count_model(config, vocab_size=VOCABULARY)
    optimizers = make_optimizers(model, lr=1e-3)
    ids = torch.randint(VOCABULARY, (2, 17))
    accumulate(model, Batch(ids[:, :-1], ids[:, 1:]))
    optimizers.step()
    both = [optimizer for optimizer in (optimizers.main, optimizers.tables) if optimizer is not None]
    states = [state for optimizer in both for state in optimizer.state.values()]
    kept = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    planned = rank(counts, 1, "none", tokens=32).always()["weights and moments"]
    assert len(both) == 2 and planned == 4 * counts.dense + kept - 4 * 24**2


def rank(counts, ranks, shard, *, tokens, expert=1, gloo=False, **work):
    return _Rank(counts, ranks, Mesh(expert, shard), Work(tokens, **work), gloo)


def test_moments_by_hand():
    """100 tokens a rank of 7000 weights, blocks of 6400 and 400 and 200 outside; logits 50 and head 400 a product."""
    one = rank(COUNTS, 1, "none", tokens=100, half=False)
    kept = [4 * 100 * (30 + 2), 4 * 100 * (20 + 2)]
    ends, head = 4 * 100 * 2 * 8, 4 * 400
    always = {"weights and moments": 12 * 7000}
    assert one.loss() == always | {"activations": ends + sum(kept), "gradients": 0, "gathered weights": 0,
                                   "logits": 8 * 100 * 50, "head": head}  # fmt: skip
    inner = [4 * 100 * (5 + 16), 4 * 100 * (7 + 16)]
    assert one.backward(1) == always | {"activations": ends + sum(kept) + inner[1], "gradients": 4 * 400 + head}
    assert one.backward(0) == always | {"activations": ends + kept[0] + inner[0], "gradients": 4 * 6800 + head}
    assert one.end() == always | {"gradients": 4 * 7000 + head}
    found = predict(COUNTS, Cluster(HARDWARE["h100"], 1), Mesh(1, "none"), tokens=100, half=False)
    assert found.moment == "loss" and found.memory == one.loss()
    small = predict(COUNTS, Cluster(HARDWARE["h100"], 1), Mesh(1, "none"), tokens=1, half=False)
    assert small.moment == "end" and small.memory == one.end()


def test_moments_in_half_precision_and_micro_batches_by_hand():
    """Copies of matrices, a router's float32 input; gradients of earlier micro-batches at every moment."""
    two = rank(COUNTS, 2, "none", tokens=200, micro_batches=2)
    kept = [100 * (2 * 30 + 4 * (2 + 8)), 100 * (2 * 20 + 4 * 2)]
    always = {"weights and moments": 12 * 7000, "gradient buckets": 4 * 7000}
    found = two.loss()
    assert found == always | {
        "activations": 4 * 100 * 16 + sum(kept), "bfloat16 weights": 2 * 700, "gradients": 4 * 7000,
        "gathered weights": 0, "logits": 8 * 100 * 50, "head": 6 * 400}  # fmt: skip
    assert two.backward(1)["gradients"] == 4 * (7000 + 400 + 400)
    # a chunk of few logits: the head's gradient from it is the larger second part
    few = rank(COUNTS, 1, "none", tokens=2)
    assert few.loss()["logits"] == (4 + 2) * 2 * 50 + 2 * 400
    # a head of its own is no second part of the embedding's gradient, but that of an earlier micro-batch is
    untied = replace(COUNTS, root=800, dense=1600)
    ends = [rank(untied, 1, "none", tokens=200, micro_batches=parts).end()["gradients"] for parts in (1, 2)]
    assert ends == [4 * 7600, 4 * (7600 + 400)]
    again = rank(COUNTS, 1, "none", tokens=100, checkpointing=True).backward(1)
    assert again["bfloat16 weights"] == 2 * 400
    assert again["activations"] == 100 * 4 * 8 * (2 + 2) + kept[1] + 2 * 100 * (7 + 16)


def test_buffers_of_fsdp_by_hand():
    """Blocks of 25,600 and 1,600 bytes, 800 outside them, over 4 ranks."""
    large, small, root, head = 25_600, 1_600, 800, 1_600
    shards = {"weights and moments": 12 * 7000 / 4}
    sharded = rank(COUNTS, 4, "fsdp", tokens=100, half=False)
    assert sharded.loss()["gathered weights"] == root
    # the last block: in use, with the first one's buffer on its way; its gradient, and that of the head
    last = sharded.backward(1)
    assert last | shards == last and last["gradients"] == 0
    assert last["gathered weights"] == root + small + large and last["gathered gradients"] == head + small
    # the first: nothing comes after it, but the last one's reduced buffer is still there
    first = sharded.backward(0)
    assert first["gathered weights"] == root + large and first["gathered gradients"] == head + small + large
    assert first["gradients"] == small / 4
    # forward: parameters beside their buffer; or, of a small block, its buffer beside the large one before it
    assert sharded.gathering(0)["gathered weights"] == root + 2 * large
    assert sharded.gathering(1)["gathered weights"] == root + large + small
    staged = rank(COUNTS, 4, "fsdp", tokens=100, half=False, gloo=True)
    assert staged.gathering(1)["gathered weights"] == root + large + 2 * small
    assert staged.backward(1)["gathered gradients"] == head + large
    assert sharded.end()["gathered gradients"] == root + head + large and sharded.end()["gradients"] == 7000


def test_spread_experts_are_divided_into_a_copy():
    """Two ranks of 3000 expert weights each: rows of 5/6 of the tokens come, own ones are kept besides."""
    spread = rank(COUNTS, 2, "none", tokens=100, expert=2, half=False)
    assert spread.loss()["weights and moments"] == 12 * (1000 + 3000)
    assert spread.loss()["gradient buckets"] == 4 * 1000
    kept = 4 * 100 * (30 + 8 * (5 / 6 + 1) + 2) + 4 * 100 * 22
    assert spread.loss()["activations"] == pytest.approx(4 * 100 * 16 + kept)
    assert spread.backward(0)["gradients"] == 4 * (400 + 400 + 3000) + 4 * 3000 + 1600


@pytest.mark.parametrize("change", [
    {"hidden": 256, "feedforward": "moe", "num_experts": 8, "k": 2, "batch": 16, "length": 128},
    {"hidden": 512, "feedforward": "moe", "num_experts": 8, "k": 2, "batch": 2, "length": 32},
    {"hidden": 512, "feedforward": "dense", "batch": 2, "length": 32},
    {"hidden": 512, "feedforward": "moe", "num_experts": 8, "k": 2, "batch": 4, "length": 32, "accumulation": 2},
])  # fmt: skip
def test_peaks_are_those_of_torchs_allocator(change, tmp_path):
    """Live bytes of the trainer's second step, as the allocator reports them, whatever is the largest moment."""
    length, batch, parts = change.pop("length"), change.pop("batch"), change.pop("accumulation", 1)
    train = TrainConfig(batch=batch, accumulation=parts, dtype="float32", device="cpu")
    config = RunConfig(out=tmp_path, data=DataConfig(length=length), train=train,
                       model=ModelConfig(dim=128, layers=3, **change))  # fmt: skip
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = built_model(config, VOCABULARY).train()
        optimizers = make_optimizers(model, lr=1e-3)
        for _ in range(2):
            ids = torch.randint(VOCABULARY, (batch, length + 1))
            accumulate(model, Batch(ids[:, :-1], ids[:, 1:]), micro_batches=parts)
            optimizers.step()
            optimizers.zero_grad()
    counts = count_model(config, vocab_size=VOCABULARY)
    plan = predict(counts, Cluster(HARDWARE["h100"], 1), Mesh(1, "none"), tokens=batch * length, micro_batches=parts,
                   half=False)  # fmt: skip
    assert plan.memory_total == pytest.approx(live_at_most(profiler, tmp_path), rel=0.08)


def live_at_most(profiler, folder):
    """The largest sum of what was allocated and not yet freed."""
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [event for event in events if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(sizes, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes))


def test_copies_of_every_block_stay_under_fsdp():
    """Autograd keeps them where FSDP2 has let go of the float32 weights: they are not divided by the ranks."""
    config = run_config(batch=8, length=32, feedforward="dense", hidden=512, layers=3)
    counts = count_model(config, vocab_size=VOCABULARY)
    half, full = (rank(counts, 8, "fsdp", tokens=256, half=half).loss() for half in (True, False))
    assert half["bfloat16 weights"] == 2 * counts.copied and "bfloat16 weights" not in full
