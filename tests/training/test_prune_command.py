"""`prune` from end to end: both kinds of folders, every structure, what is refused, and a run that was killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pruning import Masks, load_compact, load_pruned, prunable_weights
from pruning.criteria import ALLOCATIONS, METHODS
from tests.training.prune_folders import HF, hf_folder, own_folder, texts_folder
from tests.training.test_cli import sparse_transformers
from training.prune_arguments import PruneArguments
from training.prune_figures import place_of
from training.prune_report import write_prune_report
from transformer import Transformer

ROOT = Path(__file__).parents[2]
FEW = ["--calibration-sequences", "6", "--eval-sequences", "4", "--batch", "3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and models as they are asked for."""
    root = tmp_path_factory.mktemp("folders")
    texts_folder(root / "texts")
    return root


def source(folders: Path, model: str) -> str:
    """The folder of a model, made when it is first asked for; others are as they are."""
    folder = folders / model
    if model in HF:
        pytest.importorskip("transformers")
    if not folder.exists():
        if model in HF:
            hf_folder(folder, model)
        elif model in ("dense", "moe"):
            own_folder(folder, experts=4 if model == "moe" else 0)
    return str(folder)


def prune(folders: Path, model: str, out: Path, *options: str) -> int:
    text = [] if "--data" in options else ["--data", str(folders / "texts")]
    return sparse_transformers("prune", source(folders, model), str(out), *text, *FEW, *options)


def load(folder: Path) -> torch.nn.Module:
    own = json.loads((folder / "config.json").read_text())["model_type"] == "sparse-transformers"
    return Transformer.from_pretrained(folder) if own else load_pruned(folder, dtype=torch.float32)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in load(folder).named_parameters()}


def zeros_in(folder: Path, names: object) -> tuple[int, int]:
    found = [value for name, value in weights_of(folder).items() if name in set(names)]
    return sum(int((value == 0).sum()) for value in found), sum(value.numel() for value in found)


@pytest.mark.parametrize(
    ("model", "options", "share"),
    [
        ("dense", ["--sparsity", "0.5"], 0.5),
        ("dense", ["--sparsity", "0.7", "--method", "synflow", "--allocation", "erk"], 0.7),
        ("dense", ["--structure", "2:4", "--method", "sparsegpt"], 0.5),
        ("dense", ["--sparsity", "0.5", "--structure", "block 4x4"], 0.5),
        ("dense", ["--sparsity", "0.5", "--method", "random", "--calibration-sequences", "0"], 0.5),
        ("moe", ["--sparsity", "0.5", "--method", "wanda"], 0.5),
        ("llama", ["--sparsity", "0.6", "--method", "wanda", "--allocation", "owl"], 0.6),
        ("llama", ["--structure", "2:4"], 0.5),
        ("llama", ["--sparsity", "0.5", "--method", "snip"], 0.5),
        ("gpt2", ["--sparsity", "0.5", "--method", "sparsegpt"], 0.5),
        ("gpt2", ["--sparsity", "0.5", "--method", "gradient", "--allocation", "global"], 0.5),
        ("gpt2", ["--structure", "2:4"], 0.5),
        ("bloom", ["--sparsity", "0.5", "--method", "obs"], 0.5),
    ],
)
def test_weights_to_zero(folders: Path, tmp_path: Path, model: str, options: list[str], share: float) -> None:
    out = tmp_path / "out"
    assert prune(folders, model, out, *options) == 0
    masks, record = Masks.load(out / "masks.safetensors"), json.loads((out / "prune.json").read_text())
    if model == "bloom":  # no adapter: transformers reads it
        transformers = pytest.importorskip("transformers")
        pruned = {n: p.detach() for n, p in transformers.AutoModelForCausalLM.from_pretrained(out).named_parameters()}
    else:
        pruned = weights_of(out)
    assert masks.sparsity == pytest.approx(share, abs=0.01)
    assert all(not pruned[name][~kept].any() for name, kept in masks.kept.items())
    zeros = sum(int((pruned[name] == 0).sum()) for name in masks.kept)
    assert (zeros, masks.total) == (record["weights"]["zeros"], record["weights"]["total"])
    assert masks.zeros == zeros
    calibrated = record["arguments"]["method"] in ("wanda", "sparsegpt", "obs")
    reported = {one["name"].partition("[")[0] for one in record["weights"]["matrices"]}
    assert reported == (set(masks.kept) if calibrated else set())
    assert not (out / ".partial").exists()
    assert (out / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("model", "options", "kinds"),
    [
        ("dense", ["--heads", "0.3", "--neurons", "0.25"], {"head": 3, "neuron": 18}),
        ("dense", ["--layers", "0.4", "--width", "0.5"], {"layer": 1, "width": 8}),
        ("moe", ["--experts", "0.25", "--sparsity", "0.5"], {"expert": 3}),
        ("llama", ["--heads", "0.5", "--layerwise", "--neurons", "0.25"], {"head": 6, "neuron": 18}),
        ("llama", ["--layers", "0.4"], {"layer": 1}),
        ("gpt2", ["--heads", "0.25", "--sparsity", "0.5", "--method", "wanda"], {"head": 2}),
    ],
)
def test_units_that_go(folders: Path, tmp_path: Path, model: str, options: list[str], kinds: dict[str, int]) -> None:
    out = tmp_path / "out"
    assert prune(folders, model, out, *options) == 0
    record = json.loads((out / "prune.json").read_text())
    found = {one["kind"]: sum(map(len, one["removed"].values())) for one in record["units"]}
    assert found == kinds
    small = load(out)
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count == record["sizes"]["after"]["parameters"] < record["sizes"]["before"]["parameters"]
    assert count == sum(value.numel() for value in load_file(out / "model.safetensors").values())
    ids = torch.arange(20)[None]
    assert torch.isfinite(small(ids).logits).all()


def test_the_numbers_are_those_of_the_saved_model(folders: Path, tmp_path: Path) -> None:
    """Loss by a loop over single positions, zeros by counting, bytes on disk."""
    out = tmp_path / "out"
    assert prune(folders, "llama", out, "--sparsity", "0.5", "--method", "wanda", "--compact") == 0
    record, model = json.loads((out / "prune.json").read_text()), load(out)
    documents = [path.read_bytes() for path in sorted((folders / "texts").iterdir())]
    from training.corpora import load_corpus

    held_out = load_corpus(str(folders / "texts")).held_out
    assert {text.encode() for text in held_out} <= set(documents)
    tokenizer = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    letters = {index: token for token, index in tokenizer.items()}
    stream = [_id(letters, byte) for text in held_out for byte in [*text.encode(), None]]
    windows, length = record["text"]["held_out_windows"], record["text"]["held_out_length"]
    nats, predicted = 0.0, 0
    for window in range(windows):
        ids = torch.tensor(stream[window * length : (window + 1) * length + 1])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0].double()
        for place in range(length):
            nats -= (logits[place, ids[place + 1]] - logits[place].logsumexp(0)).item()
            predicted += 1
    assert record["after"]["tokens"] == predicted
    assert record["after"]["loss"] == pytest.approx(nats / predicted, rel=1e-5)
    assert record["after"]["perplexity"] == pytest.approx(torch.tensor(nats / predicted).exp().item(), rel=1e-4)
    zeros, total = zeros_in(out, prunable_weights(model))
    assert (record["weights"]["zeros"], record["weights"]["total"]) == (zeros, total)
    compact = out / "compact" / "compact.safetensors"
    assert record["sizes"]["compact_bytes"] == compact.stat().st_size
    again = load_compact(out / "compact", load(out))
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())


def _id(letters: dict[int, str], byte: int | None) -> int:
    from tokenizers.pre_tokenizers import ByteLevel

    end = next(index for index, token in letters.items() if token == "<|endoftext|>")
    if byte is None:
        return end
    shown = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0]
    return next(index for index, token in letters.items() if token == shown)


def test_calibration_and_held_out_text_do_not_meet(folders: Path, tmp_path: Path) -> None:
    from training.prune_models import find_source, load_coder
    from training.prune_text import read_texts

    folder = Path(source(folders, "dense"))
    arguments = PruneArguments(model=folder, out=tmp_path / "out", data=str(folders / "texts"),
                               sparsity=0.5, calibration_sequences=1000, eval_sequences=1000)  # fmt: skip
    found = find_source(folder)
    texts = read_texts(arguments, found, load_coder(found), most=32)
    calibration = {tuple(row) for row in texts.calibration.unfold(1, 12, 1).flatten(0, 1).tolist()}
    held_out = {tuple(row) for row in texts.held_out.unfold(1, 12, 1).flatten(0, 1).tolist()}
    assert len(texts.calibration) < 1000 and len(held_out) > 30
    assert not held_out & calibration
    other = read_texts(arguments, found, load_coder(found), most=32)
    assert other.fingerprints() == texts.fingerprints()


def test_the_page_the_table_and_the_json(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--sparsity", "0.5", "--method", "sparsegpt", "--heads", "0.3", "--sensitivity"]
    assert prune(folders, "dense", out, *options, "--json") == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert record == json.loads((out / "prune.json").read_text())
    assert "perplexity" in shown.err and "% of the weights zero (sparsegpt)" in shown.err
    assert record["command"].startswith("sparse-transformers prune ") and record["command"].endswith("--json")
    assert set(record["sensitivity"]["rises"]) >= set(record["weights"]["by_name"])
    html = (out / "report.html").read_text()
    for text in ("What it cost, what it saves", "Heads removed", "Zeros by layer", "Output error of each matrix",
                 "Sensitivity", "The command", "make no pass faster", "<svg"):  # fmt: skip
        assert text in html
    again = write_prune_report(out, output=tmp_path / "again.html")
    assert again.read_text() == html


def test_a_killed_run_goes_on_to_the_same_bits(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(folders / "texts"), *FEW, "--sparsity", "0.5", "--method", "sparsegpt", "--heads", "0.3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sparse_transformers("prune", source(folders, "moe"), str(whole), *options) == 0
    command = [sys.executable, "-m", "tests.training.killed_prune", "2", source(folders, "moe"), str(killed), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "kept\n" for line in process.stdout)
    process.kill()
    assert process.wait() == -9
    assert not (killed / "config.json").exists()
    assert len(list((killed / ".partial").glob("block-*.safetensors"))) == 2
    assert sparse_transformers("prune", source(folders, "moe"), str(killed), *options) == 1
    assert "holds a stopped run: add --resume" in capsys.readouterr().err
    changed = [*options[:-1], "0.5"]
    assert sparse_transformers("prune", source(folders, "moe"), str(killed), *changed, "--resume") == 1
    assert "--heads was 0.3, got 0.5" in capsys.readouterr().err
    assert sparse_transformers("prune", source(folders, "moe"), str(killed), *options, "--resume") == 0
    assert "going on behind 2 finished blocks" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    first, second = (Masks.load(folder / "masks.safetensors") for folder in (whole, killed))
    assert all(second.kept[name].equal(kept) for name, kept in first.kept.items())
    records = [json.loads((folder / "prune.json").read_text()) for folder in (whole, killed)]
    for key in ("before", "after", "weights", "units"):
        assert records[0][key] == records[1][key]
    assert not (killed / ".partial").exists()
    assert sparse_transformers("prune", source(folders, "moe"), str(killed), *options, "--resume") == 1
    assert "no stopped run" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_errors_leave_nothing(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.prune_command as command

    def interrupted(job: object) -> dict[str, object]:
        raise KeyboardInterrupt

    def failing(job: object) -> dict[str, object]:
        raise ValueError("no luck")

    whole = command._pruned
    for stop, code in ((failing, 1), (interrupted, 130)):
        monkeypatch.setattr(command, "_pruned", stop)
        assert prune(folders, "dense", tmp_path / "out", "--sparsity", "0.5") == code
    assert f"{FEW[-1]} --sparsity 0.5 --resume" in capsys.readouterr().out
    monkeypatch.setattr(command, "_pruned", whole)
    assert prune(folders, "dense", tmp_path / "out", "--sparsity", "0.5", "--resume") == 0


def test_refit_and_order_are_the_library_s(folders: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in {"plain": (), "refit": ("--refit",), "wanda": ("--method", "wanda"),
                          "diag": ("--method", "sparsegpt", "--order", "diag"),
                          "sparsegpt": ("--method", "sparsegpt")}.items():  # fmt: skip
        assert prune(folders, "dense", tmp_path / name, "--sparsity", "0.5", *options) == 0
        record = json.loads((tmp_path / name / "prune.json").read_text())
        found[name] = record["weights"]["matrices"], record["after"]["loss"]
    assert [name for name, (matrices, _) in found.items() if not matrices] == ["plain"]
    assert len({loss for _, loss in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("dense", [], "say what to prune"),
        ("dense", ["--sparsity", "0"], "--sparsity must be above 0 where nothing else is pruned, got 0.0"),
        ("dense", ["--sparsity", "1.5"], "must be in [0, 1), got 1.5"),
        ("dense", ["--neurons", "-0.1"], "--neurons must be in [0, 1), got -0.1"),
        ("dense", ["--sparsity", "0.5", "--method", "wandas"], "got 'wandas'; did you mean 'wanda'?"),
        ("dense", ["--sparsity", "0.5", "--allocation", "globl"], "got 'globl'; did you mean 'global'?"),
        ("dense", ["--sparsity", "0.5", "--allocation", "erk", "--scope", "global"], "--scope is an older name"),
        ("dense", ["--heads", "0.5", "--method", "wanda"], "choose weights: give --sparsity"),
        ("dense", ["--heads", "0.5", "--refit"], "--refit and --order choose weights: give --sparsity"),
        ("dense", ["--sparsity", "0.5", "--method", "snip", "--refit"], "--refit goes with --method magnitude, admm"),
        ("dense", ["--sparsity", "0.5", "--method", "wanda", "--order", "diag"], "--order diag goes with --method sp"),
        ("dense", ["--structure", "2:4", "--method", "sparsegpt", "--order", "diag"], "and --structure 2:4"),
        ("dense", ["--expert-neurons", "0.5"], "--expert-neurons needs a model that has them"),
        ("dense", ["--sparsity", "0.6", "--structure", "2:4"], "means sparsity=0.5, got 0.6"),
        ("dense", ["--sparsity", "0.6", "--structure", "pairs"], "structure must be None, 'n:m'"),
        ("dense", ["--structure", "1:3", "--method", "sparsegpt"], "m a divisor of 128, got '1:3'"),
        ("dense", ["--sparsity", "0.5", "--method", "descent"], "groups of m inputs: give --structure 2:4"),
        ("dense", ["--structure", "2:4", "--method", "exact_obs"], "leave out --structure, got '2:4'"),
        ("dense", ["--structure", "2:5"], "needs inputs divisible by 5, got 16 in layers.0.attention.query.weight"),
        ("dense", ["--sparsity", "0.5", "--structure", "block 5x5"], "divisible by 5x5, got"),
        ("dense", ["--sparsity", "0.5", "--method", "obs", "--structure", "row"], "must be n:m, got 'row'"),
        ("dense", ["--structure", "2:4", "--method", "wanda", "--allocation", "erk"], "must be uniform"),
        ("dense", ["--sparsity", "0.5", "--allocation", "loss"], "--allocation loss goes with --method admm, descent,"),
        ("dense", ["--structure", "2:4", "--method", "wanda", "--allocation", "loss"], "must be uniform"),
        ("dense", ["--sparsity", "0.5", "--method", "wanda", "--calibration-sequences", "0"],
         "--method wanda needs calibration text: --calibration-sequences must be at least 1, got 0"),
        ("dense", ["--heads", "0.5", "--calibration-sequences", "0"], "--heads needs calibration text"),
        ("dense", ["--sparsity", "0.5", "--eval-sequences", "0"], "--eval-sequences must be at least 1, got 0"),
        ("dense", ["--heads", "0.5", "--calibration-length", "33"], "at most the model's 32 tokens, got 33"),
        ("dense", ["--heads", "0.5", "--data", "{root}/short.txt"], "one sequence of --calibration-length=32: give"),
        ("dense", ["--heads", "0.5", "--data", "{root}/nothing"], "no file for corpus"),
        ("dense", ["--experts", "0.5"], "has units of kind head, layer, neuron, width"),
        ("dense", ["--heads", "0.5", "--resume"], "no stopped run in"),
        ("absent", ["--heads", "0.5"], "MODEL must be a folder, "),
        ("texts", ["--heads", "0.5"], "no model in"),
        ("untold", ["--heads", "0.5"], "no tokenizer in"),
        ("unknown", ["--heads", "0.5"], "LlamaForCausalLM, LlamaForSequenceClassification"),
        ("quantised", ["--heads", "0.5"], "must hold plain weights, got quantised ones"),
        ("packed", ["--heads", "0.5"], "must hold one .gguf file, got a.gguf, b.gguf"),
        ("t5", ["--sparsity", "0.5"], "a causal language model or a text encoder, got T5ForConditionalGeneration"),
        ("bloom", ["--heads", "0.5"], "got BloomForCausalLM: prune its weights by --sparsity"),
        ("gpt2", ["--experts", "0.5"], "--experts needs a model that has them"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_work_starts(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    _odd_folders(folders)
    if model in ("unknown", "quantised"):
        pytest.importorskip("transformers")
    out = tmp_path / "out"
    filled = [option.format(root=folders) for option in options]
    text = [] if "--data" in filled else ["--data", str(folders / "texts")]
    assert sparse_transformers("prune", source(folders, model), str(out), *text, *FEW, *filled) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert message in shown
    assert not out.exists() or [path.name for path in out.iterdir()] == [".sparse-transformers"]


def _odd_folders(root: Path) -> None:
    (root / "short.txt").write_text("a b\nc d\n")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name, record in (("untold", llama), ("unknown", {"model_type": "nothing"}),
                         ("quantised", {**llama, "quantization_config": {}})):  # fmt: skip
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(record))
        if name != "untold":
            (root / name / "tokenizer.json").write_text("{}")
    (root / "packed").mkdir(exist_ok=True)
    for name in ("a.gguf", "b.gguf"):
        (root / "packed" / name).touch()


def test_out_that_holds_something_is_refused(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in ((tmp_path, "has notes.txt: give another folder"), (tmp_path / "notes.txt", "is a file")):
        assert prune(folders, "dense", out, "--sparsity", "0.5") == 1
        assert message in capsys.readouterr().err
    assert sparse_transformers("prune", source(folders, "dense"), "--sparsity", "0.5") == 1
    assert "give one folder for the result" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_help_names_every_method_and_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse_transformers("prune", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*METHODS, *ALLOCATIONS):
        assert name in shown


def test_names_of_parameters_give_layer_and_kind() -> None:
    assert place_of("transformer.h.11.attn.c_attn.weight") == (11, "attn.c_attn")
    assert place_of("layers.0.feedforward.experts.up[3]") == (0, "feedforward.experts.up")
    assert place_of("lm_head.weight") is None
