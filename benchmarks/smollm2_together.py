"""SmolLM2-135M-Instruct pruned, recovered and quantised: what each step costs and saves, measured together.

python -m benchmarks.smollm2_together [--text FILE] [--steps 30] [--threads 2] [--ways dense pruned distilled adapters]

Half of the weights go by SparseGPT with the allocation by the loss (64 x 512 tokens). Then, each from there and with
the same steps of 4 sequences of the calibration text, the dense model's logits are learned by the weights that are left
("distilled", zeros held by the masks), or by masked low-rank adapters of rank 16, which are merged ("adapters"). After
each way the weights are also put into int8 (`quantize_weights`). A record holds perplexity on other prose, zeros, bytes
of the compact file (float32) or of all tensors (int8), and the time of a forward pass of 128 tokens beside the dense
model's, in turns. Records are appended to runs/smollm2-together.jsonl.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.activation_smollm2 import load_model
from benchmarks.harness import commit, forward_only, interleaved
from benchmarks.smollm2_pruning import perplexity, prose, sequences
from pruning import Masks, sparsify
from pruning.formats import save_compact
from pruning.recovery import add_adapters, merge_adapters, quantize_weights
from training.allocator import keep_freed_memory
from training.distill import distill
from training.precision import Precision, choose_precision

WAYS = ("dense", "pruned", "distilled", "adapters")
RECORDS = Path("runs/smollm2-together.jsonl")
TOKENS = 128


def distilled(model: Any, dense: Any, ids: Tensor, masks: Masks, steps: int, precision: Precision) -> Any:
    """Every weight that is left learns the dense model's logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    with precision.autocast(torch.device("cpu")):
        distill(model, dense, _batches(ids, steps), optimizer, masks=masks)
    return model


def adapted(model: Any, dense: Any, ids: Tensor, masks: Masks, steps: int, precision: Precision) -> Any:
    """Low-rank adapters learn them, and are merged."""
    optimizer = torch.optim.AdamW(add_adapters(model, masks, rank=16), lr=1e-3, weight_decay=0.0)
    with precision.autocast(torch.device("cpu")):
        distill(model, dense, _batches(ids, steps), optimizer)
    merge_adapters(model)
    return model


RECOVERIES: dict[str, Callable[..., Any]] = {"distilled": distilled, "adapters": adapted}


def _batches(ids: Tensor, steps: int) -> list[Tensor]:
    return [ids[torch.arange(4 * step, 4 * step + 4) % len(ids)] for step in range(steps)]


def measured(model: Any, dense: Any, evaluation: Tensor, precision: Precision) -> dict[str, Any]:
    """Perplexity, and the time of a forward pass in float32 against the dense model's."""
    row = evaluation[:1, :TOKENS]
    runs = {
        "model": forward_only(lambda: model(row, use_cache=False).logits),
        "dense": forward_only(lambda: dense(row, use_cache=False).logits),
    }
    seconds = interleaved(runs, rounds=7, warmup=2)
    return {
        "perplexity": perplexity(model, evaluation, precision),
        "forward_s": median(seconds["model"]),
        "dense_forward_s": median(seconds["dense"]),
    }


def float_bytes(model: Any) -> int:
    """Bytes of the compact file."""
    with tempfile.TemporaryDirectory() as folder:
        return save_compact(model, folder).file_bytes


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def main() -> None:
    """One record for each way in float32, one in int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    precision = choose_precision("auto", device=torch.device("cpu"))
    text, name = prose(options.text)
    dense, tokenizer = load_model(torch.float32)
    ids, evaluation = sequences(text, tokenizer, count=64)
    common = {
        "name": "together", "model": "SmolLM2-135M-Instruct", "text": name, "steps": options.steps,
        "threads": options.threads, "torch": torch.__version__, "commit": commit(), "calibration": list(ids.shape),
        "evaluation": list(evaluation.shape), "dtype": str(precision.dtype).removeprefix("torch."),
    }  # fmt: skip
    base = copy.deepcopy(dense)
    with precision.autocast(torch.device("cpu")):
        masks = sparsify(base, sparsity=0.5, method="sparsegpt", allocation="loss", calibration=ids.split(4))
    RECORDS.parent.mkdir(exist_ok=True)
    for way in options.ways:
        model = copy.deepcopy(dense if way == "dense" else base)
        if way in RECOVERIES:
            model = RECOVERIES[way](model, dense, ids, masks, options.steps, precision)
        zeros = 0.0 if way == "dense" else Masks.of(model).sparsity
        for kind in ("float32", "int8"):
            size = float_bytes if kind == "float32" else tensor_bytes
            if kind == "int8":
                quantize_weights(model, batch=TOKENS)
            line = {**common, "way": way, "kind": kind, "zeros": zeros, "bytes": size(model),
                    **measured(model, dense, evaluation, precision)}  # fmt: skip
            with RECORDS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{way}, {kind}: perplexity {line['perplexity']:.2f}, {line['bytes'] / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
