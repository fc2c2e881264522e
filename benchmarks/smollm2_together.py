"""SmolLM2-135M-Instruct pruned, recovered and quantised: what each step costs and saves, measured together.

python -m benchmarks.smollm2_together [--text FILE] [--steps 30] [--batch 4] [--threads 2] [--parts losses times]
    [--ways dense pruned distilled adapters]

Half of the weights go by SparseGPT with the allocation by the loss (64 x 512 tokens). Then, each from there and with
the same steps of --batch sequences of the calibration text, the dense model's logits are learned by the weights that
are left ("distilled", zeros held by the masks), or by masked low-rank adapters of rank 16, which are merged
("adapters"). After each way the weights are also put into int8 (`quantize_weights`).
losses: perplexity on 16 sequences of other prose in float32, zeros, and bytes of the compact file (float32) or of all
tensors (int8). times: a forward pass of 128 tokens beside the dense model's, in turns. Each way's weights are kept in
runs/smollm2-together/ and taken from there when they are asked for again: remove the folder for other steps. On two
cores the pruning takes 90 seconds. Records are appended to runs/smollm2-together.jsonl.
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.activation_smollm2 import load_model
from benchmarks.harness import commit, forward_only, interleaved
from benchmarks.smollm2_pruning import perplexity, prose, sequences
from pruning import Masks, load_compact, save_compact, sparsify
from pruning.formats.files import FILE
from pruning.recovery import add_adapters, merge_adapters, quantize_weights
from training.allocator import keep_freed_memory
from training.distill import distill
from training.precision import Precision, choose_precision

WAYS, PARTS = ("dense", "pruned", "distilled", "adapters"), ("losses", "times")
RECORDS, KEPT = Path("runs/smollm2-together.jsonl"), Path("runs/smollm2-together")
TOKENS, EVALUATED = 128, 16
# torch's kernel for 8-bit weights takes no bfloat16 inputs beside float32 scales, as autocast would give it
EXACT = Precision(torch.float32, "everything is compared in the arithmetic of its numbers")


@dataclass(frozen=True)
class Setting:
    """The dense model, what it is calibrated and evaluated on, and what every record says."""

    dense: Any
    calibration: Tensor
    evaluation: Tensor
    precision: Precision
    steps: int
    batch: int
    common: Mapping[str, Any]

    def write(self, name: str, **line: Any) -> None:
        """Append a record of that name."""
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps({"name": name, **self.common, **line}) + "\n")
        print(line, flush=True)


def pruned(setting: Setting) -> Any:
    """Half of the dense model's weights at 0."""
    model = copy.deepcopy(setting.dense)
    with setting.precision.autocast(torch.device("cpu")):
        sparsify(model, sparsity=0.5, method="sparsegpt", allocation="loss", calibration=setting.calibration.split(4))
    return model


def distilled(setting: Setting) -> Any:
    """Every weight that is left learns the dense model's logits."""
    model = obtained("pruned", setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    _learn(model, setting, optimizer, Masks.of(model))
    return model


def adapted(setting: Setting) -> Any:
    """Low-rank adapters learn them, and are merged."""
    model = obtained("pruned", setting)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(add_adapters(model, rank=16), lr=1e-3, weight_decay=0.0)
    _learn(model, setting, optimizer, None)
    merge_adapters(model)
    return model


def _learn(model: Any, setting: Setting, optimizer: torch.optim.Optimizer, masks: Masks | None) -> None:
    ids, count = setting.calibration, setting.batch
    for step in range(setting.steps):
        rows = ids[torch.arange(count * step, count * step + count) % len(ids)]
        # entered for each step: inside, autocast would go on with its copies of the weights of the first
        with setting.precision.autocast(torch.device("cpu")):
            distill(model, setting.dense, [rows], optimizer, masks=masks)


MAKERS: dict[str, Callable[[Setting], Any]] = {"pruned": pruned, "distilled": distilled, "adapters": adapted}


def obtained(way: str, setting: Setting) -> Any:
    """The model of that way, its weights from the folder where they are kept; made and put there if they are not."""
    if way == "dense":
        return copy.deepcopy(setting.dense)
    folder = KEPT / way
    if not (folder / FILE).is_file():
        save_compact(MAKERS[way](setting), folder)
    return load_compact(folder, copy.deepcopy(setting.dense))


def float_bytes(model: Any) -> int:
    """Bytes of the compact file."""
    return save_compact(model, KEPT / "size").file_bytes


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def seconds(model: Any, setting: Setting) -> dict[str, float]:
    """Time of a forward pass in float32 and of the dense model's."""
    row = setting.evaluation[:1, :TOKENS]
    runs = {
        "forward_s": forward_only(lambda: model(row, use_cache=False).logits),
        "dense_forward_s": forward_only(lambda: setting.dense(row, use_cache=False).logits),
    }
    return {name: median(found) for name, found in interleaved(runs, rounds=7, warmup=2).items()}


def measure(way: str, setting: Setting, parts: tuple[str, ...]) -> None:
    """One record of each part in float32, one in int8."""
    model = obtained(way, setting)
    zeros = 0.0 if way == "dense" else Masks.of(model).sparsity
    for kind, size in (("float32", float_bytes), ("int8", tensor_bytes)):
        if kind == "int8":
            quantize_weights(model, batch=TOKENS)
        if "losses" in parts:
            setting.write("together", way=way, kind=kind, zeros=zeros, bytes=size(model),
                          perplexity=perplexity(model, setting.evaluation, EXACT))  # fmt: skip
        if "times" in parts:
            setting.write("together-times", way=way, kind=kind, **seconds(model, setting))


def main() -> None:
    """Every way, in float32 and in int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step of recovery")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens to calibrate on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    precision = choose_precision("auto", device=torch.device("cpu"))
    text, name = prose(options.text)
    dense, tokenizer = load_model(torch.float32)
    ids, evaluation = sequences(text, tokenizer, count=options.sequences)
    evaluation = evaluation[:EVALUATED]
    common = {
        "model": "SmolLM2-135M-Instruct", "text": name, "steps": options.steps, "batch": options.batch,
        "threads": options.threads, "torch": torch.__version__, "commit": commit(), "calibration": list(ids.shape),
        "evaluation": list(evaluation.shape), "dtype": "float32",
    }  # fmt: skip
    setting = Setting(dense, ids, evaluation, precision, options.steps, options.batch, common)
    for way in options.ways:
        measure(way, setting, tuple(options.parts))


if __name__ == "__main__":
    main()
