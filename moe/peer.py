"""PEER: product keys that retrieve experts of a single neuron."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.memory_values import MemoryValues
from moe.nonlinearity import activate
from moe.product_key import Lookup, ProductKeys, QueryNorm, real_rows, restore_rows


class PEER(nn.Module):
    """y = Σ_heads Σ_{i in the head's k best keys} softmax(scores)_i · act(⟨u_i, x⟩) · v_i. He 2024, arXiv:2407.04153.

    num_keys n gives n² experts, each one input row u_i and one output row v_i of width dim. Every head has its own
    query; sub-keys and experts are shared by all heads, so that a token is served by a network of heads · k neurons
    put together for it. query_norm, key_dim: of :class:`moe.product_key.ProductKeys`. sparse: the gradients of the
    two tables are sparse tensors of the rows used, for an optimiser of their own such as
    :class:`training.rowwise_adam.RowwiseAdam`; otherwise dense. name: says in errors which layer it was.
    Raises: ValueError for a size below 1, k > num_keys, an odd key_dim, or another activation.

    >>> import torch
    >>> experts = PEER(8, num_keys=4, heads=2, k=3, key_dim=6)
    >>> y, lookup = experts.read(torch.randn(2, 5, 8))
    >>> y.shape, lookup.slots.shape, lookup.num_slots
    (torch.Size([2, 5, 8]), torch.Size([10, 2, 3]), 16)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int,
        heads: int = 8,
        k: int = 16,
        activation: Literal["gelu", "relu2"] = "gelu",
        key_dim: int = 128,
        query_norm: QueryNorm = "layer",
        sparse: bool = True,
        name: str = "peer",
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "relu2"):
            raise ValueError(f"{name}: activation of one neuron must be 'gelu' or 'relu2', got {activation!r}")
        self.keys = ProductKeys(
            dim, num_keys=num_keys, heads=heads, k=k, key_dim=key_dim, query_norm=query_norm, shared=True, name=name
        )
        self.up = MemoryValues(num_keys**2, dim, sparse=sparse)
        self.down = MemoryValues(num_keys**2, dim, sparse=sparse)
        self.dim, self.activation, self.name = dim, activation, name

    def forward(
        self, x: Float[Tensor, "*batch D"], *, padding_mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """The experts' sum; zeros for padding. See :meth:`read`."""
        return self.read(x, padding_mask=padding_mask)[0]

    def read(
        self, x: Float[Tensor, "*batch D"], *, padding_mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], Lookup]:
        """y, and the experts and weights that made it, for :func:`moe.memory_stats.memory_stats`.

        padding_mask: True for real tokens; padding uses no expert, gets zeros, and is not seen by query_norm="batch".
        Raises: ValueError for a wrong width, dtype or mask; FloatingPointError, with the layer's name, for NaN or inf.
        """
        rows = real_rows(x, padding_mask, self.dim, self.name)
        lookup = self.keys(rows)
        experts, weights = lookup.flat()
        hidden = activate(self.up.dot(experts, rows), self.activation)
        return restore_rows(self.down(experts, weights * hidden), x, padding_mask), lookup

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
