"""Root-mean-square normalisation with a backward pass that stays in cache."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# rows of one pass of the backward: 2¹⁷ float32 numbers are a quarter of a 2 MiB cache
_NUMBERS_PER_PASS = 1 << 17


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x²) + eps) · weight`` over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    dim: size of the last dimension. Half-precision input is normalised in float32.
    On CPU torch's own backward is a chain of elementwise passes over main memory; this one is a few passes over
    blocks of rows.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """x [..., dim] to the same shape and type."""
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{len(self.weight)}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        """With g = grad·weight and r the scale: dx = r·(g − x·r²·mean(g·x)), dweight = Σ grad·x·r."""
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(x, weight, grad, ctx.eps), None
        dim = x.shape[-1]
        x_rows, g_rows, r_rows = x.reshape(-1, dim), grad.reshape(-1, dim), scale.reshape(-1, 1)
        grad_x = torch.empty_like(x_rows)
        grad_weight = torch.zeros_like(weight)
        step = max(1, _NUMBERS_PER_PASS // max(1, dim))
        for start in range(0, len(x_rows), step):
            rows = slice(start, start + step)
            unit = x_rows[rows] * r_rows[rows]
            product = g_rows[rows] * unit
            grad_weight += product.sum(0)
            along = (product @ weight).div_(dim)
            out = torch.mul(g_rows[rows], weight, out=grad_x[rows])
            out.addcmul_(unit, along[:, None], value=-1).mul_(r_rows[rows])
        return grad_x.view_as(x), grad_weight, None


def _differentiable_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain operations, for a gradient of a gradient (Hessian products)."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, scaled = x * scale, grad * weight
    along = (scaled * unit).mean(-1, keepdim=True)
    return (scaled - unit * along) * scale, (grad * unit).reshape(-1, x.shape[-1]).sum(0)
