"""The mixture-of-experts layer: route → dispatch → experts → combine."""

from collections.abc import Sequence
from functools import partial
from typing import get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.checks import at_least, positive
from moe.dispatch import Priority, limit_capacity
from moe.experts import Experts
from moe.noise import Source
from moe.nonlinearity import Activation
from moe.routing import Routing


class MoE(nn.Module):
    """y = Σ_e weight_e(x) · f_e(x) over the experts that the router chose, plus an optional shared expert.

    router: a module x [T, dim] → Routing, for the same dim and num_experts.
    capacity_factor: each expert keeps at most ceil(N / E · factor) of the N choices, the first in token order or,
    as ``drop_priority`` says (:func:`moe.dispatch.limit_capacity`); the others contribute nothing, so that their tokens
    pass by the residual connection. None, the default, drops nothing. What is dropped depends on the other tokens of
    the batch: drop_in_eval=False drops in training alone, so that evaluation and decoding agree.
    shared_hidden: width of a feed-forward network that every token passes (DeepSeekMoE, arXiv:2401.06066); 0 for none.
    bias: whether experts, the shared one too, add one bias before their activation and one to their output
    (:class:`moe.experts.Experts`).
    name: says in errors which layer it was.

    >>> layer = MoE(8, 16, 4, TopKRouter(8, 4, k=2))
    >>> y, routing = layer(torch.randn(2, 5, 8))
    >>> y.shape, int(routing.loads().sum())
    (torch.Size([2, 5, 8]), 20)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        router: nn.Module,
        *,
        activation: Activation = "swiglu",
        capacity_factor: float | None = None,
        drop_priority: Priority = "first_come",
        drop_in_eval: bool = True,
        shared_hidden: int = 0,
        bias: bool = False,
        name: str = "moe",
    ) -> None:
        super().__init__()
        _check_router(router, dim, num_experts)
        at_least("shared_hidden", shared_hidden, 0)
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        self.dim, self.num_experts, self.capacity_factor, self.name = dim, num_experts, capacity_factor, name
        if drop_priority not in get_args(Priority):
            raise ValueError(f"drop_priority must be one of {', '.join(get_args(Priority))}, got {drop_priority!r}")
        self.drop_priority, self.drop_in_eval = drop_priority, drop_in_eval
        self.router = router
        self.experts = Experts(dim, hidden, num_experts, activation=activation, bias=bias)
        self.shared = Experts(dim, shared_hidden, 1, activation=activation, bias=bias) if shared_hidden else None

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        *,
        token_ids: Int[Tensor, "*batch"] | None = None,
        padding_mask: Bool[Tensor, "*batch"] | Int[Tensor, "*batch"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> tuple[Float[Tensor, "*batch D"], Routing]:
        """The mixture of x, and the routing that made it.

        padding_mask: True (or 1) marks real tokens; padding passes no expert, the shared one neither: it gets zeros.
        replay: a recorded routing of these tokens: its choices are reused, its weights recomputed (activation
        checkpointing and debugging). generator: for routers that draw noise, or :class:`moe.Noise`.
        Raises: ValueError for a wrong width, or a replay that cannot be of these tokens and experts;
        FloatingPointError, with the layer's name, for non-finite router logits.
        """
        if not x.dim() or x.shape[-1] != self.dim:
            found = x.shape[-1] if x.dim() else "a scalar"
            raise ValueError(f"{self.name}: x must have width dim={self.dim}, got {found}")
        routing = self.route(x, token_ids=token_ids, padding_mask=padding_mask, replay=replay, generator=generator)
        rows = x.reshape(-1, self.dim)
        if self.shared is None:
            y = self.experts(rows, routing)
        elif getattr(self.experts, "exchanges", False):
            y = self.experts(rows, routing, meanwhile=partial(self._shared, self.shared, rows, routing))
        else:
            y = self.experts(rows, routing) + self._shared(self.shared, rows, routing)
        return y.reshape(x.shape), routing

    @staticmethod
    def _shared(shared: Experts, rows: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        if routing.real is None:
            return shared.forward_one(0, rows)
        # padding may hold anything: a finite row can overflow too, and 0 · NaN in a weight's gradient is NaN
        padding = ~routing.real[:, None]
        return shared.forward_one(0, rows.masked_fill(padding, 0.0)).masked_fill(padding, 0.0)

    def route(
        self,
        x: Float[Tensor, "*batch D"],
        *,
        token_ids: Int[Tensor, "*batch"] | None = None,
        padding_mask: Bool[Tensor, "*batch"] | Int[Tensor, "*batch"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """What :meth:`forward` would decide for x, capacity included, without running an expert."""
        mask = None if padding_mask is None else padding_mask.reshape(-1).bool()
        for what, values in (("token_ids", token_ids), ("padding_mask", padding_mask)):
            if values is not None and values.shape != x.shape[:-1]:
                raise ValueError(
                    f"{self.name}: {what} must have shape {list(x.shape[:-1])}, one entry a token, "
                    f"got {list(values.shape)}"
                )
        try:
            routing = self.router(
                x.reshape(-1, self.dim), token_ids=_flat(token_ids), padding_mask=mask, replay=replay,
                generator=generator,
            )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from error
        if self.capacity_factor is None or replay is not None or not (self.training or self.drop_in_eval):
            return routing
        return limit_capacity(routing, self.capacity_factor, priority=self.drop_priority)

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Follow a surgery that left the experts ``kept`` (ascending) in every stacked weight and in the router's.

        Sizes and the buffers that count experts are set; the weights are not touched.
        Raises: ValueError under a hash router, whose choice has no part for each expert, and where groups of a sigmoid
        router would be left uneven.
        """
        keep = getattr(self.router, "keep_experts", None)
        if keep is None:
            raise ValueError(f"{self.name}: experts of a {type(self.router).__name__} cannot be removed one by one")
        keep(kept)
        self.num_experts = self.experts.num_experts = len(kept)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, capacity_factor={self.capacity_factor}"


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)


def _check_router(router: nn.Module, dim: int, num_experts: int) -> None:
    for name, wanted in (("dim", dim), ("num_experts", num_experts)):
        given = getattr(router, name, wanted)
        if given != wanted:
            raise ValueError(f"router.{name} must be {name}={wanted}, got {given}")
