"""Upcycling: the mixture equals the dense network at step 0, and training can tell the copies apart."""

import pytest
import torch
import torch.nn.functional as F

from moe.upcycle import upcycle
from tests.tolerances import close
from tests.typecheck import unchecked


def matrices(activation, hidden=24, dim=8, dtype=torch.float32):
    shapes = [(hidden, dim), (hidden, dim), (dim, hidden)]
    gate, up, down = (torch.randn(s, dtype=dtype) / s[1] ** 0.5 for s in shapes)
    return (gate if activation == "swiglu" else None), up, down


def dense(x, gate, up, down, activation):
    if activation == "swiglu":
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    a = x @ up.T
    return ({"gelu": F.gelu, "silu": F.silu}.get(activation, torch.relu)(a) ** (1 + (activation == "relu2"))) @ down.T


SIZES = [
    (1, 1, 1),
    (4, 1, 1),
    (4, 2, 1),
    (5, 5, 1),
    (8, 2, 2),
    (8, 4, 2),
    (12, 3, 3),
    (12, 6, 3),
    (4, 4, 4),
    (32, 8, 8),
]


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize(("num_experts", "k", "granularity"), SIZES)
def test_equal_to_the_dense_network_for_many_inputs(num_experts, k, granularity, activation):
    weights = matrices(activation)
    layer = upcycle(*weights, num_experts=num_experts, k=k, granularity=granularity, activation=activation)
    x = torch.randn(3, 300, 8, requires_grad=True)
    y, routing = layer(x)
    expected = dense(x, *weights, activation)
    close(y, expected)
    d_y = torch.randn_like(y)
    close(torch.autograd.grad(y, x, d_y)[0], torch.autograd.grad(expected, x, d_y)[0])
    shards = (routing.expert % granularity).view(-1, k)
    for s in range(granularity):
        assert ((shards == s).sum(1) == k // granularity).all(), "every token meets every shard equally often"
    groups = num_experts // granularity
    if groups > k // granularity:
        assert len((routing.expert // granularity).unique()) == groups, "the fresh router uses every group"


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("given", ["all", "up", "down"])
def test_biases_of_the_dense_network_are_taken_over(given, granularity, activation):
    gate, up, down = matrices(activation, dtype=torch.float64)
    rows = {name: torch.randn(size, dtype=torch.float64) for name, size in {"gate": 24, "up": 24, "down": 8}.items()}
    known = {name: row for name, row in rows.items() if given in ("all", name) and (name != "gate" or gate is not None)}
    layer = upcycle(gate, up, down, num_experts=4, k=2, granularity=granularity, activation=activation,
                    **{f"{name}_bias": row for name, row in known.items()})  # fmt: skip
    # a bias is one more input, which is 1: the dense network without biases has it as a column
    x = torch.randn(3, 30, 8, dtype=torch.float64)
    none = torch.zeros(24, dtype=torch.float64)
    wide = [None if w is None else torch.cat([w, known.get(name, none)[:, None]], 1)
            for name, w in {"gate": gate, "up": up}.items()]  # fmt: skip
    expected = dense(torch.cat([x, torch.ones_like(x[..., :1])], -1), *wide, down, activation)
    close(layer(x)[0], expected + known.get("down", torch.zeros(8, dtype=torch.float64)))


def test_redrawn_neurons_draw_their_biases_too():
    gate, up, down = matrices("swiglu")
    options = {"num_experts": 2, "k": 1, "gate_bias": torch.ones(24), "up_bias": torch.randn(24)}
    before = upcycle(gate, up, down, **options).experts
    after = upcycle(gate, up, down, **options, reinitialize=0.5).experts
    changed = (after.down != before.down).any(1)
    assert changed.sum(1).tolist() == [12, 12]
    gates, values = after.up_bias.split(24, 1)
    assert (gates == 1).all(), "alike, they are drawn alike"
    assert ((values != before.up_bias[:, 24:]) == changed).all()


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ({"gate_bias": torch.zeros(24)}, "gate_bias must be None without a gate, got a vector"),
        ({"up_bias": torch.zeros(8)}, r"up_bias must have shape \[24\], got \[8\]"),
        ({"down_bias": torch.zeros(24)}, r"down_bias must have shape \[8\], got \[24\]"),
    ],
)
def test_biases_of_another_size_are_refused(biases, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        upcycle(*matrices("gelu"), num_experts=2, k=1, activation="gelu", **biases)


def test_the_experts_hold_the_shards_and_only_their_product_is_scaled():
    gate, up, down = matrices("swiglu", dtype=torch.float64)
    layer = upcycle(gate, up, down, num_experts=4, k=2, granularity=2)
    for e in range(4):
        cut = slice(12 * (e % 2), 12 * (e % 2) + 12)
        close(layer.experts.up[e, :, :12], gate[cut].T)
        close(layer.experts.up[e, :, 12:], up[cut].T * 2**0.5)
        close(layer.experts.down[e], down[:, cut] * 2**0.5)
    assert layer.router.weight[0].equal(layer.router.weight[1]) and layer.router.weight[2].equal(layer.router.weight[3])
    assert not layer.router.weight[1].equal(layer.router.weight[2])
    assert layer.experts.up.dtype == torch.float64 and all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("activation", "up_scale", "down_scale"), [("gelu", 1.0, 4.0), ("relu2", 4 ** (1 / 3), 4 ** (1 / 3))]
)
def test_without_a_gate_the_scale_is_on_the_matrices_in_which_the_shard_is_homogeneous(
    activation, up_scale, down_scale
):
    _, up, down = matrices(activation, dtype=torch.float64)
    layer = upcycle(None, up, down, num_experts=8, k=4, granularity=4, activation=activation)
    for e in range(8):
        cut = slice(6 * (e % 4), 6 * (e % 4) + 6)
        close(layer.experts.up[e], up[cut].T * up_scale)
        close(layer.experts.down[e], down[:, cut] * down_scale)


def test_nothing_is_shared_with_the_dense_weights_and_the_generator_decides_the_router():
    gate, up, down = matrices("swiglu")
    options = {"num_experts": 4, "k": 2}
    one, two, other = (
        upcycle(gate, up, down, generator=torch.Generator().manual_seed(s), **options) for s in (1, 1, 2)
    )
    assert one.router.weight.equal(two.router.weight) and not one.router.weight.equal(other.router.weight)
    before = up.clone()
    with torch.no_grad():
        one.experts.up.zero_()
        one.experts.down.zero_()
    assert up.equal(before) and two.experts.up.any()


def test_one_step_separates_the_rows_of_a_group_and_leaves_the_dense_function():
    weights = matrices("swiglu")
    layer = upcycle(*weights, num_experts=4, k=2, granularity=2)
    x = torch.randn(64, 8)
    layer(x)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= parameter.grad
    assert not layer.router.weight[0].equal(layer.router.weight[1])
    assert not torch.allclose(layer(x)[0], dense(x, *weights, "swiglu"), atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_share_of_neurons_asked_for_is_drawn_anew_in_each_expert_by_itself(activation):
    weights = matrices(activation, hidden=2000)
    options = {"num_experts": 3, "k": 1, "activation": activation}
    plain, drawn = (
        upcycle(*weights, reinitialize=share, generator=torch.Generator().manual_seed(5), **options)
        for share in (0.0, 0.25)
    )
    assert plain.router.weight.equal(drawn.router.weight)
    changed = (plain.experts.down != drawn.experts.down).any(1)
    assert changed.sum(1).tolist() == [500] * 3
    assert not changed[0].equal(changed[1]), "each expert loses its own neurons"
    for up in (drawn.experts.up - plain.experts.up).split(2000, -1):
        assert (up != 0).any(1).equal(changed), "the same neurons in every matrix"
    old, new = plain.experts.down.mT[changed], drawn.experts.down.mT[changed]
    assert abs(new.mean() - old.mean()) < 0.1 * old.std() and abs(new.std() / old.std() - 1) < 0.05


def test_reinitialising_all_leaves_nothing_of_the_dense_network():
    layer = upcycle(*matrices("swiglu"), num_experts=2, k=2, reinitialize=1.0)
    assert not layer.experts.down[0].isclose(layer.experts.down[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": 0}, "granularity must be >= 1, got 0"),
        ({"granularity": 2.0}, "granularity must be an int >= 1, got 2.0"),
        ({"granularity": 5}, "granularity must divide F=24, got 5"),
        ({"granularity": 3}, "granularity must divide num_experts=4, got 3"),
        ({"granularity": 2, "k": 1}, "granularity must divide k=1, got 2"),
        ({"reinitialize": 1.5}, r"reinitialize must be in \[0, 1\], got 1.5"),
        ({"k": 5}, r"k must be in \[1, num_experts=4\], got 5"),
        ({"activation": "gelu"}, "gate must be a matrix for swiglu and None otherwise, got a matrix for 'gelu'"),
        ({"gate": None}, "gate must be a matrix for swiglu and None otherwise, got None for 'swiglu'"),
        ({"gate": torch.zeros(2, 8)}, r"gate must have the shape of up, \[24, 8\], got \[2, 8\]"),
        ({"down": torch.zeros(24, 8)}, r"shapes \[F, D\] and \[D, F\], got \[24, 8\] and \[24, 8\]"),
        ({"activation": "tanh", "gate": None}, "activation must be one of swiglu, gelu, relu, silu, relu2, got 'tanh'"),
    ],
)
def test_bad_input_names_the_bound_and_the_value(change, message):
    gate, up, down = matrices("swiglu")
    arguments = {"gate": gate, "up": up, "down": down, "num_experts": 4, "k": 2} | change
    with unchecked(), pytest.raises(ValueError, match=message):
        upcycle(**arguments)
