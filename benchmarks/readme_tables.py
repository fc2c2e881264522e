"""The README's tables, made from records and never typed.

``python benchmarks/readme_tables.py --collect`` first copies the newest run's records from ``runs/`` into
``benchmarks/records/``; without the option it only fills the README from the records that are committed. Every figure
between the markers ``<!-- table: NAME -->`` and ``<!-- end -->`` comes from here.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
Line = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *rows])


def compression(lines: list[Line]) -> str:
    """Bits per byte of held-out text: the models, then what they have to beat."""
    results = {line["name"]: line for line in of_kind(lines, "result")}
    rows = [
        [
            str(model["label"]),
            f"{results[model['name']]['bits_per_byte']:.3f}",
            f"{model['parameters'] / 1e6:.2f} M",
            f"{model['active_parameters'] / 1e6:.2f} M",
            f"{model['flops_per_token'] / 1e6:.1f} M",
        ]
        for model in of_kind(lines, "model")
        if model["name"] in results
    ]
    rows += [[line["name"], f"{line['bits_per_byte']:.3f}", "", "", ""] for line in of_kind(lines, "baseline")]
    head = ["", "bits per byte", "parameters", "active for a token", "FLOPs a token"]
    return table(head, rows) + "\n\n" + conditions(lines)


def heads(lines: list[Line]) -> str:
    """What removing heads costs and gives."""
    rows = [
        [
            f"{line['fraction']:.0%} ({line['heads']} left)",
            f"{line['bits_per_byte']:.3f}",
            f"{line['recovered_bits_per_byte']:.3f}" if line.get("recovered_bits_per_byte") else "",
            f"{line['parameters'] / 1e6:.2f} M",
            f"{line['file_bytes'] / 1e6:.2f} MB",
            f"{line['tokens_per_s']:,.0f} ± {line['tokens_per_s_iqr'] / 2:,.0f}",
        ]
        for line in of_kind(lines, "heads")
    ]
    head = ["heads removed", "bits per byte", "after recovery", "parameters", "file", "generated tokens/s"]
    return table(head, rows)


def weights(lines: list[Line]) -> str:
    """What zeroing weights costs."""
    rows = [
        [f"{line['sparsity']:.0%}", f"{line['zeros']:,} of {line['weights']:,}", f"{line['bits_per_byte']:.3f}"]
        for line in of_kind(lines, "weights")
    ]
    return table(["sparsity", "zeros", "bits per byte"], rows)


def conditions(lines: list[Line]) -> str:
    """The sentence under a demo table: where its figures were made."""
    facts = "; ".join(
        f"{key} `{value}`" for line in of_kind(lines, "conditions") for key, value in line.items() if key != "kind"
    )
    total = "".join(
        f" The whole run took {line['seconds'] / 60:.1f} minutes and at most "
        f"{line['peak_memory_bytes'] / 2**30:.1f} GiB of memory."
        for line in of_kind(lines, "total")
    )
    return f"Made by one run: {facts}.{total}"


def speed(lines: list[Line]) -> str:
    """One row a contender: median, spread, and its time relative to the others of the same interleaved run."""
    rows = [
        [
            " ".join([f"**{line['name']}**", *(f"{key}={value}" for key, value in line["conditions"].items())]),
            f"{line['median_s'] * 1e3:.1f} ± {line['iqr_s'] * 500:.1f}",
            "<br>".join(f"{ratio:.2f} × {other}" for other, ratio in line["ratios"].items()),
            line["parity"],
        ]
        for line in lines
    ]
    commands = sorted({f"`python {line['command']}`" for line in lines})
    places = sorted({_place(line) for line in lines})
    head = ["contender", "median ms ± half the interquartile range", "time relative to", "same answer as the oracle"]
    return table(head, rows) + f"\n\nMade by {', '.join(commands)} on {'; '.join(places)}."


def machine(line: Line) -> str:
    """The processor, where the record names it."""
    return str(line.get("processor", "cpu") if line["device"] == "cpu" else line["device"])


def by_machine(lines: list[Line], made: Callable[[list[Line]], str]) -> str:
    """What ``made`` makes of the rows of each processor, below each other: times of two are no contest."""
    places = dict.fromkeys(machine(line) for line in lines)
    return "\n\n".join(made([line for line in lines if machine(line) == place]) for place in places)


def _place(line: Line) -> str:
    return f"{machine(line)} with {line['threads']} threads, torch {line['torch']}, commit {line['commit']}"


TABLES: dict[str, tuple[str, Callable[[list[Line]], str]]] = {
    "compression": ("demo.jsonl", compression),
    "heads": ("demo.jsonl", heads),
    "weights": ("demo.jsonl", weights),
    "speed": ("benchmarks*.jsonl", speed),  # one file a machine
}


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    """The records of one kind, in the order written."""
    return [line for line in lines if line["kind"] == kind]


def read(path: Path) -> list[Line]:
    """The records of a JSON Lines file, none if there is no such file."""
    return [json.loads(text) for text in path.read_text().splitlines() if text.strip()] if path.is_file() else []


def fill(text: str, records: Path = RECORDS) -> str:
    """``text`` with every marked table replaced; a table whose records are missing says so.

    Raises: ValueError if a marker names no table."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        source, made = TABLES[name]
        lines = [line for path in sorted(records.glob(source)) for line in read(path)]
        body = made(lines) if lines else f"*No record in benchmarks/records/{source} yet.*"
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def collect(runs: Path, records: Path = RECORDS) -> None:
    """Copy the demo's records, and the newest row of each benchmark and conditions.

    Raises: FileNotFoundError if runs/ holds neither; ValueError if a record names a folder of this machine."""
    found = {
        "demo.jsonl": read(runs / "demo" / "results.jsonl"),
        "benchmarks.jsonl": newest(read(runs / "benchmarks.jsonl")),
    }
    if not any(found.values()):
        raise FileNotFoundError(f"{runs} must hold demo/results.jsonl or benchmarks.jsonl; run make demo or make bench")
    for name, lines in found.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if str(ROOT) in text or str(Path.home()) + "/" in text:
            raise ValueError(f"{name} must name no folder of this machine: run the command from the project's root")
        if lines:
            records.mkdir(exist_ok=True)
            (records / name).write_text(text)


def newest(lines: list[Line]) -> list[Line]:
    """The last row of each benchmark, conditions and processor, in the order in which they first came."""
    last: dict[str, Line] = {}
    for line in lines:
        last[json.dumps([line["name"], line["conditions"], machine(line)])] = line
    return list(last.values())


def main() -> None:
    """Collect if asked, then write the README, or only compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="first copy the records of the newest runs")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    if options.collect:
        collect(ROOT / "runs")
    filled = fill(readme.read_text())
    if options.check and filled != readme.read_text():
        raise SystemExit("README.md differs from its records: run make tables")
    if not options.check:
        readme.write_text(filled)


if __name__ == "__main__":
    main()
