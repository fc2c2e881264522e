"""Which tensors weight pruning works on, and the matrices they are made of."""

from collections.abc import Collection, Mapping, Sequence

from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HEADS = ("head", "lm_head")
INPUTS_LAST = ("down", "down_proj", "gate_up_proj")
# what stacks of expert matrices are called: other parameters of three dimensions are positions, tables, convolutions
STACKS = (*INPUTS_LAST, "experts", "up", "gate", "gate_up", "up_proj", "gate_proj", "w1", "w2", "w3")


def prunable_weights(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Name → weight: every weight of nn.Linear and of transformers' Conv1D (GPT-2), and every stack of expert matrices
    (3-D, named as STACKS), a tied one once.

    Dense stay embeddings and what is tied to them, the output head (`get_output_embeddings()`, or a Linear named head
    or lm_head), routers (a module named router, or of a class so named), norms and biases. `names` chooses instead,
    from all parameters of two or three dimensions.
    Raises: ValueError for names that are unknown or have another number of dimensions, and if nothing is left."""
    if names is not None:
        return _named(model, names)
    found = default_weights(model)
    if not found:
        raise ValueError(f"{type(model).__name__} must have prunable weights, got none; pass weights=")
    return found


def default_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """`prunable_weights`, or {} where there are none."""
    dense = {id(parameter) for module in _dense_modules(model) for parameter in module.parameters()}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
    return {name: p for name, p in model.named_parameters() if id(p) not in dense
             and (id(p) in linear or (p.ndim == 3 and name.rpartition(".")[2] in STACKS))}  # fmt: skip


def growable_weights(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """`prunable_weights`, each of which trains and is one layer's own: those whose masks are found in training, where a
    frozen one would be pruned and never learn, and one that two layers share would have two gradients for one choice.

    Raises: as `prunable_weights`; ValueError for a frozen weight, and one that the model holds under two names."""
    chosen = prunable_weights(model, names)
    check_values(chosen)
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
    for name in names:
        if name not in parameters:
            raise ValueError(f"weights must name parameters of the model, got {name!r}")
        if parameters[name].ndim not in (2, 3):
            raise ValueError(f"weights must have 2 or 3 dimensions, got {list(parameters[name].shape)} for {name!r}")
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


def inputs_last(name: str) -> bool:
    """Whether a stack of experts of this name is laid out [E, out, in]: our ``down``, and those of transformers."""
    return name.rpartition(".")[2] in INPUTS_LAST


def matrices(tensors: Mapping[str, Tensor], turned: Collection[str] = ()) -> dict[str, Shaped[Tensor, "out in"]]:
    """Each matrix [out, in] as it is; each stack of experts as E matrices [out, in] named "name[e]".

    A stack is laid out [E, in, out] unless its name is in :data:`INPUTS_LAST`: [E, out, in]. turned: names of matrices
    stored [in, out], from :func:`stored_turned`.

    Views, no copies. Selection works on these, so that experts are ranked and counted one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = {} if tensor.ndim == 2 else {f"{name}[{e}]": part for e, part in enumerate(tensor)}
        laid = {part: matrix if inputs_last(name) else matrix.mT for part, matrix in parts.items()}
        found |= laid if parts else {name: tensor.mT if name in turned else tensor}
    return found
