"""What holds for every method: counts, distinct masks, resuming, finishing, accumulation, checkpointing, refusals."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from pruning import Masks, cubic, global_ranking, one_shot, prunable_axes, uniform
from pruning.learned import (
    L0,
    STR,
    L0Units,
    Movement,
    Proximal,
    Regularized,
    SoftMovement,
    UnitGates,
    VariationalDropout,
    VariationalUnits,
    group_lasso,
    hoyer_square,
    l2,
)
from pruning.retraining import Feedback, GeneralizationDriven, HardThresholding, LearningCompression, NeuralWirings
from tests.pruning.learned.fixtures import make_optimizer, net, train
from tests.tolerances import close
from tests.typecheck import unchecked
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig

GRADUAL = cubic(0.5, begin=2, end=8)
HALF = {
    "movement": lambda m: Movement(m, schedule=GRADUAL),
    "feedback": lambda m: Feedback(m, schedule=GRADUAL, every=2),
    "wirings": lambda m: NeuralWirings(m, sparsity=0.5),
    "iht": lambda m: HardThresholding(m, sparsity=0.5, sparse_steps=4, dense_steps=3, begin=2),
    "lc": lambda m: LearningCompression(m, sparsity=0.5, mu=0.1, growth=1.5, every=2),
    "l1": lambda m: Regularized(m, sparsity=0.5, strength=3.0),
    "hoyer": lambda m: Regularized(m, sparsity=0.5, strength=0.5, penalty=hoyer_square),
    "l2": lambda m: Regularized(m, sparsity=0.5, strength=20.0, penalty=l2),
}
FREE = {
    "soft_movement": lambda m, s=1.0: SoftMovement(m, strength=3 * s, threshold=0.45, gate_lr=3.0),
    "l0": lambda m, s=1.0: L0(m, strength=40 * s, keep=0.3, gate_lr=8.0),
    "str": lambda m, s=1.0: STR(m, strength=4 * s, start=-4.0, gate_lr=3.0),
    "variational": lambda m, s=1.0: VariationalDropout(m, strength=10 * s, start=-3.0, gate_lr=5.0),
    "proximal": lambda m, s=1.0: Proximal(m, strength=0.6 * s),
}
METHODS = HALF | FREE


def trained(name: str, *, steps: int = 14, strength: float | None = None):
    model = net()
    method = METHODS[name](model) if strength is None else METHODS[name](model, strength)
    train(model, method, make_optimizer(model, method), steps)
    return model, method


@pytest.mark.parametrize("name", HALF)
def test_the_asked_sparsity_is_exact(name):
    _, method = trained(name)
    masks = method.masks()
    if name in ("wirings", "lc"):
        assert masks.zeros == masks.total // 2
    else:
        for key, mask in masks.kept.items():
            parts = mask if mask.ndim == 3 else [mask]
            assert all(int((~part).sum()) == part.numel() // 2 for part in parts), key
    assert method.finish().sparsity == 0.5


@pytest.mark.parametrize("name", FREE)
def test_a_method_that_finds_its_sparsity_finds_more_with_more_strength(name):
    found = [trained(name, steps=25, strength=s)[1].finish().sparsity for s in (0.0, 0.3, 1.0, 4.0)]
    assert found == sorted(found) and len(set(found)) >= 3 and found[0] < 0.45
    assert found[-1] > found[0] + 0.1


def test_no_two_names_are_one_computation():
    masks = {}
    for name in METHODS:
        model, method = trained(name, steps=25)
        method.finish()
        masks[name] = torch.cat([mask.flatten() for mask in Masks.of(model).kept.values()])
    same = [(a, b) for a, b in itertools.combinations(masks, 2) if masks[a].equal(masks[b])]
    assert not same
    assert all(0 < float(mask.float().mean()) < 1 for mask in masks.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_model_is_plain_and_keeps_its_zeros(name):
    model, method = trained(name, steps=25)
    model.eval()
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    with method.parametrise():
        wanted = model(x)
    masks = method.finish()
    assert type(model.first.weight) is torch.nn.Parameter and not hasattr(model.first, "parametrizations")
    close(model(x), wanted)
    with method.parametrise():
        close(model(x), wanted)
    for key, mask in masks.kept.items():
        assert model.get_parameter(key)[~mask].eq(0).all() and (~mask).any()
    model.train()
    train(model, method, make_optimizer(model, method, lr=0.1), 3)
    for key, mask in masks.kept.items():
        assert model.get_parameter(key)[~mask].eq(0).all()
    assert not model.first.weight.detach().equal(wanted)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_undisturbed_one(name):
    model = net()
    method = METHODS[name](model)
    optimizer = make_optimizer(model, method)
    train(model, method, optimizer, 9)
    saved = copy.deepcopy((model.state_dict(), method.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    train(model, method, optimizer, 7, seed=1)
    again = net(1)
    other = METHODS[name](again)
    fresh = make_optimizer(again, other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    fresh.load_state_dict(saved[2])
    torch.set_rng_state(random)
    train(again, other, fresh, 7, seed=1)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(two)
    for key, gate in method.named_gates().items():
        assert gate.equal(other.named_gates()[key])
    assert all(a.equal(b) for a, b in zip(method.finish().kept.values(), other.finish().kept.values(), strict=True))


def test_the_state_of_another_method_or_model_is_refused():
    model = net()
    state = L0(model).state_dict()
    with pytest.raises(ValueError, match="state must be one of STR, got 'L0'"):
        STR(model).load_state_dict(state)
    with pytest.raises(ValueError, match=r"gate 'first.weight' must have shape \[20, 12\], got None"):
        L0(model).load_state_dict(state | {"gates": {}})


# the activations of variational dropout draw noise for every call: see test_rules
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"variational"}))
def test_micro_batches_add_up(name):
    gradients = []
    for parts in (1, 2):
        model = net().double()
        method = METHODS[name](model)
        optimizer = make_optimizer(model, method)
        train_double(model, method, optimizer)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with method.parametrise():
            for part in x.chunk(parts):
                (model(part).square().sum() / 8).backward()
        method.before_step(optimizer)
        gradients.append([p.grad for p in (*model.parameters(), *method.named_gates().values()) if p.grad is not None])
    for one, two in zip(*gradients, strict=True):
        close(one, two)


def train_double(model, method, optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
        with method.parametrise():
            model(x).square().mean().backward()
        method.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)


def test_whoever_enters_within_a_step_sees_the_same_gates():
    model = net()
    method = L0(model)
    seen = []
    for _ in range(2):
        with method.parametrise():
            seen.append(model.first.weight.detach().clone())
    assert seen[0].equal(seen[1])
    method.after_step(make_optimizer(model, method))
    with method.parametrise():
        assert not model.first.weight.equal(seen[0])


def test_an_error_inside_gives_the_weights_back():
    model = net()
    before = model.first.weight.detach().clone()
    with pytest.raises(KeyError), STR(model, start=0.0).parametrise():
        assert not model.first.weight.equal(before)
        raise KeyError
    assert model.first.weight.equal(before)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.99), st.integers(0, 3), st.booleans())
def test_chosen_masks_count_exactly_with_ties(sparsity, levels, globally):
    model = net()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(levels).round_()
    allocation = global_ranking if globally else uniform
    for method in (
        Movement(model, schedule=one_shot(sparsity), allocation=allocation),
        Feedback(model, schedule=one_shot(sparsity), allocation=allocation),
    ):
        masks = method.masks()
        counted = allocation({"all": torch.zeros(masks.total)}, sparsity)["all"]
        if globally:
            assert masks.zeros == counted
        else:
            assert counted - 5 < masks.zeros <= counted


def transformer(*, experts: int = 0, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    feedforward = MoEConfig(hidden=6, num_experts=experts, k=2) if experts else DenseConfig(hidden=10)
    config = TransformerConfig.uniform(
        vocab_size=23, dim=8, num_layers=2, num_heads=4, num_kv_heads=2, feedforward=feedforward, max_length=12,
        dropout=dropout,
    )  # fmt: skip
    return Transformer(config)


OURS = {
    "movement": lambda m: Movement(m, schedule=cubic(0.5, begin=1, end=4)),
    "l0": lambda m: L0(m, strength=2.0),
    "str": lambda m: STR(m, start=-5.0),
    "variational": lambda m: VariationalDropout(m, start=-6.0),
    "l0_units": lambda m: L0Units(m, strength=3.0),
    "sigmoid": lambda m: UnitGates(m, sparsity=0.5),
    "softplus": lambda m: UnitGates(m, sparsity=0.5, form="softplus", polarize=1.2),
    "variational_units": lambda m: VariationalUnits(m),
    "feedback": lambda m: Feedback(m, schedule=cubic(0.5, begin=1, end=4), every=2),
}


def train_transformer(name: str, *, experts: int, checkpointing: bool):
    model = transformer(experts=experts, dropout=0.1)
    model.gradient_checkpointing(checkpointing)
    method = OURS[name](model)
    optimizer = make_optimizer(model, method)
    torch.manual_seed(1)
    for _ in range(5):
        ids = torch.randint(23, (2, 9))
        with method.parametrise():
            model(ids, labels=ids).loss.backward()
        method.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)
    return model, method


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("name", OURS)
def test_our_transformer_trains_the_same_with_recomputed_blocks_and_reloads_plain(name, experts, tmp_path):
    model, method = train_transformer(name, experts=experts, checkpointing=True)
    stored, other = train_transformer(name, experts=experts, checkpointing=False)
    for one, two in zip(model.parameters(), stored.parameters(), strict=True):
        close(one, two)
    moved = [gate for gate in other.named_gates().values() if gate.detach().flatten().unique().numel() > 1]
    assert len(moved) > 0 or name in ("str", "feedback")
    masks = method.finish()
    model.save_pretrained(tmp_path)
    plain = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(23, (2, 9))
    close(plain.eval()(ids).logits, model.eval()(ids).logits)
    for key, mask in masks.kept.items():
        assert plain.get_parameter(key)[~mask].eq(0).all()
    if experts:
        assert any(key.endswith("experts.down") for key in masks.kept)


def test_units_are_counted_named_and_gone():
    model = transformer(experts=3)
    method = UnitGates(model, sparsity=0.25)
    with torch.no_grad():
        for index, gate in enumerate(method.named_gates().values()):
            gate.add_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(index)))
    kept = method.kept()
    assert {len(units) for key, units in kept.items() if "heads" in key} <= set(range(5))
    opened = {name: method.gate(name, training=False) != 0 for name in method.groups}
    assert sum(int(gate.sum()) for gate in opened.values()) == 2 * 4 + 2 * 3 * 6 - 11
    assert {key for key in kept if "experts" in key} == {f"layers.{i}.feedforward.experts.neurons" for i in range(2)}
    method.finish()
    assert method.kept() == kept
    for i in range(2):
        gate = opened[f"layers.{i}.feedforward.experts.down"]
        found = kept[f"layers.{i}.feedforward.experts.neurons"]
        # open ones stay, and closed ones with them where another expert has more that are open
        assert {6 * e + u for e in range(3) for u in range(6) if gate[e, u]} <= set(found)
        assert [sum(unit // 6 == e for unit in found) for e in range(3)] == [int(gate.sum(1).max())] * 3
        for e in range(3):
            assert not model.layers[i].feedforward.experts.down[e][:, ~gate[e]].any()


def test_closed_units_can_be_cut_out():
    from pruning import shrink

    model = transformer()
    method = UnitGates(model, sparsity=0.5, kinds=("neuron",))
    with torch.no_grad():
        for gate in method.named_gates().values():
            gate.copy_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(2)))
    method.finish()
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = model.eval()(ids).logits
    shrink(model, [axis for axis in prunable_axes(model) if axis.kind == "neuron"], method.kept())
    close(model(ids).logits, wanted)
    assert sum(layer.feedforward.up.out_features for layer in model.layers if layer.feedforward) == 10


def test_bf16_weights_train():
    model = net().to(torch.bfloat16)
    method = L0(model, strength=1.0)
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    with method.parametrise():
        model(x).float().square().mean().backward()
    method.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.isfinite(gate.grad).all() and gate.grad.any() for gate in method.named_gates().values())


def test_noise_on_outputs_that_ranks_have_in_part_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = parallelize_module(net(), init_device_mesh("cpu", (1,)), {"first": ColwiseParallel()})
        method = VariationalDropout(model)
        with pytest.raises(ValueError, match="first.weight must be whole in the forward pass .*, got .*Shard"):
            with method.parametrise():
                model(torch.randn(3, 12))
        model.eval()
        with method.parametrise():
            model(torch.randn(3, 12))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: L0(m, strength=-1.0), "strength must be >= 0, got -1.0"),
        (lambda m: L0(m, gate_lr=-1.0), "gate_lr must be >= 0, got -1.0"),
        (lambda m: L0(m, keep=1.0), r"keep must be in \(0, 1\), got 1.0"),
        (lambda m: Movement(m, schedule=one_shot(0.5), every=0), "every must be >= 1, got 0"),
        (lambda m: SoftMovement(m, threshold=0.5), r"threshold must be in \(0, 0.5\), got 0.5"),
        (lambda m: Regularized(m, sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda m: UnitGates(transformer(), sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda m: UnitGates(transformer(), sparsity=0.5, form="tanh"), "form must be 'sigmoid' or 'softplus', got"),
        (lambda m: L0Units(transformer(experts=3), kinds=("expert",)), "must list a slice of its gate module's weight"),
        (
            lambda m: L0Units(transformer(), kinds=("cell",)),
            r"Transformer must have units of kinds \('cell',\), got none",
        ),
        (lambda m: GeneralizationDriven(m, sparsity=0.5, when="now"), "when must be 'low' or 'high', got 'now'"),
        (
            lambda m: group_lasso({}, axes=prunable_axes(transformer())[:1]),
            "weights must hold a slice of axis 'layers.0.attention.heads', got 0 others",
        ),
    ],
)
def test_bad_options(make, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        make(net())


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_and_a_model_without_values_are_named(name):
    model = net()
    first = next(iter(METHODS[name](net()).masks().kept))
    model.get_parameter(first).requires_grad_(False)
    with pytest.raises(ValueError, match=f"got '{first}' with requires_grad=False: leave it out"):
        METHODS[name](model)
    with pytest.raises(ValueError, match=f"got '{first}' on the meta device: load the model first"):
        METHODS[name](net().to("meta"))
