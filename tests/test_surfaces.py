"""The names that people and other programs rely on, each called as it is promised: one test for each promise."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import training.cli
from moe import (
    PEER,
    ExpertChoiceRouter,
    HashRouter,
    MixtureOfDepths,
    MoE,
    ProductKeyMemory,
    SigmoidRouter,
    SinkhornRouter,
    SoftMoE,
    SwitchRouter,
    ThresholdedFeedForward,
    TopKRouter,
    calibrate_thresholds,
    load_balancing_loss,
    router_z_loss,
    shard_experts,
    upcycle,
)
from pruning import (
    Sparsifier,
    cubic,
    erk,
    expert_importance,
    head_importance,
    layer_importance,
    magnitude,
    prune_experts,
    prune_heads,
    prune_layers,
    prune_neurons,
    sparsify,
    unstructured,
)
from pruning.adapters import adapted_axes
from pruning.dynamic import DSR, SET, SNFS, DeepR, NeST, RigL, TopKAST
from sparse_attn import (
    attend,
    axial,
    bigbird,
    causal,
    dilated,
    documents,
    fixed,
    global_tokens,
    random_blocks,
    sinks,
    sliding_window,
    strided,
)
from tests.tolerances import close
from training import compress_gradients
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig

WIDTH, EXPERTS = 8, 4
# commands that the architecture names; there may be more
COMMANDS = ("demo", "train", "evaluate", "generate", "prune", "report", "bench")


def config(feedforward=None) -> TransformerConfig:
    return TransformerConfig.uniform(vocab_size=31, dim=16, num_layers=2, num_heads=4, max_length=32,
                                     feedforward=feedforward or DenseConfig(hidden=24))  # fmt: skip


def model(feedforward=None) -> Transformer:
    return Transformer(config(feedforward), generator=torch.Generator().manual_seed(0))


def batches(count=2) -> list[torch.Tensor]:
    return [torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.fixture
def one_process(tmp_path):
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


ROUTERS = {
    "top_k": lambda: TopKRouter(WIDTH, EXPERTS, k=2),
    "switch": lambda: SwitchRouter(WIDTH, EXPERTS),
    "sigmoid": lambda: SigmoidRouter(WIDTH, EXPERTS, k=2),
    "expert_choice": lambda: ExpertChoiceRouter(WIDTH, EXPERTS, allow_future=True),
    "hash": lambda: HashRouter(WIDTH, EXPERTS, k=2),
    "sinkhorn": lambda: SinkhornRouter(WIDTH, EXPERTS),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_moe_layer_is_the_weighted_sum_of_its_experts(router):
    layer = MoE(dim=WIDTH, hidden=16, num_experts=EXPERTS, router=ROUTERS[router]())
    x = torch.randn(2, 5, WIDTH)
    ids, real = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    y, routing = layer(x, token_ids=ids, padding_mask=real)
    rows, expected = x.flatten(0, 1), torch.zeros(10, WIDTH)
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        expected[token] += weight * layer.experts.forward_one(expert, rows[token : token + 1])[0]
    close(y.flatten(0, 1), expected)
    assert routing.loads().sum() == len(routing.token) and routing.logits.shape[1] == EXPERTS
    assert torch.isfinite(routing.entropy())
    again, _ = layer(x, token_ids=ids, padding_mask=real, replay=routing)
    close(again, y)


def test_a_moe_layer_takes_x_alone_and_the_losses_train_its_router():
    layer = MoE(dim=WIDTH, hidden=16, num_experts=EXPERTS, router=TopKRouter(WIDTH, EXPERTS, k=2))
    y, routing = layer(torch.randn(6, WIDTH))
    loss = y.square().mean() + 0.01 * load_balancing_loss(routing) + 1e-3 * router_z_loss(routing)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_the_other_layers_of_conditional_computation():
    x = torch.randn(2, 5, WIDTH)
    assert SoftMoE(WIDTH, 16, EXPERTS, allow_future=True)(x).shape == x.shape
    assert ProductKeyMemory(WIDTH, num_keys=4, k=2, key_dim=8)(x).shape == x.shape
    assert PEER(WIDTH, num_keys=4, k=2, key_dim=8)(x).shape == x.shape
    assert ThresholdedFeedForward(WIDTH, 16)(x).shape == x.shape
    y, routing = MixtureOfDepths(WIDTH)(x, lambda rows, *_, **__: rows)
    assert y.shape == x.shape and routing is not None
    gate, up, down = torch.randn(16, WIDTH), torch.randn(16, WIDTH), torch.randn(WIDTH, 16)
    grown = upcycle(gate, up, down, num_experts=EXPERTS, k=2)
    close(grown(x)[0], (nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT)
    assert calibrate_thresholds(model(), batches(), sparsity=0.5)


PATTERNS = {
    "sliding_window": lambda: sliding_window(3),
    "strided": lambda: strided(3),
    "fixed": lambda: fixed(4, 1),
    "dilated": lambda: dilated(2, 3),
    "global_tokens": lambda: global_tokens(0, 5),
    "sinks": lambda: sinks(2),
    "random_blocks": lambda: random_blocks(1, block=4),
    "bigbird": lambda: bigbird(2, 1, 1, block=4),
    "axial": lambda: axial(4),
    "documents": lambda: documents(5, 7),
    "all": lambda: sliding_window(4) | sinks(2),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_attention_sees_what_the_pattern_says_and_trains(name):
    pattern = causal() & PATTERNS[name]()
    q = torch.randn(2, 4, 12, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 12, 8, requires_grad=True) for _ in "kv")
    y = attend(q, k, v, pattern=pattern)
    place = torch.arange(12)
    seen = pattern.visible(place[:, None], place)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    close(y, expected)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), (q, k, v))
    for mine, oracle in zip(found, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        close(mine, oracle)


@pytest.mark.parametrize("as_keywords", [False, True])
def test_heads_are_scored_and_pruned_in_place(as_keywords):
    net, data = model(), batches()
    given = [{"input_ids": ids, "labels": ids} for ids in data] if as_keywords else data
    before = net.num_parameters()
    report = prune_heads(net, head_importance(net, given, loss=None), fraction=0.3)
    assert sum(map(len, report.removed.values())) == 2  # ⌊0.3 · 8⌋, over both layers
    assert net.num_parameters() == report.parameters_after < before
    assert net(data[0]).logits.shape == (2, 9, 31)


def test_a_loss_of_ones_own_scores_heads():
    net = model()
    scores = head_importance(net, batches(), loss=lambda m, batch: m(batch).logits.square().mean())
    assert all(torch.isfinite(score).all() for score in scores.values())


def test_neurons_experts_and_layers_are_pruned():
    net, data = model(MoEConfig(hidden=8, num_experts=EXPERTS, k=2)), batches()
    prune_experts(net, expert_importance(net, data), fraction=0.5)
    prune_layers(net, layer_importance(net, data), fraction=0.5)
    assert len(net.layers) == 1 and torch.isfinite(net(data[0]).logits).all()
    dense = model()
    report = prune_neurons(dense, fraction=0.25)
    assert sum(map(len, report.removed.values())) == 12 and torch.isfinite(dense(data[0]).logits).all()


def test_heads_of_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    small = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    net = transformers.LlamaForCausalLM(small)
    assert {axis.kind for axis in adapted_axes(net)} >= {"head", "neuron"}
    report = prune_heads(net, head_importance(net, batches()), fraction=0.5, layerwise=True)
    assert sum(map(len, report.removed.values())) == 4 and torch.isfinite(net(batches()[0]).logits).all()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("structure", [None, "2:4"])
def test_weights_are_sparsified_to_the_count(method, structure):
    net = model()
    masks = sparsify(net, sparsity=0.5, method=method, calibration=batches(), structure=structure)
    for name, mask in masks.kept.items():
        weight = net.get_parameter(name).detach()
        assert int((~mask).sum()) == mask.numel() // 2 and not weight[~mask].any() and weight[mask].all()
        if structure:
            assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_a_sparsifier_of_four_choices_prunes_while_training():
    net, data = model(), batches()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sparsifier = Sparsifier(net, saliency=magnitude, allocation=erk, structure=unstructured,
                            schedule=cubic(0.8, begin=0, end=3))  # fmt: skip
    _train(net, sparsifier, optimizer, data, steps=5)
    total = sum(mask.numel() for mask in sparsifier.masks().kept.values())
    assert sparsifier.masks().zeros == int(0.8 * total)


DYNAMIC = {
    "SET": lambda net: SET(net, sparsity=0.9, allocation=erk, every=2),
    "DeepR": lambda net: DeepR(net, sparsity=0.9, allocation=erk),
    "DSR": lambda net: DSR(net, sparsity=0.9, allocation=erk, every=2),
    "SNFS": lambda net: SNFS(net, sparsity=0.9, allocation=erk, every=2),
    "RigL": lambda net: RigL(net, sparsity=0.9, allocation=erk, every=2, stop=4),
    "TopKAST": lambda net: TopKAST(net, sparsity=0.9, allocation=erk),
    "NeST": lambda net: NeST(net, sparsity=0.9, allocation=erk, every=1, growths=2, prunings=2),
}


def _train(net, method, optimizer, data, *, steps) -> int:
    taken = 0
    for step in range(steps):
        net(data[step % len(data)], labels=data[step % len(data)]).loss.backward()
        if method.before_step(optimizer):
            optimizer.step()
            taken += 1
        method.after_step(optimizer)
        optimizer.zero_grad()
    return taken


@pytest.mark.parametrize("feedforward", [None, MoEConfig(hidden=8, num_experts=EXPERTS, k=2)], ids=["dense", "moe"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_method_has_its_three_moments_and_state(name, feedforward):
    net = model(feedforward)
    method = DYNAMIC[name](net)
    total = sum(mask.numel() for mask in method.masks().kept.values())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    taken = _train(net, method, optimizer, batches(), steps=6)
    assert taken == (5 if name == "RigL" else 6)  # RigL updates at step 2; 4 is its stop
    assert method.masks().zeros == int(0.9 * total)
    state = copy.deepcopy(method.state_dict())
    other = DYNAMIC[name](model(feedforward))
    other.load_state_dict(state)
    for key, mask in method.masks().kept.items():
        assert torch.equal(other.masks().kept[key], mask)


def test_experts_are_sharded_over_a_group_of_one(one_process):
    net, data = model(MoEConfig(hidden=8, num_experts=EXPERTS, k=2)), batches()
    expected = net(data[0]).logits
    shard_experts(net, one_process)
    close(net(data[0]).logits, expected)


def test_gradients_are_compressed_with_error_feedback(one_process):
    net, data = model(), batches()
    dense = copy.deepcopy(net)
    dense(data[0], labels=data[0]).loss.backward()
    parallel = DistributedDataParallel(net)
    compress_gradients(parallel, "topk", density=0.01)
    sent = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(3):
        parallel(data[0], labels=data[0]).loss.backward()
        for name, p in net.named_parameters():
            count = -(-p.numel() // 100)
            assert int((p.grad != 0).sum()) <= count
            sent[name] += p.grad
            p.grad = None
        if step == 0:
            for name, p in dense.named_parameters():
                top = p.grad.abs().flatten().topk(-(-p.numel() // 100)).indices
                assert torch.equal(sent[name].flatten()[top], p.grad.flatten()[top])


def test_a_transformer_is_saved_and_loaded(tmp_path):
    net, data = Transformer(config()), batches()
    net.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(net.eval()(data[0]).logits, again.eval()(data[0]).logits)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_command_has_its_subcommands():
    assert set(COMMANDS) <= set(training.cli.COMMANDS)
