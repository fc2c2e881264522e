"""Text in, trained, pruned and measured model out."""

import os

# Before torch loads its thread pool: waiting threads sleep instead of spinning. With one other busy process on two
# cores the demo's training step ran at 0.5 to 3 thousand tokens/s spinning, at 7 thousand sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from training.allocator import keep_freed_memory

__all__ = ["keep_freed_memory"]
