"""A small language model that this project does not know, with axes written by hand: any model can declare its own.

Attention is written with plain einsum; grouped queries, biases and a fused gate-and-up projection make the axes
harder than the library's own model's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning import Axis, Slice


class ToyAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.q = nn.Linear(dim, heads * width)
        self.k = nn.Linear(dim, kv_heads * width, bias=False)
        self.v = nn.Linear(dim, kv_heads * width)
        self.o = nn.Linear(heads * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width)
        share = self.heads // self.kv_heads if self.kv_heads else 1
        k, v = (
            layer(x).view(batch, length, self.kv_heads, self.width).repeat_interleave(share, dim=2)
            for layer in (self.k, self.v)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.width**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return self.o(mixed.reshape(batch, length, self.heads * self.width))


class ToyFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Toy(nn.Module):
    """layers: (heads, kv_heads, hidden) of each layer; tied embedding; dropout shows whether evaluation mode is set."""

    def __init__(self, layers: list[tuple[int, int, int]], *, dim: int = 8, width: int = 4, vocab: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.attention = nn.ModuleList(ToyAttention(dim, heads, kv, width) for heads, kv, _ in layers)
        self.feedforward = nn.ModuleList(ToyFeedForward(dim, hidden) for _, _, hidden in layers)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            x = x + self.dropout(attention(F.layer_norm(x, x.shape[-1:])))
            x = x + self.dropout(feedforward(F.layer_norm(x, x.shape[-1:])))
        return self.head(x)

    def prunable_axes(self) -> list[Axis]:
        layers = range(len(self.attention))
        return [self._heads(i) for i in layers] + [self._neurons(i) for i in layers]

    def _heads(self, layer: int) -> Axis:
        module, where = self.attention[layer], f"attention.{layer}"
        width = module.width

        def resize(kept: list[int]) -> None:
            module.heads, module.kv_heads = len(kept), module.k.out_features // width

        own = [Slice(f"{where}.q.weight", 0, width), Slice(f"{where}.q.bias", 0, width),
               Slice(f"{where}.o.weight", -1, width)]  # fmt: skip
        shared = [Slice(f"{where}.{name}", 0, width, grouped=True) for name in ("k.weight", "v.weight", "v.bias")]
        return Axis("head", layer, f"{where}.heads", module.heads, width, f"{where}.o", (*own, *shared), resize,
                    groups=module.kv_heads)  # fmt: skip

    def _neurons(self, layer: int) -> Axis:
        where, size = f"feedforward.{layer}", self.feedforward[layer].down.in_features
        fused = [Slice(f"{where}.gate_up.{name}", 0, 1, offset=offset)
                 for name in ("weight", "bias") for offset in (0, size)]  # fmt: skip
        return Axis("neuron", layer, f"{where}.neurons", size, 1, f"{where}.down",
                    (*fused, Slice(f"{where}.down.weight", 1, 1)), lambda kept: None)  # fmt: skip


def toy(*layers: tuple[int, int, int], seed: int = 0, **sizes: int) -> Toy:
    """A float64 Toy with weights large enough that every head matters."""
    torch.manual_seed(seed)
    model = Toy(list(layers), **sizes).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


def tokens(batch: int = 3, length: int = 7, *, vocab: int = 13, seed: int = 1) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
