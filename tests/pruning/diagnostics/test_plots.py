"""Every record draws itself on axes that it is given, or on its own."""

import sys

import pytest
import torch

from pruning import Masks
from pruning.diagnostics import (
    DataCurve,
    FisherCurriculum,
    FisherHistory,
    FisherTrace,
    LossPath,
    Memorisation,
    RankingStability,
    Robustness,
    Sensitivity,
    SparsityCurve,
    TangentKernel,
    TransferCurve,
    degree_distribution,
    dense_run,
    fit_power_law,
    run_cost,
)

TRACE = FisherTrace({"a": 1.0, "b": 2.0}, "model")
MASKS = Masks({"a": torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) < 0.2})
RECORDS = [
    SparsityCurve((0.5, 0.9), (1.0, 2.0), 1.1, (0.9, 1.9)),
    Sensitivity((0.5, 0.9), {"a": (1.0, 2.0)}, 1.0),
    RankingStability((0, 1), {"dense": (0.2, 1.0)}, {"dense": (0.3, 1.0)}),
    TRACE,
    FisherHistory({0: TRACE, 10: TRACE}),
    FisherCurriculum(torch.tensor([1, 0]), torch.tensor([2.0, 1.0])),
    LossPath((0.0, 0.5, 1.0), (1.0, 2.0, 1.0)),
    TangentKernel(torch.eye(3).double(), 1, 1),
    degree_distribution(MASKS),
    Robustness((0.1, 0.2), (1.0, 2.0), 0.5, 1),
    Memorisation((0.0, 1.0), (0.1, 0.2), (float("nan"), 0.5), (0.9, float("nan")), 0.1),
    DataCurve((10, 100), (1.0, 0.5), (2.0, 1.0)),
    TransferCurve((0.0, 0.5), (2.0, 2.5), (1.0, 1.5)),
    run_cost(dense_run(), steps=3, tokens=1, prunable_flops=1.0, other_flops=1.0, prunable_weights=1, other_weights=1),
]


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_draws_itself(record, pyplot):
    given = pyplot.subplots()[1]
    assert record.plot(ax=given) is given
    given.figure.canvas.draw()
    drawn = record.plot()
    assert drawn is not given and drawn.get_xlabel() and drawn.get_title()


def test_a_fit_is_drawn_over_the_degrees(pyplot):
    found = degree_distribution(MASKS)
    ax = found.plot(fit=fit_power_law(found.degrees()))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["neurons", "power law"]


def test_without_matplotlib_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        RECORDS[0].plot()
