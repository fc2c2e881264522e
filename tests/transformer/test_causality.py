"""What a causal model says of a token never depends on a later one, nor on how the text was cut."""

import pytest
import torch

from tests.tolerances import close
from transformer import MoEConfig, Transformer, TransformerConfig

ROUTERS = {
    "top_k": {"k": 2}, "switch": {"k": 1}, "noisy_top_k": {"k": 2}, "top_2": {"k": 2}, "sigmoid": {"k": 2},
    "hash": {"k": 1}, "sinkhorn": {"k": 2},
}  # fmt: skip


def build(router: str, priority: str) -> Transformer:
    torch.manual_seed(0)
    feedforward = MoEConfig(16, 4, router=router, capacity_factor=0.5, drop_priority=priority, **ROUTERS[router])
    model = Transformer(
        TransformerConfig.uniform(
            vocab_size=50, dim=16, num_layers=2, num_heads=2, feedforward=feedforward, max_length=64
        )
    )
    return model.eval()


@pytest.mark.parametrize("priority", ["first_come", "gate", "choice"])
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_capacity_drops_nothing_in_evaluation(router, priority):
    model = build(router, priority)
    ids = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
    later = ids.clone()
    later[:, 30:] = (later[:, 30:] + 7) % 50
    whole = model(ids).logits
    close(model(later).logits[:, :30], whole[:, :30])
    close(model(ids[:1]).logits, whole[:1])
    cache = model.new_cache()
    parts = [model(part, cache=cache).logits for part in ids.split(13, 1)]
    close(torch.cat(parts, 1), whole)


def test_capacity_drops_in_training():
    model = build("top_k", "gate").train()
    routing = model(torch.randint(50, (2, 40))).routings[0]
    assert len(routing.dropped) > 0
