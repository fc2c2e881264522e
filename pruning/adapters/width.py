"""The axis of the embedding width: every tensor of a supported model that lies along the residual stream."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pruning.adapters.empty import HeadlessAttention
from pruning.adapters.families import Family, Place, row_multiple, set_attributes, weight_of
from pruning.adapters.record import projected, width_of
from pruning.axes import Axis, Slice

# of transformers' task models: layers that read the stream, or a vector that loses the same channels
_READERS = (
    "lm_head", "score", "qa_outputs", "classifier", "multiple_choice_head.summary", "cls.predictions.decoder",
    "cls.seq_relationship",
)  # fmt: skip
# from the stream to a vector as wide, which loses the same channels: a tied or stock head needs them to be equal
_POOLER, _TRANSFORM = "pooler.dense", "cls.predictions.transform.dense"
_TRANSFORMED = "cls.predictions.transform.LayerNorm"
Lines = list[tuple[str, int]]  # (parameter, dimension that lies along the stream)


def width_axis(place: Place, told: Callable[[], None]) -> Axis | None:
    """The channels of the residual stream: in embeddings, norms, whatever reads or writes it, and the head.

    None for a model whose head is something else than the linear layers of transformers' own classes. told: called
    once the tensors are cut. Raises: ValueError for weights that are not plain parameters."""
    modules = dict(place.model.named_modules())
    if any(not isinstance(modules[name], nn.Linear | nn.Identity) for name in _READERS if name in modules):
        return None
    lines = [*_tables(place), *_ends(place, modules)]
    for index, layer in enumerate(place.layers):
        lines += [(f"{place.where(index)}.{name}", dim) for name, dim in _of_layer(place.family, layer)]
    norms = {f"{place.where(index)}.{name}" for index in range(len(place.layers)) for name in place.family.norms}
    owners = {name.rpartition(".")[0] for name, _ in lines} | norms | {f"{place.prefix}{place.family.norm}"}

    def resize(kept: list[int]) -> None:
        _set_width(place, owners, len(kept))
        told()

    slices = tuple(Slice(name, dim, 1) for name, dim in lines)
    gate = f"{place.prefix}{place.family.layers}"
    return Axis("width", 0, f"{place.prefix}width", width_of(place), 1, gate, slices, resize, least=1,
                multiple=row_multiple(place))  # fmt: skip


def _tables(place: Place) -> Lines:
    """Embeddings that are added up to the stream, or what projects them onto it."""
    family = place.family
    weight_of(place.base, family.embedding)
    words = (f"{family.entry}.weight", 0) if projected(place) else (f"{family.embedding}.weight", 1)
    lines = [words, *((f"{table}.weight", 1) for table in family.positions)]
    return [(f"{place.prefix}{name}", dim) for name, dim in lines]


def _ends(place: Place, modules: dict[str, nn.Module]) -> Lines:
    """What lies before the first layer and after the last: norms, squares and heads."""
    family, base = place.family, place.base
    squares = [name for name in dict.fromkeys((f"{place.prefix}{_POOLER}", _TRANSFORM)) if name in modules]
    lines = [line for name in squares for line in ((f"{name}.weight", 0), (f"{name}.weight", 1), (f"{name}.bias", 0))]
    norms = [name for name in (f"{place.prefix}{family.norm}", _TRANSFORMED) if name in modules]
    lines += [(f"{name}.{tensor}", 0) for name in norms for tensor, _ in modules[name].named_parameters()]
    if projected(place):
        return [*lines, (f"{place.prefix}{family.exit}.weight", 1)]
    embedding = base.get_submodule(family.embedding).weight
    readers = [name for name in _READERS if isinstance(modules.get(name), nn.Linear)]
    return lines + [(f"{name}.weight", 1) for name in readers if weight_of(place.model, name) is not embedding]


def _of_layer(family: Family, layer: nn.Module) -> Lines:
    names = {name for name, _ in layer.named_parameters()}
    into, out = (0, 1) if family.transposed else (1, 0)
    headless = isinstance(layer.get_submodule(family.attention), HeadlessAttention)
    reads = dict.fromkeys(part.module for part in (*(() if headless else family.projections), *family.inputs))
    writes = [name for name in (family.output, family.hidden) if name]
    found = [(f"{name}.{tensor}", 0) for name in family.norms for tensor in ("weight", "bias")]
    found += [(f"{name}.weight", into) for name in reads]
    found += [line for name in writes for line in ((f"{name}.weight", out), (f"{name}.bias", 0))]
    if family.experts is not None:
        stacks = ((f"{family.experts}.gate_up_proj", 2), (f"{family.experts}.down_proj", 1))
        found += [*stacks, (f"{family.router}.weight", 1)]
    return [(name, dim) for name, dim in found if name in names]


def _set_width(place: Place, owners: set[str], width: int) -> None:
    """The sizes that modules keep beside their tensors; some may be gone by now (a layer that lost all its heads)."""
    modules: dict[str, Any] = dict(place.model.named_modules())
    for module in (modules[name] for name in owners if name in modules):
        if isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = (width,)
        elif hasattr(module, "nx"):
            module.nx, module.nf = module.weight.shape
    for layer in place.layers:
        set_attributes(layer, ("hidden_size", "hidden_dim"), width)
