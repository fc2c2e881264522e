"""Dynamic sparse training: sparse from the first step, with connections that move."""

from pruning.dynamic.adversarial import Attack, adversarial_loss, perturbed
from pruning.dynamic.base import DynamicSparsity
from pruning.dynamic.deep_r import DeepR
from pruning.dynamic.methods import DSR, SET, SNFS, RigL, StaticSparsity
from pruning.dynamic.nest import NeST
from pruning.dynamic.preferential import PreferentialAttachment
from pruning.dynamic.robust import RobustRewiring
from pruning.dynamic.sparse_adamw import SparseAdamW
from pruning.dynamic.top_kast import TopKAST
from pruning.dynamic.topology import Topology, banded, block_diagonal, locally_connected, small_world

__all__ = [
    "DSR",
    "SET",
    "SNFS",
    "Attack",
    "DeepR",
    "DynamicSparsity",
    "NeST",
    "PreferentialAttachment",
    "RigL",
    "RobustRewiring",
    "SparseAdamW",
    "StaticSparsity",
    "TopKAST",
    "Topology",
    "adversarial_loss",
    "banded",
    "block_diagonal",
    "locally_connected",
    "perturbed",
    "small_world",
]
