"""Encoders predict no next token: what `prune` scores and judges them by in place of its loss."""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pruning import prunable_weights
from pruning.batches import Loss
from pruning.calibrated.blocks import find_blocks

TEMPERATURE = 0.05
LENGTH = 128  # sentence encoders are trained on passages, not pages
LEAST_TO_CORRELATE = 3
MODULES = "modules.json"
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
Over = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Encoder:
    """How an encoder makes one vector of a passage. pooling: "mean" over its tokens, or "cls", the first one's; before
    and after: the ids that the tokenizer puts around every text ([CLS] and [SEP])."""

    pooling: str = "mean"
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def states(self, model: nn.Module, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The last hidden states, float32 or wider; heads on top of the encoder do not run."""
        plain = cast(Any, model)
        if hasattr(plain, "base_model"):
            found = plain.base_model(input_ids=ids).last_hidden_state
        else:
            found = plain.hidden_states(ids)[0]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def pooled(self, states: Float[Tensor, "B L D"]) -> Float[Tensor, "B D"]:
        """One vector a passage, of length 1."""
        return F.normalize(states[:, 0] if self.pooling == "cls" else states.mean(1), dim=-1)

    def embed(self, model: nn.Module, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """`pooled` of `states`."""
        return self.pooled(self.states(model, ids))

    def framed(self, bodies: Int[Tensor, "W M"]) -> Int[Tensor, "W L"]:
        """Passages of the tokens between what the tokenizer puts around them."""
        ends = [bodies.new_tensor(ids).expand(len(bodies), len(ids)) for ids in (self.before, self.after)]
        return torch.cat([ends[0], bodies, ends[1]], 1)

    def halves(self, ids: Int[Tensor, "B L"]) -> tuple[Int[Tensor, "B L1"], Int[Tensor, "B L2"]]:
        """Each passage cut in the middle, both parts framed. Raises: ValueError with fewer than two tokens to cut."""
        body = ids[:, len(self.before) : ids.shape[1] - len(self.after)]
        middle = body.shape[1] // 2
        if not middle:
            raise ValueError(f"passages must have at least 2 tokens between {len(self.before)} + {len(self.after)} "
                             f"special ones, got {list(ids.shape)}: give a larger --calibration-length")  # fmt: skip
        return self.framed(body[:, :middle]), self.framed(body[:, middle:])


@dataclass(frozen=True)
class Likeness:
    """An encoder on held-out passages. found: the share whose second half is, of all second halves, the nearest to
    their first half. Against the whole model: agreement, the correlation of the cosines of all pairs of passages;
    cosine, the mean cosine of a passage's two embeddings; error, Σ‖h − h₀‖² / Σ‖h₀‖² of the last hidden states. None
    where it cannot be said: fewer than three passages, or another width."""

    passages: int
    found: float
    agreement: float | None
    cosine: float | None
    error: float | None


@torch.no_grad()
def finding_loss(encoder: Encoder, model: nn.Module, passages: Int[Tensor, "S L"], *, batch: int) -> Loss:
    """Σ over samples of −log softmax_j(cos(e(first half), e_j) / 0.05) at the sample's own j, e_j the second halves.

    Contrastive: a sample's first half must find its second half among those of all `passages`, embedded once by `model`
    as it is now and held fixed, so that samples do not depend on one another (Oord et al. 2018, arXiv:1807.03748,
    eq. 4; a fixed table as in Wu et al. 2018, arXiv:1805.01978). The distance to the model itself would not do: its
    gradient at the model is 0. The loss takes ids [B, L] that are rows of `passages`.
    Raises: ValueError for fewer than two passages."""
    if len(passages) < 2:
        raise ValueError("an encoder is scored by which of several passages it finds: --calibration-sequences must be "
                         f"at least 2, got {len(passages)}")  # fmt: skip
    known = passages.to(next(model.parameters()).device)
    others = torch.cat([encoder.embed(model, encoder.halves(ids)[1]) for ids in known.split(batch)])

    def loss(scored: nn.Module, ids: Tensor) -> Tensor:
        own = (ids[:, None] == known[None]).all(-1).int().argmax(1)
        near = encoder.embed(scored, encoder.halves(ids)[0]) @ others.mT
        return F.cross_entropy(near / TEMPERATURE, own, reduction="sum")

    return loss


@torch.no_grad()
def likeness(
    encoder: Encoder, model: nn.Module, whole: nn.Module, held_out: Int[Tensor, "W L"], *, batch: int, progress: Over
) -> Likeness:
    """`model` on held-out passages, beside the whole model (itself for what it is before).

    Raises: ValueError if its states are not finite."""
    device = next(model.parameters()).device
    own, dense, first, second = [], [], [], []
    gap = size = 0.0
    for ids in progress(list(held_out.to(device).split(batch))):
        states, wanted = encoder.states(model, ids), encoder.states(whole, ids)
        if not torch.isfinite(states).all():
            raise ValueError("hidden states on held-out text must be finite: the model's weights are damaged, or "
                             "--dtype is too narrow for them")  # fmt: skip
        if states.shape == wanted.shape:
            gap, size = gap + _square(states - wanted), size + _square(wanted)
        own += [encoder.pooled(states)]
        dense += [encoder.pooled(wanted)]
        halves = encoder.halves(ids)
        first += [encoder.embed(model, halves[0])]
        second += [encoder.embed(model, halves[1])]
    e, e0 = torch.cat(own), torch.cat(dense)
    nearest = (torch.cat(first) @ torch.cat(second).mT).argmax(1)
    found = float((nearest == torch.arange(len(e), device=device)).float().mean())
    alike = e.shape == e0.shape
    cosine = float((e * e0).sum(-1).clamp(-1, 1).mean()) if alike else None
    return Likeness(len(e), found, _agreement(e, e0), cosine, gap / size if alike and size else None)


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _agreement(e: Float[Tensor, "W D"], e0: Float[Tensor, "W D0"]) -> float | None:
    if len(e) < LEAST_TO_CORRELATE:
        return None
    pairs = torch.ones(len(e), len(e), device=e.device).triu(1).bool()
    cosines = torch.stack([(x.double() @ x.double().mT)[pairs] for x in (e, e0)])
    found = float(torch.corrcoef(cosines)[0, 1])
    return None if math.isnan(found) else found  # all pairs are equally near


def encoder_weights(model: nn.Module) -> list[str]:
    """Names of the matrices inside the encoder's layers: poolers and heads on top have no part in an embedding."""
    weights = prunable_weights(model)
    where, _ = find_blocks(model, weights)
    return [name for name in weights if name.startswith(f"{where}.")]


def pooling_of(folder: Path) -> str:
    """What the folder's pooling layer of sentence-transformers says; "mean" without one.

    Raises: ValueError for another pooling than the mean or the first token."""
    for part in _modules(folder):
        if part["type"].endswith("Pooling"):
            record = json.loads((folder / part["path"] / "config.json").read_text(encoding="utf-8"))
            chosen = [key for key, value in record.items() if key.startswith("pooling_mode_") and value is True]
            if len(chosen) != 1 or chosen[0] not in POOLING:
                raise ValueError(f"{folder / part['path']}: pooling must be one of {', '.join(POOLING)}, got "
                                 f"{', '.join(chosen) or 'none'}")  # fmt: skip
            return POOLING[chosen[0]]
    return "mean"


def copy_parts(source: Path, out: Path) -> None:
    """The files by which sentence-transformers knows the folder: its list of modules, and those after the encoder."""
    for name in (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)
    for part in _modules(source):
        folder = source / part["path"]
        if part["path"] and folder.is_dir() and folder.resolve().parent == source.resolve():
            shutil.copytree(folder, out / folder.name)


def _modules(folder: Path) -> list[dict[str, Any]]:
    file = folder / MODULES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
