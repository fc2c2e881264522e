"""int8 weights go into one file and come back; whoever would take the integers for weights is refused."""

import pytest
import torch
from torch import nn

from pruning import choose_execution, load_compact, load_quantized, quantize_weights, restore_dense, save_compact
from pruning.execution import SparseLinear, choose
from pruning.recovery import Int8Linear
from tests.pruning.adapters.models import answer, ids, peer
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import Transformer


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_model_of_transformers_comes_back_and_is_saved_no_other_way(tmp_path, name):
    model, fresh = peer(name), peer(name, initializer_range=0.1)
    expected = answer(model, ids())
    report = quantize_weights(model, rounds=1, candidates=["dequantise"])
    assert not report.left and sum(isinstance(module, Int8Linear) for module in model.modules()) == len(report.weights)
    whole = answer(model, ids())
    assert 0 < (whole - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ValueError, match="quantized with pruning.recovery.quantize_weights .*load_quantized reads it"):
        model.save_pretrained(tmp_path / "stock")
    save_compact(model, tmp_path)
    with pytest.raises(ValueError, match="its weights are int8: pruning.recovery.load_quantized reads them"):
        load_compact(tmp_path, fresh)
    again = load_quantized(tmp_path, fresh, rounds=1, candidates=["dequantise"])
    assert again is fresh and answer(again, ids()).equal(whole)
    with pytest.raises(ValueError, match="quantized with pruning.recovery.quantize_weights"):
        again.save_pretrained(tmp_path / "stock")


def test_conv1d_is_quantised_by_its_outputs():
    model = peer("GPT2")
    before = model.transformer.h[0].mlp.c_fc
    weight, bias = before.weight.detach(), before.bias.detach()
    quantize_weights(model, rounds=1)
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight.shape == weight.mT.shape
    close(layer.scale, torch.stack([column.abs().max() / 127 for column in weight.unbind(1)]))
    x = torch.randn(3, weight.shape[0])
    wanted = torch.stack([x @ (layer.scale[o] * layer.weight[o].float()) + bias[o] for o in range(weight.shape[1])], 1)
    close(layer(x), wanted)


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = toy((2, 1, 6))
    save_compact(model, tmp_path / "float")
    with pytest.raises(ValueError, match="must hold int8 weights and their scales, got none: load_compact reads it"):
        load_quantized(tmp_path / "float", toy((2, 1, 6)))
    quantize_weights(model, rounds=1)
    save_compact(model, tmp_path)
    for other, message in (
        (toy((2, 1, 8)), "feedforward.0.down.weight must be"),
        (nn.Sequential(nn.Linear(2, 2)), "must have a Linear or Conv1D 'attention.0.q' for int8 weights, got none"),
        (model, "must have a Linear or Conv1D 'attention.0.q' for int8 weights, got Int8Linear"),
    ):
        before, kinds = {n: t.clone() for n, t in other.state_dict().items()}, [type(m) for m in other.modules()]
        with pytest.raises(ValueError, match=message):
            load_quantized(tmp_path, other)
        assert [type(m) for m in other.modules()] == kinds
        assert all(tensor.equal(before[n]) for n, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="execution must be one of"):
        load_quantized(tmp_path, toy((2, 1, 6)), candidates=["int4"])
    assert load_quantized(tmp_path, lambda _: toy((2, 1, 6), seed=4))(tokens()).equal(model(tokens()))


def test_sparse_execution_of_conv1d_and_back(monkeypatch):
    model = peer("GPT2")
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, answer(model, ids())
    monkeypatch.setattr(choose, "_seconds", lambda run, x: 0.5 if isinstance(run, SparseLinear) else 1.0)
    report = choose_execution(model, candidates=["csr"], rounds=1)
    assert len(report.swapped) == len(report.choices) == 12
    close(answer(model, ids()), expected)
    assert len(restore_dense(model)) == 12
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert answer(model, ids()).equal(expected)
    assert all(tensor.equal(before[n]) for n, tensor in model.state_dict().items())


def test_the_own_model_refuses_integers(tmp_path):
    from tests.pruning.test_merge import own
    from transformer import DenseConfig

    model = own(DenseConfig(hidden=20))
    quantize_weights(model, rounds=1)
    save_compact(model, tmp_path / "compact")
    again = load_quantized(tmp_path / "compact", own(DenseConfig(hidden=20)), candidates=["dequantise"], rounds=1)
    assert isinstance(again.layers[0].attention.query, Int8Linear)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scale"):
        Transformer.from_pretrained(tmp_path)
