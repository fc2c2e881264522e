"""Linear layers with 8-bit weights: a fourth of the bytes, zeros stay zeros, multiplied in the way measured fastest."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from pruning.weights import is_conv1d, prunable_weights

LARGEST = 127
# torch's kernel reads whole vectors of inputs and does not check: other widths give wrong products, or crash
PACKED_WIDTH = 32


def quantize_rows(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out"]]:
    """q = round(w / s) and s = max abs(w) / 127 for each row, of the weight's dtype; a row of zeros has s = 1.

    0 stays 0; abs(w − s·q) <= s / 2, up to the rounding of s. Raises: ValueError for weights that are not finite."""
    if not weight.isfinite().all():
        raise ValueError(f"weights must be finite, got {int((~weight.isfinite()).sum())} that are not")
    # half-precision quotients would fall between the 255 values
    wide = torch.promote_types(weight.dtype, torch.float32)
    most = weight.detach().abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = (most.to(wide) / LARGEST).to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quotient = weight.detach().to(wide) / scale.to(wide)[:, None]
    return quotient.round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


class Int8Linear(nn.Module):
    """y = x (s ⊙ q)ᵀ + b, for inference: q [out, in] int8 and s [out] from `quantize_rows`.

    execution: "dequantise" makes the float weight at every call; "packed" multiplies by the bytes through torch's
    weight-only kernel; "int_mm" rounds each row of x to 8 bits too and multiplies integers, which is another result
    (Dettmers et al. 2022, arXiv:2208.07339, without their outlier columns).
    Inputs have the layer's dtype, that of s; under autocast any, as for nn.Linear. "packed" takes no float64.
    Raises: ValueError for another execution, "packed" unless 32 divides in_features, and as `quantize_rows`."""

    weight: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out"]
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        *,
        execution: str = "dequantise",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if not _fits(_checked(execution), self.in_features):
            raise ValueError(_misfit(self.in_features))
        self.execution = execution
        quantised, scale = quantize_rows(weight)
        # of a Conv1D it is a turned view, which torch's kernel refuses
        self.register_buffer("weight", quantised.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x [..., in] → [..., out]. Raises: ValueError for x of a dtype that the layer does not take."""
        if x.dtype != self.scale.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x must be {self.scale.dtype}, as the layer's scales, got {x.dtype}: cast one to the other"
            )
        y = EXECUTIONS[self.execution](x.reshape(-1, self.in_features), self.weight, self.scale)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        """s ⊙ q, what the layer multiplies by."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, execution={self.execution!r}"


def _dequantise(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(scale.dtype)) * scale


def _packed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # torch's kernel is not among those whose inputs autocast casts
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if dtype == torch.float64:
        raise ValueError("execution='packed' multiplies floats of 16 or 32 bits, got torch.float64")
    return torch._weight_int8pack_mm(x.to(dtype).contiguous(), weight, scale.to(dtype))


def _int_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, own = quantize_rows(x)
    return (torch._int_mm(rows, weight.mT).float() * own.float()[:, None] * scale.float()).to(x.dtype)


EXECUTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dequantise": _dequantise, "packed": _packed, "int_mm": _int_mm,
}  # fmt: skip


def _checked(execution: str) -> str:
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    return execution


def _fits(execution: str, width: int) -> bool:
    return execution != "packed" or width % PACKED_WIDTH == 0


def _misfit(width: int) -> str:
    return f"in_features must be a multiple of {PACKED_WIDTH} for execution='packed', got {width}"


@dataclass(frozen=True)
class Quantised:
    """One matrix: bytes of weights (and scales) before and after, error ‖W − s⊙q‖ / ‖W‖, median seconds of the float
    layer ("dense") and of each candidate that can run, and the candidate that was taken."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float
    seconds: dict[str, float]
    chosen: str


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_weights` did; batch: rows of the measured products. left: names of weights that stay float, and
    why each does."""

    weights: tuple[Quantised, ...]
    left: tuple[str, ...]
    why: tuple[str, ...]
    batch: int
    threads: int

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.weights], default=6)
        lines = [f"{self.batch} rows, {self.threads} threads",
                 f"{'weight':<{width}}        bytes ->        int8   error  dense ms  int8 ms"]  # fmt: skip
        lines += [
            f"{row.name:<{width}} {row.bytes_before:>12,} -> {row.bytes_after:>11,} {row.error:>7.2%} "
            f"{row.seconds['dense'] * 1e3:>9.3f} {row.seconds[row.chosen] * 1e3:>8.3f}  {row.chosen}"
            for row in self.weights
        ]
        totals = [sum(getattr(row, name) for row in self.weights) for name in ("bytes_before", "bytes_after")]
        dense, fast = (sum(row.seconds[name or row.chosen] for row in self.weights) for name in ("dense", ""))
        lines.append(f"{totals[0]:,} -> {totals[1]:,} bytes, {dense * 1e3:.3f} -> {fast * 1e3:.3f} ms")
        return "\n".join([*lines, *(f"{name} stays float: {why}" for name, why in self._reasons())])

    def _reasons(self) -> Iterator[tuple[str, str]]:
        return zip(self.left, self.why, strict=True)


def quantize_weights(
    model: nn.Module,
    *,
    batch: int = 1,
    candidates: Sequence[str] = ("dequantise", "packed"),
    rounds: int = 5,
    weights: Sequence[str] | None = None,
) -> QuantizeReport:
    """Replace each Linear (and Conv1D) of `model` by an `Int8Linear`, in place, executed in the way that is measured
    fastest here.

    Symmetric, one scale an output row, from the weights alone. Sizes and times are measured together: every candidate
    and the float layer multiply `batch` random rows, in turns, `rounds` times. "int_mm" may be a candidate too, where
    8-bit inputs will do. weights: parameter names; None is `prunable_weights`, so that embeddings and the output head
    stay float, and with them stacks of experts and weights that several modules share. "packed" is left out where
    32 does not divide a layer's inputs. The model is then for inference, and of one file: `save_compact` writes it and
    `load_quantized` reads it; transformers' save_pretrained refuses it, for stock transformers would take the integers
    for weights.
    Raises: ValueError for a batch or rounds below 1, unknown or no candidates, and weights that are not finite; the
    model has not changed then."""
    check_measurement(batch, candidates, rounds)
    chosen = prunable_weights(model, weights)
    layers = {name: owner for name in chosen if (owner := _sole_linear(model, name)) is not None}
    able = able_executions({name: matrix_of(layer).shape[1] for name, layer in layers.items()}, candidates)
    made = {name: _small(layer) for name, layer in layers.items()}
    rows = []
    for name, layer in layers.items():
        seconds = measure(made[name], able[name], batch, rounds, layer)
        made[name].execution = min(able[name], key=lambda candidate: seconds[candidate])
        rows.append(_row(name, matrix_of(layer), made[name], seconds))
    for name, small in made.items():
        model.set_submodule(name.rpartition(".")[0], small)
    refuse_saving(model)
    left = tuple(name for name in chosen if name not in layers)
    why = tuple(_why(model, name) for name in left)
    return QuantizeReport(tuple(rows), left, why, batch, torch.get_num_threads())


def check_measurement(batch: int, candidates: Sequence[str], rounds: int) -> None:
    """Raises: ValueError for a batch or rounds below 1, and unknown or no candidates."""
    if batch < 1 or rounds < 1:
        raise ValueError(f"batch and rounds must be >= 1, got {batch} and {rounds}")
    if not candidates:
        raise ValueError("candidates must name at least one execution, got none")
    for candidate in candidates:
        _checked(candidate)


def able_executions(widths: Mapping[str, int], candidates: Sequence[str]) -> dict[str, list[str]]:
    """Name of each layer → the candidates that work on as many inputs. Raises: ValueError where none does."""
    able = {name: [candidate for candidate in candidates if _fits(candidate, widths[name])] for name in widths}
    for name, found in able.items():
        if not found:
            raise ValueError(f"{name}: {_misfit(widths[name])}")
    return able


def _why(model: nn.Module, name: str) -> str:
    if model.get_parameter(name).ndim > 2:
        return "a stack of matrices"
    if len(_names(model, name)) > 1:
        return "shared"
    owner = name.rpartition(".")[0]
    return f"of class {type(model.get_submodule(owner)).__name__}" if owner else "of the model itself"


def _names(model: nn.Module, name: str) -> list[str]:
    weight = model.get_parameter(name)
    return [other for other, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]


def _sole_linear(model: nn.Module, name: str) -> nn.Module | None:
    """The one nn.Linear or Conv1D that owns this weight."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    known = type(module) is nn.Linear or is_conv1d(module)
    return module if known and attribute == "weight" and len(_names(model, name)) == 1 and owner else None


def matrix_of(layer: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a Linear or Conv1D."""
    weight = layer.get_parameter("weight")
    return weight.mT if is_conv1d(layer) else weight


def _small(layer: nn.Module) -> Int8Linear:
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    return Int8Linear(matrix_of(layer), bias).train(layer.training)


@dataclass(frozen=True)
class _Method:
    quant_method: str = "pruning.recovery.quantize_weights (pruning.save_compact writes it, load_quantized reads it)"


@dataclass(frozen=True)
class _Unwritten:
    quantization_config: _Method = _Method()


def refuse_saving(model: nn.Module) -> None:
    """Let transformers' save_pretrained refuse the model: it asks `hf_quantizer`, and without an answer it writes
    integers that stock from_pretrained takes for weights. Models of other libraries stay as they are."""
    for module in model.modules():
        if any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
            module.hf_quantizer = _Unwritten()  # type: ignore[assignment]


@torch.no_grad()
def measure(
    small: Int8Linear, candidates: Sequence[str], batch: int, rounds: int, dense: nn.Module | None = None
) -> dict[str, float]:
    """Median seconds of a product of `batch` random rows by each candidate, and by the float layer "dense"."""
    x = torch.randn(batch, small.in_features).to(small.scale)
    taken: dict[str, list[float]] = {name: [] for name in (*(["dense"] if dense else []), *candidates)}
    for turn in range(rounds + 1):
        for name in taken:
            run: nn.Module = small
            if name == "dense" and dense is not None:
                run = dense
            else:
                small.execution = name
            start = time.perf_counter()
            run(x)
            elapsed = time.perf_counter() - start
            taken[name] += [elapsed] if turn else []
    return {name: statistics.median(times) for name, times in taken.items()}


def _row(name: str, weight: Tensor, small: Int8Linear, seconds: dict[str, float]) -> Quantised:
    error = (
        weight.detach().double() - small.dense_weight().double()
    ).norm() / weight.detach().double().norm().clamp_min(1e-300)
    return Quantised(
        name=name,
        shape=tuple(weight.shape),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=small.weight.numel() + small.scale.numel() * small.scale.element_size(),
        error=float(error),
        seconds=seconds,
        chosen=small.execution,
    )
