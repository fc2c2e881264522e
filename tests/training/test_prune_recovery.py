"""`prune --recover`: the steps against plain loops, zeros that hold, and from end to end."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import training.prune_recovery as recovery
from pruning import Masks, load_pruned, sparsify
from tests.tolerances import close
from tests.training.prune_folders import COMMON, HF, hf_folder, own_folder, texts_folder
from tests.training.test_cli import sparse_transformers
from training.prune_encoder import Encoder
from training.prune_recovery import Lesson, rate_at, recover, smoothed
from transformer import Transformer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")
FEW = ["--calibration-sequences", "6", "--eval-sequences", "4", "--batch", "3"]


def plan(*, steps: int = 3, by: str = "distill", rank: int | None = None) -> Lesson:
    return Lesson(steps, by, 0.01, rank, batch=2, seed=5)


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **HF["llama"][2])).to(dtype).eval()


def lessons() -> torch.Tensor:
    return torch.randint(0, 257, (4, 9), generator=torch.Generator().manual_seed(1))


def order(steps: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    every = torch.cat([torch.randperm(4, generator=draw) for _ in range(steps)])
    return [lessons()[every[2 * step : 2 * step + 2]] for step in range(steps)]


def recovered(model: torch.nn.Module, whole: torch.nn.Module, chosen: Lesson, masks: Masks | None) -> list[float]:
    encoder = Encoder("mean") if hasattr(model, "pooler") else None
    return recover(model, whole, lessons(), chosen, masks=masks, encoder=encoder, progress=list)


def loss_by_loop(model: torch.nn.Module, whole: torch.nn.Module, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """Sequence by sequence, token by token."""
    total, count = torch.zeros(()), 0
    for row in ids:
        if kind == "encoder":
            h, h0 = (one(row[None]).last_hidden_state[0] for one in (model, whole))
            e, e0 = h.mean(0), h0.mean(0)
            total = total + 1 - (e @ e0) / (e.norm() * e0.norm())
            count += 1
            continue
        p, p0 = (one(row[None]).logits[0].log_softmax(-1) for one in (model, whole))
        for place in range(len(row) - (kind == "retrain")):
            if kind == "retrain":
                total = total - p[place, row[place + 1]]
            else:
                total = total + (p0[place].exp() * (p0[place] - p[place])).sum()
            count += 1
    mean = total / count
    if kind == "encoder":
        h, h0 = (one(ids).last_hidden_state for one in (model, whole))
        mean = mean + (h - h0).square().sum() / h0.square().sum()
    return mean


@pytest.mark.parametrize("kind", ["distill", "retrain", "encoder"])
@pytest.mark.parametrize("at_once", [2**26, 1])
def test_steps_are_those_of_a_loop(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    if kind == "encoder":
        whole = transformers.BertModel(transformers.BertConfig(**COMMON, **HF["minilm"][2])).eval()
    else:
        whole = llama()
    model = copy.deepcopy(whole)
    masks = sparsify(model, sparsity=0.6)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for factor, ids in zip((1, 2 / 3, 1 / 3), order(3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        loss = loss_by_loop(expected, whole, ids, kind)
        loss.backward()
        used = [p.grad for p in expected.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in used]).norm()
        for gradient in used:
            gradient *= min(1.0, 1.0 / float(norm))
        optimizer.step()
        with torch.no_grad():
            for name, kept in masks.kept.items():
                expected.get_parameter(name).mul_(kept)
        losses.append(float(loss.detach()))
    kept_whole = copy.deepcopy(whole).state_dict()
    found = recovered(model, whole, plan(by="retrain" if kind == "retrain" else "distill"), masks)
    assert found == pytest.approx(losses, rel=1e-3)
    for (name, own), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        # the gradient of BERT's key biases is 0 but for rounding, and Adam makes steps of it
        assert name.endswith("key.bias") or (own - want).abs().max() < 2e-3, name
        assert torch.equal(own == 0, want == 0) or name not in masks.kept
    assert all(value.equal(kept_whole[name]) for name, value in whole.state_dict().items())
    weights = dict(model.named_parameters())
    assert sum(int((weights[name] == 0).sum()) for name in masks.kept) == masks.zeros


def test_half_precision_is_trained_in_float32_and_rounded_back() -> None:
    whole = llama(torch.bfloat16)
    model = copy.deepcopy(whole)
    masks = sparsify(model, sparsity=0.5)
    wide, buffers = copy.deepcopy(model).float(), {name: b.clone() for name, b in model.named_buffers()}
    small = Lesson(4, "distill", 1e-6, None, batch=2, seed=5)  # in bfloat16 every single step would be lost
    recovered(model, whole, small, masks)
    recovered(wide, whole, small, masks)
    for (name, own), want in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert own.dtype == torch.bfloat16 and own.equal(want.bfloat16()), name
    assert all(b.equal(buffers[name]) and b.dtype == buffers[name].dtype for name, b in model.named_buffers())


def test_adapters_change_adapted_weights_alone_and_keep_their_zeros() -> None:
    whole = llama()
    model = copy.deepcopy(whole)
    masks = sparsify(model, sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    losses = recovered(model, whole, plan(steps=6, rank=2), masks)
    after = model.state_dict()
    assert after.keys() == before.keys() and losses[-1] < losses[0]
    for name, value in after.items():
        if name in masks.kept:
            assert not value[~masks.kept[name]].any() and not value.equal(before[name])
            assert torch.linalg.matrix_rank(value - before[name]) > 2  # the mask lifts the rank of B·A
        else:
            assert value.equal(before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_types() -> None:
    model, whole = llama(torch.bfloat16), llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="loss of recovery step 0 must be finite, got nan: lower --recover-rate"):
        recovered(model, whole, plan(), None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_rates_rise_and_fall() -> None:
    rates = [rate_at(step, 40) for step in range(40)]
    close(torch.tensor(rates[:4]), torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert all(0 < late < early <= 1 for early, late in itertools.pairwise(rates[3:]))
    assert rate_at(0, 1) == 1
    assert smoothed([4.0, 2.0, 3.0], share=0.6) == [4.0, 3.0, 2.5] and smoothed([]) == []


@pytest.mark.parametrize(
    ("model", "options", "sparsity"),
    [
        ("llama", ["--sparsity", "0.7", "--recover", "25", "--recover-rate", "0.005"], 0.7),
        ("llama", ["--sparsity", "0.7", "--recover", "25", "--recover-rate", "0.05", "--recover-rank", "4"], 0.7),
        ("gpt2", ["--heads", "0.25", "--recover", "25", "--recover-by", "retrain", "--recover-rate", "0.005"], None),
        ("moe", ["--structure", "2:4", "--recover", "25", "--recover-rate", "0.005"], 0.5),
        ("minilm", ["--sparsity", "0.6", "--heads", "0.25", "--recover", "25", "--recover-rate", "0.002"], 0.6),
    ],
)
def test_recovery_from_end_to_end(tmp_path: Path, model: str, options: list[str], sparsity: float | None) -> None:
    folder, out = tmp_path / model, tmp_path / "out"
    own_folder(folder, experts=4) if model == "moe" else hf_folder(folder, model)
    texts = str(texts_folder(tmp_path / "texts"))
    assert sparse_transformers("prune", str(folder), str(out), "--data", texts, *FEW, *options) == 0
    record = json.loads((out / "prune.json").read_text())
    found, measure = record["recovery"], "error" if model == "minilm" else "loss"
    assert len(found["losses"]) == found["steps"] == 25
    assert record["after"][measure] < (1 if model == "moe" else 0.97) * found["before"][measure]
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    assert "recovered in 25 steps" in (out / "report.html").read_text()
    if sparsity is not None:
        masks = Masks.load(out / "masks.safetensors")
        saved = Transformer.from_pretrained(out) if model == "moe" else load_pruned(out, dtype=torch.float32)
        weights = dict(saved.named_parameters())
        assert masks.sparsity == pytest.approx(sparsity, abs=0.01)
        assert all(not weights[name][~kept].any() for name, kept in masks.kept.items())
        assert record["weights"]["zeros"] == masks.zeros


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", ["--recover", "-1"], "--recover must be at least 0 steps, got -1"),
        ("llama", ["--recover-by", "retrain"], "--recover-by goes with --recover 200"),
        ("llama", ["--recover-rank", "4"], "--recover-rank goes with --recover 200"),
        ("llama", ["--recover", "5", "--recover-rate", "0"], "--recover-rate must be above 0, got 0.0"),
        ("llama", ["--recover", "5", "--recover-rank", "0"], "--recover-rank must be at least 1, got 0"),
        ("llama", ["--recover", "5", "--recover-rank", "17"], "rank must be in [1, "),
        ("minilm", ["--recover", "5", "--recover-by", "retrain"], "which an encoder does not predict"),
        ("minilm", ["--recover", "5", "--width", "0.5"], "must be as wide: leave out the width that goes"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    folder = hf_folder(tmp_path / model, model)
    texts = str(texts_folder(tmp_path / "texts"))
    options = ["--sparsity", "0.5", *options]
    assert sparse_transformers("prune", str(folder), str(tmp_path / "out"), "--data", texts, *FEW, *options) == 1
    assert message in capsys.readouterr().err
