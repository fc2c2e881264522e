"""Each update rule, several steps of it, against loops over a tiny matrix in NumPy."""

import math

import numpy as np
import pytest
import torch

from moe import Noise
from pruning import cubic, one_shot
from pruning.learned import L0, STR, L0Units, Movement, Proximal, Regularized, SoftMovement, UnitGates, VariationalUnits
from pruning.learned.hard_concrete import expected_gate, hard_concrete, open_probability
from pruning.learned.variational import VariationalDropout, kl_to_prior, log_alpha
from tests.pruning.learned.fixtures import IN, OUT, Regression, sigmoid, smallest
from tests.pruning.toy import tokens, toy
from tests.tolerances import close

LR, STEPS = 0.01, 6


def same(actual: torch.Tensor, expected: np.ndarray) -> None:
    close(actual.detach(), torch.from_numpy(np.asarray(expected)).reshape(actual.shape))


def test_movement_scores_move_by_the_masked_gradient_times_the_weight():
    task = Regression()
    model, schedule = task.model(), cubic(0.6, begin=1, end=5)
    method = Movement(model, schedule=schedule)
    task.run(model, method, steps=STEPS, lr=LR)
    theta, scores, mask = task.start.copy(), np.zeros((OUT, IN)), np.ones((OUT, IN), dtype=bool)
    for step in range(STEPS):
        g = task.slope(theta * mask)
        for i in range(OUT):
            for j in range(IN):
                scores[i, j] -= LR * g[i, j] * theta[i, j]
                theta[i, j] -= LR * g[i, j] * mask[i, j]
        mask = smallest(scores, math.floor(round(schedule(step + 1) * OUT * IN, 9)))
    same(model.weight, theta)
    same(method.named_gates()["weight"], scores)
    assert method.masks().kept["weight"].numpy().tolist() == mask.tolist()
    assert method.masks().zeros == 9
    method.finish()
    same(model.weight, theta * mask)


def test_soft_movement_prunes_below_a_threshold_that_a_penalty_draws_scores_under():
    task = Regression()
    model = task.model()
    method = SoftMovement(model, strength=30.0, threshold=0.4)
    task.run(model, method, steps=STEPS, lr=0.05)
    theta, scores = task.start.copy(), np.zeros((OUT, IN))
    for _ in range(STEPS):
        mask = sigmoid(scores) > 0.4
        g = task.slope(theta * mask)
        pull = 30.0 * sigmoid(scores) * (1 - sigmoid(scores)) / (OUT * IN)
        scores, theta = scores - 0.05 * (g * theta + pull), theta - 0.05 * g * mask
    same(model.weight, theta)
    same(method.named_gates()["weight"], scores)
    assert 0 < method.masks().zeros < OUT * IN


def test_str_learns_its_threshold_and_moves_only_what_is_above_it():
    task = Regression()
    model = task.model()
    method = STR(model, strength=0.7, start=-2.0)
    task.run(model, method, steps=STEPS, lr=LR)
    theta, s = task.start.copy(), -2.0
    for _ in range(STEPS):
        above = np.abs(theta) > sigmoid(s)
        g = task.slope(np.sign(theta) * np.maximum(np.abs(theta) - sigmoid(s), 0))
        slope = sum(-g[i, j] * np.sign(theta[i, j]) for i in range(OUT) for j in range(IN) if above[i, j])
        s_next = s - LR * (slope * sigmoid(s) * (1 - sigmoid(s)) + 0.7 * s)
        theta, s = theta - LR * g * above, s_next
    same(model.weight, theta)
    assert method.thresholds()["weight"].item() == pytest.approx(sigmoid(s), rel=1e-9)
    method.finish()
    same(model.weight, np.sign(theta) * np.maximum(np.abs(theta) - sigmoid(s), 0))
    assert 0 < int((model.weight == 0).sum()) < OUT * IN


def hard_concrete_by_hand(log_a: float, u: float) -> tuple[float, float]:
    """z and dz/d log α."""
    s = sigmoid((math.log(u) - math.log(1 - u) + log_a) * 3 / 2)
    stretched = s * 1.2 - 0.1
    inside = 0 < stretched < 1
    return min(max(stretched, 0.0), 1.0), 1.2 * s * (1 - s) * 1.5 if inside else 0.0


def test_l0_draws_gates_and_penalises_that_they_are_open():
    task = Regression()
    model = task.model()
    method = L0(model, strength=2.0, keep=0.6, generator=torch.Generator().manual_seed(3))
    task.run(model, method, steps=STEPS, lr=LR)
    theta, log_a = task.start.copy(), np.full((OUT, IN), math.log(0.6 / 0.4))
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        u = torch.rand(OUT, IN, generator=generator).double().numpy()
        z, dz = np.vectorize(hard_concrete_by_hand)(log_a, u)
        p = sigmoid(log_a - 2 / 3 * math.log(0.1 / 1.1))
        g = task.slope(theta * z)
        log_a, theta = log_a - LR * (g * theta * dz + 2.0 * p * (1 - p) / (OUT * IN)), theta - LR * g * z
    same(model.weight, theta)
    same(method.named_gates()["weight"], log_a)


def test_the_gates_are_distributed_as_they_should():
    for value in (-3.0, 0.0, 2.0):
        log_a = torch.full((200_000,), value)
        u = torch.rand(log_a.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
        z = hard_concrete(log_a, u)
        assert float(z.min()) >= 0 and float(z.max()) <= 1
        assert float((z > 0).float().mean()) == pytest.approx(float(open_probability(log_a[:1])), abs=4e-3)
    assert float(expected_gate(torch.tensor(-2.41))) == 0.0 < float(expected_gate(torch.tensor(-2.38)))
    assert float(expected_gate(torch.tensor(4.0))) == 1.0


def test_the_kl_is_molchanovs_and_a_numerical_integral_agrees():
    levels = torch.linspace(-4, 7, 23, dtype=torch.float64)
    by_hand = [0.63576 - 0.63576 / (1 + math.exp(-(1.8732 + 1.48695 * a))) + 0.5 * math.log(1 + math.exp(-a))
               for a in levels.tolist()]  # fmt: skip
    close(kl_to_prior(levels), torch.tensor(by_hand, dtype=torch.float64))
    # −KL = ½ log α − E log|1 + √α ε| + C (their eq. 12); C from large α
    nodes = (np.arange(400_000) + 0.5) / 400_000 * 18 - 9
    parts = np.exp(-(nodes**2) / 2)
    exact = [0.5 * a - np.dot(parts, np.log(np.abs(1 + math.exp(a / 2) * nodes))) / parts.sum()
             for a in (*levels.tolist(), 16.0)]  # fmt: skip
    difference = (exact[-1] - np.array(exact[:-1])) - np.array(by_hand)
    assert np.abs(difference).max() < 0.03


def test_variational_dropout_draws_activations_of_the_right_mean_and_variance():
    task = Regression()
    model = task.model()
    method = VariationalDropout(model, start=-3.0)
    x = torch.from_numpy(task.x)
    torch.manual_seed(5)
    with method.parametrise():
        got = model(x)
    torch.manual_seed(5)
    noise = torch.randn(got.shape, dtype=got.dtype)
    for n in range(len(task.x)):
        for o in range(OUT):
            mean = sum(task.x[n, i] * task.start[o, i] for i in range(IN))
            variance = sum(task.x[n, i] ** 2 * math.exp(-3.0) for i in range(IN))
            assert got[n, o].item() == pytest.approx(mean + math.sqrt(variance + 1e-8) * noise[n, o].item(), rel=1e-9)
    model.eval()
    with method.parametrise():
        alpha = -3.0 - np.log(task.start**2)
        same(model(x), task.x @ (task.start * (alpha <= 3)).T)


@pytest.mark.parametrize("sizes", [(3, 2), (1, 4), (5,)], ids=str)
def test_variational_dropout_draws_the_same_for_a_sequence_whatever_the_micro_batch(sizes):
    """Outputs by loops; gradients of θ and σ² summed over micro-batches equal the whole batch's, by autograd."""
    task = Regression()
    x = torch.from_numpy(task.x)[:5]
    noise = Noise("step 0", 5)
    model = task.model()
    method = VariationalDropout(model, start=-3.0)
    outputs, start = [], 0
    with method.parametrise():
        for size in sizes:
            method.draw_from(noise.rows(start, start + size))
            outputs.append(model(x[start : start + size]))
            (outputs[-1].square() * (1 + torch.arange(start, start + size)[:, None])).sum().backward()
            start += size
    draws = torch.stack([
        noise.rows(n, n + 1).draw("noise of weight", x.new_empty(1, OUT), lambda part, g: part.normal_(generator=g))[0]
        for n in range(5)
    ])  # fmt: skip
    theta = torch.from_numpy(task.start).requires_grad_()
    level = torch.full_like(theta, -3.0).requires_grad_()
    alpha = (level - (theta**2 + 1e-16).log()).clamp(-8, 8).exp()
    wanted = x @ theta.T + ((x**2) @ (alpha * theta**2).T + 1e-8).sqrt() * draws
    (wanted.square() * torch.arange(1, 6)[:, None]).sum().backward()
    same(torch.cat(outputs), wanted.detach().numpy())
    same(model.weight.grad, theta.grad.numpy())
    same(method.named_gates()["weight"].grad, level.grad.numpy())
    with method.parametrise():  # the sequences of one step are not those of the next
        assert not model(x).equal(torch.cat(outputs))


def test_the_noise_level_is_clipped_on_both_sides():
    theta = torch.tensor([1e-6, 1.0, 1e6, 0.0], dtype=torch.float64)
    assert log_alpha(theta, torch.full_like(theta, -2.0)).tolist() == [8.0, -2.0, -8.0, 8.0]


def test_variational_gradients_are_those_of_the_loss_and_the_kl():
    task = Regression()
    model = task.model()
    method = VariationalDropout(model, start=-3.0, strength=0.5)
    gate = method.named_gates()["weight"]

    def objective() -> float:
        torch.manual_seed(2)
        with method.parametrise():
            value = task.loss(model)
        return float(value) + float(method.loss())

    torch.manual_seed(2)
    with method.parametrise():
        task.loss(model).backward()
    method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
    for tensor in (model.weight, gate):
        check_slopes(tensor, objective)


def check_slopes(tensor: torch.Tensor, objective, *, width: float = 1e-6) -> None:
    """The gradient of each entry against a central difference."""
    slopes = tensor.grad.clone()
    for index in np.ndindex(*tensor.shape):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[index] += sign * width
                values.append(objective())
                tensor[index] -= sign * width
        assert slopes[index].item() == pytest.approx((values[0] - values[1]) / (2 * width), rel=1e-4, abs=1e-6)


SMOOTH = {
    "l0_units": lambda model: L0Units(model, strength=0.3),
    "sigmoid": lambda model: UnitGates(model, sparsity=0.5, strength=0.3),
    "softplus": lambda model: UnitGates(model, sparsity=0.5, form="softplus", strength=0.3, polarize=1.1),
    "variational_units": lambda model: VariationalUnits(model, strength=0.3),
    "l0": lambda model: L0(model, strength=0.3),
    "str": lambda model: STR(model, start=-3.0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_weights_and_gates_are_finite_differences(name):
    model = toy((2, 1, 3), dim=4, width=2).train()
    model.dropout.p = 0.0
    method = SMOOTH[name](model)
    ids = tokens(2, 4)

    def objective() -> float:
        with method.parametrise():
            value = model(ids).square().mean()
        return float(value) + float(method.loss())

    with method.parametrise():
        model(ids).square().mean().backward()
    method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
    gates = method.named_gates()
    for key in list(gates)[:2]:
        check_slopes(gates[key], objective)
    check_slopes(model.get_parameter("feedforward.0.down.weight"), objective)


def test_gates_on_units_are_gates_on_their_activations():
    from pruning import gated, prunable_axes

    model = toy((4, 2, 6)).train()
    model.dropout.p = 0.0
    method = L0Units(model, keep=0.7, generator=torch.Generator().manual_seed(1))
    axes = [axis for axis in prunable_axes(model) if axis.kind in ("head", "neuron")]
    by_name = {group.name: name for name, group in method.groups.items()}
    with method.parametrise():
        got = model(tokens())
        z = {axis.name: method.gate(by_name[axis.name], training=True).detach() for axis in axes}
    with gated(model, axes, z):
        close(got, model(tokens()))


def test_proximal_shrinks_after_the_step():
    task = Regression()
    model = task.model()
    task.run(model, Proximal(model, strength=6.0), steps=STEPS, lr=LR)
    w = task.start.copy()
    for _ in range(STEPS):
        w = w - LR * task.slope(w)
        for i in range(OUT):
            for j in range(IN):
                w[i, j] = math.copysign(max(abs(w[i, j]) - LR * 6.0, 0.0), w[i, j])
    same(model.weight, w)
    assert 0 < (w == 0).sum() < w.size


def test_group_proximal_shrinks_a_unit_with_all_its_slices():
    from pruning import prunable_axes

    model = toy((2, 1, 5))
    axis = next(axis for axis in prunable_axes(model) if axis.kind == "neuron")
    method = Proximal(model, strength=30.0, axes=[axis])
    up, down = (model.get_parameter(f"feedforward.0.{n}.weight").detach().numpy().copy() for n in ("gate_up", "down"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    method.after_step(optimizer)
    for unit in range(5):
        parts = [up[unit], up[5 + unit], down[:, unit]]
        norm = math.sqrt(sum(float((part**2).sum()) for part in parts))
        factor = max(0.0, 1 - 0.02 * 30.0 * math.sqrt(sum(part.size for part in parts)) / norm)
        for part in parts:
            part *= factor
    same(model.get_parameter("feedforward.0.gate_up.weight"), up)
    same(model.get_parameter("feedforward.0.down.weight"), down)


def test_a_regularised_run_adds_the_penaltys_gradient_and_keeps_the_largest():
    task = Regression()
    model = task.model()
    method = Regularized(model, sparsity=0.4, strength=3.0)
    task.run(model, method, steps=STEPS, lr=LR)
    w = task.start.copy()
    for _ in range(STEPS):
        w = w - LR * (task.slope(w) + 3.0 * np.sign(w) / w.size)
    same(model.weight, w)
    method.finish()
    same(model.weight, w * smallest(np.abs(w), 6))


def test_a_mask_that_is_chosen_seldom_is_held_between():
    task = Regression()
    model = task.model()
    method = Movement(model, schedule=one_shot(0.4, step=1), every=3)
    task.run(model, method, steps=2, lr=LR)
    assert method.masks().zeros == 0
    task.run(model, method, steps=1, lr=LR)
    assert method.masks().zeros == 6
