"""Which matrices [out, in] the prunable weights are made of, and where each meets its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pruning.weights import labelled


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter: all of it, or that at `place` of it, (e,) for an expert, (head, half) for sub-keys.

    transposed: it is stored as [in, out]."""

    name: str
    parameter: nn.Parameter
    transposed: bool = False
    place: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The parameter's name, and "[e]" after it for an expert, "[head][half]" for sub-keys."""
        return labelled(self.name, self.place)

    def view(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "out in"]:
        """This matrix in a tensor of the parameter's shape, as [out, in], sharing memory."""
        part = tensor[self.place] if self.place else tensor
        return part.mT if self.transposed else part


@dataclass(frozen=True)
class Inputs:
    """A module that multiplies rows by prunable weights.

    weights: of a plain layer its matrix, under "weight"; of stacked experts theirs by role, "up" (from the layer's
    input) and "down" (from the hidden activation), one an expert; of product keys all sub-keys, under "keys"."""

    name: str
    module: nn.Module
    weights: Mapping[str, Sequence[Matrix]]


# Transformers' Conv1D stores [in, out]
_PLAIN = {"Linear": False, "Conv1D": True}


def find_inputs(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> list[Inputs]:
    """The modules that use `weights`, each use of a shared weight apart.

    Known are nn.Linear, transformers' Conv1D, this library's stacked experts (a module with hidden_one, up and down),
    transformers' (gate_up_proj and down_proj, [E, out, in], without biases) and product keys (a module with
    matrix_inputs).
    Raises: ValueError naming a weight of any other module."""
    found = []
    names = {id(parameter): name for name, parameter in weights.items()}
    for where, module in model.named_modules():
        held = {key: (names[id(p)], p) for key, p in module.named_parameters(recurse=False) if id(p) in names}
        if held:
            found.append(Inputs(where, module, _matrices(where, module, held)))
    return found


def _matrices(where: str, module: nn.Module, held: dict[str, tuple[str, nn.Parameter]]) -> dict[str, list[Matrix]]:
    kind = "Linear" if isinstance(module, nn.Linear) else type(module).__name__
    if kind in _PLAIN and held.keys() == {"weight"}:
        return {"weight": [Matrix(*held["weight"], transposed=_PLAIN[kind])]}
    if hasattr(module, "matrix_inputs"):
        return {"keys": [Matrix(name, p, place=place) for name, p in held.values() for place in _places(p)]}
    roles = _expert_roles(module)
    if not held.keys() <= roles.keys():
        raise ValueError(
            f"calibration must know what {where or 'the model'} ({kind}) multiplies by {sorted(held)}: supported are "
            f"Linear, Conv1D, moe.Experts, moe.ProductKeys and stacked gate_up_proj/down_proj without biases; choose "
            f"others with weights=, or a method without calibration"
        )
    return {
        roles[key][0]: [Matrix(name, p, roles[key][1], (e,)) for e in range(len(p))] for key, (name, p) in held.items()
    }


def _places(parameter: Tensor) -> list[tuple[int, ...]]:
    return list(product(*map(range, parameter.shape[:-2])))


def _expert_roles(module: nn.Module) -> dict[str, tuple[str, bool]]:
    """Parameter → (role, stored as [in, out]) of stacked experts; {} for any other module."""
    if hasattr(module, "hidden_one") and hasattr(module, "up") and hasattr(module, "down"):
        return {"up": ("up", True), "down": ("down", False)}
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    if plain and hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
        return {"gate_up_proj": ("up", False), "down_proj": ("down", False)}
    return {}


def routed_rows(module: Any, arguments: Sequence[Any]) -> list[Float[Tensor, "rows width"]]:
    """The rows of each expert, from the positional arguments of a stack's forward."""
    x = arguments[0]
    if hasattr(module, "hidden_one"):
        token, expert = arguments[1].token, arguments[1].expert
        return [x[token[expert == e]] for e in range(module.up.shape[0])]
    return [x[(arguments[1] == e).any(-1)] for e in range(module.gate_up_proj.shape[0])]


def hidden_rows(module: Any, expert: int, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows hidden"]:
    """What the expert's second matrix gets for these rows."""
    if hasattr(module, "hidden_one"):
        return module.hidden_one(expert, rows)
    gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
    return module.act_fn(gate) * up
