"""A few tokens without a graph: the oracle's answer, and no expert touched that was not chosen."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from moe import prepare_for_decoding
from moe.decode import fused_mixture
from moe.reference import mixture_of_experts
from tests.moe.cases import DTYPES, parameters, switch_layer, top_k_layer
from tests.tolerances import close


@pytest.fixture(params=["no_grad", "inference_mode"])
def without_graph(request):
    with getattr(torch, request.param)():
        yield


@pytest.mark.parametrize("prepared", [False, True], ids=["as built", "prepared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 16, 17])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu2", "relu, biases"])
def test_equals_the_oracle(tokens, dtype, kind, prepared, without_graph):
    activation, _, biases = kind.partition(", ")
    layer = top_k_layer(8, 5, 6, 3, activation=activation, dtype=dtype, bias=bool(biases))
    if prepared:
        prepare_for_decoding(layer)
    x = torch.randn(8, tokens, dtype=dtype).mT
    wide = [t.double() for t in (x, *parameters(layer))]
    y, _ = layer(x)
    assert y.dtype == dtype
    close(y, mixture_of_experts(*wide, k=3, renormalize=True, activation=activation), dtype)


@pytest.mark.parametrize("prepared", [False, True], ids=["as built", "prepared"])
@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_columns_are_shared_among_threads(tokens, dtype, threads, prepared, without_graph):
    # width 12 and 2 · 18 columns: 2 and 4 divide both, 3 too; experts with one row and with several
    layer = top_k_layer(12, 18, 6, 2, dtype=dtype)
    if prepared:
        prepare_for_decoding(layer)
    x = torch.randn(tokens, 12, dtype=dtype)
    wide = [t.double() for t in (x, *parameters(layer))]
    torch.set_num_threads(threads)
    close(layer(x)[0], mixture_of_experts(*wide, k=2, renormalize=True), dtype)


@pytest.mark.parametrize("prepared", [False, True], ids=["as built", "prepared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_unchosen_experts_are_not_touched(tokens, dtype, prepared, without_graph):
    layer = top_k_layer(experts=40, k=2, dtype=dtype, bias=True)
    if prepared:
        prepare_for_decoding(layer)
    x = torch.randn(tokens, 8, dtype=dtype)
    y, routing = layer(x)
    unchosen = torch.ones(40, dtype=torch.bool).index_fill(0, routing.expert, False)
    with torch.inference_mode():
        for weight in layer.experts.parameters():
            weight[unchosen] = torch.nan
    assert torch.equal(layer(x)[0], y)


def test_dropped_and_padding_tokens_get_zeros(without_graph):
    layer = switch_layer(capacity_factor=0.5)
    x = torch.randn(8, 8, dtype=torch.float64)
    real = torch.tensor([True] * 6 + [False] * 2)
    y, routing = layer(x, padding_mask=real)
    assert set(routing.token.tolist()) == set(y.any(1).nonzero().flatten().tolist())
    wide = [t.double() for t in (x, *parameters(layer))]
    options = {"renormalize": False, "capacity_factor": 0.5, "real": real.tolist()}
    close(y, mixture_of_experts(*wide, k=1, **options))


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_autocast_computes_in_its_dtype(bias, without_graph):
    layer = top_k_layer(dtype=torch.float32, bias=bias)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, layer(x)[0], torch.bfloat16)


def test_the_answer_does_not_depend_on_which_path_it_takes():
    layer = top_k_layer(dtype=torch.float32)
    x = torch.randn(9, 8)
    with_graph, _ = layer(x)
    with torch.no_grad():
        close(layer(x)[0], with_graph)


def test_flops_are_counted(without_graph):
    layer = top_k_layer(8, 12, 4, 2, dtype=torch.float32)
    x = torch.randn(3, 8)
    routing = layer.router(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer.experts(x, routing)
    assert counter.get_total_flops() == 2 * 6 * (8 * 24 + 12 * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_the_expression_for_a_compiler_equals_the_oracle(tokens, dtype, activation, bias):
    layer = top_k_layer(8, 5, 6, 3, activation=activation, dtype=dtype, bias=bias)
    x = torch.randn(tokens, 8, dtype=dtype)
    routing, experts = layer.route(x), layer.experts
    wide = [t.double() for t in (x, *parameters(layer))]
    wanted = mixture_of_experts(*wide, k=3, renormalize=True, activation=activation)
    weights = (experts.up, experts.down, activation, experts.up_bias, experts.down_bias)
    close(fused_mixture(x, routing.token, routing.expert, routing.weight, *weights), wanted, dtype)
    dropped = fused_mixture(x, routing.token[:0], routing.expert[:0], routing.weight[:0], *weights)
    assert not dropped.any() and dropped.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("prepared", [False, True], ids=["as built", "prepared"])
def test_a_shared_expert_passes_few_tokens_too(tokens, dtype, prepared, without_graph):
    layer = top_k_layer(dtype=dtype, shared_hidden=6)
    if prepared:
        prepare_for_decoding(layer)
    x, shared = torch.randn(tokens, 8, dtype=dtype), layer.shared
    gate, value = (x.double() @ shared.up[0].double()).chunk(2, dim=-1)
    alone = (torch.nn.functional.silu(gate) * value) @ shared.down[0].double().mT
    close(shared.forward_one(0, x), alone, dtype)
    with pytest.raises(IndexError, match=r"expert must be in \[0, num_experts=1\), got 1"):
        shared.forward_one(1, x)


@pytest.mark.parametrize("tokens", [1, 2])
def test_weights_and_sums_of_the_mixture_are_float32(tokens, without_graph):
    # what two nearly opposite weights leave of one expert's output: bfloat16 knows no 1 + 2**-9
    layer = top_k_layer(8, 5, 1, 1, dtype=torch.bfloat16)
    x, token = torch.randn(tokens, 8, dtype=torch.bfloat16), torch.arange(tokens).repeat_interleave(2)
    weight, zero = torch.tensor([1 + 2**-9, -1.0]).repeat(tokens), torch.zeros(2 * tokens, dtype=torch.int64)
    y = layer.experts(x, replace(layer.route(x), token=token, expert=zero, weight=weight))
    close(y.double(), layer.experts.forward_one(0, x).double() * 2**-9, torch.bfloat16)


def test_preparing_changes_nothing_but_the_order_in_memory():
    layer = top_k_layer(dtype=torch.float32, shared_hidden=6)
    before = copy.deepcopy(layer)
    assert prepare_for_decoding(nn.ModuleList([layer])) == ["0.experts", "0.shared"]
    assert layer.experts.up.stride(1) == 1 and layer.experts.up.shape == before.experts.up.shape
    for name, value in before.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(before.state_dict())
    assert copied.to(torch.bfloat16).experts.up.stride(1) == 1
    x = torch.randn(40, 8)
    for made in (layer, before):
        made.zero_grad()
        made(x)[0].square().sum().backward()
    for prepared, as_built in zip(layer.parameters(), before.parameters(), strict=True):
        close(prepared.grad, as_built.grad)
    with pytest.raises(ValueError, match="model must hold experts"):
        prepare_for_decoding(nn.Linear(2, 2))
