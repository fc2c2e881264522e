"""SmolLM2-135M-Instruct without some of its heads: what each importance costs, against chance and against zeros.

python -m benchmarks.smollm2_heads [--text FILE] [--fractions 0.1 0.2 0.3 0.4 0.5] [--recover 20]
    [--parts removed recovered whole sizes times] [--importances gradient "chance 0" ...]

removed: for each importance and fraction heads removed for good (``prune_heads``; 9 query heads on 3 key-value heads a
layer, so whole groups or the same number from each), perplexity and parameters. "zeros" sets as many weights to zero as
the heads had by gradient, by SparseGPT, anywhere in the blocks. recovered: --recover steps of next-token training on
--batch sequences of the calibration text after removing each of --recover-fractions of the heads; whole: of the whole
model, by the same steps, so that what mere training gains is seen. sizes and times, by gradient: bytes of the file that
save_pretrained writes, and the median time of a forward pass of 4 sequences in turns with the whole model.
Every importance is scored on 8 sequences of 512 tokens but two: leaving each of the 270 heads out in turn takes 271
passes over one sequence (bfloat16), hard-concrete gates are learned on 40 sequences of the same text, a step each.
Scores are kept in runs/smollm2-heads/, so that an ended run goes on with them. Text, calibration and evaluation as
``smollm2_pruning``. Records are appended to runs/smollm2-heads.jsonl.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.activation_smollm2 import load_model
from benchmarks.harness import commit, interleaved
from benchmarks.smollm2_pruning import perplexity, prose, sequences
from pruning import (
    activation_importance,
    attention_confidence,
    head_importance,
    leave_one_out,
    magnitude_importance,
    prunable_axes,
    prune_heads,
    random_importance,
    response_importance,
    sparsify,
)
from pruning.axes import Axis
from pruning.batches import Batch, Loss, next_token_loss
from pruning.learned import L0Units
from pruning.weights import prunable_weights
from training.allocator import keep_freed_memory
from training.precision import Precision, choose_precision

RECORDS, KEPT = Path("runs/smollm2-heads.jsonl"), Path("runs/smollm2-heads")
SCORED, SEEDS, ROUNDS, GATE_STEPS = 8, 3, 5, 40
PARTS = ("removed", "recovered", "whole", "sizes", "times")
Scores = Mapping[str, Tensor]


def learned_gates(
    model: nn.Module, batches: Iterable[Batch], *, axes: Sequence[Axis], loss: Loss, strength: float, rate: float = 0.1
) -> dict[str, Tensor]:
    """log α of a hard-concrete gate on each head after a step of Adam on the gates alone for each batch.

    Voita et al. 2019 (arXiv:1905.09418): the more likely a gate is open, the more the head is needed. Gates begin at
    σ(log α) = 0.8; loss(model, batch) is a sum over samples, strength what all heads cost in the units of its mean."""
    model = copy.deepcopy(model).eval()
    method = L0Units(model, strength=strength, keep=0.8, axes=axes, kinds=("head",))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in method.groups)
    # the gates draw, nothing else: dropout stays off
    model.training = True
    optimizer = torch.optim.Adam(method.named_gates().values(), lr=rate)
    for batch in batches:
        with method.parametrise():
            found = loss(model, batch)
            (found / _samples(batch)).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()
        model.zero_grad()
    return {method.groups[name].name: gate.detach().double() for name, gate in method.named_gates().items()}


def _samples(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(batch["input_ids"])


def importances(model: Any, calibration: Tensor, precision: Precision) -> dict[str, Callable[[], Scores]]:
    """What makes each importance of every head, the larger the more important; chance with three seeds."""
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    batches = list(calibration[:SCORED].split(2))

    def loss(gated: nn.Module, batch: Batch) -> Tensor:
        # entered for each batch: autocast keeps its copies of the weights, which the gates change at every step
        with precision.autocast(torch.device("cpu")):
            return next_token_loss(gated, batch)

    found: dict[str, Callable[[], Scores]] = {
        "gradient": partial(head_importance, model, batches, normalize=None),
        "gradient, by layer": partial(head_importance, model, batches),
        "activation taylor": partial(response_importance, model, batches, axes=axes),
        "activation sensitivity": partial(response_importance, model, batches, axes=axes, response="sensitivity"),
        "activation energy": partial(activation_importance, model, batches, axes=axes),
        "activation variance": partial(activation_importance, model, batches, axes=axes, statistic="variance"),
        "magnitude": partial(magnitude_importance, model, axes),
        "confidence": partial(attention_confidence, model, batches),
        "confidence past the first token": partial(attention_confidence, model, batches, skip_first=1),
        "leave one out": lambda: leave_one_out(copy.deepcopy(model).to(precision.dtype), [calibration[:1]]),
        "hard-concrete gates": partial(
            learned_gates, model, calibration[:GATE_STEPS].split(1), axes=axes, loss=loss, strength=5.0
        ),
    }
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        found[f"chance {seed}"] = partial(random_importance, axes, generator=generator)
    return found


def kept_scores(folder: Path, importance: str, make: Callable[[], Scores]) -> Scores:
    """The scores that the folder has under this name; made and put there if it has none."""
    file = folder / f"{importance}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: values.tolist() for name, values in make().items()}))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in json.loads(file.read_text()).items()}


def seconds(models: Mapping[str, Any], ids: Tensor, precision: Precision) -> dict[str, float]:
    """Median seconds of a forward pass, in turns."""

    def forward(model: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), precision.autocast(torch.device("cpu")):
                return model.model(ids, use_cache=False)

        return run

    times = interleaved({name: forward(model) for name, model in models.items()}, rounds=ROUNDS, warmup=1)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def saved_bytes(model: Any) -> int:
    """Size of the file that save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def recover(model: Any, calibration: Tensor, steps: int, batch: int, precision: Precision) -> float:
    """Train on the calibration text, so many sequences a step; seconds."""
    start = time.perf_counter()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for step in range(steps):
        rows = calibration[torch.arange(step * batch, step * batch + batch) % len(calibration)]
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

    def write(self, name: str, **line: Any) -> None:
        """Append a record of that name."""
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps({"name": name, **self.common, **line}) + "\n")
        print(line, flush=True)


def removed(setting: Setting, importance: str, scores: Scores, fraction: float) -> None:
    """One importance at one fraction; by the gradient also as many zeros."""
    model = copy.deepcopy(setting.dense)
    report = prune_heads(model, scores, fraction=fraction)
    line = {"importance": importance, "fraction": fraction, "achieved": report.achieved,
            "parameters": report.parameters_after, "perplexity": setting.perplexity(model)}  # fmt: skip
    if importance == "gradient":
        line |= zeros(setting, report.parameters_after)
    setting.write("heads", **line)


def zeros(setting: Setting, parameters: int) -> dict[str, float]:
    """As many single weights at zero as leave so many parameters, by SparseGPT: their share and the perplexity."""
    model = copy.deepcopy(setting.dense)
    whole = sum(p.numel() for p in model.parameters())
    share = (whole - parameters) / sum(p.numel() for p in prunable_weights(model).values())
    sparsify(model, sparsity=share, method="sparsegpt", calibration=list(setting.calibration[:16].split(4)))
    return {"zeros_sparsity": share, "zeros_perplexity": setting.perplexity(model)}


@dataclass(frozen=True)
class Recovery:
    """Steps of training, and sequences in each."""

    steps: int
    batch: int


def recovered(setting: Setting, importance: str, scores: Scores | None, fraction: float, recovery: Recovery) -> None:
    """After training without the heads that matter least; scores: None trains the whole model."""
    model = copy.deepcopy(setting.dense)
    if scores is not None:
        prune_heads(model, scores, fraction=fraction)
    took = recover(model, setting.calibration, recovery.steps, recovery.batch, setting.precision)
    setting.write("heads", importance=importance, fraction=fraction, recovered_steps=recovery.steps, recovery_s=took,
                  recovered_batch=recovery.batch, perplexity=setting.perplexity(model))  # fmt: skip


def shrunk(setting: Setting, scores: Scores, fraction: float, parts: Sequence[str]) -> None:
    """Size on disk and time of what the surgery leaves, beside the whole model's."""
    model = copy.deepcopy(setting.dense)
    report = prune_heads(model, scores, fraction=fraction)
    line = {"importance": "gradient", "fraction": fraction, "achieved": report.achieved}
    if "sizes" in parts:
        setting.write("heads-sizes", **line, parameters=report.parameters_after, file_bytes=saved_bytes(model))
    if "times" in parts:
        times = seconds({"whole": setting.dense, "pruned": model}, setting.evaluation[:4], setting.precision)
        setting.write("heads-times", **line, **{f"{key}_s": value for key, value in times.items()})


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
    """The whole model trained; every importance at every fraction, then recovered; what is left, by gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--importances", nargs="+", help="only these")
    parser.add_argument("--recover", type=int, default=20, help="steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step of recovery")
    parser.add_argument("--recover-fractions", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    setting, recovery = prepared(options), Recovery(options.recover, options.batch)
    every = importances(setting.dense, setting.calibration, setting.precision)
    if "whole" in options.parts:
        recovered(setting, "none", None, 0.0, recovery)
    for importance in options.importances or every:
        if not {"removed", "recovered"} & set(options.parts):
            continue
        scores = kept_scores(KEPT, importance, every[importance])
        for fraction in options.fractions if "removed" in options.parts else ():
            removed(setting, importance, scores, fraction)
        if "recovered" in options.parts:
            for fraction in options.recover_fractions:
                recovered(setting, importance, scores, fraction, recovery)
    if {"sizes", "times"} & set(options.parts):
        for fraction in (0.0, *options.fractions):
            shrunk(setting, kept_scores(KEPT, "gradient", every["gradient"]), fraction, options.parts)


if __name__ == "__main__":
    main()
