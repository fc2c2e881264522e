"""How many heads does a trained model need, and what do I get back for the others?

Trains a small model on one file of the standard library, scores its heads, and removes half of them for good.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pruning import head_importance, prune_heads
from transformer import Transformer, TransformerConfig, generate

LENGTH, HEADS, HEAD_DIM, DIM = 96, 8, 8, 64


def batch_of(text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` random pieces of the text, as byte ids [size, LENGTH]."""
    starts = torch.randint(len(text) - LENGTH, (size,), generator=generator).tolist()
    return torch.stack([text[start : start + LENGTH] for start in starts])


@torch.no_grad()
def loss_on(model: Transformer, batches: list[Tensor]) -> float:
    """Mean next-byte loss in nats."""
    model.eval()
    return sum(model(batch, labels=batch).loss.item() for batch in batches) / len(batches)


def train(model: Transformer, text: Tensor, steps: int) -> None:
    """Adam on random pieces of the text."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = batch_of(text, 8, generator)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Train, score, prune both ends of the ranking, recover, save and load."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    config = TransformerConfig.uniform(vocab_size=256, dim=DIM, num_layers=3, num_heads=HEADS, max_length=256)
    model = Transformer(config)
    train(model, text, steps=200)
    batches = [batch_of(text, 16, torch.Generator().manual_seed(seed)) for seed in range(1, 5)]
    scores = head_importance(model, batches)

    before = loss_on(model, batches), model.num_parameters()
    wrong_end = copy.deepcopy(model)
    prune_heads(wrong_end, {name: -score for name, score in scores.items()}, fraction=0.5)
    prune_heads(model, scores, fraction=0.5)
    pruned, worst = loss_on(model, batches), loss_on(wrong_end, batches)
    train(model, text, steps=50)
    recovered = loss_on(model, batches)
    print(f"loss: all heads {before[0]:.3f}, half of them {pruned:.3f} (the wrong half {worst:.3f}), "
          f"after recovery {recovered:.3f}")  # fmt: skip
    print("heads left in each layer:", [layer.attention.num_heads if layer.attention else 0 for layer in config.layers],
          "→", [layer.attention.num_heads if layer.attention else 0 for layer in model.config.layers])  # fmt: skip

    removed_heads = 3 * HEADS // 2
    assert before[1] - model.num_parameters() == removed_heads * 4 * DIM * HEAD_DIM, "query, key, value, output"
    assert pruned < worst and recovered < pruned
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = Transformer.from_pretrained(folder).eval()
    model.eval()
    prompt = text[None, :32]
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert generate(loaded, prompt, max_new_tokens=8).shape == (1, 40)


if __name__ == "__main__":
    main()
