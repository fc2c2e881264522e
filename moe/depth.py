"""Mixture-of-Depths: a block that only some tokens pass, with the compute of the others really skipped."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.checks import at_least
from moe.routers.top_k import router_logits

Block = Callable[[Tensor, Tensor], Tensor]
Weighting = Literal["sigmoid", "raw"]


@dataclass(frozen=True)
class DepthRouting:
    """Which tokens passed the block.

    selected [B, L]: True for tokens that passed. logits [B, L]: the router's, float32. predicted [B, L]: the causal
    predictor's logits, from an input that no gradient enters. real [B, L]: False for padding, which never passes and
    is taken for zeros in both logits.
    places [B, C]: where the tokens that passed stand, ascending, filled up with L: what the block was given.
    ragged: False says that every sequence has C tokens that pass, so that no place is L.
    """

    selected: Bool[Tensor, "B L"]
    logits: Float[Tensor, "B L"]
    predicted: Float[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    places: Int[Tensor, "B C"]
    ragged: bool

    def share(self) -> Tensor:
        """Share of the real tokens that passed; 0 where there is none."""
        return self.selected.sum() / self.real.sum().clamp_min(1)

    def aux_loss(self) -> Tensor:
        """Mean binary cross-entropy of the predictor against ``selected`` over real tokens (arXiv:2404.02258, §3.5).

        It trains the predictor alone. 0 without tokens.
        """
        logits, target = self.predicted[self.real], self.selected[self.real].to(self.predicted.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / max(logits.numel(), 1)

    def accuracy(self) -> Tensor:
        """Share of the real tokens for which the predictor says what the routing did; 1 where there is none."""
        wrong = ((self.predicted > 0) != self.selected) & self.real
        return 1 - wrong.sum() / self.real.sum().clamp_min(1)

    def detach(self) -> "DepthRouting":
        """The same record without gradient history: what to keep for a replay."""
        return dataclasses.replace(self, logits=self.logits.detach(), predicted=self.predicted.detach())


class MixtureOfDepths(nn.Module):
    """y_i = x_i + g_i · (f(x)_i − x_i) for the tokens that pass the block f, y_i = x_i for the others.

    Raposo et al. 2024 (arXiv:2404.02258). r = w·x in float32; in training the C = ceil(capacity · L) tokens of
    highest r in each sequence pass, exactly C even with ties, padding excepted. g = sigmoid(r), or the paper's r itself
    (weighting "raw"). That choice compares with later tokens, so it cannot be made while sampling: in evaluation a
    token passes where a predictor, a small network trained by ``DepthRouting.aux_loss`` on x without gradient, gives
    more than 1/2; a single decoded token may then skip the block.
    ``always``, False unless set: the block is called in evaluation even where no token passes, on a row of filling for
    each sequence, as other processes may wait in it (experts spread over processes).
    Raises: ValueError for dim < 1, capacity outside (0, 1] or an unknown weighting; in forward for another width, a
    mask of another shape, or a block that returns another shape; FloatingPointError for non-finite router logits.

    >>> depths = MixtureOfDepths(8, capacity=0.5)
    >>> y, routing = depths(torch.randn(2, 5, 8), lambda rows, indices: rows.tanh())
    >>> routing.selected.sum(1).tolist()
    [3, 3]
    """

    # told to calibration: inside the block neither rows nor their places are the batch's
    gathers_rows = True

    def __init__(
        self,
        dim: int,
        *,
        capacity: float = 0.5,
        weighting: Weighting = "sigmoid",
        name: str = "depth",
    ) -> None:
        super().__init__()
        at_least("dim", dim, 1)
        if not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity must be in (0, 1], got {capacity}")
        if weighting not in ("sigmoid", "raw"):
            raise ValueError(f"weighting must be 'sigmoid' or 'raw', got {weighting!r}")
        self.dim, self.capacity, self.weighting, self.name = dim, capacity, weighting, name
        self.always = False
        self.weight = nn.Parameter(torch.empty(1, dim))
        width = predictor_width(dim)
        self.predictor = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw w from the normal distribution of deviation dim^-1/2."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        run: Block,
        *,
        padding_mask: Bool[Tensor, "B L"] | None = None,
        choose: Literal["auto", "top_k", "predictor"] = "auto",
        replay: DepthRouting | None = None,
    ) -> tuple[Float[Tensor, "B L D"], DepthRouting]:
        """x after the block for the tokens that pass, and the record of which did.

        run(rows [B, C, dim], indices [B, C]) → f(rows) [B, C, dim], the block's output with its residual connections.
        indices hold the rows' places in their sequence, ascending, for position encoding and causal masks. Sequences
        with fewer tokens to pass than others are filled up at the end with zero rows of index L: later than every
        token, so a causal block needs no further mask (a bidirectional one hides keys with index L); their outputs are
        thrown away. run is not called when no token passes, unless ``always``. padding_mask: True for real tokens.
        choose: "auto" takes "top_k" in training and "predictor" in evaluation. replay: the tokens of this record pass,
        whatever the logits say; gates and losses are computed from the current logits.
        Raises: ValueError for a replay of another shape, or by which padding would pass.
        """
        routing = self.route(x, padding_mask=padding_mask, choose=choose, replay=replay)
        return self.through(x, run, routing), routing

    def route(
        self,
        x: Float[Tensor, "B L D"],
        *,
        padding_mask: Bool[Tensor, "B L"] | None = None,
        choose: Literal["auto", "top_k", "predictor"] = "auto",
        replay: DepthRouting | None = None,
    ) -> DepthRouting:
        """Which tokens of x pass; the options are :meth:`forward`'s."""
        if choose not in ("auto", "top_k", "predictor"):
            raise ValueError(f"choose must be 'auto', 'top_k' or 'predictor', got {choose!r}")
        real = self._real(x, padding_mask)
        try:
            logits = router_logits(x.flatten(0, 1), self.weight, real.flatten()).view(x.shape[:2])
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from error
        # padding may hold anything, and 0 · NaN in a weight's gradient is NaN
        seen = x.detach() if padding_mask is None else x.detach().masked_fill(~real[..., None], 0.0)
        predicted = rearrange(self.predictor(seen.to(self.weight.dtype)).to(logits.dtype), "b l 1 -> b l")
        if replay is not None:
            indices, ragged = _replayed(replay, real), replay.ragged or padding_mask is not None
        elif choose == "top_k" or (choose == "auto" and self.training):
            indices, ragged = self.top_tokens(logits, real), padding_mask is not None
        else:
            self._require_finite(predicted.detach(), real)
            indices, ragged = _places((predicted.detach() > 0) & real, least=int(self.always)), True
        return DepthRouting(_mark(indices, x.shape[1]), logits, predicted, real, indices, ragged)

    def _require_finite(self, predicted: Float[Tensor, "B L"], real: Bool[Tensor, "B L"]) -> None:
        """NaN is not above 0: the token would pass by without a word."""
        finite = predicted.isfinite() | ~real
        if torch.compiler.is_compiling():
            torch._assert_async(finite.all(), "the depth predictor's logits must be finite, got NaN or infinity")
        elif not finite.all():
            raise FloatingPointError(
                f"{self.name}: the predictor's logits must be finite, got NaN or infinity for "
                f"{int((~finite).sum())} of {finite.numel()} tokens"
            )

    def through(self, x: Float[Tensor, "B L D"], run: Block, routing: DepthRouting) -> Float[Tensor, "B L D"]:
        """x after the block for the tokens that the record lets pass; ``run`` as in :meth:`forward`."""
        if routing.places.shape[1] == 0:
            return x
        return self._through(x, run, routing.logits, routing.places)

    def top_tokens(self, logits: Float[Tensor, "B L"], real: Bool[Tensor, "B L"]) -> Int[Tensor, "B C"]:
        """Places of the ceil(capacity · L) highest logits of each sequence, ascending, padding replaced by L."""
        length = logits.shape[1]
        count = passing_tokens(length, capacity=self.capacity)
        chosen = logits.detach().masked_fill(~real, -torch.inf).topk(count, dim=1).indices
        return chosen.masked_fill(~real.gather(1, chosen), length).sort(dim=1).values

    def _through(
        self, x: Float[Tensor, "B L D"], run: Block, logits: Float[Tensor, "B L"], indices: Int[Tensor, "B C"]
    ) -> Float[Tensor, "B L D"]:
        # one row more, at place L, feeds the filling and takes its results
        padded = F.pad(x, (0, 0, 0, 1))
        places = repeat(indices, "b c -> b c d", d=self.dim)
        rows = padded.gather(1, places)
        out = run(rows, indices)
        if out.shape != rows.shape:
            raise ValueError(f"run must return shape {list(rows.shape)}, got {list(out.shape)}")
        r = F.pad(logits, (0, 1)).gather(1, indices)
        gate = r.sigmoid() if self.weighting == "sigmoid" else r
        change = rearrange(gate, "b c -> b c 1").to(x.dtype) * (out.to(x.dtype) - rows)
        return padded.scatter_add(1, places, change)[:, :-1]

    def _real(self, x: Float[Tensor, "B L D"], padding_mask: Tensor | None) -> Bool[Tensor, "B L"]:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have width dim={self.dim}, got {x.shape[-1]}")
        if padding_mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if padding_mask.shape != x.shape[:2]:
            raise ValueError(f"padding_mask must have shape {list(x.shape[:2])}, got {list(padding_mask.shape)}")
        return padding_mask.bool()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, capacity={self.capacity}, weighting={self.weighting}"


def passing_tokens(length: int, *, capacity: float) -> int:
    """C = ceil(capacity · L): how many of the tokens of a sequence pass in training, if none is padding.

    At least 1 of a sequence that is not empty.

    >>> passing_tokens(100, capacity=0.55)
    55
    """
    # less rounding: 0.55 · 100 is 55.00000000000001
    return max(min(1, length), math.ceil(capacity * length - 1e-9))


def predictor_width(dim: int) -> int:
    """Neurons of the predictor's hidden layer."""
    return max(1, dim // 4)


def _replayed(replay: DepthRouting, real: Bool[Tensor, "B L"]) -> Int[Tensor, "B C"]:
    if replay.selected.shape != real.shape:
        raise ValueError(f"replay must be of shape {list(real.shape)}, got {list(replay.selected.shape)}")
    if torch.compiler.is_compiling():
        return replay.places
    padding = int((replay.selected & ~real).sum())
    if padding:
        raise ValueError(f"replay must let no padding pass, got {padding} tokens that padding_mask calls padding")
    return replay.places


def _places(selected: Bool[Tensor, "B L"], *, least: int) -> Int[Tensor, "B C"]:
    """Places of the True entries of each row, ascending, filled with L up to the longest row's count, or ``least``."""
    length = selected.shape[1]
    places = torch.arange(length, device=selected.device).expand(selected.shape)
    count = max(least, int(selected.sum(1).max())) if selected.numel() else 0
    return places.masked_fill(~selected, length).sort(dim=1).values[:, :count]


def _mark(indices: Int[Tensor, "B C"], length: int) -> Bool[Tensor, "B L"]:
    marked = torch.zeros(indices.shape[0], length + 1, dtype=torch.bool, device=indices.device)
    return marked.scatter(1, indices, True)[:, :-1]
