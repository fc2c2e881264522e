"""Which keys a query sees: patterns, the block layouts they give, attention over them, and a cache that forgets."""

from sparse_attn.attend import BackendChoice, attend, explain_backend
from sparse_attn.cache import KVCache
from sparse_attn.layout import BlockLayout
from sparse_attn.parsing import parse_pattern
from sparse_attn.patterns import Pattern, causal, full, sinks, sliding_window

__all__ = [
    "BackendChoice",
    "BlockLayout",
    "KVCache",
    "Pattern",
    "attend",
    "causal",
    "explain_backend",
    "full",
    "parse_pattern",
    "sinks",
    "sliding_window",
]
