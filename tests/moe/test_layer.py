"""The layer against the oracle: outputs and every gradient, over shapes that break careless code."""

import pytest
import torch

from moe import MoE, TopKRouter
from moe.reference import mixture_of_experts
from tests.moe.cases import DTYPES, parameters, switch_layer, top_k_layer
from tests.tolerances import close
from tests.typecheck import unchecked


def compare(layer, x, d_y, *, dtype=None, renormalize=True, activation="swiglu", real=None, capacity_factor=None):
    """Run the layer, and the oracle in float64 on the same numbers; compare y, d_x and the three weight gradients."""
    x = x.requires_grad_()
    mask = None if real is None else torch.tensor(real).view(x.shape[:-1])
    y, routing = layer(x, padding_mask=mask)
    actual = [y, *torch.autograd.grad(y, [x, *parameters(layer)], d_y)]
    wide = [t.detach().double().requires_grad_() for t in (x, *parameters(layer))]
    options = {"renormalize": renormalize, "activation": activation, "real": real, "capacity_factor": capacity_factor}
    expected = mixture_of_experts(wide[0].reshape(-1, layer.dim), *wide[1:], k=layer.router.k, **options).view(x.shape)
    for got, wanted in zip(actual, [expected, *torch.autograd.grad(expected, wide, d_y.double())], strict=True):
        close(got, wanted, dtype)
    return routing


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_and_precision(activation, dtype, bias):
    layer = top_k_layer(activation=activation, dtype=dtype, bias=bias)
    x, d_y = torch.randn(23, 8, dtype=dtype), torch.randn(23, 8, dtype=dtype)
    compare(layer, x, d_y, activation=activation)


@pytest.mark.parametrize(
    ("tokens", "dim", "hidden", "experts", "k"),
    [(0, 8, 12, 4, 2), (1, 8, 12, 4, 2), (9, 8, 12, 4, 4), (7, 3, 5, 1, 1), (30, 7, 9, 33, 3), (5, 1, 1, 2, 1)],
)
@pytest.mark.parametrize(("renormalize", "bias"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_awkward_shapes(tokens, dim, hidden, experts, k, renormalize, dtype, bias):
    layer = top_k_layer(dim, hidden, experts, k, renormalize=renormalize, dtype=dtype, bias=bias)
    compare(
        layer, torch.randn(tokens, dim, dtype=dtype), torch.randn(tokens, dim, dtype=dtype), renormalize=renormalize
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_tokens_on_one_expert_and_the_others_empty(dtype):
    layer = switch_layer(dtype=dtype)
    with torch.no_grad():
        layer.router.weight[1:] = -layer.router.weight[0]
    x = layer.router.weight.detach()[:1] + torch.randn(11, 8, dtype=dtype) / 50
    routing = compare(layer, x, torch.randn(11, 8, dtype=dtype), renormalize=False)
    assert routing.loads().tolist() == [11, 0, 0, 0]


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize(("dtype", "tiles"), [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_an_expert_with_more_rows_than_a_chunk(dtype, tiles, bias, monkeypatch):
    monkeypatch.setattr("moe.grouped.has_tiles", lambda: tiles)
    monkeypatch.setattr("moe.grouped.SMALL_HALF", 0)
    monkeypatch.setattr("moe.grouped.CHUNK_ROWS", 4)
    layer = top_k_layer(experts=3, k=2, dtype=dtype, bias=bias)
    compare(layer, torch.randn(31, 8, dtype=dtype), torch.randn(31, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "small", "tiles"),
    [
        (torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.bfloat16, False, False),
        (torch.float64, True, False), (torch.float64, False, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_experts_that_share_a_batched_product_and_not(threads, dtype, small, tiles, bias, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("moe.grouped.has_tiles", lambda: tiles)
    for limit in ("SMALL_HALF", "SMALL_FLOAT"):
        monkeypatch.setattr(f"moe.grouped.{limit}", 2**40 if small else 0)
    layer = top_k_layer(experts=7, k=2, dtype=dtype, bias=bias)
    compare(layer, torch.randn(400, 8, dtype=dtype), torch.randn(400, 8, dtype=dtype))


def test_strided_and_expanded_inputs_and_gradients():
    layer = top_k_layer()
    d_y = torch.ones((), dtype=torch.float64).expand(3, 5, 8)
    compare(layer, torch.randn(5, 3, 8, dtype=torch.float64).transpose(0, 1), d_y)
    compare(layer, torch.randn(8, 3, 5, dtype=torch.float64).permute(1, 2, 0), d_y.transpose(0, 1).transpose(0, 1))
    compare(layer, torch.randn(8, dtype=torch.float64).expand(3, 5, 8), torch.randn(3, 8, 5).double().mT)


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_padding_gets_zeros_and_trains_nothing(bias):
    layer = top_k_layer(bias=bias)
    real = [True, False, True, True, False, False, True, True, True, True]
    x = torch.randn(10, 8, dtype=torch.float64)
    routing = compare(layer, x, torch.randn(10, 8, dtype=torch.float64), real=real)
    assert routing.padding == 3
    assert not set(routing.token.tolist()) & {1, 4, 5}
    y, _ = layer(x, padding_mask=torch.tensor(real))
    assert not y[[1, 4, 5]].any()


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_that_holds_nan_reaches_no_gradient(dtype, tiles, monkeypatch):
    monkeypatch.setattr("moe.grouped.has_tiles", lambda: tiles)
    monkeypatch.setattr("moe.grouped.SMALL_HALF", 0)
    layer = top_k_layer(dtype=dtype, bias=True)
    x = torch.randn(11, 8, dtype=dtype)
    x[0] = torch.nan
    real = torch.tensor([False] + [True] * 10)
    y, _ = layer(x, padding_mask=real)
    found = torch.autograd.grad(y.float().sum(), parameters(layer))
    clean, _ = layer(x[1:])
    for got, wanted in zip(found, torch.autograd.grad(clean.float().sum(), parameters(layer)), strict=True):
        close(got, wanted, dtype)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25])
def test_capacity_drops_what_the_loop_drops(factor):
    x, d_y = torch.randn(2, 26, 8, dtype=torch.float64)
    switch = switch_layer(capacity_factor=factor)
    compare(switch, x, d_y, renormalize=False, capacity_factor=factor)
    for bias in (False, True):
        routing = compare(top_k_layer(capacity_factor=factor, bias=bias), x, d_y, capacity_factor=factor)
        assert int(routing.choices().sum()) == 52


def test_shared_expert_is_added_for_every_token_but_padding():
    layer = top_k_layer(shared_hidden=6)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    y, routing = layer(x, padding_mask=mask)
    gate, value = (x @ layer.shared.up[0]).chunk(2, -1)
    shared = (torch.nn.functional.silu(gate) * value) @ layer.shared.down[0].mT
    close(y[mask], (layer.experts(x.view(10, 8), routing).view(2, 5, 8) + shared)[mask])
    assert not y[~mask].any()


@pytest.mark.parametrize("tokens", [2, 30])
def test_the_shared_expert_has_biases_too(tokens):
    layer = top_k_layer(shared_hidden=6, activation="relu", bias=True)
    x = torch.randn(tokens, 8, dtype=torch.float64)
    shared = layer.shared
    expected = (x @ shared.up[0] + shared.up_bias[0]).clamp_min(0) @ shared.down[0].mT + shared.down_bias[0]
    routed = top_k_layer(activation="relu", bias=True)
    routed.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared")})
    y = layer(x)[0]
    close(y, routed(x)[0] + expected)
    names = [name for name, _ in shared.named_parameters()]
    found = torch.autograd.grad(y.square().sum(), shared.parameters())
    wanted = torch.autograd.grad((routed(x)[0] + expected).square().sum(), shared.parameters())
    assert names == ["up", "down", "up_bias", "down_bias"]
    for got, one in zip(found, wanted, strict=True):
        close(got, one)
    with torch.no_grad():
        close(layer(x)[0], y)


def test_without_biases_nothing_is_added_to_the_state():
    assert top_k_layer(shared_hidden=6).state_dict().keys() == {
        "router.weight", "experts.up", "experts.down", "shared.up", "shared.down",
    }  # fmt: skip
    torch.manual_seed(0)
    plain = top_k_layer()
    torch.manual_seed(0)
    assert torch.equal(top_k_layer(bias=False).experts.down, plain.experts.down)


def test_biases_alone_learn_where_the_matrices_are_frozen():
    layer = top_k_layer(bias=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    layer(x)[0].sum().backward()
    expected = layer.experts.up_bias.grad.clone(), layer.experts.down_bias.grad.clone()
    layer.zero_grad()
    layer.requires_grad_(False)
    for bias in (layer.experts.up_bias, layer.experts.down_bias):
        bias.requires_grad_(True)
    layer(x)[0].sum().backward()
    assert layer.experts.up.grad is None
    close(layer.experts.up_bias.grad, expected[0])
    close(layer.experts.down_bias.grad, expected[1])
    layer.zero_grad()
    layer.experts.forward_one(1, x).sum().backward()
    assert layer.experts.down_bias.grad[1].equal(torch.full((8,), 3.0, dtype=torch.float64))


def test_biases_in_another_dtype_or_alone_are_refused():
    layer = top_k_layer(bias=True, dtype=torch.float32)
    layer.experts.up_bias = torch.nn.Parameter(layer.experts.up_bias.double())
    with pytest.raises(ValueError, match="x must have the dtype of the expert weights"):
        layer(torch.randn(20, 8))
    layer.experts.up_bias = None
    with pytest.raises(ValueError, match="up_bias and down_bias must be given together, got down_bias"):
        layer(torch.randn(20, 8))


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_gradcheck(bias):
    layer = top_k_layer(4, 3, 3, 2, bias=bias)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *weights):
        names = ["router.weight", "experts.up", "experts.down", "experts.up_bias", "experts.down_bias"]
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=False)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters(layer)))


def test_a_token_s_output_does_not_depend_on_the_others():
    layer = top_k_layer()
    x = torch.randn(20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    y, _ = layer(x)
    close(layer(x[order])[0], y[order])
    close(layer(x[3:4])[0], y[3:4])


@pytest.mark.parametrize("options", [{}, {"renormalize": False}, {"capacity_factor": 0.5}])
def test_replay_repeats_the_choice_and_recomputes_the_weights(options):
    layer = top_k_layer(**options)
    x = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x)
    again, replayed = layer(x, replay=routing.detach())
    close(again, y)
    for one, other in zip(
        *(torch.autograd.grad(out.sum(), [x, *parameters(layer)]) for out in (y, again)), strict=True
    ):
        close(one, other)
    with torch.no_grad():
        layer.router.weight.neg_()
    _, moved = layer(x, replay=routing.detach())
    assert torch.equal(moved.expert, routing.expert) and torch.equal(moved.dropped, routing.dropped)
    assert not torch.allclose(moved.weight, routing.weight)
    assert torch.equal(replayed.expert, routing.expert)


def test_checkpointing_with_a_replay_gives_the_same_gradients():
    layer = switch_layer(jitter=0.3, capacity_factor=0.75)
    x = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    recorded = layer(x)[1].detach()

    def run(x):
        return layer(x, replay=recorded)[0]

    plain = torch.autograd.grad(run(x).sum(), [x, *parameters(layer)])
    saved = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    for one, other in zip(plain, torch.autograd.grad(saved.sum(), [x, *parameters(layer)]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_autocast_computes_in_bf16_and_returns_gradients_in_the_dtype_of_the_weights(bias):
    layer = top_k_layer(dtype=torch.float32, bias=bias)
    x = torch.randn(40, 8, requires_grad=True)
    d_y = torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    actual = torch.autograd.grad(y, [x, *parameters(layer)], d_y.bfloat16())
    wide = [t.detach().double().requires_grad_() for t in (x, *parameters(layer))]
    expected = mixture_of_experts(*wide, k=2, renormalize=True)
    for got, wanted in zip(actual, torch.autograd.grad(expected, wide, d_y.double()), strict=True):
        assert got.dtype == torch.float32
        close(got, wanted, torch.bfloat16)


def test_frozen_experts_and_inputs_without_gradient():
    layer = top_k_layer()
    x = torch.randn(9, 8, dtype=torch.float64)
    layer(x)[0].sum().backward()
    expected = layer.router.weight.grad.clone()
    layer.zero_grad()
    layer.experts.requires_grad_(False)
    layer(x)[0].sum().backward()
    assert layer.experts.up.grad is None and torch.equal(layer.router.weight.grad, expected)
    with torch.inference_mode():
        assert torch.isfinite(layer(x)[0]).all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_saved_bytes_are_x_the_routing_and_the_pre_activation(bias):
    tokens, dim, hidden, experts, k = 64, 16, 24, 4, 2
    layer = top_k_layer(dim, hidden, experts, k, dtype=torch.float32, bias=bias)
    x = torch.randn(tokens, dim, requires_grad=True)
    routing = layer.router(x)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.experts(x, routing)
    weights = sum(parameter.numel() * 4 for parameter in layer.experts.parameters())
    rows = tokens * k
    routed = rows * (8 + 8 + 8 + 4)  # token, row and place of each assignment; its weight
    blocks = experts * 4 * 8
    assert sum(saved.values()) == weights + tokens * dim * 4 + rows * 2 * hidden * 4 + routed + blocks


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_flops_are_counted_exactly(bias):
    layer = top_k_layer(8, 12, 4, 2, dtype=torch.float32, bias=bias)
    x = torch.randn(10, 8, requires_grad=True)
    routing = layer.router(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = layer.experts(x, routing)
        forward = counter.get_total_flops()
        y.sum().backward()
    router = 2 * 2 * 10 * 8 * 4  # d_x and d_weight of the router
    assert forward == 2 * 20 * (8 * 24 + 12 * 8)
    assert counter.get_total_flops() == 3 * forward + router


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_forward_one_is_the_expert_unweighted(bias):
    layer = top_k_layer(experts=1, k=1, bias=bias)
    x = torch.randn(5, 8, dtype=torch.float64)
    close(layer.experts.forward_one(0, x), layer(x)[0])
    with pytest.raises(IndexError, match=r"expert must be in \[0, num_experts=1\), got 1"):
        layer.experts.forward_one(1, x)


def test_the_error_of_a_diverged_layer_names_it():
    layer = top_k_layer(name="layers.3.feedforward")
    x = torch.randn(4, 8, dtype=torch.float64)
    x[2, 1] = torch.inf
    with pytest.raises(
        FloatingPointError, match=r"layers\.3\.feedforward: router logits must be finite, .* 1 of 4 tokens"
    ):
        layer(x)
    y, _ = layer(x, padding_mask=torch.tensor([True, True, False, True]))
    assert torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(8, 4, 4, TopKRouter(9, 4, k=2)), "router.dim must be dim=8, got 9"),
        (lambda: MoE(8, 4, 4, TopKRouter(8, 5, k=2)), "router.num_experts must be num_experts=4, got 5"),
        (lambda: MoE(8, 0, 4, TopKRouter(8, 4, k=2)), "hidden must be >= 1, got 0"),
        (lambda: MoE(8, 4, 4, TopKRouter(8, 4, k=2), shared_hidden=-1), "shared_hidden must be >= 0, got -1"),
        (lambda: top_k_layer(capacity_factor=0.0), "capacity_factor must be a finite number > 0, got 0.0"),
        (lambda: top_k_layer()(torch.randn(3, 9).double()), "moe: x must have width dim=8, got 9"),
        (lambda: top_k_layer()(torch.randn(3, 8)), "x must have the dtype of the expert weights"),
    ],
)
def test_bad_input_names_the_bound_and_the_value(build, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        build()


def test_an_integer_mask_is_the_boolean_mask():
    layer = top_k_layer(dtype=torch.float32)
    x = torch.randn(2, 5, layer.dim)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    y, routing = layer(x, padding_mask=mask)
    expected, wanted = layer(x, padding_mask=mask.bool())
    close(y, expected)
    assert routing.expert.equal(wanted.expert) and routing.padding == 2


@pytest.mark.parametrize("name", ["padding_mask", "token_ids"])
def test_a_mask_or_ids_of_another_shape_are_refused(name):
    layer = top_k_layer(dtype=torch.float32)
    values = torch.ones(5, 2, dtype=torch.bool if name == "padding_mask" else torch.long)
    with unchecked(), pytest.raises(ValueError, match=rf"{name} must have shape \[2, 5\]"):
        layer(torch.randn(2, 5, layer.dim), **{name: values})


def test_a_replay_with_other_padding_is_refused():
    layer = top_k_layer(dtype=torch.float32)
    x = torch.randn(2, 5, layer.dim)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with pytest.raises(ValueError, match="padding_mask must be the one that replay was recorded with"):
        layer(x, padding_mask=mask, replay=layer(x)[1])
    recorded = layer(x, padding_mask=mask)
    close(layer(x, padding_mask=mask, replay=recorded[1])[0], recorded[0])


def test_an_unknown_priority_is_refused_before_anything_is_dropped():
    with unchecked(), pytest.raises(ValueError, match="drop_priority must be one of first_come, gate, choice"):
        MoE(8, 16, 4, TopKRouter(8, 4, k=2), drop_priority="typo")
