"""What does sparsity cost a trained model, beyond its loss?

Trains a small model to count on, prunes it by magnitude, and looks at the loss, the most sensitive matrix, the Fisher
trace, the tangent kernel, attacks on the embeddings and the FLOPs: `python examples/what_sparsity_costs.py`.
"""

import copy

import torch
from torch import Tensor, nn

from pruning import Masks, sparsify
from pruning.diagnostics import (
    adversarial_robustness,
    fisher_trace,
    last_logits,
    layer_sensitivity,
    run_cost,
    sparsity_loss_curve,
    static_run,
    tangent_kernel,
)
from transformer import DenseConfig, Transformer, TransformerConfig

VOCAB, LENGTH, SPARSITIES = 32, 16, (0.3, 0.6, 0.9)


def text(count: int) -> list[Tensor]:
    """Batches [8, 16] that count on in steps of one, two or three: two tokens tell the next."""
    strides = [torch.randint(1, 4, (8, 1)) for _ in range(count)]
    return [(torch.randint(VOCAB, (8, 1)) + stride * torch.arange(LENGTH)) % VOCAB for stride in strides]


def trained() -> Transformer:
    """Two narrow layers after 200 steps."""
    config = TransformerConfig.uniform(
        vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, max_length=LENGTH, feedforward=DenseConfig(hidden=64)
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in text(200):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def first_logits(model: nn.Module, batch: Tensor) -> Tensor:
    """A few outputs: the tangent kernel takes a backward pass for each."""
    return last_logits(model, batch)[:, :4]


def describe(model: Transformer, masks: Masks | None, batches: list[Tensor]) -> dict[str, float]:
    """Fisher trace of the weights that are there, and the loss that an attack adds."""
    draw = torch.Generator().manual_seed(0)
    return {
        "Fisher trace": fisher_trace(model, batches, masks=masks, generator=draw).total,
        "loss added by an attack of 0.1": adversarial_robustness(model, batches, radii=(0.1,)).gaps()[0],
    }


def main() -> None:
    """Print what each diagnostic says, and check what must hold of any model."""
    torch.manual_seed(0)
    model, held_out = trained(), text(4)
    curve = sparsity_loss_curve(model, held_out, sparsities=SPARSITIES)
    print(
        f"loss: dense {curve.dense:.3f},",
        ", ".join(f"{s:.0%} {loss:.3f}" for s, loss in zip(SPARSITIES, curve.losses, strict=True)),
    )
    print("most sensitive:", layer_sensitivity(model, held_out, sparsities=(0.9,)).ranking()[0])

    sparse = copy.deepcopy(model)
    masks = sparsify(sparse, sparsity=0.9, allocation="global")
    for name, value in describe(model, None, held_out).items():
        print(f"{name}: dense {value:.3f}, 90% sparse {describe(sparse, masks, held_out)[name]:.3f}")
    few = held_out[0][:4]
    kernel = tangent_kernel(model, few, outputs=first_logits)
    moved = tangent_kernel(sparse, few, outputs=first_logits, masks=masks).distance(kernel)
    weights, others = masks.total, model.num_parameters() - masks.total
    cost = run_cost(
        static_run(0.1), steps=200, tokens=8 * LENGTH, prunable_flops=2 * weights,
        other_flops=model.flops_per_token(LENGTH) - 2 * weights, prunable_weights=weights, other_weights=others,
    )  # fmt: skip
    print(f"tangent kernel moved by {moved:.3f}; trained at 10% density it would take {cost.ratio:.2f} of the FLOPs")

    assert curve.losses[-1] > curve.dense, "nine weights of ten cannot go for nothing"
    assert 0 < moved < 1 and abs(kernel.distance(kernel)) < 1e-9
    assert 0.1 < cost.ratio < 1, "attention scores and the head stay dense"


if __name__ == "__main__":
    main()
