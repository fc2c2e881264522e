"""Which neurons a token will use, told before they are computed: labels, training and recall of small predictors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.calibration import CalibratedMethod, compared_magnitudes
from moe.sparsified import FeedForwardSite, feedforward_sites
from moe.thresholded import Thresholds


def active_neurons(
    site: FeedForwardSite, x: Float[Tensor, "T D"], *, method: CalibratedMethod, thresholds: Thresholds
) -> Bool[Tensor, "T F"]:
    """True for the neurons that the thresholds of ``method`` keep: what a predictor is trained to tell.

    Raises: ValueError for method "teal", which drops inputs and not neurons.
    """
    if method == "teal":
        raise ValueError("method must be 'hard', 'cats' or 'cett', got 'teal': it drops inputs and not neurons")
    place = "gate" if method == "cats" else "down"
    with torch.no_grad():
        return compared_magnitudes(site, x, method)[place] > getattr(thresholds, place)


class ActivePredictor(nn.Module):
    """Which neurons a token will use, before they are computed: logits = B(A x), of rank r (arXiv:2310.17157).

    threshold: neurons with a logit above it count as active; see :func:`train_predictor`.
    Raises: ValueError for sizes or rank < 1.
    """

    def __init__(self, dim: int, hidden: int, *, rank: int) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("rank", rank)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, hidden)
        self.threshold = 0.0

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """Logits of activity."""
        return self.up(self.down(x))

    def active(self, x: Float[Tensor, "*batch D"]) -> Bool[Tensor, "*batch F"]:
        """True for the neurons to compute: a NaN in x drops none, so that it reaches the output."""
        return ~(self(x) <= self.threshold)


def train_predictor(
    x: Float[Tensor, "T D"],
    active: Bool[Tensor, "T F"],
    *,
    rank: int,
    recall: float = 0.99,
    steps: int = 300,
    lr: float = 1e-2,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> ActivePredictor:
    """A predictor of ``active`` from x, by binary cross-entropy with Adam.

    Its threshold is the largest that keeps the share ``recall`` of the active entries, on the last tenth of the rows,
    which training does not see. generator: a CPU generator for the initial weights and the batches.
    Raises: ValueError for recall outside (0, 1], steps or batch < 1, fewer than 10 rows, or no active entry to measure.
    """
    if not 0.0 < recall <= 1.0:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    for name, value, least in (("steps", steps, 1), ("batch", batch, 1), ("rows of x", x.shape[0], 10)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    held = x.shape[0] - x.shape[0] // 10
    predictor = ActivePredictor(x.shape[1], active.shape[1], rank=rank).to(x)
    with torch.no_grad():
        for linear in (predictor.down, predictor.up):
            linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
        predictor.up.bias.zero_()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(held, (batch,), generator=generator).to(x.device)
            loss = F.binary_cross_entropy_with_logits(predictor(x[chosen].detach()), active[chosen].to(x.dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predictor.threshold = recall_threshold(predictor(x[held:])[active[held:]], recall)
    return predictor


def recall_threshold(logits: Float[Tensor, "N"], recall: float) -> float:
    """The largest threshold that leaves at least the share ``recall`` of these logits, of active entries, above it.

    Raises: ValueError for no logits.
    """
    if logits.numel() == 0:
        raise ValueError("active must be True somewhere in the last tenth of the rows, got no such entry")
    missed = math.floor((1.0 - recall) * logits.numel() + 1e-9)
    least = logits.kthvalue(missed + 1).values
    # just under the least logit that must stay
    return float(torch.nextafter(least, least.new_tensor(-torch.inf)))


def train_predictors(
    model: nn.Module,
    inputs: Mapping[str, Float[Tensor, "_ _"]],
    *,
    method: CalibratedMethod,
    thresholds: Mapping[str, Thresholds],
    rank: int,
    recall: float = 0.99,
    steps: int = 300,
    generator: torch.Generator | None = None,
) -> dict[str, ActivePredictor]:
    """For each feed-forward network of the model a predictor of the neurons that its thresholds keep, by module name.

    inputs: rows of each network's input, as :func:`moe.calibration.feedforward_inputs` gives them; thresholds: as
    :func:`moe.calibrate_thresholds` finds them with that method. Other options: of :func:`train_predictor`; a rank
    above the smaller side of a network is that side.
    Raises: as :func:`train_predictor`; ValueError if inputs or thresholds name other networks than the model has.
    """
    sites = _sites(model, inputs, thresholds)
    return {
        name: train_predictor(
            inputs[name], active_neurons(site, inputs[name], method=method, thresholds=thresholds[name]),
            rank=min(rank, site.up.in_features, site.up.out_features), recall=recall, steps=steps, generator=generator,
        )
        for name, site in sites.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Foresight:
    """What the predictors of a model tell of some rows, over all networks and neurons.

    recall: share of the active neurons that are predicted; predicted: share of all neurons that are, which is what
    decoding computes; active: share of all neurons that the thresholds keep.
    """

    recall: float
    predicted: float
    active: float


@torch.no_grad()
def foresight(
    model: nn.Module,
    inputs: Mapping[str, Float[Tensor, "_ _"]],
    predictors: Mapping[str, ActivePredictor],
    *,
    method: CalibratedMethod,
    thresholds: Mapping[str, Thresholds],
) -> Foresight:
    """How well predictors tell the active neurons of these rows; options as of :func:`train_predictors`."""
    return foreseen(
        (
            predictors[name].active(inputs[name]),
            active_neurons(site, inputs[name], method=method, thresholds=thresholds[name]),
        )
        for name, site in _sites(model, inputs, thresholds).items()
    )


def foreseen(layers: Iterable[tuple[Bool[Tensor, "_ _"], Bool[Tensor, "_ _"]]]) -> Foresight:
    """What was told and what was wanted, layer by layer, in one figure each."""
    found = told = active = neurons = 0
    for guess, wanted in layers:
        found, told = found + int((guess & wanted).sum()), told + int(guess.sum())
        active, neurons = active + int(wanted.sum()), neurons + wanted.numel()
    return Foresight(found / max(active, 1), told / neurons, active / neurons)


def _sites(
    model: nn.Module, inputs: Mapping[str, Tensor], thresholds: Mapping[str, Thresholds]
) -> dict[str, FeedForwardSite]:
    sites = feedforward_sites(model)
    for kind, named in (("inputs", inputs), ("thresholds", thresholds)):
        if named.keys() != sites.keys():
            raise ValueError(f"{kind} must name {', '.join(sites)}, got {', '.join(named) or 'none'}")
    return sites
