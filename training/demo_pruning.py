"""The demo's pruning: heads removed from the trained model and recovered shortly, weights zeroed, speed measured."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rich.console import Console

from pruning import AxisScores, head_importance, prunable_weights, prune_heads, sparsify
from training.config import RunConfig
from training.data import Batches, Data
from training.evaluation import Evaluation
from training.records import Line
from training.trainer import Trainer
from transformer import Transformer, generate

Evaluate = Callable[[Transformer], Evaluation]
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CALIBRATION_BATCHES = 8
RECOVERY_SHARE = 0.06  # of the training steps
RECOVERY_RATE = 0.1  # of the peak learning rate: a little above where training ended, or the loss goes up again
GENERATION_BATCH, GENERATION_ROUNDS = 16, 4


@dataclass(frozen=True)
class Variant:
    """The mixture with some heads gone, recovered, and its line of the results (without its speed)."""

    model: Transformer
    line: Line


def importance(
    model: Transformer, data: Data, run: RunConfig, *, autocast: AbstractContextManager[object]
) -> AxisScores:
    """Gate-gradient importance of every head on batches of training text, in another order than training's."""
    batches = Batches(data.train, batch=run.train.batch, length=run.data.length, seed=run.seed + 1)
    with autocast:
        return head_importance(model, [batches.next().inputs for _ in range(CALIBRATION_BATCHES)], normalize=None)


def importance_line(model: Transformer, scores: AxisScores, *, fraction: float) -> Line:
    """The map of scores, and which heads go first when ``fraction`` of them are removed."""
    axes = {axis.name: axis for axis in model.prunable_axes() if axis.kind == "head"}
    report = prune_heads(copy.deepcopy(model), scores, fraction=fraction)
    removed = [[axes[name].layer, head] for name, heads in report.removed.items() for head in heads]
    return {"scores": scores.matrix().tolist(), "fraction": fraction, "removed": removed, "samples": scores.samples}


def remove_heads(
    model: Transformer, scores: AxisScores, data: Data, run: RunConfig, evaluate: Evaluate, *, console: Console
) -> Iterator[Variant]:
    """For each fraction: remove the heads from a copy, evaluate, recover, evaluate, save. 0 only recovers."""
    for fraction in FRACTIONS:
        variant = copy.deepcopy(model)
        prune_heads(variant, scores, fraction=fraction)
        before = evaluate(variant)
        recover(variant, data, run)
        after = evaluate(variant)
        folder = run.out.parent / "pruned" / f"heads-{fraction:.0%}".removesuffix("%")
        variant.save_pretrained(folder)
        data.tokenizer.save(folder)
        heads = sum(layer.attention.num_heads for layer in variant.config.layers if layer.attention)
        console.print(
            f"{fraction:.0%} of heads removed, {heads} left: {before.bits_per_byte:.4f} bits per byte,"
            f" after recovery {after.bits_per_byte:.4f}", highlight=False,
        )  # fmt: skip
        yield Variant(variant, {
            "fraction": fraction, "heads": heads, "parameters": variant.num_parameters(),
            "file_bytes": (folder / "model.safetensors").stat().st_size,
            "flops_per_token": variant.flops_per_token(run.data.length),
            "bits_per_byte": before.bits_per_byte, "recovered_bits_per_byte": after.bits_per_byte,
            "recovery_steps": recovery(run).train.steps,
        })  # fmt: skip


def recovery(run: RunConfig) -> RunConfig:
    """The one recipe for every fraction: 6% of the steps at a small rate that falls to zero."""
    steps = max(1, round(RECOVERY_SHARE * run.train.steps))
    optim = dataclasses.replace(run.optim, lr=RECOVERY_RATE * run.optim.lr, warmup=max(1, steps // 10), final=0.0)
    return dataclasses.replace(run, optim=optim, train=dataclasses.replace(run.train, steps=steps), seed=run.seed + 2)


def recover(model: Transformer, data: Data, run: RunConfig) -> None:
    """Train a little more, in place, on training text in another order than before."""
    recipe = recovery(run)
    trainer = Trainer(
        model, data, out=run.out, length=run.data.length, optim=recipe.optim, train=recipe.train, seed=recipe.seed
    )
    model.train()
    for _ in range(recipe.train.steps):
        trainer.train_step()
    model.eval()


def speeds(models: Sequence[Transformer], *, seed: int, new: int) -> list[Line]:
    """Tokens a second of greedy cached generation of ``new`` tokens a sequence: median and interquartile range.

    All models take their turn in every round, so that a busy machine slows all of them alike.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary = models[0].config.vocab_size
    prompt = torch.randint(vocabulary, (GENERATION_BATCH, 16), generator=draw).to(models[0].head_weight.device)
    rates: list[list[float]] = [[] for _ in models]
    for turn in range(GENERATION_ROUNDS + 1):
        for model, found in zip(models, rates, strict=True):
            seconds = _generation_seconds(model, prompt, new)
            if turn:  # the first round warms up
                found.append(GENERATION_BATCH * new / seconds)
    return [{"tokens_per_s": statistics.median(found), "tokens_per_s_iqr": _iqr(found)} for found in rates]


def _generation_seconds(model: Transformer, prompt: torch.Tensor, new: int) -> float:
    _synchronise(prompt.device)
    started = time.perf_counter()
    generate(model, prompt, max_new_tokens=new)
    _synchronise(prompt.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _iqr(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def zero_weights(model: Transformer, evaluate: Evaluate) -> Iterator[Line]:
    """Global magnitude pruning of the trained model at each sparsity, zeros counted, without retraining."""
    for sparsity in SPARSITIES:
        variant = copy.deepcopy(model)
        if sparsity:
            sparsify(variant, sparsity=sparsity, allocation="global")
        weights = prunable_weights(variant).values()
        yield {
            "sparsity": sparsity,
            "zeros": sum(int((weight == 0).sum()) for weight in weights),
            "weights": sum(weight.numel() for weight in weights),
            "bits_per_byte": evaluate(variant).bits_per_byte,
        }
