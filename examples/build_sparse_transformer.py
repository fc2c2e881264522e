"""How do I put sparse attention and a mixture of experts into a model of my own?

Two calls replace the dense parts of a block: `attend` with a pattern, and `MoE` with a router. The model below learns
the text of this file; the checks at the end show that both kinds of sparsity are real.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import MoE, Routing, TopKRouter, load_balancing_loss, router_z_loss
from sparse_attn import attend, causal, sinks, sliding_window

WINDOW, SINKS, HEADS, DIM, EXPERTS = 16, 2, 4, 64, 8


class Block(nn.Module):
    """x + attention, then x + experts; every token uses 2 of 8 experts and sees 16 neighbours and 2 sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.moe = MoE(DIM, 2 * DIM, EXPERTS, TopKRouter(DIM, EXPERTS, k=2))
        self.pattern = causal() & (sliding_window(WINDOW) | sinks(SINKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, pattern=self.pattern).transpose(1, 2).flatten(2))
        y, routing = self.moe(self.norms[1](x))
        return x + y, routing


class Model(nn.Module):
    """Bytes in, next-byte logits out; the routing comes back with them, for the side losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIM)
        self.block = Block()
        self.head = nn.Linear(DIM, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        hidden, routing = self.block(self.embedding(tokens))
        return self.head(hidden), routing


def main() -> None:
    """Train for 150 steps, then check what a token reaches and which experts work."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(len(text) - 129, (8,)).tolist()
        batch = torch.stack([text[start : start + 129] for start in starts])
        logits, routing = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + 0.01 * load_balancing_loss(routing) + 1e-3 * router_z_loss(routing)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == 149:
            print(f"step {step:3d}  {loss.item():.2f} nats a byte  busiest expert {routing.loads().max() / 2048:.0%}")

    counts = text.bincount().double()
    unigram = -(counts / counts.sum() * (counts / counts.sum()).clamp(min=1e-9).log()).sum().item()
    assert loss.item() < unigram - 0.5, f"{loss.item():.2f} must beat single-byte frequencies, {unigram:.2f}"
    assert (routing.loads() > 0).all(), "an expert got no token"

    embedded = model.embedding(text[None, :100]).detach().requires_grad_()
    model.block(embedded)[0][0, -1].sum().backward()
    reached = embedded.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert reached == [*range(SINKS), *range(100 - WINDOW, 100)], reached
    print(f"{model.block.pattern}: the last of 100 bytes reads positions {reached}")


if __name__ == "__main__":
    main()
