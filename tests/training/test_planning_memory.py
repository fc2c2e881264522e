"""The plan's memory against what autograd really keeps, in both precisions, and against published formulas."""

import pytest
import torch

from training.config import DataConfig, RunConfig, TrainConfig
from training.data import Batch
from training.model_config import ModelConfig
from training.planning import HARDWARE, Cluster, Mesh, count_model, predict
from training.planning.counts import block_activations, transformer_config
from training.planning.memory import WEIGHT_BYTES
from training.step import forward
from transformer import Transformer
from transformer.feedforward_config import DenseConfig
from transformer.layer_config import AttentionConfig, LayerConfig

VOCABULARY = 500


def run_config(*, length, batch, checkpointing=False, **model):
    return RunConfig(data=DataConfig(length=length), train=TrainConfig(batch=batch, checkpointing=checkpointing),
                     model=ModelConfig(dim=128, **model))  # fmt: skip


def kept_bytes(config, *, half):
    """Bytes of distinct tensors that autograd saves in a forward pass of the trainer, parameters aside."""
    model = Transformer(transformer_config(config, VOCABULARY)).train()
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
    """What the plan counts of the same: activations, copies, and of the head its gradient."""
    counts = count_model(config, vocab_size=VOCABULARY)
    tokens = config.train.batch * config.data.length
    one = predict(counts, Cluster(HARDWARE["h100"], 1), Mesh(1, "none"), tokens=tokens, half=half)
    head = 4 * VOCABULARY * counts.dim
    assert one.memory["head"] == head + (2 * VOCABULARY * counts.dim if half else 0)
    return one.memory["activations"] + one.memory.get("bfloat16 weights", 0.0) + head


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


def test_copied_weights_are_those_that_autograd_keeps_in_bfloat16():
    """By value: of attention and the shared expert, but neither of routers, which stay float32, nor of experts."""
    config = run_config(batch=2, length=16, feedforward="moe", hidden=64, num_experts=48, k=1, layers=2,
                        shared_hidden=96)  # fmt: skip
    model = Transformer(transformer_config(config, VOCABULARY)).train()
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
    wanted = 4 * (8 * 64 * counts.boundary[1] + VOCABULARY * counts.dim)
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
    name = "weights, gradients, moments"
    for ranks in (1, 4, 64):
        cluster = Cluster(HARDWARE["h100"], ranks, per_node=ranks)
        shard = "fsdp" if ranks > 1 else "none"
        held = predict(counts, cluster, Mesh(1, shard), tokens=64 * ranks).memory[name]
        assert held == pytest.approx((2 + 2 + 12) * counts.dense / ranks) and WEIGHT_BYTES == 4 + 4 + 8


def test_copies_of_every_block_stay_under_fsdp():
    """Autograd keeps them where FSDP2 has let go of the float32 weights: they are not divided by the ranks."""
    config = run_config(batch=8, length=32, feedforward="dense", hidden=512, layers=3)
    counts = count_model(config, vocab_size=VOCABULARY)
    cluster = Cluster(HARDWARE["h100"], 8)
    half, full = (predict(counts, cluster, Mesh(1, "fsdp"), tokens=2048, half=half).memory for half in (True, False))
    assert half["bfloat16 weights"] == 2 * counts.copied and "bfloat16 weights" not in full
