"""Matrices that something else holds: what torch.nn.utils.prune and adapters made of a parameter, and the way out."""

import re
from collections.abc import Collection, Iterable

from torch import nn

_PRUNED = re.compile(r"(.+)_orig")
_ADAPTED = re.compile(r"(|.*\.)parametrizations\.(\w+)\.original\d*")
_WAYS = (
    ": torch.nn.utils.prune holds it, call pruning.torch_prune.from_torch_prune(model) or prune.remove first",
    ": it is parametrised, call pruning.recovery.merge_adapters(model) if add_adapters did it, else"
    " torch.nn.utils.parametrize.remove_parametrizations, first",
)


def held_by(names: Collection[str], name: str) -> str:
    """Why parameter `name` is not among `names` though its module has it, and what to call; "" for any other name.

    >>> held_by(["up.weight_orig"], "up.weight").partition(",")[0]
    ': torch.nn.utils.prune holds it'
    """
    return _held(names).get(name, "")


def check_free(model: nn.Module, matrices: Collection[str], *, dense: Iterable[nn.Module] = ()) -> None:
    """Refuse a model some of whose matrices are no parameters now, for they would be left out without a word.

    matrices: what stacks of matrices are called, besides `weight` of a Linear or Conv1D and what a module names in
    ``matrix_stacks``. dense: modules that stay dense whatever holds them.
    Raises: ValueError naming the first such matrix, what holds it, and what to call."""
    skipped = {id(inner) for module in dense for inner in module.modules()}
    for name, why in _held([name for name, _ in model.named_parameters()]).items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        single = isinstance(module, nn.Linear) or type(module).__name__.endswith("Conv1D")
        known = {*matrices, *getattr(module, "matrix_stacks", ()), *(["weight"] if single else [])}
        if own in known and id(module) not in skipped:
            raise ValueError(f"weights that are pruned must be parameters, got {name!r}{why}")


def _held(names: Iterable[str]) -> dict[str, str]:
    """Name of each parameter that something holds → what, and the way out."""
    found = {}
    for name in names:
        if match := _PRUNED.fullmatch(name):
            found[match[1]] = _WAYS[0]
        elif match := _ADAPTED.fullmatch(name):
            found[f"{match[1]}{match[2]}"] = _WAYS[1]
    return found
