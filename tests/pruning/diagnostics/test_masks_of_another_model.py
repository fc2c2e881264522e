"""Masks of another shape, and of parameters that a model does not have: every diagnostic refuses them by name."""

import pytest
import torch

from pruning import Masks
from pruning.diagnostics import (
    degree_distribution,
    empirical_fisher_trace,
    fisher_penalty,
    fisher_trace,
    last_logits,
    low_fisher_first,
    tangent_kernel,
)
from pruning.diagnostics.kept import kept_of
from tests.pruning.diagnostics.test_fisher import Tiny, draw
from tests.pruning.diagnostics.test_kernel import net
from tests.typecheck import unchecked


def kernel(model, batch, *, masks):
    return tangent_kernel(model, batch, outputs=lambda m, b: last_logits(m, b)[:, :2], masks=masks)


TAKING = [
    lambda masks: fisher_trace(Tiny(), [draw()], masks=masks),
    lambda masks: empirical_fisher_trace(Tiny(), [draw()], masks=masks),
    lambda masks: low_fisher_first(Tiny(), [draw()], masks=masks),
    lambda masks: fisher_penalty(Tiny(), draw(), masks=masks),
    lambda masks: kernel(Tiny(), draw(), masks=masks),
]
NAMES = ["fisher_trace", "empirical_fisher_trace", "low_fisher_first", "fisher_penalty", "tangent_kernel"]


@pytest.mark.parametrize("call", TAKING, ids=NAMES)
def test_masks_that_do_not_fit_the_model_are_refused_before_any_pass(call):
    with pytest.raises(ValueError, match=r"mask of 'out' must have shape \[4, 3\], got \[3, 3\]"):
        call(Masks({"out": torch.ones(3, 3, dtype=torch.bool)}))
    # one that would broadcast, and count wrongly without a word
    with pytest.raises(ValueError, match=r"mask of 'out' must have shape \[4, 3\], got \[1, 1\]"):
        call(Masks({"out": torch.ones(1, 1, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="masks must name parameters of the model, got 'nope'"):
        call(Masks({"out": torch.ones(4, 3, dtype=torch.bool), "nope": torch.ones(4, 3, dtype=torch.bool)}))


def test_a_mask_is_boolean_and_of_a_matrix():
    with unchecked(), pytest.raises(ValueError, match=r"mask of 'out' must be boolean, got torch.float32"):
        kept_of(Masks({"out": torch.ones(4, 3)}), Tiny())
    with pytest.raises(ValueError, match=r"mask of 'bias' must have at least 2 dimensions, got \[3\]"):
        degree_distribution(Masks({"bias": torch.ones(3, dtype=torch.bool)}))


def test_a_matrix_that_something_holds_is_named_with_the_way_out():
    model = net()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"got '0.weight': it is parametrised, call"):
        kept_of(Masks({"0.weight": torch.ones(4, 3, dtype=torch.bool)}), model)
