"""SmolLM2-135M-Instruct without some of its heads: what each importance costs, against chance and against zeros.

python -m benchmarks.smollm2_heads [--text FILE] [--fractions 0.1 0.2 0.3 0.4 0.5] [--recover 20]
    [--parts removed recovered whole] [--importances gradient "chance 0" ...]

removed: for each importance and fraction heads removed for good (``prune_heads``; 9 query heads on 3 key-value heads a
layer, so whole groups or the same number from each), perplexity, parameters, and for the gradient the median time of a
forward pass of 4 sequences in turns with the whole model. "zeros" sets as many weights to zero as the heads had, by
SparseGPT, anywhere in the blocks. recovered: so many steps of next-token training on the calibration text after
removing --recover-fraction of the heads; whole: of the whole model, by the same steps, so that what mere training gains
is seen. Text, calibration and evaluation as ``smollm2_pruning``. Records are appended to runs/smollm2-heads.jsonl.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.activation_smollm2 import load_model
from benchmarks.harness import commit, interleaved
from benchmarks.smollm2_pruning import perplexity, prose, sequences
from pruning import (
    attention_confidence,
    head_importance,
    magnitude_importance,
    prunable_axes,
    prune_heads,
    random_importance,
    sparsify,
)
from pruning.saliency import response_importance
from pruning.weights import prunable_weights
from training.allocator import keep_freed_memory
from training.precision import Precision, choose_precision

RECORDS = Path("runs/smollm2-heads.jsonl")
SCORED, SEEDS, ROUNDS = 8, 3, 5
PARTS = ("removed", "recovered", "whole")
Scores = Mapping[str, Tensor]


def importances(model: Any, calibration: Tensor) -> dict[str, Scores]:
    """Each importance of every head, the larger the more important; chance with three seeds."""
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    batches = list(calibration[:SCORED].split(2))
    found: dict[str, Scores] = {
        "gradient": head_importance(model, batches, normalize=None),
        "gradient, by layer": head_importance(model, batches),
        "activation taylor": response_importance(model, batches, axes=axes),
        "magnitude": magnitude_importance(model, axes),
        "confidence": attention_confidence(model, batches),
    }
    for seed in range(SEEDS):
        found[f"chance {seed}"] = random_importance(axes, generator=torch.Generator().manual_seed(seed))
    return found


def seconds(models: Mapping[str, Any], ids: Tensor, precision: Precision) -> dict[str, float]:
    """Median seconds of a forward pass, in turns."""

    def forward(model: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), precision.autocast(torch.device("cpu")):
                return model.model(ids, use_cache=False)

        return run

    times = interleaved({name: forward(model) for name, model in models.items()}, rounds=ROUNDS, warmup=1)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def recover(model: Any, calibration: Tensor, steps: int, precision: Precision) -> float:
    """Train on the calibration text, 4 sequences a step; seconds."""
    start = time.perf_counter()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for step in range(steps):
        rows = calibration[torch.arange(step * 4, step * 4 + 4) % len(calibration)]
        with precision.autocast(torch.device("cpu")):
            logits = model(rows, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Setting:
    """The whole model, what it is calibrated and evaluated on, and what every record says."""

    dense: Any
    calibration: Tensor
    evaluation: Tensor
    precision: Precision
    common: Mapping[str, Any]

    def perplexity(self, model: Any) -> float:
        """Of the held-out tokens."""
        return perplexity(model, self.evaluation, self.precision)

    def write(self, **line: Any) -> None:
        """Append a record."""
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps({"name": "heads", **self.common, **line}) + "\n")
        print(line, flush=True)


def removed(setting: Setting, importance: str, scores: Scores, fraction: float) -> None:
    """One importance at one fraction; by the gradient also its time, and as many zeros."""
    model = copy.deepcopy(setting.dense)
    report = prune_heads(model, scores, fraction=fraction)
    line = {"importance": importance, "fraction": fraction, "achieved": report.achieved,
            "parameters": report.parameters_after, "perplexity": setting.perplexity(model)}  # fmt: skip
    if importance == "gradient":
        times = seconds({"whole": setting.dense, "pruned": model}, setting.evaluation[:4], setting.precision)
        line |= {f"{key}_s": value for key, value in times.items()} | zeros(setting, report.parameters_after)
    setting.write(**line)


def zeros(setting: Setting, parameters: int) -> dict[str, float]:
    """As many single weights at zero as leave so many parameters, by SparseGPT: their share and the perplexity."""
    model = copy.deepcopy(setting.dense)
    whole = sum(p.numel() for p in model.parameters())
    share = (whole - parameters) / sum(p.numel() for p in prunable_weights(model).values())
    sparsify(model, sparsity=share, method="sparsegpt", calibration=list(setting.calibration[:16].split(4)))
    return {"zeros_sparsity": share, "zeros_perplexity": setting.perplexity(model)}


def recovered(setting: Setting, importance: str, scores: Scores | None, fraction: float, steps: int) -> None:
    """After training without the heads that matter least; scores: None trains the whole model."""
    model = copy.deepcopy(setting.dense)
    if scores is not None:
        prune_heads(model, scores, fraction=fraction)
    before = setting.perplexity(model)
    took = recover(model, setting.calibration, steps, setting.precision)
    setting.write(importance=importance, fraction=fraction, recovered_steps=steps, recovery_s=took,
                  perplexity_before=before, perplexity=setting.perplexity(model))  # fmt: skip


def prepared(options: argparse.Namespace) -> Setting:
    """The model and the text, as the options say."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    precision = choose_precision("auto", device=torch.device("cpu"))
    text, name = prose(options.text)
    dense, tokenizer = load_model(torch.float32)
    calibration, evaluation = sequences(text, tokenizer, count=64)
    evaluation = evaluation[:16]
    common = {
        "model": "SmolLM2-135M-Instruct", "text": name, "dense_perplexity": perplexity(dense, evaluation, precision),
        "calibration": [SCORED, calibration.shape[1]], "evaluation": list(evaluation.shape), "threads": options.threads,
        "dtype": str(precision.dtype).removeprefix("torch."), "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
    return Setting(dense, calibration, evaluation, precision, common)


def main() -> None:
    """Every importance at every fraction, then recovery, then the whole model trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--importances", nargs="+", help="only these")
    parser.add_argument("--recover", type=int, default=20)
    parser.add_argument("--recover-fraction", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    setting = prepared(options)
    if "whole" in options.parts:
        recovered(setting, "none", None, 0.0, options.recover)
    if set(options.parts) == {"whole"}:
        return
    every = importances(setting.dense, setting.calibration)
    for importance in options.importances or every:
        if "recovered" in options.parts and importance not in ("chance 1", "chance 2"):
            recovered(setting, importance, every[importance], options.recover_fraction, options.recover)
        for fraction in options.fractions if "removed" in options.parts else ():
            removed(setting, importance, every[importance], fraction)


if __name__ == "__main__":
    main()
