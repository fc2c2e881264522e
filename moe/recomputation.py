"""Whether a forward pass is the second of activation checkpointing, which no statistics may count."""

import torch


def in_backward() -> bool:
    """Whether autograd is running a backward pass: a forward in there is the recomputation of a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
