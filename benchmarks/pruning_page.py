"""The page of pruned SmolLM2: tables and figure, made from records and never typed.

``python -m benchmarks.pruning_page --collect`` first copies the newest records from runs/ into
benchmarks/records/smollm2-pruning.jsonl; without the option it only fills the page from the committed ones.
"""

import argparse
import json
import math
import re
from statistics import mean, mode

from benchmarks.pruning_figures import CHANCE, head_curves, heads_before, heads_figure, parameters_figure
from benchmarks.readme_tables import RECORDS, ROOT, Line, read, table

PAGE = ROOT / "docs" / "guides" / "prune-measured.md"
FIGURES = {PAGE.with_suffix(".svg"): heads_figure, PAGE.with_name("prune-heads-or-weights.svg"): parameters_figure}
SOURCE = RECORDS / "smollm2-pruning.jsonl"
NAMES = ("smollm2-pruning", "smollm2-heads", "minilm-heads", "experts-removed", "sparse-execution", "smollm2-together")
RUNS = tuple(ROOT / "runs" / f"{name}.jsonl" for name in NAMES)
LABELS = {
    ("magnitude", "uniform"): "magnitude",
    ("wanda", "uniform"): "Wanda",
    ("wanda", "loss"): "Wanda, allocation by loss",
    ("sparsegpt", "uniform"): "SparseGPT",
    ("sparsegpt", "loss"): "SparseGPT, allocation by loss",
    ("descent", "uniform"): "SparseGPT, then descent by groups",
    ("admm", "uniform"): "ADMM",
    ("admm", "loss"): "ADMM, allocation by loss",
}


def named(lines: list[Line], name: str) -> list[Line]:
    """The records of one name, in the order written."""
    return [line for line in lines if line["name"] == name]


def pruned(lines: list[Line]) -> str:
    """Perplexity of each method at each level, and as a multiple of the dense model's."""
    rows = [line for line in named(lines, "pruned") if not line["refit"]]
    levels = sorted({line["level"] for line in rows}, key=lambda text: (":" in text, text))
    found = {((line["method"], line["allocation"]), line["level"]): line for line in rows}
    cells = []
    for key, label in LABELS.items():
        if any((key, level) in found for level in levels):
            ones = [found.get((key, level)) for level in levels]
            cells.append([label, *("" if one is None else _ratio(one) for one in ones)])
    one = rows[-1]
    return (
        table(["", *(level if ":" in level else f"{float(level):.0%}" for level in levels)], cells)
        + f"\n\nPerplexity of {math.prod(one['evaluation']):,} held-out tokens of {one['text']}, and its multiple of "
        + f"the dense model's {one['dense_perplexity']:.2f}. {one['model']}, every matrix of the 30 blocks; calibrated "
        + f"on {one['calibration'][0]} x {one['calibration'][1]} tokens of other documents. {_made(rows)}"
    )


def _ratio(line: Line) -> str:
    return f"{line['perplexity']:,.1f} ({line['perplexity'] / line['dense_perplexity']:,.2f} ×)"


def _made(rows: list[Line]) -> str:
    commits = ", ".join(f"`{text}`" for text in dict.fromkeys(line["commit"] for line in rows))
    return f"{rows[-1]['dtype']} forward passes, torch {rows[-1]['torch']}, commit {commits}."


def times(lines: list[Line]) -> str:
    """Seconds of a whole run of each method against the floor in the same process."""
    rows = [line for line in named(lines, "pruned") if line["level"] == "0.5" and line["seconds"] is not None]
    # the run that timed most methods: its floor is that of all of them
    run = mode(line["commit"] for line in rows)
    rows = [line for line in rows if line["commit"] == run]
    cells = [
        [LABELS[(line["method"], line["allocation"])] + (", refitted" if line["refit"] else ""),
         f"{line['seconds']:.0f} s", f"{line['floor_s']:.0f} s", f"{line['seconds'] / line['floor_s']:.2f}"]
        for line in rows
    ]  # fmt: skip
    return table(["at 50%", "run", "floor", "ratio"], cells) + f"\n\n{rows[-1]['threads']} thread(s). {_made(rows)}"


def spread(lines: list[Line]) -> str:
    """What share each kind of matrix loses where the loss allots."""
    rows = [line for line in named(lines, "pruned") if (line["method"], line["allocation"]) == ("sparsegpt", "loss")]
    kinds: dict[str, list[str]] = {}
    for line in rows:
        by_kind: dict[str, list[float]] = {}
        for name, share in line["by_matrix"].items():
            by_kind.setdefault(name.split(".")[-2], []).append(share)
        for kind, shares in by_kind.items():
            kinds.setdefault(kind, []).append(f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
    return table(["", *(f"{float(line['level']):.0%}" for line in rows)], [[k, *v] for k, v in kinds.items()])


def heads(lines: list[Line]) -> str:
    """Perplexity of each importance at each fraction of heads; chance as the mean of its seeds."""
    found = head_curves(lines)
    fractions = sorted({fraction for curve in found.values() for fraction in curve})
    one = named(lines, "heads")[-1]
    cells = [[label, *(f"{curve[f]:,.1f}" if f in curve else "" for f in fractions)] for label, curve in found.items()]
    return (
        table(["heads removed", *(f"{fraction:.0%}" for fraction in fractions)], cells)
        + f"\n\nPerplexity; dense {one['dense_perplexity']:.2f}. {math.prod(one['evaluation']):,} held-out tokens of "
        + f"{one['text']}, {one['calibration'][0]} sequences to score on. {_made(named(lines, 'heads'))}"
    )


def shrunk(lines: list[Line]) -> str:
    """Parameters and time of the shrunk models."""
    rows = [line for line in named(lines, "heads") if "pruned_s" in line]
    cells = [
        [f"{line['fraction']:.0%}", f"{line['achieved']:.1%}", f"{line['parameters'] / 1e6:.1f} M",
         f"{line['whole_s'] * 1e3:.0f} ms", f"{line['pruned_s'] * 1e3:.0f} ms",
         f"{line['whole_s'] / line['pruned_s']:.2f}"]
        for line in rows
    ]  # fmt: skip
    head = ["heads asked", "removed", "parameters", "forward, whole", "forward, shrunk", "times as fast"]
    return table(head, cells) + "\n\nForward passes of 4 x 512 tokens without the head, in turns."


def recovery(lines: list[Line]) -> str:
    """Before and after a few steps of training, and the whole model trained by the same."""
    rows = [line for line in named(lines, "heads") if "recovered_steps" in line]
    found = {(line["importance"], line["fraction"]): line["perplexity"] for line in heads_before(lines)}
    cells = []
    for line in rows:
        key = (line["importance"], line["fraction"])
        before = found[key] if key in found else line.get("perplexity_before", line["dense_perplexity"])
        label = "whole model" if line["importance"] == "none" else line["importance"].removesuffix(" 0")
        cells.append([label, f"{line['fraction']:.0%}", f"{before:,.1f}", f"{line['perplexity']:,.1f}"])
    steps = ", ".join(str(number) for number in dict.fromkeys(line["recovered_steps"] for line in rows))
    return (
        table(["importance", "heads removed", "before", "after"], cells)
        + f"\n\nPerplexity; {steps} steps of 4 x 512 tokens, the same for all."
    )


def experts(lines: list[Line]) -> str:
    """Bits per byte of the demo's mixture without some of its experts."""
    rows = named(lines, "experts")
    whole = next(line for line in rows if line["way"] == "whole")
    fractions = sorted({line["fraction"] for line in rows if line["way"] != "whole"})
    found = {(line["way"], line["fraction"]): line for line in rows}
    ways = [way for way in dict.fromkeys(line["way"] for line in rows) if way != "whole"]
    cells = [
        [way, *(f"{found[way, f]['bits_per_byte']:.3f}" if (way, f) in found else "" for f in fractions)]
        for way in ways
    ]  # fmt: skip
    sizes = ", ".join(
        f"{next(line for line in rows if line['fraction'] == f)['parameters'] / 1e6:.1f} M" for f in fractions
    )
    return (
        table(["experts gone", *(f"{fraction:.0%}" for fraction in fractions)], cells)
        + f"\n\nHeld-out bits per byte without retraining; whole: {whole['bits_per_byte']:.3f} with "
        + f"{whole['parameters'] / 1e6:.1f} M parameters, then {sizes}. Calibrated on {rows[0]['calibration'][0]} x "
        + f"{rows[0]['calibration'][1]} tokens. Torch {rows[0]['torch']}, commit `{rows[0]['commit']}`."
    )


def agreement(lines: list[Line]) -> str:
    """Agreement with the whole encoder before and after recovery, by heads removed; chance as the mean of its seeds."""
    one = named(lines, "encoder")[-1]
    return _encoder(lines, "agreement") + (
        f"\n\nCorrelation of the cosine similarities of all pairs among {one['sentences']} held-out sentences of "
        f"{one['text']} with the whole encoder's. {one['model']}, {_seeds(lines)} seeds of chance. "
        f"Torch {one['torch']}, commit `{one['commit']}`."
    )


def found(lines: list[Line]) -> str:
    """The share of docstrings found, before and after recovery, by heads removed."""
    one = named(lines, "encoder")[-1]
    whole = next(line for line in named(lines, "encoder") if line["importance"] == "none")
    return _encoder(lines, "found") + (
        f"\n\nShare of {one['docstrings']} docstrings whose first line finds its second paragraph as the nearest; "
        f"the whole encoder finds {whole['found']:.3f}."
    )


def _seeds(lines: list[Line]) -> int:
    return len({line["importance"] for line in named(lines, "encoder") if line["importance"].startswith(CHANCE)})


def _encoder(lines: list[Line], key: str) -> str:
    rows = [line for line in named(lines, "encoder") if line["importance"] != "none"]
    fractions = sorted({line["fraction"] for line in rows})
    by: dict[str, dict[tuple[float, bool], list[float]]] = {}
    for line in rows:
        label = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        by.setdefault(label, {}).setdefault((line["fraction"], "recovered_steps" in line), []).append(line[key])
    measured = {at for curve in by.values() for at in curve}
    columns = [(fraction, after) for fraction in fractions for after in (False, True) if (fraction, after) in measured]
    cells = [
        [label, *(f"{mean(curve[at]):.3f}" if at in curve else "" for at in columns)] for label, curve in by.items()
    ]
    return table(["heads removed", *(f"{f:.0%}{', recovered' * after}" for f, after in columns)], cells)


def encoder(lines: list[Line]) -> str:
    """Agreement with the whole sentence encoder, and speed, by heads removed; chance as the mean of its seeds."""
    rows = [line for line in named(lines, "minilm") if "agreement" in line]
    fractions = sorted({line["fraction"] for line in rows})
    found: dict[str, dict[float, list[Line]]] = {}
    for line in rows:
        label = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        found.setdefault(label, {}).setdefault(line["fraction"], []).append(line)
    cells = [
        [label, *(f"{mean(one['agreement'] for one in by[f]):.3f}" if f in by else "" for f in fractions)]
        for label, by in found.items()
    ]
    fastest = [
        f"{mean(line['parameters'] for line in rows if line['fraction'] == f) / 1e6:.1f} M and "
        f"{mean(line['speedup'] for line in rows if line['fraction'] == f):.2f} times as fast"
        for f in fractions
    ]
    return (
        table(["heads removed", *(f"{fraction:.0%}" for fraction in fractions)], cells)
        + f"\n\nCorrelation of the cosine similarities of all pairs among {rows[0]['pairs']} held-out sentences of "
        + f"{rows[0]['text']} with the whole encoder's. {rows[0]['model']}, shrunk for good: {'; '.join(fastest)}, "
        + f"{rows[0]['threads']} thread(s). Torch {rows[0]['torch']}, commit `{rows[0]['commit']}`."
    )


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
    rows = named(lines, "together")
    cells = [
        [WAYS[line["way"]], line["kind"], f"{line['zeros']:.0%}", f"{line['perplexity']:,.1f}",
         f"{line['bytes'] / 1e6:,.0f} MB", f"{line['forward_s'] / line['dense_forward_s']:.2f}"]
        for line in rows
    ]  # fmt: skip
    one = rows[0]
    return (
        table(["", "numbers", "zeros", "perplexity", "bytes", "time of a forward pass"], cells)
        + f"\n\n{one['steps']} steps of 4 x {one['calibration'][1]} tokens of the calibration text. The time: of "
        + f"128 tokens, as a share of the dense float32 model's, in turns on {one['threads']} threads. {_made(rows)}"
    )


WAYS = {"dense": "dense", "pruned": "50% of the weights gone, SparseGPT by loss", "distilled": "and distilled",
        "adapters": "or low-rank adapters, merged"}  # fmt: skip
TABLES = {
    "pruned": ("pruned", pruned), "times": ("pruned", times), "spread": ("pruned", spread),
    "heads": ("heads", heads), "shrunk": ("heads", shrunk), "recovery": ("heads", recovery),
    "experts": ("experts", experts),
    "encoder": ("minilm", encoder), "agreement": ("encoder", agreement), "found": ("encoder", found),
    "execution": ("sparse_csr", execution), "together": ("together", together),
}  # fmt: skip


def fill(text: str, lines: list[Line]) -> str:
    """The page with every table made anew. Raises: ValueError for a marker without a table."""

    def made(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {match[1]!r}")
        kind, make = TABLES[match[1]]
        body = make(lines) if named(lines, kind) else "*No record yet.*"
        return f"<!-- table: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def newest(lines: list[Line]) -> list[Line]:
    """The last record of each cell."""
    keys = (
        "name",
        "method",
        "allocation",
        "level",
        "refit",
        "importance",
        "fraction",
        "recovered_steps",
        "way",
        "kind",
    )
    return list({(*(line.get(key) for key in keys), str(line.get("conditions"))): line for line in lines}.values())


def collect() -> None:
    """Copy the newest records from runs/. Raises: FileNotFoundError if there are none."""
    lines = newest([line for path in RUNS if path.is_file() for line in read(path)])
    if not lines:
        raise FileNotFoundError("runs/ must hold records: run python -m benchmarks.smollm2_pruning")
    SOURCE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    """Collect if asked, then write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="first copy the records of the newest runs")
    if parser.parse_args().collect:
        collect()
    lines = read(SOURCE)
    PAGE.write_text(fill(PAGE.read_text(), lines))
    for path, figure in FIGURES.items():
        if named(lines, "heads"):
            path.write_text(figure(lines))


if __name__ == "__main__":
    main()
