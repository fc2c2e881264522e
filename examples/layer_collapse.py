"""Which layers does a pruning method empty before training, and at what compression?

Prunes a small deep model at initialisation by four methods, counts what each layer keeps, and draws it as an SVG file:
`python examples/layer_collapse.py docs/guides/layer-collapse.svg`.
"""

import sys

import torch
from torch import Tensor

from pruning import prunable_weights, sparsify
from transformer import DenseConfig, Transformer, TransformerConfig

METHODS = ("magnitude", "snip", "grasp", "synflow")
RATIOS = (3, 10, 30, 100, 300)
LAYERS = 6


def new_model() -> Transformer:
    """Six narrow layers as they are before training."""
    feedforward = DenseConfig(hidden=96)
    config = TransformerConfig.uniform(
        vocab_size=64, dim=32, num_layers=LAYERS, num_heads=4, max_length=32, feedforward=feedforward
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def kept_by_matrix(method: str, ratio: int, batch: Tensor) -> list[int]:
    """How many weights each matrix keeps where one of `ratio` stays. SNIP and GraSP score once, SynFlow 100 times."""
    masks = sparsify(
        new_model(), sparsity=1 - 1 / ratio, method=method, allocation="global", rounds=1 if method == "snip" else None,
        calibration=[batch] if method in ("snip", "grasp") else None,
    )  # fmt: skip
    return [int(mask.sum()) for mask in masks.kept.values()]


def draw(found: dict[str, list[list[int]]], path: str) -> None:
    """For each method the weights kept in every matrix, a line each, against the compression; 0 is at the bottom."""
    import matplotlib
    from matplotlib.figure import Figure

    parts = [name.split(".")[-2] for name in prunable_weights(new_model())]
    colours = dict(zip(dict.fromkeys(parts), matplotlib.colormaps["tab10"].colors, strict=False))
    with matplotlib.rc_context({"svg.hashsalt": "collapse", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        for axes, (method, rows) in zip(figure.subplots(1, 4, sharey=True), found.items(), strict=True):
            for index, part in enumerate(parts):
                label = part if index == parts.index(part) else None
                axes.plot(RATIOS, [row[index] for row in rows], color=colours[part], label=label, lw=0.8)
            axes.set(title=method, xscale="log", xlabel="one weight of … stays")
            axes.set_yscale("symlog", linthresh=1)
        figure.axes[0].set_ylabel("weights kept in a matrix")
        figure.axes[-1].legend(fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Count empty matrices by method and compression, and check who keeps a way through the network."""
    batch = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    found = {method: [kept_by_matrix(method, ratio, batch) for ratio in RATIOS] for method in METHODS}
    print(f"empty matrices of {LAYERS * 7}, when one weight of N stays:")
    print("N".ljust(12), *(f"{ratio:6}" for ratio in RATIOS))
    for method, rows in found.items():
        print(method.ljust(12), *(f"{row.count(0):6}" for row in rows))
    if len(sys.argv) > 1:
        draw(found, sys.argv[1])

    empty = {method: [row.count(0) for row in rows] for method, rows in found.items()}
    assert not any(empty["synflow"]), "flow is conserved: every matrix keeps a share of it"
    assert all(empty[method][-1] for method in ("magnitude", "snip", "grasp"))
    assert empty["magnitude"][1], "matrices that start small are gone at 10×"


if __name__ == "__main__":
    main()
