"""Which models ranks can train together, and in which layout."""

from typing import Literal

from torch import nn

from moe import LayerDrop, MemoryValues, MixtureOfDepths, MoE
from training.distributed.tensor_parallel import check_attention
from transformer import Transformer

Shard = Literal["none", "fsdp"]


def check_model(model: Transformer, *, expert_parallel: int, tensor_parallel: int, shard: Shard) -> None:
    """Raises: ValueError for experts or heads that the ranks cannot share out evenly, for tables of memories, whose
    sparse gradients are not reduced, and for Mixture-of-Depths where ranks that split heads could choose differently.
    """
    if any(isinstance(module, MemoryValues) for module in model.modules()):
        raise ValueError(
            "tables of memories (product_key, peer) are trained by one process: their gradients are sparse"
        )
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if expert_parallel > 1 and not layers:
        raise ValueError(f"distributed.expert_parallel must be 1 for a model without experts, got {expert_parallel}")
    for layer in layers:
        if layer.num_experts % expert_parallel:
            raise ValueError(
                f"{layer.name}: num_experts must be a multiple of distributed.expert_parallel={expert_parallel},"
                f" got {layer.num_experts}"
            )
    if tensor_parallel > 1:
        check_attention(model, tensor_parallel)
    if expert_parallel > 1 and tensor_parallel > 1:
        for name, module in model.named_modules():
            if isinstance(module, MixtureOfDepths):
                raise ValueError(
                    f"{name}: ranks that split heads must let the same tokens pass a layer, and rows that come back"
                    " from spread experts may differ between them in the last digits: distributed.expert_parallel or"
                    f" distributed.tensor_parallel must be 1, got {expert_parallel} and {tensor_parallel}"
                )


def skipping(module: nn.Module) -> bool:
    """Whether a module may leave a layer out of a step. In training some tokens always pass Mixture-of-Depths."""
    return isinstance(module, LayerDrop) and module.p > 0
