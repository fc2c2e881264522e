"""A linear layer for inference that multiplies by what its sparse weight has left."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.formats.encoded import parse_format

CSR_TYPES = (torch.float32, torch.float64)


class SparseLinear(nn.Module):
    """y = x Wᵀ + b from a weight [out, in] of which only what is not 0 is kept, for inference: there are no gradients.

    turned: whether it stands for a Conv1D, whose weight lay [in, out]: `restore_dense` asks.
    execution: "csr" multiplies through torch's CSR (float32 and float64, 4-byte indices). "block HxW" gathers, for each
    panel of H outputs, the inputs that its blocks of W inputs with anything in them read, and makes one dense product
    of each panel. The order of additions is not the dense layer's, so outputs agree to rounding.
    Raises: ValueError for another execution, and for CSR of another dtype."""

    bias: Tensor | None
    values: Tensor
    starts: Tensor
    columns: Tensor
    inputs: Tensor
    widths: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        *,
        execution: str,
        turned: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.turned = turned
        self.execution = check_execution(execution, weight.dtype)
        kind, numbers = parse_format(execution)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        held = weight.detach()
        for name, part in (_csr_parts(held) if kind == "csr" else _panels(held, *numbers)).items():
            self.register_buffer(name, part)
        self._height = numbers[0]
        # read once: a loop over panels must not ask a tensor for each
        self._widths = self.widths.tolist() if kind == "block" else []

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x [..., in] → [..., out]. Raises: ValueError for another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have width in_features={self.in_features}, got {x.shape[-1]}")
        rows = x.reshape(-1, self.in_features)
        multiply = self._csr_product if self.execution == "csr" else self._panel_product
        with torch.no_grad():
            y = multiply(rows)
            return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        """The weight that was given, −0 as 0."""
        whole = self.values.new_zeros(self.out_features, self.in_features)
        if self.execution == "csr":
            rows = torch.arange(self.out_features, device=whole.device).repeat_interleave(self.starts.long().diff())
            whole[rows, self.columns.long()] = self.values
            return whole
        for outputs, inputs, panel in self._each_panel():
            whole[outputs, inputs] = panel
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for the weight."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name != "bias")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, execution={self.execution!r}"

    def _csr_product(self, rows: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            matrix = torch.sparse_csr_tensor(
                self.starts, self.columns, self.values, (self.out_features, self.in_features), check_invariants=False
            )
        # a product with one column takes ten times as long as with a vector
        return (matrix @ rows[0])[None] if len(rows) == 1 else (matrix @ rows.mT).mT

    def _panel_product(self, rows: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        if len(rows) == 1:
            one = rows.new_zeros(self.out_features)
            for outputs, inputs, panel in self._each_panel():
                torch.mv(panel, rows[0].index_select(0, inputs), out=one[outputs])
            return one[None]
        # rows of the transpose are gathered, and panels written, in one piece each
        columns, y = rows.mT.contiguous(), rows.new_zeros(self.out_features, len(rows))
        for outputs, inputs, panel in self._each_panel():
            torch.mm(panel, columns.index_select(0, inputs), out=y[outputs])
        return y.mT

    def _each_panel(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Outputs, indices of the inputs read, and the weights between them, of each panel that is not all 0."""
        found, start, offset = [], 0, 0
        for place, width in enumerate(self._widths):
            first, last = place * self._height, min((place + 1) * self._height, self.out_features)
            size = (last - first) * width
            if width:
                panel = self.values[offset : offset + size].view(last - first, width)
                found.append((slice(first, last), self.inputs[start : start + width], panel))
            start, offset = start + width, offset + size
        return found


def check_execution(execution: str, dtype: torch.dtype) -> str:
    """The execution as given. Raises: ValueError unless it is "csr" or "block HxW" and works on dtype."""
    kind, _ = parse_format(execution)
    if kind not in ("csr", "block"):
        raise ValueError(f"execution must be 'csr' or 'block HxW', got {execution!r}")
    if kind == "csr" and dtype not in CSR_TYPES:
        raise ValueError(f"execution='csr' works on float32 and float64, got {dtype}")
    return execution


def _csr_parts(weight: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    kept = weight != 0
    counts = kept.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # with 8-byte indices torch converts them at every product
    return {"starts": starts.int(), "columns": kept.nonzero()[:, 1].int(), "values": weight[kept]}


def _panels(weight: Float[Tensor, "out in"], height: int, width: int) -> dict[str, Tensor]:
    """inputs: of all panels, one after another; widths: how many each has; values: the panels, flat."""
    inputs, values, widths = [], [], []
    for rows in weight.split(height):
        used = (rows != 0).any(0)
        whole = nn.functional.pad(used, (0, -len(used) % width)).view(-1, width).any(1)
        taken = whole.repeat_interleave(width)[: len(used)].nonzero().squeeze(1)
        inputs.append(taken)
        values.append(rows[:, taken].flatten())
        widths.append(len(taken))
    nothing = weight.new_zeros(0)
    return {
        "inputs": torch.cat([nothing.long(), *inputs]),
        "values": torch.cat([nothing, *values]),
        "widths": torch.tensor(widths, dtype=torch.long),
    }
