"""The page of pruned SmolLM2: tables and figure, made from records and never typed.

``python -m benchmarks.pruning_page --collect`` first copies the newest records from runs/ into
benchmarks/records/smollm2-pruning.jsonl; without the option it only fills the page from the committed ones.
"""

import argparse
import json
import math
import re
from html import escape
from statistics import mean

from benchmarks.readme_tables import RECORDS, ROOT, Line, read, table

PAGE = ROOT / "docs" / "guides" / "prune-measured.md"
FIGURE = PAGE.with_suffix(".svg")
SOURCE = RECORDS / "smollm2-pruning.jsonl"
NAMES = ("smollm2-pruning", "smollm2-heads", "minilm-heads", "experts-removed", "sparse-execution")
RUNS = tuple(ROOT / "runs" / f"{name}.jsonl" for name in NAMES)
LABELS = {
    ("magnitude", "uniform"): "magnitude",
    ("wanda", "uniform"): "Wanda",
    ("wanda", "loss"): "Wanda, allocation by loss",
    ("sparsegpt", "uniform"): "SparseGPT",
    ("sparsegpt", "loss"): "SparseGPT, allocation by loss",
}
CHANCE = "chance"
COLOURS = ("#1f8fbf", "#8f5bd6", "#d9822b", "#3a9a5b", "#c2455c", "#8a8f98")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 60, 16, 34, 78
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.title{fill:#eee}.grid{stroke:#444}}"
)


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
    rows = [line for line in named(lines, "pruned") if line["level"] == "0.5"]
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


def head_curves(lines: list[Line]) -> dict[str, dict[float, float]]:
    """Label → fraction → perplexity, before any recovery."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in named(lines, "heads"):
        if "recovered_steps" in line:
            continue
        label = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        found.setdefault(label, {}).setdefault(line["fraction"], []).append(line["perplexity"])
        if "zeros_perplexity" in line:
            zeros = found.setdefault("as many single weights, SparseGPT", {})
            zeros.setdefault(line["fraction"], []).append(line["zeros_perplexity"])
    return {label: {f: mean(values) for f, values in curve.items()} for label, curve in found.items()}


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
    """After a few steps of training."""
    rows = [line for line in named(lines, "heads") if "recovered_steps" in line]
    cells = [
        [line["importance"].removesuffix(" 0"), f"{line['fraction']:.0%}", f"{line['recovered_steps']}",
         f"{line['perplexity']:,.1f}"]
        for line in rows
    ]  # fmt: skip
    return table(["importance", "heads removed", "steps of 4 x 512 tokens", "perplexity"], cells)


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


def encoder(lines: list[Line]) -> str:
    """Agreement with the whole sentence encoder, and speed, by heads removed; chance as the mean of its seeds."""
    rows = named(lines, "minilm")
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


TABLES = {
    "pruned": ("pruned", pruned), "times": ("pruned", times), "spread": ("pruned", spread),
    "heads": ("heads", heads), "shrunk": ("heads", shrunk), "recovery": ("heads", recovery),
    "experts": ("experts", experts),
    "encoder": ("minilm", encoder),
    "execution": ("sparse_csr", execution),
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


def draw(lines: list[Line]) -> str:
    """Perplexity over the fraction of heads removed, on a logarithmic axis, one line an importance."""
    curves = head_curves(lines)
    dense = named(lines, "heads")[-1]["dense_perplexity"]
    every = [value for curve in curves.values() for value in curve.values()] + [dense]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    end = max(fraction for curve in curves.values() for fraction in curve)

    def at(fraction: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * fraction / end, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [f'<text class="title" x="{LEFT}" y="18">perplexity by share of heads removed</text>']
    for power in range(low, high + 1):
        y = at(0, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    for fraction in sorted({fraction for curve in curves.values() for fraction in curve} | {0.0}):
        x = at(fraction, 10.0**low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{fraction:.0%}</text>')
    for index, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [at(0, dense), *(at(fraction, value) for fraction, value in sorted(curve.items()))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        left, top = LEFT + 6 + index % 3 * 215, HEIGHT - 34 + index // 3 * 20
        parts.append(f'<circle cx="{left}" cy="{top}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 8}" y="{top + 4}">{escape(label)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def newest(lines: list[Line]) -> list[Line]:
    """The last record of each cell."""
    keys = ("name", "method", "allocation", "level", "refit", "importance", "fraction", "recovered_steps", "way")
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
    if named(lines, "heads"):
        FIGURE.write_text(draw(lines))


if __name__ == "__main__":
    main()
