"""What a study's page answers besides the comparison with its reference."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, and the number in the cells' records that answers it.

    text: printed above the answer. metric: dotted path into a record (``measures.robustness.radius_10``), lower is
    better; label: its name in tables and figures. arms, reference: those compared, and with which (the study's others,
    and its reference, if left out). order: in place of them names of arms as they were before the study's grid, the
    expected best first: each is compared with the next, for every combination of the grid.
    """

    text: str
    label: str = ""
    metric: str = "bits_per_byte"
    arms: tuple[str, ...] = ()
    reference: str | None = None
    order: tuple[str, ...] = ()

    def check(self, names: Sequence[str]) -> None:
        """names: of the study's arms. Raises: ValueError for one that is not there."""
        for name in (*self.arms, *([self.reference] if self.reference else [])):
            if name not in names:
                raise ValueError(f"ask {self.text!r} must name arms of the study, got {name!r}")
        for name in self.order:
            if not any(own == name or own.startswith(f"{name} ") for own in names):
                raise ValueError(f"ask {self.text!r} must order arms of the study, got {name!r}")
        if self.order and (self.arms or self.reference or len(self.order) < 2):
            raise ValueError(f"ask {self.text!r} must give order (two or more) or arms and reference, not both")
