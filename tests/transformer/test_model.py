import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe import load_balancing_loss, router_z_loss
from sparse_attn import parse_pattern
from tests.tolerances import close
from tests.transformer import reference
from tests.typecheck import unchecked
from transformer import AttentionConfig, DenseConfig, LayerConfig, MoEConfig, Transformer, TransformerConfig

CAUSAL, WINDOW = "causal()", "causal() & (sliding_window(3) | sinks(1))"
MIXTURE = MoEConfig(hidden=6, num_experts=4, k=2)


def uniform(**options):
    defaults = {"vocab_size": 13, "dim": 12, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    return TransformerConfig.uniform(**{**defaults, **options})


def unequal():
    """Every layer different, as in a pruned model."""
    return TransformerConfig(
        vocab_size=13, dim=12, tied=False, max_length=64,
        layers=(
            LayerConfig(AttentionConfig(4, 2, 6, CAUSAL), DenseConfig(10)),
            LayerConfig(None, MIXTURE),
            LayerConfig(AttentionConfig(1, 1, 4, WINDOW), None),
            LayerConfig(AttentionConfig(3, 3, 2, WINDOW), DenseConfig(7, "gelu")),
            LayerConfig(None, None),
        ),
    )  # fmt: skip


def model_of(config, dtype=torch.float32):
    model = Transformer(config, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():  # scales and biases away from one and zero, so that every term shows in the logits
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize("pattern", [CAUSAL, WINDOW])
@pytest.mark.parametrize("length", [1, 7])
def test_logits_equal_the_loops(activation, pattern, length):
    model = model_of(uniform(pattern=pattern, feedforward=DenseConfig(10, activation), tied=activation == "gelu"))
    ids = torch.randint(13, (2, length))
    shown = parse_pattern(pattern)
    expected = [
        reference.logits(model, row.tolist(), sees=lambda i, j: bool(shown.visible(torch.tensor(i), torch.tensor(j))))
        for row in ids
    ]
    close(model(ids).logits, torch.stack(expected), dtype=torch.float32)


def test_every_number_of_the_config_reaches_the_model():
    """Far from their defaults, so that a default in their place shows."""
    mixture = MoEConfig(hidden=6, num_experts=4, k=2, renormalize=False, shared_hidden=5)
    model = model_of(uniform(rope_theta=7.0, norm_eps=0.3, feedforward=mixture))
    ids = torch.randint(13, (1, 8))

    def mixed(prefix, state, x):
        up, down, router = (state[f"{prefix}.{name}"] for name in ("experts.up", "experts.down", "router.weight"))
        scores = (x @ router.T).softmax(-1)
        y = swiglu(x, state[f"{prefix}.shared.up"][0], state[f"{prefix}.shared.down"][0])
        for t in range(len(x)):
            for e in scores[t].argsort(descending=True)[:2].tolist():
                y[t] += scores[t, e] * swiglu(x[t], up[e], down[e])
        return y

    expected = reference.logits(model, ids[0].tolist(), sees=lambda i, j: j <= i, moe=mixed)
    close(model(ids).logits[0], expected, dtype=torch.float32)


def swiglu(x, up, down):
    gate, value = (x @ up).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * value) @ down.T


def test_initial_weights_are_scaled_by_depth_where_they_write_to_the_stream():
    model = Transformer(TransformerConfig.uniform(vocab_size=50, dim=64, num_layers=8, num_heads=4))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            wanted = (2 / (5 * 64)) ** 0.5 / (4 if name.split(".")[-2] in ("output", "down") else 1)
            assert abs(parameter.std().item() / wanted - 1) < 0.1, name


def test_dropout_reaches_both_branches():
    for layer in (LayerConfig(AttentionConfig(2, 2, 4), None), LayerConfig(None, DenseConfig(8))):
        model = model_of(TransformerConfig(vocab_size=13, dim=12, layers=(layer,), dropout=0.5)).train()
        ids = torch.randint(13, (1, 7))
        assert not torch.equal(model(ids).hidden, model(ids).hidden)


def test_the_switch_router_gets_its_jitter():
    config = uniform(feedforward=MoEConfig(6, 4, k=1, router="switch", jitter=0.3))
    model = model_of(config).train()
    ids = torch.randint(13, (1, 7))
    assert not torch.equal(model(ids).routings[0].logits, model(ids).routings[0].logits)
    assert torch.equal(model.eval()(ids).routings[0].logits, model(ids).routings[0].logits)


def test_the_loss_without_the_logits():
    model = model_of(uniform())
    ids = torch.randint(13, (2, 8))
    out = model(ids, labels=ids, return_logits=False)
    assert out.logits is None and out.loss == model(ids, labels=ids).loss


def test_an_encoder_sees_both_ways():
    model = model_of(uniform(causal=False, feedforward=DenseConfig(10)))
    ids = torch.randint(13, (1, 6))
    close(model(ids).logits[0], reference.logits(model, ids[0].tolist(), sees=lambda i, j: True), dtype=torch.float32)


@pytest.mark.parametrize("config", [uniform(), uniform(feedforward=MIXTURE, pattern=WINDOW), unequal()])
def test_a_later_token_changes_nothing_before_it(config):
    model = model_of(config, torch.float64)
    ids = torch.randint(13, (1, 9))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 13
    before, after = model(ids).logits, model(changed).logits
    close(before[:, :5], after[:, :5])
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-3


def test_loss_is_next_token_cross_entropy_and_skips_ignored_labels():
    model = model_of(uniform(), torch.float64)
    ids = torch.randint(13, (3, 8))
    labels = ids.clone()
    labels[0, 3] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(out.loss, expected)


def test_padding_on_the_right_or_left_changes_no_real_logit():
    model = model_of(uniform(feedforward=MIXTURE, pattern="causal() & sliding_window(4)"), torch.float64)
    ids = torch.randint(13, (1, 6))
    plain = model(ids)
    for padded, real in ((F.pad(ids, (0, 3)), slice(0, 6)), (F.pad(ids, (3, 0)), slice(3, 9))):
        mask = torch.zeros_like(padded)
        mask[:, real] = 1
        out = model(padded, attention_mask=mask)
        close(out.logits[:, real], plain.logits, dtype=torch.float32)  # rotary angles are float32
        assert out.routings[0].loads().sum() == plain.routings[0].loads().sum()


@pytest.mark.parametrize("config", [uniform(feedforward=MIXTURE), unequal()])
def test_recomputation_gives_the_same_loss_gradients_and_experts(config):
    model = model_of(config, torch.float64).train()
    ids = torch.randint(13, (2, 9))
    results = []
    for again in (False, True):
        model.gradient_checkpointing(again)
        out = model(ids, labels=ids)
        routed = [r for r in out.routings if r is not None]
        (out.loss + sum(load_balancing_loss(r) + router_z_loss(r) for r in routed)).backward()
        results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for plain, again in zip(*results, strict=True):
        close(again, plain)


def test_recomputation_does_not_route_again(monkeypatch):
    """Between the two runs the router turns around: only a replay keeps the experts of the first run."""
    model = model_of(uniform(feedforward=MIXTURE, num_layers=1), torch.float64).train()
    model.gradient_checkpointing(True)
    router = model.layers[0].feedforward.router
    seen = []
    monkeypatch.setattr(router, "forward", lambda *a, f=router.forward, **o: seen.append(f(*a, **o)) or seen[-1])
    ids = torch.randint(13, (2, 5))
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        router.weight.data.neg_()
    loss.backward()
    assert len(seen) == 3 and all(routing.expert.equal(seen[0].expert) for routing in seen)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "mixture",
    [
        MoEConfig(6, 4, k=1, router="switch", jitter=0.3, capacity_factor=1.0),
        MoEConfig(6, 4, k=2, router="noisy_top_k"),
        MoEConfig(6, 4, k=2, router="top_2"),
    ],
    ids=lambda mixture: mixture.router,
)
def test_noise_is_the_same_in_the_recomputation(mixture, dropout):
    config = uniform(feedforward=mixture, dropout=dropout)
    model = model_of(config, torch.float64).train()
    ids = torch.randint(13, (2, 9))
    gradients = []
    for again in (False, True):
        model.gradient_checkpointing(again)
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        close(again, plain)


def test_replay_uses_the_recorded_experts():
    model = model_of(uniform(feedforward=MIXTURE), torch.float64)
    ids = torch.randint(13, (1, 7))
    first = model(ids)
    flipped = tuple(dataclasses.replace(r, expert=(r.expert + 1) % 4) for r in first.routings)
    out = model(ids, replay=flipped)
    assert all(a.expert.equal(b.expert) for a, b in zip(out.routings, flipped, strict=True))
    assert (out.logits - first.logits).abs().max() > 1e-4


def test_dropout_works_in_training_only():
    model = model_of(uniform(dropout=0.5))
    ids = torch.randint(13, (1, 7))
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    close(model.eval()(ids).logits, model(ids).logits)


def test_same_generator_same_weights():
    weights = [Transformer(uniform(), generator=torch.Generator().manual_seed(5)).state_dict() for _ in range(2)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.full((1, 3), 13), {}, r"input_ids must be in \[0, vocab_size=13\)"),
        (torch.zeros(1, 65, dtype=torch.long), {}, "at most max_length=64 tokens, got 65"),
        (torch.zeros(1, 3, dtype=torch.long), {"replay": ()}, "one entry for each of the 5 layers, got 0"),
    ],
)
def test_bad_input(ids, options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(unequal())(ids, **options)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 3)])
def test_ids_of_another_shape_or_type(ids):
    with unchecked(), pytest.raises(ValueError, match=r"input_ids must be integers \[B, L\]"):
        Transformer(uniform())(ids)


def test_an_encoder_takes_no_cache():
    model = Transformer(uniform(causal=False))
    with pytest.raises(ValueError, match="cannot take a cache"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=model.new_cache())


def test_nan_names_the_layer():
    model = Transformer(uniform(feedforward=MIXTURE))
    with torch.no_grad():
        model.layers[1].feedforward.router.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layers.1.feedforward"):
        model(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("made", [{}, {"mode": "streaming"}, {"unequal_rows": 2}], ids=str)
def test_a_pass_with_a_cache_has_no_backward_as_keys_lose_their_gradients_there(made):
    config = TransformerConfig.uniform(
        vocab_size=20, dim=16, num_layers=1, num_heads=2, pattern="causal() & (sliding_window(4) | sinks(2))"
    )
    model, text = Transformer(config), torch.randint(20, (2, 5))
    output = model(text, labels=text, cache=model.new_cache(**made))
    with pytest.raises(ValueError, match=r"backward\(\) needs a pass without a cache"):
        output.loss.backward()
    assert all(weight.grad is None for weight in model.parameters() if weight is not model.head_weight)
    torch.testing.assert_close(output.loss, model(text, labels=text).loss)


@pytest.mark.parametrize("drop", [{"dropout": 0.2}, {"dropout": 0.2, "layer_drop": 0.5}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "feedforward",
    [
        MoEConfig(8, 4, router="noisy_top_k"),
        MoEConfig(8, 4, k=1, router="switch", jitter=0.1),
        MoEConfig(8, 4, router="top_2"),
        MIXTURE,
    ],
    ids=lambda config: config.router,
)
def test_a_replay_draws_what_the_recorded_run_drew(feedforward, checkpointing, drop):
    config = TransformerConfig.uniform(
        vocab_size=13, dim=16, num_layers=3, num_heads=2, dropout=drop["dropout"], feedforward=feedforward
    )
    layers = tuple(dataclasses.replace(layer, layer_drop=drop.get("layer_drop", 0.0)) for layer in config.layers)
    model = Transformer(dataclasses.replace(config, layers=layers)).double().train()
    model.gradient_checkpointing(checkpointing)
    text = torch.randint(13, (2, 9))
    for seed in range(3):
        results = []
        replay = None
        for _ in range(2):
            torch.manual_seed(seed)
            output = model(text, labels=text, replay=replay)
            model.zero_grad()
            output.loss.backward()
            gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
            results.append((output.logits, gradients, torch.get_rng_state()))
            replay = tuple(routing.detach() for routing in output.routings)
        torch.testing.assert_close(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1])
        assert results[0][2].equal(results[1][2])
