"""Every method of [sparsify] through the trainer, on all kinds of layers at once, under all that a step may do besides.

One model has attention, experts and a product-key memory with dense layers around it; its steps accumulate two
micro-batches, recompute every block, multiply in bfloat16 and clip.
"""

from pathlib import Path
from typing import get_args

import pytest
import torch

from pruning import Masks, magnitude, prunable_weights, select_masks, uniform
from pruning.dynamic import DynamicSparsity
from pruning.prescribed import Prescribed
from pruning.retraining.phases import Phases
from tests.training.models import small_batch, small_data, small_trainer
from training.moments import evaluating, observe_all, parametrised
from training.sparsify_config import FINDING, SparsifyConfig, SparsifyMethod, check_sparsify, unread
from training.sparsity import FROM_THE_START, make_sparsifiers
from training.trainer import Trainer
from transformer import AttentionConfig, LayerConfig, MoEConfig, ProductKeyConfig, Transformer, TransformerConfig

STEPS, SAVED = 6, 3
UNITS = ("sigmoid_units", "softplus_units", "polarized_units", "l0_units", "variational_units", "group_proximal")
# sparse to the weight from the first step
ALWAYS = (*(name for name in FROM_THE_START if name != "nest"), "snip", "grasp", "synflow", "random", "mask")
# at the end of these as many weights are there as they were asked for; 'dsd' ends dense, 'generalization' may not reach
# it, 'nest' may keep fewer
ASKED = tuple(set(get_args(SparsifyMethod)) - {*FINDING, *UNITS, "dsd", "generalization", "nest"})
DATA = small_data()


def model() -> Transformer:
    torch.manual_seed(0)
    layers = (
        LayerConfig(AttentionConfig(2, 2, 4), MoEConfig(hidden=8, num_experts=3, k=2)),
        LayerConfig(None, ProductKeyConfig(6, 2, 3, 8, gated=True)),
    )
    return Transformer(TransformerConfig(vocab_size=257, dim=8, layers=layers, max_length=16))


# four of attention; experts, up and down; queries; the sub-keys of two heads and halves; the memory's gate and output
WEIGHTS = 4 * 8 * 8 + 3 * (8 * 16 + 8 * 8) + 8 * 16 + 2 * 2 * 6 * 4 + 2 * 8 * 8


def asked(method: str) -> float:
    """The sparsity of a run: sub-keys that no token of a batch reads have no gradient, and snip empties a matrix."""
    return 0.25 if method == "snip" else 0.5


def trainer(out: Path, method: str) -> Trainer:
    made = model()
    words = {"sparsity": 0.0 if method in FINDING or method == "mask" else asked(method), "every": 1, "rounds": 1}
    if method == "mask":
        scores = {name: magnitude(weight) for name, weight in prunable_weights(made).items()}
        words["mask"] = select_masks(scores, sparsity=0.5, allocation=uniform).save(out / "masks.safetensors")
    words["end"] = {"magnitude": 3, "early_bird": 6}.get(method, 0)
    config = SparsifyConfig(method=method, **{name: word for name, word in words.items() if name not in unread(method)})
    check_sparsify(config, steps=STEPS)
    methods = make_sparsifiers(config, made, steps=STEPS, calibration=lambda: [small_batch(batch=2).inputs])
    settings = {"steps": STEPS, "accumulation": 2, "checkpointing": True, "dtype": "bfloat16", "batch": 2}
    return small_trainer(out, model=made, data=DATA, sparsifiers=methods, train=settings)


def step(made: Trainer) -> None:
    """One step, an evaluation of which the loss rises, and all that must hold after it."""
    made.train_step()
    observe_all(made.sparsifiers, 3.0 + made.step / 10)
    (method,) = made.sparsifiers
    masks = {name: mask for name, mask in method.masks().kept.items() if name in weights_of(made)}
    with evaluating(made.model), parametrised(made.sparsifiers):
        for name, mask in masks.items():
            assert not weights_of(made)[name][~mask].any(), name
    if isinstance(method, DynamicSparsity | Prescribed | Phases):
        forgotten(made, masks if not isinstance(method, Phases) or method._now is not None else {})


def forgotten(made: Trainer, masks: dict[str, torch.Tensor]) -> None:
    """The optimiser holds nothing of weights that are not there."""
    for name, mask in masks.items():
        for slot in made.optimizers.main.state[weights_of(made)[name]].values():
            if slot.shape == mask.shape:
                assert not slot[~mask].any(), name


def weights_of(made: Trainer) -> dict[str, torch.nn.Parameter]:
    return prunable_weights(made.model)


def test_the_weights_are_those_counted_by_hand():
    assert sum(weight.numel() for weight in prunable_weights(model()).values()) == WEIGHTS


@pytest.mark.parametrize("name", get_args(SparsifyMethod))
def test_zeros_are_exact_after_every_step_and_a_resumed_run_is_the_undisturbed_one(name, tmp_path):
    whole = trainer(tmp_path, name)
    (method,) = whole.sparsifiers
    for _ in range(STEPS):
        step(whole)
        if name in ALWAYS:
            assert method.masks().zeros == WEIGHTS * asked(name)
        if whole.step == SAVED:
            saved = whole.save()
    if name in ASKED:
        assert method.masks().zeros == WEIGHTS * asked(name)
        assert Masks.of(whole.model).zeros >= WEIGHTS * asked(name)
    parts = trainer(tmp_path, name)
    torch.manual_seed(99)
    parts.resume(saved)
    for _ in range(STEPS - SAVED):
        step(parts)
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert one.equal(two)
    for key, mask in method.masks().kept.items():
        assert mask.equal(parts.sparsifiers[0].masks().kept[key])
