"""Statistics of activations against loops over tokens, responses against differences of the loss."""

import pytest
import torch

from pruning import gate_importance, masked
from pruning.saliency import activation_importance, response_importance
from tests.pruning.saliency.models import MODELS, axes_of_kind, masked_loss, padded_batch
from tests.tolerances import close

KINDS = [(name, kind) for name in MODELS for kind in ("head", "neuron")]


def gate_inputs(model, axis, batch):
    """What the gate module gets, [B, L, size, width]."""
    seen = []
    handle = axis.gate_module(model).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].unflatten(-1, (axis.size, axis.width))


def by_loop(rows, statistic):
    """rows: [size, width] of each real token."""
    size, values = rows[0].shape[0], []
    mean_square = sum(float(row.square().sum()) for row in rows) / len(rows) / size
    for unit in range(size):
        squares = [float(row[unit].square().sum()) for row in rows]
        if statistic == "energy":
            values.append(sum(squares) / len(rows))
        elif statistic == "variance":
            mean = sum(row[unit] for row in rows) / len(rows)
            values.append(sum(float((row[unit] - mean).square().sum()) for row in rows) / len(rows))
        else:
            limit = 0.25 if statistic == "active" else mean_square
            values.append(sum(square > limit for square in squares) / len(rows))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name, kind", KINDS)
@pytest.mark.parametrize("statistic", ["energy", "variance", "active", "firing"])
def test_statistics_over_real_tokens(name, kind, statistic):
    model, batch = MODELS[name](), padded_batch()
    axes = axes_of_kind(model, kind)
    threshold = 0.5 if statistic == "active" else None
    found = activation_importance(model, [batch], axes=axes, statistic=statistic, threshold=threshold)
    for axis in axes:
        rows = list(gate_inputs(model, axis, batch)[batch["attention_mask"].bool()])
        close(found[axis.name], by_loop(rows, statistic))
    assert found.samples == 2 and found.method == f"activation {statistic}"


def test_apoz_runs_the_other_way():
    """Neurons of a ReLU that are never, always and half of the time zero."""
    model, batch = MODELS["own"](), padded_batch()
    (axis, *_) = axes_of_kind(model, "neuron")

    def zeroed(_, arguments):
        x = arguments[0].abs() + 1
        x[..., 0] = 0
        x[:, ::2, 1] = 0
        return (x,)

    handle = axis.gate_module(model).register_forward_pre_hook(zeroed)
    found = activation_importance(model, [batch["input_ids"]], axes=[axis], statistic="active")[axis.name]
    handle.remove()
    assert found[:3].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name, kind", KINDS)
def test_responses_sum_over_tokens_what_the_loss_feels(name, kind):
    """Each token's activation is moved alone: a loop of finite differences."""
    model, batch = MODELS[name](), padded_batch()
    axes = axes_of_kind(model, kind)
    found = {r: response_importance(model, [batch], axes=axes, response=r, loss=masked_loss)
             for r in ("taylor", "sensitivity")}  # fmt: skip
    axis = axes[-1]
    inputs = gate_inputs(model, axis, batch)

    def loss_at(moved):
        hook = axis.gate_module(model).register_forward_pre_hook(lambda *_: (moved.flatten(-2),))
        with torch.no_grad():
            value = masked_loss(model, batch).item()
        hook.remove()
        return value

    unit, taylor, sensitivity = 1, 0.0, 0.0
    for sample in range(2):
        for token in range(6):
            slopes = []
            for channel in range(axis.width):
                ends = []
                for sign in (1, -1):
                    moved = inputs.clone()
                    moved[sample, token, unit, channel] += sign * 1e-3
                    ends.append(loss_at(moved))
                slopes.append((ends[0] - ends[1]) / 2e-3)
            slope = torch.tensor(slopes, dtype=torch.float64)
            taylor += abs(float((slope * inputs[sample, token, unit]).sum()))
            sensitivity += float(slope.norm())
    assert found["taylor"][axis.name][unit].item() == pytest.approx(taylor / 2, rel=2e-3)
    assert found["sensitivity"][axis.name][unit].item() == pytest.approx(sensitivity / 2, rel=2e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_do_not_cancel_as_they_do_under_a_gate():
    model, batch = MODELS["own"](), padded_batch()
    axes = axes_of_kind(model, "head")
    gates = gate_importance(model, [batch], axes=axes, loss=masked_loss)
    found = response_importance(model, [batch], axes=axes, loss=masked_loss)
    for axis in axes:
        assert (found[axis.name] >= gates[axis.name] - 1e-9).all()
    assert any((found[axis.name] > 1.01 * gates[axis.name]).any() for axis in axes)


def test_a_unit_without_energy_changes_nothing():
    model, batch = MODELS["own"](), padded_batch()
    (axis, *_) = axes_of_kind(model, "neuron")
    with torch.no_grad():
        model.layers[0].feedforward.up.weight[3] = 0
    energy = activation_importance(model, [batch], axes=[axis])[axis.name]
    assert energy[3] == 0 and (energy > 0).sum() == axis.size - 1
    with torch.no_grad():
        whole = model(**batch).logits
        with masked(model, [axis], {axis.name: [unit for unit in range(axis.size) if unit != 3]}):
            close(model(**batch).logits, whole)


@pytest.mark.parametrize("options, message", [
    ({"statistic": "apoz"}, "one of energy, variance, active, firing, got 'apoz'"),
    ({"threshold": 0.5}, "threshold must be >= 0 with 'active' and 'firing' alone, got 0.5 with 'energy'"),
    ({"statistic": "active", "threshold": -1.0}, "got -1.0 with 'active'"),
])  # fmt: skip
def test_bad_statistics(options, message):
    from tests.typecheck import unchecked

    model = MODELS["own"]()
    with unchecked(), pytest.raises(ValueError, match=message):
        activation_importance(model, [padded_batch()], axes=axes_of_kind(model, "head"), **options)


def test_bad_responses():
    from tests.typecheck import unchecked

    model, batch = MODELS["own"](), padded_batch()
    axes = axes_of_kind(model, "head")
    with unchecked(), pytest.raises(ValueError, match="one of sensitivity, taylor, got 'gain'"):
        response_importance(model, [batch], axes=axes, response="gain")
    with pytest.raises(ValueError, match="at least one batch"):
        activation_importance(model, [], axes=axes)
    with pytest.raises(ValueError, match="loss must depend on the activations"):
        response_importance(model, [batch], axes=axes, loss=lambda model, b: model(**b).logits.detach().sum())
