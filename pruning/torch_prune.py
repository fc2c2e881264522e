"""Models pruned with torch.nn.utils.prune: in, as plain weights and masks, and out again.

torch keeps a pruned parameter `weight` as `weight_orig` and `weight_mask`, and computes their product in a hook before
each forward pass, so that `weight` is no parameter any more."""

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning.masking import Masks
from pruning.weights import default_weights


def from_torch_prune(model: nn.Module) -> Masks:
    """Make every parameter that torch.nn.utils.prune holds a plain one again, in place, and return the masks.

    Its value is weight_orig where weight_mask is not 0, else 0; torch's hooks go. The masks name every weight of
    `prunable_weights` (those that torch did not prune are kept whole) and whatever else torch pruned, biases too.
    Optimisers hold weight_orig: it is the same tensor. A `Sparsifier` goes on from such masks:

    >>> masks = from_torch_prune(model)
    >>> sparsifier = Sparsifier(model, schedule=cubic(0.9, begin=0, end=1000))
    >>> sparsifier.load_state_dict({"step": 0, "sparsity": masks.sparsity, "masks": masks.state_dict()})

    Raises: ValueError if nothing is pruned so, or a mask has another shape than its weight; nothing has changed then.
    """
    found = pruned_parameters(model)
    if not found:
        raise ValueError(f"{type(model).__name__} must be pruned with torch.nn.utils.prune, got no weight_orig")
    kept = {}
    for name, (module, attribute) in found.items():
        mask, original = getattr(module, f"{attribute}_mask"), getattr(module, f"{attribute}_orig")
        if mask.shape != original.shape:
            raise ValueError(f"mask of {name!r} must have shape {list(original.shape)}, got {list(mask.shape)}")
        kept[name] = mask != 0
    for name, (module, attribute) in found.items():
        _plain(module, attribute, kept[name])
    whole = {name: torch.ones_like(p, dtype=torch.bool) for name, p in default_weights(model).items()}
    return Masks(whole | kept)


def to_torch_prune(model: nn.Module, masks: Masks) -> None:
    """Hand the masks to torch.nn.utils.prune, in place: each masked parameter becomes its `_orig` and `_mask`.

    Masks that keep everything are left out. `from_torch_prune` undoes it.
    Raises: ValueError, before anything changes, as `Masks.apply`; if a masked parameter is tied, for torch would untie
    it; and if torch holds one already."""
    names = [name for name, mask in masks.kept.items() if not mask.all()]
    held = dict(model.named_parameters(remove_duplicate=False))
    ready = pruned_parameters(model)
    for name in names:
        if name in ready:
            raise ValueError(f"{name!r} is held by torch.nn.utils.prune already: call from_torch_prune first")
        shared = [other for other, parameter in held.items() if name in held and parameter is held[name]]
        if len(shared) > 1:
            raise ValueError(f"{name!r} must not be tied for torch.nn.utils.prune, got {', '.join(shared)}")
    masks.apply(model)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(owner), attribute, masks.kept[name].to(held[name].device))


def pruned_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name → (module, attribute) of all that torch.nn.utils.prune holds, shared modules once."""
    found = {}
    for where, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                found[f"{where}.{hook._tensor_name}" if where else hook._tensor_name] = (module, hook._tensor_name)
    return found


def _plain(module: nn.Module, attribute: str, kept: Tensor) -> None:
    original = getattr(module, f"{attribute}_orig")
    prune.remove(module, attribute)
    with torch.no_grad():
        # torch multiplies, which leaves -0 and NaN behind
        original.masked_fill_(~kept, 0)
    setattr(module, attribute, original)
