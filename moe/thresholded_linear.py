"""A linear map that drops the small entries of its input, and the thresholds of the four maps of an attention."""

from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import at_least, magnitude, one_of
from moe.column_products import Case, DecodesSparsely, Execution, decodes
from moe.thresholded import drop


@dataclass(frozen=True)
class AttentionThresholds:
    """Magnitudes up to which entries of the inputs of an attention's projections count as zero (TEAL).

    query, key and value see the same input, the normed stream; output sees what the heads give.
    Raises: ValueError for a negative or NaN threshold.
    """

    query: float = 0.0
    key: float = 0.0
    value: float = 0.0
    output: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            magnitude(f"threshold {field.name}", getattr(self, field.name))


class ThresholdedLinear(DecodesSparsely, nn.Linear):
    """y = W x̂ + b, where x̂ is x without the entries of magnitude up to ``threshold``. TEAL (arXiv:2408.14690), eq. 3.

    Its parameters, and their names, are those of nn.Linear. The gradient is that of the dropped input. Up to
    DECODE_ROWS rows on the CPU in evaluation, without gradient and outside autocast, are computed without reading the
    columns of W that meet zeros only, where ``execution`` "auto" found that faster than dense on the first calls
    (``races``; again after a thousand, then two, four …); "sparse" and "dense" force one. Sparse decoding holds a
    transposed second copy of W, made on first use, dropped by ``train()`` and where dense is faster, and remade after
    any change that torch counts and any step of an optimiser.
    Raises: ValueError for sizes that are no int or < 1, a threshold that is negative or NaN, another execution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        threshold: float = 0.0,
        execution: Execution = "auto",
    ) -> None:
        at_least("inputs", inputs, 1)
        at_least("outputs", outputs, 1)
        magnitude("threshold", threshold)
        one_of("execution", execution, ("auto", "dense", "sparse"))
        nn.Linear.__init__(self, inputs, outputs, bias=bias)
        self.threshold, self.execution = threshold, execution
        self.start_anew()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float, execution: Execution = "auto") -> Self:
        """The same map with a threshold, over the weight and bias of ``linear``, which it shares and does not copy."""
        with torch.device("meta"):
            layer = cls(
                linear.in_features, linear.out_features, bias=linear.bias is not None, threshold=threshold,
                execution=execution,
            )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """x [..., inputs] → [..., outputs]."""
        left = drop(x, self.threshold)
        if decodes(x, self.in_features, execution=self.execution, training=self.training):
            case = Case(x.numel() // self.in_features, x.dtype, torch.get_num_threads(), float(self.threshold))
            if self.weight.dtype == x.dtype:
                return self.decided(
                    case,
                    dense=lambda: F.linear(left, self.weight, self.bias),
                    sparse=lambda: self._skipping(left, case).view(*x.shape[:-1], self.out_features),
                )
        return F.linear(left, self.weight, self.bias)

    def _skipping(self, x: Tensor, case: Case) -> Float[Tensor, "n O"]:
        return self.times_nonzeros("weight", x.reshape(-1, self.in_features), self.weight, self.bias, case)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:.4g}, execution={self.execution}"
