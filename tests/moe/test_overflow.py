"""float16: what exceeds 65504 inside an expert reaches the output as inf or NaN, never as a number that looks right."""

import pytest
import torch

from moe import MoE, TopKRouter, load_balancing_loss, prepare_for_decoding, router_z_loss
from moe.decode import fused_mixture
from tests.moe.cases import top_k_layer
from training.finite import first_non_finite
from transformer import MoEConfig, Transformer, TransformerConfig

LARGEST = torch.finfo(torch.float16).max


def overflowing(activation, *, bias=False):
    """A layer whose expert 1 has pre-activations far above the largest float16."""
    layer = top_k_layer(activation=activation, dtype=torch.float16, bias=bias)
    with torch.no_grad():
        layer.experts.up[1] *= 3e4
    return layer


def exactly(layer):
    """The same weights in float64."""
    other = top_k_layer(activation=layer.experts.activation, bias=layer.experts.up_bias is not None)
    other.load_state_dict(layer.state_dict())
    return other.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize(
    ("tokens", "path"), [(40, "graph"), (40, "no graph"), (16, "few"), (1, "few"), (9, "prepared")]
)
def test_an_overflow_reaches_its_tokens_and_no_others(tokens, path, activation, bias):
    layer = overflowing(activation, bias=bias)
    if path == "prepared":
        prepare_for_decoding(layer)
    x = 4 * torch.randn(tokens, 8).half()
    with torch.set_grad_enabled(path == "graph"):
        routing = layer.route(x)
        y = layer.experts(x, routing).detach()
    exact = exactly(layer).experts
    expected, hidden = exact(x.double(), routing.detach()), exact.hidden_one(1, x.double())
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[routing.token[routing.expert == 1]] = True
    finite = y.isfinite().all(1)
    assert finite[~chosen].all()
    assert not (finite & chosen & (hidden.abs().amax(1) > LARGEST)).any()
    scale = expected.abs().amax(1, keepdim=True) + 0.1
    assert ((y.double() - expected).abs() <= 1e-2 * scale)[finite].all()


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_one_expert_alone_overflows_alike_and_the_compilers_loops_do_not(activation):
    layer = overflowing(activation)
    x = torch.full((3, 8), 4.0).half()
    with torch.no_grad():
        layer.experts.up[1].abs_()
        assert not layer.experts.forward_one(1, x).isfinite().any()
        # in float32 to the end, which is where a result too large for float16 becomes infinite
        layer.experts.down[1] *= 1e-6 if activation != "gelu" else 1e-2
        token, one = torch.arange(3), torch.ones(3, dtype=torch.long)
        y = fused_mixture(x, token, one, torch.ones(3), layer.experts.up, layer.experts.down, activation)
    expected = exactly(layer).experts.forward_one(1, x.double())
    finite = expected.abs() < LARGEST
    assert finite.any() and expected[finite].abs().min() > 1
    torch.testing.assert_close(y[finite].double(), expected[finite], rtol=1e-2, atol=1e-2)
    assert y[~finite].isinf().all()


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
def test_rows_that_fill_a_block_overflow_into_no_gradient(activation, monkeypatch):
    """A large token stands for the missing rows of all experts, not only of its own, whose weights are small."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("moe.grouped.SMALL_HALF", 2**40)
    layer = top_k_layer(experts=3, k=1, activation=activation, dtype=torch.float16, bias=True)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3, 8))
        layer.experts.up[0] *= 1e-3
    x = 0.1 * torch.randn(90, 8).half()
    x[:, :3] = torch.eye(3).repeat(30, 1)
    x[0] *= 2e4
    x[0, 0] = 6e4
    y, routing = layer(x)
    assert routing.expert[0] == 0 and y.isfinite().all()
    assert not layer.experts.forward_one(1, x[:1].abs() * 4).isfinite().all()
    found = torch.autograd.grad(y.float().sum(), layer.experts.parameters())
    assert all(gradient[1:].isfinite().all() for gradient in found)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, torch.nan), (torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 3e4)],
)
def test_padding_of_any_value_reaches_no_gradient_beside_a_shared_expert(dtype, value):
    """Finite rows too: they overflow inside."""
    layer = MoE(8, 16, 4, TopKRouter(8, 4, k=2), shared_hidden=8, bias=True).to(dtype)
    x, mask = torch.randn(3, 8, dtype=dtype), torch.tensor([True, False, True])
    found = []
    for filling in (value, 0.0):
        x[1] = filling
        y, routing = layer(x, padding_mask=mask)
        loss = y.float().square().sum() + load_balancing_loss(routing) + router_z_loss(routing)
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
        assert not y[1].any()
    for got, wanted in zip(*found, strict=True):
        assert got.equal(wanted) and got.isfinite().all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_a_gradient_scaler_skips_the_step_and_goes_on(bias):
    """Scaled gradients overflow in float16 while the output is finite: nothing moves, and a lower scale then works."""
    layer = MoE(8, 12, 4, TopKRouter(8, 4, k=2), bias=bias)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    x, skipped = torch.randn(40, 8), 0
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y, _ = layer(x)
        assert y.dtype == torch.float16 and y.isfinite().all()
        scaler.scale(y.float().square().mean()).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        moved = [name for name, parameter in layer.named_parameters() if not parameter.equal(before[name])]
        if scaler.get_scale() == scale:
            break
        skipped += 1
        assert not moved
    assert skipped > 0 and len(moved) == len(before)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_a_model_whose_expert_overflows_says_where():
    torch.manual_seed(0)
    config = TransformerConfig.uniform(
        vocab_size=13, dim=8, num_layers=2, num_heads=2, max_length=8, feedforward=MoEConfig(12, 4, k=4)
    )
    model = Transformer(config).half()
    with torch.no_grad():
        model.layers[0].feedforward.experts.up.fill_(3e4)
        model.embedding.weight.abs_()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.feedforward: router logits must be finite"):
        model(ids)
    assert "layers.0.feedforward.experts" in first_non_finite(model, lambda: model(ids))
