"""Text in, trained, pruned and measured model out."""

from training.allocator import keep_freed_memory

__all__ = ["keep_freed_memory"]
