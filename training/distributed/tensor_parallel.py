"""Attention split over ranks by its heads, through torch's own styles of tensor parallel."""

from typing import cast

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from sparse_attn import PerHead
from transformer import Transformer
from transformer.attention import Attention
from transformer.block import Block

PROJECTIONS = ("query", "key", "value")
NORMS = ("query_norm", "key_norm")


def split_attention(model: Transformer, mesh: DeviceMesh) -> tuple[list[str], list[str]]:
    """Leave on each rank of a one-dimensional mesh its share of the heads of every attention, in place.

    Queries, keys and values are split by outputs, the output projection by inputs (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3): one all-reduce of [B, L, dim] in each pass. Every rank must hold the same weights and
    feed the same rows. Returns the names of the parameters that are now DTensors, and of those that every rank keeps
    whole but whose gradients are sums over its own heads, to be added up: the norms of queries and keys. Each rank
    keeps the patterns and ALiBi's slopes of its own heads.
    Raises: ValueError as :func:`check_attention`.
    """
    check_attention(model, mesh.size())
    plan: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in PROJECTIONS}
    plan["attention.output"] = RowwiseParallel()
    # the three projections share one all-reduce of the gradient of their input
    plan["attention"] = PrepareModuleInput(input_layouts=(Replicate(), None), desired_input_layouts=(Replicate(), None))
    split: list[str] = []
    partial: list[str] = []
    for prefix, block, attention in attentions(model):
        parallelize_module(block, mesh, plan)
        share = attention.num_heads // mesh.size()
        mine = range(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)
        if isinstance(attention.pattern, PerHead):
            attention.pattern = attention.pattern.keep(mine)
        if attention.alibi is not None:
            attention.alibi = tuple(attention.alibi[head] for head in mine)
        for name, _ in attention.named_parameters():
            (partial if name.partition(".")[0] in NORMS else split).append(f"{prefix}.{name}")
    return split, partial


def check_attention(model: Transformer, tensor_parallel: int) -> None:
    """Raises: ValueError for a model without attention, heads that so many ranks cannot share out evenly, and what
    needs all heads on one rank."""
    found = attentions(model)
    if not found:
        raise ValueError(f"distributed.tensor_parallel must be 1 for a model without attention, got {tensor_parallel}")
    for prefix, _, attention in found:
        for name in ("num_heads", "num_kv_heads"):
            value = getattr(attention, name)
            if value % tensor_parallel:
                wanted = f"a multiple of distributed.tensor_parallel={tensor_parallel}"
                raise ValueError(f"{prefix}: {name} must be {wanted}, got {value}")
        unfit = {
            "selection": ("none", attention.selection and type(attention.selection).__name__),
            "qk_norm": ("'none' or 'head'", attention.qk_norm if attention.qk_norm == "full" else None),
            "head_dropout": ("0", attention.head_dropout.p),
            "dropout": ("0", attention.dropout),
            "drop_connect": ("0", attention.drop_connect),
        }
        for name, (bound, value) in unfit.items():
            if value:
                raise ValueError(f"{prefix}: {name} must be {bound} with distributed.tensor_parallel, got {value}")


def attentions(model: Transformer) -> list[tuple[str, Block, Attention]]:
    """(name, its block, itself) of every attention."""
    blocks = [cast(Block, block) for block in model.layers]
    return [
        (f"layers.{index}.attention", block, block.attention)
        for index, block in enumerate(blocks)
        if block.attention is not None
    ]
