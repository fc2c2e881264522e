"""A trained model's routing on held-out text, measured and written down for the report."""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe import (
    MoE,
    Routing,
    RoutingMeter,
    RoutingSummary,
    coactivation_lift,
    load_imbalance,
    load_variation,
    specialisation,
)
from moe.memory_stats import MemoryMeter
from moe.product_key import ProductKeys
from moe.stats import TakenToken, top_tokens
from training.checkpoint import latest_checkpoint
from training.config import RunConfig, from_dict
from training.data import Batch, held_out_batches, tokenise
from training.durable import replace_durably
from training.evaluation import memory_meters
from training.records import METRICS, ROUTING, Line
from training.run import CONFIG, model_folder, read_corpus, read_record
from training.tokenizer import Tokenizer, load_tokenizer
from training.trainer import CHECKPOINTS, choose_device
from transformer import Transformer

TOKENS = 8  # kept for each expert
MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def record_routing(folder: Path, *, batches: int = 20, device: str = "auto") -> list[Path]:
    """Measure the latest checkpoint of the run in ``folder``, or of each run one level below; write routing.jsonl.

    Runs without a config, without a checkpoint, or without a layer that routes are left out. Returns the files
    written. Raises: ValueError for batches below 1; what reading a run's corpus and model raises.
    """
    if batches < 1:
        raise ValueError(f"batches must be >= 1, got {batches}")
    paths = (folder, *sorted(path.parent for path in folder.glob(f"*/{METRICS}")))
    return [path / ROUTING for path in paths if _is_run(path) and _record(path, batches=batches, device=device)]


def _is_run(path: Path) -> bool:
    saved = (path / "config.json").is_file() or latest_checkpoint(path / CHECKPOINTS) is not None
    return saved and (path / CONFIG).is_file()


def _record(path: Path, *, batches: int, device: str) -> bool:
    config = from_dict(RunConfig, read_record(path / CONFIG), where=str(path / CONFIG))
    folder = model_folder(path)
    model = Transformer.from_pretrained(folder).to(choose_device(device))
    if not any(isinstance(module, MoE | ProductKeys) for module in model.modules()):
        return False
    tokenizer, batch, length = load_tokenizer(folder), config.train.batch, config.data.length
    tokens = drawn_tokens(read_corpus(config.data).held_out, tokenizer, count=batches * batch * length + 1)
    parts = held_out_batches(tokens, batch=batch, length=length, padding_id=tokenizer.eos_id)
    lines = measure_routing(model, itertools.islice(parts, batches), tokenizer)
    replace_durably(path / ROUTING, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return True


def drawn_tokens(documents: Sequence[str], tokenizer: Tokenizer, *, count: int, seed: int = 0) -> np.ndarray:
    """At most ``count`` tokens of documents drawn at random, of which no more than needed is encoded.

    Of a long document only the start is taken, so that where tokens are as long as 8 characters 16 documents or all of
    them are there, and of single bytes two.
    """
    budget = 8 * count  # characters: more than enough for all but the longest of tokens
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    longest = max(1, budget // max(1, min(16, len(documents))))
    texts = [documents[index][:longest] for index in order]
    before = itertools.accumulate((len(text) for text in texts), initial=0)
    needed = sum(1 for size in before if size < budget)
    return tokenise(texts[:needed], tokenizer)[:count]


@torch.no_grad()
def measure_routing(model: Transformer, batches: Iterator[Batch], tokenizer: Tokenizer) -> list[Line]:
    """One line for each layer that routes, in order: experts (kind "experts") or memory slots (kind "memory").

    The model runs in evaluation mode and is left in the mode that it was in.
    """
    training = model.training
    model.eval()
    with meters(model) as (experts, memories):
        for batch in batches:
            here = batch.to(model.head_weight.device)
            model.hidden_states(here.inputs, attention_mask=here.mask)
    model.train(training)
    lines = [_expert_line(layer, meter.result(), tokenizer) for layer, meter in experts.items()]
    lines += [_memory_line(layer, meter) for layer, meter in memories.items() if meter.reads]
    return sorted(lines, key=lambda line: line["layer"])


@contextmanager
def meters(model: Transformer) -> Iterator[tuple[dict[int, RoutingMeter], dict[int, MemoryMeter]]]:
    """A meter for each layer with experts, and one for each with product keys (a memory, or PEER).

    They are fed by every forward inside the context, with the tokens that reach the layer.
    """
    experts: dict[int, RoutingMeter] = {}
    with memory_meters(model) as memories, ExitStack() as hooks:
        for layer, block in enumerate(model.layers):
            for module in block.modules():
                if isinstance(module, MoE):
                    experts[layer] = RoutingMeter(module.num_experts, vocab_size=model.config.vocab_size)
                    feed = partial(_feed_experts, experts[layer])
                    hooks.callback(module.register_forward_hook(feed, with_kwargs=True).remove)
        yield experts, memories


def _feed_experts(
    meter: RoutingMeter,
    layer: nn.Module,
    x: tuple[Tensor, ...],
    options: dict[str, Any],
    output: tuple[Tensor, Routing],
) -> None:
    meter.update(output[1], token_ids=options["token_ids"].flatten())


def _expert_line(layer: int, summary: RoutingSummary, tokenizer: Tokenizer) -> Line:
    if summary.taken is None:
        raise ValueError("summary.taken must hold the tokens taken, got None: give the meter a vocab_size")
    best = top_tokens(summary.taken, count=TOKENS)
    return {
        "kind": "experts",
        "layer": layer,
        "tokens": summary.tokens,
        "loads": summary.loads.tolist(),
        "drops": summary.drops.tolist(),
        "entropy": summary.entropy,
        "confidence": summary.confidence,
        "imbalance": load_imbalance(summary.loads),
        "variation": load_variation(summary.loads),
        "specialisation": [round(value, 4) for value in specialisation(summary.taken).tolist()],
        "lift": [[round(value, 2) for value in row] for row in coactivation_lift(summary.together).tolist()],
        "pairs": int(summary.together.sum() - summary.together.diagonal().sum()),
        "taken": [[_token(token, tokenizer) for token in row] for row in best],
    }


def _token(token: TakenToken, tokenizer: Tokenizer) -> Line:
    return {
        "text": token_text(token.token_id, tokenizer), "count": token.count, "share": round(token.share, 4),
        "routed": round(token.routed, 4), "lift": round(token.lift, 2),
    }  # fmt: skip


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token as one can read it: blanks as signs, and ids that are no text of their own by number."""
    if token_id >= tokenizer.vocab_size:
        return f"id {token_id}"
    if token_id == tokenizer.eos_id:
        return "end of document"
    text = tokenizer.decode([token_id])
    return f"id {token_id}" if not text or "\ufffd" in text else text.translate(MARKS)


def _memory_line(layer: int, meter: MemoryMeter) -> Line:
    stats = meter.result()
    return {
        "kind": "memory", "layer": layer, "slots": meter.num_slots, "reads": meter.reads, "used": stats.used,
        "kl": stats.kl, "weighted_kl": stats.weighted_kl, "gini": stats.gini,
    }  # fmt: skip
