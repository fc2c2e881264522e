"""Which tensors weight pruning works on, and the matrices they are made of."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pruning.held import check_free, held_by

HEADS = ("head", "lm_head")
INPUTS_LAST = ("down", "down_proj", "gate_up_proj")
# what stacks of expert matrices are called: other parameters of three dimensions are positions, tables, convolutions
STACKS = (*INPUTS_LAST, "experts", "up", "gate", "gate_up", "up_proj", "gate_proj", "w1", "w2", "w3")
TABLE = (
    "a table whose gradients are the rows that were read: it is sparse by use already; leave it out with weights=, and"
    " prune it after training with sparsify(model, weights=[...])"
)


def prunable_weights(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Name → weight: every weight of nn.Linear and of transformers' Conv1D (GPT-2), every stack of expert matrices
    (3-D, named as STACKS), and what a module names in ``matrix_stacks`` (the sub-keys of `moe.ProductKeys`, 4-D), a
    tied one once.

    Dense stay embeddings and what is tied to them, tables of memories, the output head (`get_output_embeddings()`, or a
    Linear named head or lm_head), routers (a module named router, or of a class so named), norms and biases. `names`
    chooses instead, from all parameters of two or three dimensions and those of ``matrix_stacks``.
    Raises: ValueError for names that are unknown or have another number of dimensions, if nothing is left, and for
    matrices that torch.nn.utils.prune or adapters hold."""
    if names is not None:
        return _named(model, names)
    check_free(model, STACKS, dense=_dense_modules(model))
    found = default_weights(model)
    if not found:
        raise ValueError(f"{type(model).__name__} must have prunable weights, got none; pass weights=")
    return found


def default_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """`prunable_weights`, or {} where there are none."""
    dense = {id(parameter) for module in _dense_modules(model) for parameter in module.parameters()}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
    whole = linear | {id(p) for p in declared_stacks(model)}
    return {name: p for name, p in model.named_parameters() if id(p) not in dense
             and (id(p) in whole or (p.ndim == 3 and name.rpartition(".")[2] in STACKS))}  # fmt: skip


def declared_stacks(model: nn.Module) -> list[nn.Parameter]:
    """What modules name in ``matrix_stacks``: parameters [..., out, in] of which every [out, in] is a matrix that
    multiplies an input of its own, such as the sub-keys [heads, 2, keys, half] of `moe.ProductKeys`."""
    return [module.get_parameter(name) for module in model.modules() for name in getattr(module, "matrix_stacks", ())
            if name in dict(module.named_parameters(recurse=False))]  # fmt: skip


def growable_weights(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """`prunable_weights`, each of which trains and is one layer's own: those whose masks are found in training, where a
    frozen one would be pruned and never learn, and one that two layers share would have two gradients for one choice.

    Raises: as `prunable_weights` and `check_dense_gradients`; ValueError for a frozen weight, and one that the model
    holds under two names."""
    chosen = prunable_weights(model, names)
    check_values(chosen)
    check_dense_gradients(model, chosen)
    for name, weight in chosen.items():
        if not weight.requires_grad:
            raise ValueError(f"weights must train while their masks are found, got {name!r} with requires_grad=False: "
                             "leave it out with weights=")  # fmt: skip
    check_unshared(model, chosen)
    return chosen


def check_unshared(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises: ValueError for a weight that the model holds under two names."""
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    for weight in weights.values():
        if len(held.get(id(weight), ())) > 1:
            raise ValueError(f"weights whose masks change must be of one layer, got one shared by {held[id(weight)]}: "
                             "leave it out with weights=")  # fmt: skip


def check_dense_gradients(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises: ValueError for a weight of a module with ``sparse=True``, such as the values of a memory.

    Its gradient holds the rows that the batch read: no score of the others, and steps of an optimiser of its own."""
    tables = {id(p) for module in model.modules() if getattr(module, "sparse", False) is True
              for p in module.parameters(recurse=False)}  # fmt: skip
    for name, weight in weights.items():
        if id(weight) in tables:
            raise ValueError(f"weights that are pruned in training must have dense gradients, got {name!r}, {TABLE}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers: a matrix stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def stored_turned(model: nn.Module) -> frozenset[str]:
    """Names of the weights stored [in, out]: those of Conv1D, as in GPT-2."""
    turned = {id(module.weight) for module in model.modules() if is_conv1d(module)}
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in turned)


def check_values(weights: Mapping[str, Tensor]) -> None:
    """Raises: ValueError naming a weight on the meta device, which has a shape and no values."""
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"weights must hold values, got {name!r} on the meta device: load the model first")


def check_unquantised(model: nn.Module) -> None:
    """Raises: ValueError naming the first module whose weight is quantised: integers, 8-bit floats, a packed tensor."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        packed = ".quantized" in type(module).__module__
        if packed or (isinstance(weight, Tensor) and _quantised(weight)):
            got = f"{type(module).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(module).__name__
            raise ValueError(f"{name}.weight must be in float16, bfloat16, float32 or float64, got {got}: prune the "
                             "model before it is quantised")  # fmt: skip


def _quantised(weight: Tensor) -> bool:
    # torchao's tensors say the dtype of what they stand for
    known = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, DTensor)
    return not known or not weight.is_floating_point() or weight.element_size() < 2


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stacked = {id(parameter) for parameter in declared_stacks(model)}
    for name in names:
        if name not in parameters:
            raise ValueError(f"weights must name parameters of the model, got {name!r}{held_by(parameters, name)}")
        if parameters[name].ndim not in (2, 3) and id(parameters[name]) not in stacked:
            more = ", no stack of matrices (its module has no matrix_stacks)" if parameters[name].ndim > 3 else ""
            shape = list(parameters[name].shape)
            raise ValueError(f"weights must have 2 or 3 dimensions, got {shape} for {name!r}{more}")
    distinct = {id(parameters[name]): name for name in reversed(names)}
    return {name: parameters[name] for name in names if distinct[id(parameters[name])] == name}


def _dense_modules(model: nn.Module) -> list[nn.Module]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    dense = [] if output is None else [output]
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_router = last == "router" or "router" in type(module).__name__.lower()
        if isinstance(module, nn.Embedding) or is_router or (isinstance(module, nn.Linear) and last in HEADS):
            dense.append(module)
    return dense


def inputs_last(name: str, dims: int = 3) -> bool:
    """Whether a stack of ``dims`` dimensions lies [..., out, in]: our ``down``, those of transformers, and every stack
    of more than three."""
    return dims > 3 or name.rpartition(".")[2] in INPUTS_LAST


def matrices(tensors: Mapping[str, Tensor], turned: Collection[str] = ()) -> dict[str, Shaped[Tensor, "out in"]]:
    """Each matrix [out, in] as it is; each stack of experts as E matrices [out, in] named "name[e]"; sub-keys
    [heads, 2, keys, half] as 2 · heads matrices [keys, half] named "name[h][s]".

    A stack of experts is laid out [E, in, out] unless its name is in :data:`INPUTS_LAST`: [E, out, in]. turned: names
    of matrices stored [in, out], from :func:`stored_turned`.

    Views, no copies. Selection works on these, so that experts and sub-keys are ranked and counted one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for place in product(*map(range, tensor.shape[:-2])):
            as_stored = inputs_last(name, tensor.ndim) if place else name not in turned
            part = tensor[place] if place else tensor
            found[labelled(name, place)] = part if as_stored else part.mT
    return found


def assembled(
    name: str, tensor: Tensor, parts: Mapping[str, Tensor], turned: Collection[str] = ()
) -> Shaped[Tensor, "..."]:
    """The inverse of :func:`matrices` for one parameter: what ``parts`` has of its matrices, in its own shape."""
    places = list(product(*map(range, tensor.shape[:-2])))
    whole = torch.empty(tensor.shape, dtype=parts[labelled(name, places[0])].dtype, device=tensor.device)
    for part, view in matrices({name: whole}, turned).items():
        view.copy_(parts[part])
    return whole


def labelled(name: str, place: Iterable[int]) -> str:
    """The name of a matrix in a stack.

    >>> labelled("keys.weight", (3, 1))
    'keys.weight[3][1]'
    """
    return name + "".join(f"[{index}]" for index in place)
