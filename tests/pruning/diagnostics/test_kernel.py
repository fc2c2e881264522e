"""The empirical tangent kernel against whole Jacobians, one entry at a time."""

import copy

import pytest
import torch
from torch import nn

from pruning import Masks
from pruning.diagnostics import TangentKernel, last_logits, tangent_kernel
from tests.pruning.test_transformer import build, ids
from tests.tolerances import close


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2, bias=False)).double()


def kernel_by_loop(model, x, masks=None):
    """Σ over parameters and outputs of products of Jacobian entries; the Jacobian of an explicit formula."""
    first, bias, second = (p.detach() for p in model.parameters())

    def f(a, b, c, row):
        return torch.tanh(row @ a.T + b) @ c.T

    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)
    tables = [torch.autograd.functional.jacobian(lambda a, b, c, row=row: f(a, b, c, row), (first, bias, second))
              for row in x]  # fmt: skip
    for one in range(len(x)):
        for two in range(len(x)):
            for part in range(3):
                for c in range(2):
                    product = tables[one][part][c] * tables[two][part][c]
                    kernel[one, two] += (product if masks is None else product * masks[part]).sum() / 2
    return kernel


def test_the_kernel_is_the_plain_loop():
    model, x = net().train(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    found = tangent_kernel(model, x, outputs=lambda m, b: m(b))
    close(found.matrix, kernel_by_loop(model, x))
    assert (found.outputs, found.parameters) == (2, 24) and model.training
    masks = [torch.rand(s, generator=torch.Generator().manual_seed(2)) < 0.5 for s in ((4, 3), (4,), (2, 4))]
    masks[1][:] = True
    kept = Masks({"0.weight": masks[0], "3.weight": masks[2]})
    sparse = tangent_kernel(model, x, outputs=lambda m, b: m(b), masks=kept)
    close(sparse.matrix, kernel_by_loop(model, x, masks))
    assert sparse.parameters == kept.total - kept.zeros + 4
    # in float64 a kernel of tangents is symmetric and has no negative eigenvalue
    assert torch.linalg.eigvalsh(found.matrix).min() > -1e-9


def test_distances_by_hand():
    one = TangentKernel(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), 1, 1)
    two = TangentKernel(torch.tensor([[3.0, 0.0], [0.0, 3.0]]).double(), 1, 1)
    far = TangentKernel(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), 1, 1)
    assert one.distance(two) == pytest.approx(0.0) and one.distance(far) == pytest.approx(1.0)
    assert two.relative_change(one) == pytest.approx(2.0) and one.relative_change(one) == 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_pruning_moves_the_kernel_of_a_transformer(kind):
    model, batch = build(kind), ids(batch=2, length=5)

    def outputs(model, batch):
        return last_logits(model, batch)[:, :3]

    dense = tangent_kernel(model, batch, outputs=outputs)
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in Masks.of(model).kept.items():
            half = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            sparse.get_parameter(name).mul_(half)
    other = tangent_kernel(sparse, batch, outputs=outputs, masks=Masks.of(sparse))
    assert dense.distance(tangent_kernel(model, batch, outputs=outputs)) == pytest.approx(0, abs=1e-9)
    assert 0 < other.distance(dense) < 1 and other.parameters < dense.parameters


def test_kernels_of_other_samples_outputs_or_weights_have_no_distance():
    model, x = net(), torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()

    def kernel(x, count=2, **options):
        return tangent_kernel(model, x, outputs=lambda m, b: m(b)[:, :count], **options)

    one = kernel(x)
    masks = Masks({"0.weight": torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) < 0.5})
    assert 0 < kernel(x.clone(), masks=masks).distance(one) < 1, "of fewer weights that are there, of as many in all"
    for other, message in (
        (kernel(x + 1), r"of the same samples: other must have [0-9a-f]+, got"),
        (kernel(x.flip(0)), "of the same samples"),
        (kernel(x, 1), "of the same outputs: other must have 2, got 1"),
        (kernel(x, weights=["0.weight"]), "of the same weights, masks aside: other must have 24, got 12"),
    ):
        for compare in (one.distance, one.relative_change):
            with pytest.raises(ValueError, match=message):
                compare(other)


def test_samples_are_the_same_wherever_they_lie():
    ids_ = ids(batch=2, length=4)
    model = build("dense")

    def samples(batch):
        return tangent_kernel(
            model, batch, outputs=lambda m, b: last_logits(m, b)[:, :1], weights=["norm.weight"]
        ).samples

    assert samples(ids_) == samples({"input_ids": ids_.T.contiguous().T}) != samples(ids_.flip(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tangent_kernel(net(), torch.ones(2, 3).double(), outputs=lambda m, b: m(b)[0]), r"return \[n, K\]"),
        (lambda: tangent_kernel(net(), torch.ones(2, 3).double(), weights=["x"]), "name parameters of the model, got"),
        (lambda: TangentKernel(torch.eye(2).double(), 1, 1).distance(TangentKernel(torch.eye(3).double(), 1, 1)),
         r"other must be \[2, 2\], got \[3, 3\]"),
        (lambda: TangentKernel(torch.eye(2).double(), 1, 1).distance(TangentKernel(torch.zeros(2, 2).double(), 1, 1)),
         "got norm 0"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
