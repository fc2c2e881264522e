"""Adapters keep zeros and merge without changing an output; int8 weights round as they should and keep zeros too."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import Masks, sparsify
from pruning.recovery import Int8Linear, add_adapters, merge_adapters, quantize, quantize_weights
from tests.pruning.test_merge import ids, own
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from tests.typecheck import unchecked
from transformer import DenseConfig, MoEConfig

FEEDFORWARDS = {"dense": DenseConfig(hidden=20), "moe": MoEConfig(hidden=8, num_experts=4, k=2)}


def trained(model, adapters, steps=3):
    optimizer = torch.optim.AdamW(adapters, lr=0.05, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(ids(seed=step), labels=ids(seed=step)).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", FEEDFORWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_train_merge_and_keep_the_zeros(tmp_path, kind, dtype):
    model = own(FEEDFORWARDS[kind]).to(dtype)
    masks = sparsify(model, sparsity=0.6)
    before, names = model(ids()).logits, [name for name, _ in model.named_parameters()]
    start = {name: p.clone() for name, p in model.named_parameters()}
    adapters = add_adapters(model, masks, rank=3)
    assert len(adapters) == 2 * len(masks.kept) and model(ids()).logits.equal(before)
    trained(model, adapters)
    after = model(ids()).logits
    assert not after.equal(before)
    merged = merge_adapters(model)
    assert model(ids()).logits.equal(after)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert merged.kept.keys() == masks.kept.keys()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if name in masks.kept:
            assert merged.kept[name].equal(masks.kept[name]) and not parameter[~masks.kept[name]].any()
            change = (parameter - start[name]).float()
            assert change[masks.kept[name]].any()
        else:
            assert parameter.equal(start[name])
    again = type(model).from_pretrained(model.save_pretrained(tmp_path))
    assert again(ids()).logits.equal(model.eval()(ids()).logits)


def test_gradients_are_those_of_the_masked_product():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model, mask = nn.Sequential(layer), torch.rand(5, 6) < 0.5
    a, b = add_adapters(model, Masks({"0.weight": mask}), rank=2, alpha=6.0)
    with torch.no_grad():
        b.normal_()
    base = layer.parametrizations.weight.original.detach().clone()
    x, d_y = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    y = model(x)
    y.backward(d_y)
    weight = torch.zeros(5, 6, dtype=torch.float64)
    d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
    for o in range(5):
        for i in range(6):
            if mask[o, i]:
                weight[o, i] = base[o, i] + 3.0 * sum(b[o, r] * a[r, i] for r in range(2)).item()
                slope = sum(d_y[n, o] * x[n, i] for n in range(7))
                d_a[:, i] += 3.0 * slope * b[o].detach()
                d_b[o] += 3.0 * slope * a[:, i].detach()
    close(y, torch.einsum("ni,oi->no", x, weight) + layer.bias)
    close(a.grad, d_a)
    close(b.grad, d_b)
    assert layer.parametrizations.weight.original.grad is None


def test_without_masks_the_zeros_of_now_stay_and_chosen_weights_alone_are_adapted():
    model = toy((2, 1, 6))
    masks = sparsify(model, sparsity=0.5)
    adapters = add_adapters(model, rank=1, weights=["feedforward.0.down.weight"])
    assert len(adapters) == 2 and "parametrizations" in "".join(name for name, _ in model.named_parameters())
    with torch.no_grad():
        adapters[1].fill_(1.0)
    expected = model(tokens())
    merged = merge_adapters(model)
    assert merged.kept["feedforward.0.down.weight"].equal(masks.kept["feedforward.0.down.weight"])
    assert model(tokens()).equal(expected) and Masks.of(model).zeros == masks.zeros


def test_a_frozen_weight_is_frozen_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    add_adapters(model, rank=1)
    assert not model[1].parametrizations.weight.original.requires_grad
    merge_adapters(model)
    assert [layer.weight.requires_grad for layer in model] == [False, True]


def test_adapters_survive_a_checkpoint():
    model, other = toy((2, 1, 6)), toy((2, 1, 6), seed=3)
    sparsify(model, sparsity=0.5)
    for made in (model, other):
        adapters = add_adapters(made, rank=2)
    with torch.no_grad():
        adapters[1].normal_()
    model.load_state_dict(other.state_dict())
    assert model(tokens()).equal(other(tokens()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, r"rank must be in \[1, 8\] for a weight \[8, 8\], got 0"),
        ({"rank": 7}, r"rank must be in \[1, 4\] for a weight \[4, 8\], got 7"),
        ({"weights": ["nothing"]}, "weights must be parameters that the masks name, got 'nothing'"),
        ({"masks": Masks({"head.weight": torch.ones(13, 8, dtype=torch.bool)})}, "'head.weight' must not be tied"),
        ({"masks": Masks({"attention.0.q.weight": torch.ones(2, 2, dtype=torch.bool)})}, r"must have shape \[8, 8\]"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(options, message):
    model = toy((2, 1, 6))
    before = copy.deepcopy(model.state_dict())
    masks = options.pop("masks", None)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, masks, **({"rank": 1} | options))
    assert model.state_dict().keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_adapting_twice_and_merging_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential must have adapters, got none"):
        merge_adapters(model)
    masks = Masks.of(model)
    add_adapters(model, masks, rank=1)
    with pytest.raises(ValueError, match="got '0.weight', adapted"):
        add_adapters(model, masks, rank=1)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_rows_round_to_the_nearest_of_255_values_and_zeros_stay(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, weight, 0.0).to(dtype)
    quantised, scale = quantize.quantize_rows(weight)
    assert quantised.dtype == torch.int8 and scale.dtype == dtype and int(quantised.abs().max()) <= 127
    assert not quantised[weight == 0].any()
    for row, whole, step in zip(weight.double(), quantised.double(), scale.double(), strict=True):
        assert step > 0 and (row.any() or step == 1)
        close(step, row.abs().max() / 127 if row.any() else step, dtype)
        # the rounding of the scale moves the largest by up to 127 of its errors
        slack = 127 * step * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
        assert ((row - whole * step).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("execution", ["dequantise", "packed", "int_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (33, 47), (64, 32), (5, 96)])
def test_products_of_each_execution(execution, dtype, shape):
    if execution == "packed" and shape[1] % 32:
        with pytest.raises(ValueError, match=f"in_features must be a multiple of 32 .* got {shape[1]}"):
            Int8Linear(torch.ones(shape), None, execution=execution)
        return
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    layer = Int8Linear(weight, bias, execution=execution)
    for batch in ((1,), (2, 3), (0,), ()):
        x = torch.randn(*batch, shape[1]).to(dtype)
        rows = x.double().reshape(-1, shape[1])
        if execution == "int_mm":
            most = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
            rows = (rows / most).round() * most
        wanted = torch.stack([(rows * row).sum(1) for row in layer.dense_weight().double()], 1) + bias.double()
        y = layer(x)
        assert y.shape == (*batch, shape[0]) and y.dtype == dtype
        if execution != "int_mm":
            close(y, wanted.view(y.shape), dtype)
        elif y.numel():
            # a product that lies between two steps may round to either
            share = 0.01 if dtype == torch.float32 else 0.05
            assert (y.double() - wanted.view(y.shape)).norm() <= share * wanted.norm()


def test_a_model_shrinks_to_a_fourth_and_the_report_says_so():
    model = own(DenseConfig(hidden=20))
    masks = sparsify(model, sparsity=0.5)
    expected = model(ids()).logits
    report = quantize_weights(model, batch=4, rounds=2)
    assert all(isinstance(model.get_submodule(row.name.removesuffix(".weight")), Int8Linear) for row in report.weights)
    assert not report.left and type(model.embedding) is nn.Embedding and len(report.weights) == len(masks.kept)
    for row in report.weights:
        out, into = row.shape
        assert (row.bytes_before, row.bytes_after) == (out * into * 4, out * into + out * 4)
        # 16 and 20 inputs: torch's kernel takes multiples of 32
        assert 0 < row.error < 0.01 and row.seconds.keys() == {"dense", "dequantise"}
        layer = model.get_submodule(row.name.removesuffix(".weight"))
        assert not layer.weight[~masks.kept[row.name]].any() and layer.execution == row.chosen
    found = model(ids()).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    text = str(report).splitlines()
    before, after = (sum(getattr(row, name) for row in report.weights) for name in ("bytes_before", "bytes_after"))
    assert text[-1].startswith(f"{before:,} -> {after:,} bytes") and "4 rows" in text[0]


def test_the_fastest_execution_is_taken(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))
    assert quantize_weights(copy.deepcopy(model)).weights[0].seconds.keys() == {"dense", "dequantise", "packed"}
    times = {"dense": 3.0, "dequantise": 2.0, "packed": 5.0, "int_mm": 1.0}
    monkeypatch.setattr(quantize, "measure", lambda *arguments: times)
    assert [row.chosen for row in quantize_weights(model).weights] == ["dequantise"] * 2
    model = nn.Sequential(nn.Linear(32, 4))
    assert quantize_weights(model, candidates=["packed", "int_mm"]).weights[0].chosen == "int_mm"


def test_stacks_and_shared_weights_stay_float():
    report = quantize_weights(own(FEEDFORWARDS["moe"]), rounds=1)
    assert [name.rpartition(".")[2] for name in report.left] == ["up", "down"] * 2
    assert str(report).count("stays float: a stack of matrices") == 4
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    report = quantize_weights(shared, rounds=1)
    assert report.left == ("0.weight",) and report.why == ("shared",)
    embedded = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    assert quantize_weights(embedded, rounds=1, weights=["0.weight"]).why == ("of class Embedding",)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch and rounds must be >= 1, got 0 and 5"),
        ({"candidates": []}, "candidates must name at least one execution, got none"),
        ({"candidates": ["packed"]}, "0.weight: in_features must be a multiple of 32 for execution='packed', got 4"),
        ({"candidates": ["int4"]}, "execution must be one of dequantise, packed, int_mm, got 'int4'"),
    ],
)
def test_bad_quantisations_change_nothing(options, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        quantize_weights(model, **options)
    assert type(model[0]) is nn.Linear


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weights must be finite, got 1 that are not"):
        quantize_weights(model)
    assert all(type(layer) is nn.Linear for layer in model)
    with unchecked(), pytest.raises(RuntimeError):
        Int8Linear(torch.ones(2, 3), None)(torch.ones(1, 4))


@pytest.mark.parametrize("execution", ["dequantise", "packed", "int_mm"])
def test_inputs_of_another_dtype_than_an_8_bit_layers_are_refused_and_autocast_takes_them(execution):
    torch.manual_seed(0)
    weight, x = torch.randn(5, 64), torch.randn(20, 64)
    layer = Int8Linear(weight, torch.randn(5), execution=execution)
    with pytest.raises(ValueError, match="x must be torch.float32, as the layer's scales, got torch.bfloat16: cast"):
        layer(x.bfloat16())
    wanted = x @ layer.dense_weight().mT + layer.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert float((layer(given).float() - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert Int8Linear(weight.bfloat16(), None, execution=execution)(x.bfloat16()).dtype == torch.bfloat16


def test_packed_multiplication_of_float64_is_refused():
    layer = Int8Linear(torch.randn(5, 64, dtype=torch.float64), None, execution="packed")
    with pytest.raises(ValueError, match="execution='packed' multiplies floats of 16 or 32 bits, got torch.float64"):
        layer(torch.randn(20, 64, dtype=torch.float64))
