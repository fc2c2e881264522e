"""Sparse weights executed in the form that is measured faster on the machine at hand, else dense."""

from pruning.execution.choose import Choice, ExecutionReport, choose_execution, restore_dense
from pruning.execution.linear import SparseLinear

__all__ = ["Choice", "ExecutionReport", "SparseLinear", "choose_execution", "restore_dense"]
