"""After pruning: low-rank adapters that keep the zeros, and int8 weights.

Distillation from the dense parent, which needs a loop, is :mod:`training.distill`."""

from pruning.recovery.adapters import MaskedLowRank, add_adapters, merge_adapters
from pruning.recovery.quantize import Int8Linear, QuantizeReport, quantize_weights
from pruning.recovery.quantized import load_quantized

__all__ = ["Int8Linear", "MaskedLowRank", "QuantizeReport", "add_adapters", "load_quantized", "merge_adapters",
           "quantize_weights"]  # fmt: skip
