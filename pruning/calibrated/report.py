"""What calibrated pruning did, matrix by matrix."""

from dataclasses import dataclass

from pruning.masking import Masks


@dataclass(frozen=True)
class MatrixReport:
    """One matrix [out, in], or one expert's ("name[e]").

    zeros of total weights; rows: calibration rows it was seen with, 0 where an expert got none and went by magnitude;
    dead: inputs that were 0 in all of them; error: squared output error as a share of the squared output, over these
    rows, None where only norms were kept (Wanda, magnitude). damping: what the Hessian took where that was more than
    asked for, a share of its mean diagonal."""

    name: str
    zeros: int
    total: int
    rows: int
    dead: int
    error: float | None
    damping: float | None = None


@dataclass(frozen=True)
class CalibratedReport:
    """masks, as `sparsify` returns them; matrices in the order in which they were pruned; sequential: whether each
    block was calibrated on the already pruned blocks before it."""

    masks: Masks
    matrices: tuple[MatrixReport, ...]
    sequential: bool

    @property
    def unseen(self) -> tuple[str, ...]:
        """Experts that no calibration row reached: they were pruned by magnitude."""
        return tuple(matrix.name for matrix in self.matrices if not matrix.rows)

    def __str__(self) -> str:
        lines = [f"{self.masks.zeros:,} of {self.masks.total:,} weights are zero ({self.masks.sparsity:.2%})"]
        for one in self.matrices:
            error = "" if one.error is None else f", output error {one.error:.3%}"
            damping = "" if one.damping is None else f", damping raised to {one.damping:g}"
            lines.append(f"  {one.name}: {one.zeros / max(one.total, 1):.2%}, {one.rows:,} rows{error}{damping}")
        return "\n".join(lines)
