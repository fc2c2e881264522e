"""The tables of docs/guides/conditional-measured.md, made from records and never typed.

python -m benchmarks.conditional_page [--collect FILE]

``--collect runs/benchmarks.jsonl`` first copies the newest rows of the benchmarks below into
benchmarks/records/conditional.jsonl; without it the page is only filled from the committed ones.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.readme_tables import RECORDS, ROOT, Line, by_machine, newest, read, speed

PAGE = ROOT / "docs" / "guides" / "conditional-measured.md"
SOURCE = RECORDS / "conditional.jsonl"


def made_by(bench: str) -> Callable[[Line], bool]:
    """Whether a record comes from this benchmark."""
    return lambda line: f"benchmarks.{bench}" in line["command"].split()


def fine_grained(line: Line) -> bool:
    """A layer of many small experts."""
    return made_by("bench_moe")(line) and line["conditions"]["E"] == 64


TABLES: dict[str, Callable[[Line], bool]] = {
    "fine-grained": fine_grained,
    "decode": made_by("bench_decode"),
    "memory": made_by("bench_product_key"),
    "depth": made_by("bench_depth"),
    "matvec": made_by("bench_activation"),
    "thresholded": made_by("bench_thresholded"),
}


def fill(text: str, lines: list[Line]) -> str:
    """``text`` with every marked table replaced. Raises: ValueError for a marker that names no table."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        rows = [line for line in lines if TABLES[name](line)]
        return f"<!-- table: {name} -->\n{by_machine(rows, speed) if rows else '*No record yet.*'}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def collect(path: Path) -> None:
    """Keep the newest row of each benchmark and its conditions. Raises: FileNotFoundError if ``path`` holds none."""
    found = [line for line in read(path) if any(wanted(line) for wanted in TABLES.values())]
    if not found:
        raise FileNotFoundError(f"{path} must hold records: run python -m benchmarks.bench_decode")
    kept = newest([*read(SOURCE), *found])
    SOURCE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def main() -> None:
    """Collect if asked, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="FILE", help="first copy the newest rows of this file")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    PAGE.write_text(fill(PAGE.read_text(), read(SOURCE)))


if __name__ == "__main__":
    main()
