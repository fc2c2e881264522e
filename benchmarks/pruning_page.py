"""The page of pruned SmolLM2: tables and figure, made from records and never typed.

``python -m benchmarks.pruning_page --collect [FILES]`` first puts the records of these files (none: of all that the
benchmarks left in runs/) in the place of the committed ones of the same cells, in
benchmarks/records/smollm2-pruning.jsonl; without the option it only fills the page from those.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, mode

from benchmarks.collapse_tables import collapse, collapse_figure
from benchmarks.pruning_figures import heads_figure, parameters_figure
from benchmarks.pruning_head_tables import agreement, found, heads, made, named, recovery, shrunk, shrunk_encoder
from benchmarks.readme_tables import RECORDS, ROOT, Line, read, table

PAGE = ROOT / "docs" / "guides" / "prune-measured.md"
# figure, and the name of the records that it needs
FIGURES = {
    PAGE.with_suffix(".svg"): (heads_figure, "heads"),
    PAGE.with_name("prune-heads-or-weights.svg"): (parameters_figure, "heads"),
    PAGE.with_name("prune-collapse.svg"): (collapse_figure, "collapse"),
}
SOURCE = RECORDS / "smollm2-pruning.jsonl"
NAMES = ("smollm2-pruning", "smollm2-heads", "minilm-heads", "experts-removed", "sparse-execution", "smollm2-together",
         "layer-collapse")  # fmt: skip
RUNS = tuple(ROOT / "runs" / f"{name}.jsonl" for name in NAMES)
REFITTED = ", refitted"
# method, allocation, order of columns
LABELS = {
    ("magnitude", "uniform", None): "magnitude",
    ("wanda", "uniform", None): "Wanda",
    ("wanda", "owl", None): "Wanda, OWL",
    ("wanda", "loss", None): "Wanda, allocation by loss",
    ("sparsegpt", "uniform", None): "SparseGPT",
    ("sparsegpt", "uniform", "diag"): "SparseGPT, columns by the diagonal",
    ("sparsegpt", "owl", None): "SparseGPT, OWL",
    ("sparsegpt", "loss", None): "SparseGPT, allocation by loss",
    ("sparsegpt", "loss", "diag"): "SparseGPT, allocation by loss, columns by the diagonal",
    ("descent", "uniform", None): "SparseGPT, then descent by groups",
    ("admm", "uniform", None): "ADMM",
    ("admm", "loss", None): "ADMM, allocation by loss",
}


# sequences of calibration of every table but the one that compares them
SEQUENCES = 64


def pruned(lines: list[Line]) -> str:
    """Perplexity of each method at each level, and as a multiple of the dense model's."""
    rows = [line for line in named(lines, "pruned") if line["calibration"][0] == SEQUENCES]
    levels = sorted({line["level"] for line in rows}, key=lambda text: (":" in text, text))
    found = {(_label(line), line["level"]): line for line in rows}
    cells = []
    for label in [text + more for text in LABELS.values() for more in ("", REFITTED)]:
        if any((label, level) in found for level in levels):
            ones = [found.get((label, level)) for level in levels]
            cells.append([label, *("" if one is None else _ratio(one) for one in ones)])
    one = rows[-1]
    return (
        table(["", *(level if ":" in level else f"{float(level):.0%}" for level in levels)], cells)
        + f"\n\nPerplexity of {math.prod(one['evaluation']):,} held-out tokens of {one['text']}, and its multiple of "
        + f"the dense model's {one['dense_perplexity']:.2f}. {one['model']}, every matrix of the 30 blocks; calibrated "
        + f"on {one['calibration'][0]} x {one['calibration'][1]} tokens of other documents. {made(rows)}"
    )


def calibrated(lines: list[Line]) -> str:
    """Perplexity of one method by how much text it is calibrated on."""
    rows = [line for line in named(lines, "pruned") if _key(line) == ("sparsegpt", "loss", None)]
    rows = sorted((line for line in rows if line["level"] == "0.5" and not line["refit"]), key=_tokens)
    cells = [[f"{_tokens(line):,}", _ratio(line), f"{line['seconds']:.0f} s"] for line in rows]
    return table(["tokens", "perplexity at 50%", "run"], cells) + f"\n\n{LABELS[_key(rows[0])]}. {made(rows)}"


def _tokens(line: Line) -> int:
    return math.prod(line["calibration"])


def _key(line: Line) -> tuple[str, str, str | None]:
    return line["method"], line["allocation"], line.get("order")


def _label(line: Line) -> str:
    return LABELS[_key(line)] + (REFITTED if line["refit"] else "")


def _ratio(line: Line) -> str:
    return f"{line['perplexity']:,.1f} ({line['perplexity'] / line['dense_perplexity']:,.2f} ×)"


def times(lines: list[Line]) -> str:
    """Seconds of a whole run of each method against the floor in the same process."""
    rows = [line for line in named(lines, "pruned") if line["level"] in ("0.5", "2:4") and line["seconds"] is not None]
    rows = [line for line in rows if line["calibration"][0] == SEQUENCES]
    # the run that timed most methods: its floor is that of all of them
    run = mode(line["commit"] for line in rows)
    rows = [line for line in rows if line["commit"] == run]
    cells = [
        [_label(line), line["level"] if ":" in line["level"] else f"{float(line['level']):.0%}",
         f"{line['seconds']:.0f} s", f"{line['floor_s']:.0f} s", f"{line['seconds'] / line['floor_s']:.2f}"]
        for line in rows
    ]  # fmt: skip
    return table(["", "zeros", "run", "floor", "ratio"], cells) + f"\n\n{rows[-1]['threads']} thread(s). {made(rows)}"


def spread(lines: list[Line]) -> str:
    """What share each kind of matrix loses where the loss allots."""
    rows = [line for line in named(lines, "pruned") if _key(line) == ("sparsegpt", "loss", None) and not line["refit"]]
    rows = [line for line in rows if line["calibration"][0] == SEQUENCES]
    kinds: dict[str, list[str]] = {}
    for line in rows:
        by_kind: dict[str, list[float]] = {}
        for name, share in line["by_matrix"].items():
            by_kind.setdefault(name.split(".")[-2], []).append(share)
        for kind, shares in by_kind.items():
            kinds.setdefault(kind, []).append(f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
    return table(["", *(f"{float(line['level']):.0%}" for line in rows)], [[k, *v] for k, v in kinds.items()])


INSIDE = "neurons "


def experts(lines: list[Line]) -> str:
    """Bits per byte of the demo's mixture without some of its experts, and what the best rule leaves of each layer."""
    rows = [line for line in named(lines, "experts") if not line["way"].startswith(INSIDE)]
    left = [line for line in rows if line["way"] == "from all layers, least added (REAP)"]
    kept = "; ".join(f"{', '.join(str(one[0]) for one in line['left'])} at {line['fraction']:.0%}" for line in left)
    told = f" Experts that the rule over all layers, least added, leaves in each: {kept}." if kept else ""
    return _without(rows, "experts gone") + told


def expert_neurons(lines: list[Line]) -> str:
    """Bits per byte of the demo's mixture without some of the neurons inside its experts."""
    rows = [line for line in named(lines, "experts") if line["way"] == "whole" or line["way"].startswith(INSIDE)]
    rows = [{**line, "way": line["way"].removeprefix(INSIDE)} for line in rows]
    return _without(rows, "neurons of experts gone")


def _without(rows: list[Line], title: str) -> str:
    whole = next(line for line in rows if line["way"] == "whole")
    fractions = sorted({line["fraction"] for line in rows if line["way"] != "whole"})
    found: dict[tuple[str, float], list[float]] = {}
    for line in rows:
        # draws of chance end in their seed
        found.setdefault((line["way"].rstrip("0123456789 "), line["fraction"]), []).append(line["bits_per_byte"])
    ways = [way for way in dict.fromkeys(way for way, _ in found) if way != "whole"]
    cells = [[way, *(_drawn(found.get((way, f), [])) for f in fractions)] for way in ways]
    sizes = ", ".join(
        f"{next(line for line in rows if line['fraction'] == f)['parameters'] / 1e6:.1f} M" for f in fractions
    )
    return (
        table([title, *(f"{fraction:.0%}" for fraction in fractions)], cells)
        + f"\n\nHeld-out bits per byte without retraining; whole: {whole['bits_per_byte']:.3f} with "
        + f"{whole['parameters'] / 1e6:.1f} M parameters, then {sizes}. Calibrated on {rows[0]['calibration'][0]} x "
        + f"{rows[0]['calibration'][1]} tokens. Torch {rows[0]['torch']}, commit `{rows[0]['commit']}`."
    )


def _drawn(values: list[float]) -> str:
    """Of several draws the mean, and the least and the most."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} draws)"


def execution(lines: list[Line]) -> str:
    """Time of CSR and of blocks against the dense product, by sparsity and batch."""
    rows = [line for line in lines if line["name"] in ("sparse_csr", "sparse_block")]
    found = {(r["name"], r["conditions"]["sparsity"], r["conditions"]["batch"]): r["ratios"]["dense"] for r in rows}
    batches = sorted({batch for _, _, batch in found})
    cells = [
        [f"{name.removeprefix('sparse_')}, {sparsity:.0%}", *(f"{found[name, sparsity, b]:.2f}" for b in batches)]
        for name in ("sparse_csr", "sparse_block")
        for sparsity in sorted({sparsity for _, sparsity, _ in found})
    ]
    one = rows[0]
    return (
        table(["time against dense", *(f"batch {batch}" for batch in batches)], cells)
        + f"\n\n{one['conditions']['shape']}, float32, {one['threads']} threads, torch {one['torch']}, commit "
        + f"`{one['commit']}`: `python {one['command']}`. Below 1 is faster."
    )


def together(lines: list[Line]) -> str:
    """Pruned, recovered and in int8: perplexity, bytes and time of each, beside the dense model."""
    rows, timed = named(lines, "together"), named(lines, "together-times")
    shares = {(line["way"], line["kind"]): line["forward_s"] / line["dense_forward_s"] for line in timed}
    cells = [
        [WAYS[line["way"]], line["kind"], f"{line['zeros']:.0%}", f"{line['perplexity']:,.1f}",
         f"{line['bytes'] / 1e6:,.0f} MB",
         f"{shares[line['way'], line['kind']]:.2f}" if (line["way"], line["kind"]) in shares else ""]
        for line in rows
    ]  # fmt: skip
    one = rows[0]
    clock = "" if not timed else (
        f" The time: of 128 tokens, as a share of the dense float32 model's, in turns on {timed[0]['threads']} "
        f"thread(s), commit `{timed[0]['commit']}`."
    )  # fmt: skip
    return (
        table(["", "numbers", "zeros", "perplexity", "bytes", "time of a forward pass"], cells)
        + f"\n\nPerplexity of {math.prod(one['evaluation']):,} held-out tokens; {one['steps']} steps of "
        + f"{one['batch']} x {one['calibration'][1]} tokens of the calibration text. {made(rows)}{clock}"
    )


WAYS = {"dense": "dense", "pruned": "50% of the weights gone, SparseGPT by loss", "distilled": "and distilled",
        "adapters": "or low-rank adapters, merged"}  # fmt: skip
TABLES = {
    "pruned": ("pruned", pruned), "times": ("pruned", times), "calibrated": ("pruned", calibrated),
    "spread": ("pruned", spread),
    "heads": ("heads", heads), "shrunk": ("heads", shrunk), "recovery": ("heads", recovery),
    "experts": ("experts", experts),
    "inside": ("experts", expert_neurons),
    "encoder": ("minilm", shrunk_encoder), "agreement": ("encoder", agreement), "found": ("encoder", found),
    "execution": ("sparse_csr", execution), "together": ("together", together),
    "collapse": ("collapse", collapse),
}  # fmt: skip


def fill(text: str, lines: list[Line]) -> str:
    """The page with every table made anew. Raises: ValueError for a marker without a table."""

    def filled(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {match[1]!r}")
        kind, make = TABLES[match[1]]
        body = make(lines) if named(lines, kind) else "*No record yet.*"
        return f"<!-- table: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


KEYS = ("name", "model", "method", "allocation", "level", "refit", "order", "importance", "fraction", "recovered_steps",
        "way", "kind", "compression", "seed")  # fmt: skip
UNHASHABLE = ("conditions", "calibration")


def newest(lines: list[Line]) -> list[Line]:
    """The last record of each cell, where the first of it stood."""
    cells = [(*(line.get(key) for key in KEYS), *(str(line.get(key)) for key in UNHASHABLE)) for line in lines]
    return list(dict(zip(cells, lines, strict=True)).values())


def collect(paths: Sequence[Path]) -> None:
    """Records of these files beside the committed ones, in the place of those of the same cells.

    Raises: FileNotFoundError if no file is there."""
    found = [line for path in paths if path.is_file() for line in read(path)]
    if not found:
        raise FileNotFoundError("runs/ must hold records: run python -m benchmarks.smollm2_pruning")
    lines = newest([*read(SOURCE), *found])
    SOURCE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    """Collect if asked, then write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="*", metavar="FILE", help="first take the records of these runs")
    options = parser.parse_args()
    if options.collect is not None:
        collect(options.collect or RUNS)
    lines = read(SOURCE)
    PAGE.write_text(fill(PAGE.read_text(), lines))
    for path, (figure, name) in FIGURES.items():
        if named(lines, name):
            path.write_text(figure(lines))


if __name__ == "__main__":
    main()
