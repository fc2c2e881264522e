"""Diagnostics of a prefix language model count the tokens past its prefix, as its loss does."""

import dataclasses

import pytest
import torch

from pruning.batches import next_token_loss
from pruning.diagnostics import fisher_penalty, fisher_trace, memorisation
from pruning.saliency.products import twice_differentiable
from transformer import Transformer, TransformerConfig

PREFIX, LENGTH, VOCAB = 6, 9, 7


def model(prefix: int = PREFIX, pattern: str = "causal()", width: int = 8) -> Transformer:
    config = TransformerConfig.uniform(
        vocab_size=VOCAB, dim=width, num_layers=1, num_heads=2, prefix_length=prefix, pattern=pattern, max_length=16
    )
    made = Transformer(config, generator=torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return made


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def exact(built: Transformer) -> float:
    """mean_t Σ_y p(y) ‖∇ log p(y | x ≤ t)‖² over the positions that predict a token past the prefix."""
    total, places = 0.0, range(PREFIX - 1, LENGTH - 1)
    for place in places:
        chances = built(ids()).logits[0, place].log_softmax(-1)
        for each in chances:
            found = torch.autograd.grad(each, list(built.parameters()), retain_graph=True, allow_unused=True)
            total += each.exp().item() * sum(float(g.square().sum()) for g in found if g is not None)
    return total / len(places)


def test_fisher_trace_and_penalty_are_means_over_the_tokens_past_the_prefix():
    built, draw = model(), torch.Generator().manual_seed(2)
    wanted = exact(built)
    assert fisher_trace(built, [ids()], draws=150, generator=draw).total == pytest.approx(wanted, rel=0.3)
    with twice_differentiable(built):
        found = [fisher_penalty(built, ids(), generator=draw).item() for _ in range(60)]
    assert sum(found) / len(found) == pytest.approx(wanted, rel=0.4)
    everywhere = dataclasses.replace(built.config, prefix_length=0)
    built.config = everywhere
    assert fisher_trace(built, [ids()], draws=20, generator=draw).total > 0
    with pytest.raises(ValueError, match=r"L >= 7, got \[1, 6\]"):
        fisher_penalty(model(), ids()[:, :PREFIX])


def test_memorisation_asks_for_the_labels_past_the_prefix_alone():
    def fit(trained, batches):
        optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
        for _ in range(120):
            for batch in batches:
                optimizer.zero_grad()
                next_token_loss(trained, batch).backward()
                optimizer.step()

    text = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    found = memorisation(
        lambda: model(pattern=f"prefix_lm({PREFIX})", width=32), fit, [text], vocab_size=VOCAB, shares=(1.0,),
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert found.losses[0] < 0.1 and found.random_accuracy[0] > 0.95
