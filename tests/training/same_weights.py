"""Comparing the weights of two training runs."""

from torch import Tensor

from tests.tolerances import close


def same_weights(name: str, found: Tensor, wanted: Tensor) -> None:
    """``close``, but for key biases: softmax forgets what all keys share, so AdamW divides rounding by rounding."""
    if name.endswith("key.bias") and not name.startswith("gradient"):
        assert (found - wanted).abs().max() < 1e-5, name
    else:
        close(found, wanted)
