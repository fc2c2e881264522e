"""What decays, how the learning rate moves, and what clipping does, against hand-worked numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import ProductKeyMemory
from tests.tolerances import close
from tests.training.models import small_batch, small_model
from training.optim import (
    Schedule,
    adamw,
    clip,
    decay_steps,
    gradient_norm,
    longest_warmup,
    lr_multiplier,
    parameter_groups,
    set_lr,
)
from training.step import accumulate


def decayed_names(model: torch.nn.Module) -> set[str]:
    decayed = {id(p) for g in parameter_groups(model, weight_decay=0.1) if g["weight_decay"] for p in g["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_matrices_decay_and_norms_embeddings_biases_do_not() -> None:
    model = small_model()
    model.register_module("extra", torch.nn.Linear(3, 3))
    names = decayed_names(model)
    assert "extra.weight" in names
    assert "layers.0.attention.query.weight" in names
    assert any("experts" in name for name in names)
    spared = {name for name, _ in model.named_parameters()} - names
    assert {"embedding.weight", "norm.weight", "extra.bias", "layers.1.attention_norm.weight"} <= spared
    assert all(
        parameter.ndim == 1 or "embedding" in name for name, parameter in model.named_parameters() if name in spared
    )


def test_a_table_of_memories_with_dense_gradients_does_not_decay() -> None:
    memory = ProductKeyMemory(8, num_keys=4, heads=2, k=2, key_dim=4)
    memory.values.sparse = False
    groups = parameter_groups(memory, weight_decay=0.1)
    assert any(memory.values.weight is p for g in groups for p in g["params"])
    assert decayed_names(memory) == {"keys.weight", "keys.query.weight"}


def test_every_trainable_parameter_is_in_one_group_and_routers_keep_their_factor() -> None:
    model = small_model()
    model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, router_lr=0.5)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_lr(optimizer, 0.2)
    routers = {id(p) for name, p in model.named_parameters() if ".router." in name}
    assert routers
    for group in optimizer.param_groups:
        expected = 0.1 if id(group["params"][0]) in routers else 0.2
        assert group["lr"] == pytest.approx(expected)


def test_schedules_by_hand() -> None:
    cosine = [lr_multiplier(step, steps=14, warmup=4, final=0.2) for step in range(14)]
    assert cosine[:4] == [0.25, 0.5, 0.75, 1.0]
    assert cosine[8] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.5 * math.pi)) / 2)
    assert cosine[12] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.9 * math.pi)) / 2)
    wsd = [lr_multiplier(step, steps=10, kind="wsd", warmup=2, final=0.0, decay_fraction=0.4) for step in range(10)]
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert lr_multiplier(7, steps=10, kind="constant", warmup=2) == 1.0
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 10\] for cosine over steps=10, got 11"):
        lr_multiplier(0, steps=10, warmup=11)
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 8\] for wsd over steps=10, got 9"):
        lr_multiplier(0, steps=10, kind="wsd", warmup=9)
    with pytest.raises(ValueError, match=r"decay_fraction must be in \(0, 1\], got 0"):
        lr_multiplier(0, steps=10, kind="wsd", decay_fraction=0.0)


@given(
    st.integers(2, 60),
    st.sampled_from(["cosine", "wsd"]),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_schedules_end_at_final_and_never_jump_down(
    steps: int, kind: Schedule, final: float, decay_fraction: float, share: float
) -> None:
    longest = longest_warmup(steps, kind=kind, decay_fraction=decay_fraction)
    warmup = int(share * min(longest, steps - 1))
    factors = [
        lr_multiplier(step, steps=steps, kind=kind, warmup=warmup, final=final, decay_fraction=decay_fraction)
        for step in range(steps)
    ]
    peak = max(warmup - 1, 0)
    assert factors[peak] == pytest.approx(1.0)
    assert factors[-1] == final
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[peak:]))
    slope = (
        math.pi / 2 / (steps - 1 - peak) if kind == "cosine" else 1 / decay_steps(steps, decay_fraction=decay_fraction)
    )
    longest_fall = (1 - final) * slope
    assert all(a - b <= longest_fall + 1e-12 for a, b in itertools.pairwise(factors[peak:]))


def test_clipping_scales_the_global_norm() -> None:
    model = small_model()
    accumulate(model, small_batch())
    flat = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    norm = gradient_norm(model.parameters())
    close(norm, flat.norm())
    clip(model.parameters(), norm, limit=norm.item() / 4)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
    close(clipped, flat / 4)


def test_one_step_of_adamw_by_hand() -> None:
    model = torch.nn.Linear(2, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = adamw(model, lr=0.01, weight_decay=0.1)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.full((2,), -2.0)
    optimizer.step()
    close(model.weight.detach(), weight * (1 - 0.01 * 0.1) - 0.01)
    close(model.bias.detach(), bias + 0.01)
