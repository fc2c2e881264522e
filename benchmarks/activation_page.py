"""The activation-sparsity guide's tables and figure, made from records and never typed.

``python -m benchmarks.activation_page --collect`` first puts the records of runs/ among those of
benchmarks/records/smollm2-activation.jsonl, in place of older ones; without the option it only fills the page from the
committed ones.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable

from benchmarks.activation_figure import Panel, figure
from benchmarks.activation_smollm2 import THRESHOLD_ROWS
from benchmarks.readme_tables import RECORDS, ROOT, Line, machine, read, table

PAGE = ROOT / "docs" / "guides" / "activation-sparsity.md"
FIGURE = PAGE.with_suffix(".svg")
SOURCE = RECORDS / "smollm2-activation.jsonl"
BLOCKS = {
    "feed-forward uniform": "feed-forward alone",
    "blocks uniform": "all seven maps, uniform",
    "blocks greedy": "all seven maps, greedy",
}
ORDER = ("top-k", "CATS", "CETT", "TEAL uniform", "TEAL greedy")


def named(lines: list[Line], name: str) -> list[Line]:
    """The records of one name, in the order written."""
    return [line for line in lines if line["name"] == name]


def by_level(lines: Iterable[Line]) -> dict[float, dict[str, Line]]:
    """Records of quality by sparsity and method."""
    found: dict[float, dict[str, Line]] = {}
    for line in lines:
        found.setdefault(line["sparsity"], {})[line["method"]] = line
    return dict(sorted(found.items()))


def present(lines: Iterable[Line]) -> list[str]:
    """The methods that have records, in a fixed order."""
    held = {line["method"] for line in lines}
    return [name for name in ORDER if name in held]


def quality(lines: list[Line]) -> str:
    """Perplexity of each method at each sparsity, and in brackets what that saves of the networks' weights."""
    rows = [line for line in named(lines, "quality") if line["method"] != "dense"]
    dense = rows[0]
    return (
        perplexities(rows, {name: name for name in present(rows)})
        + f"\n\nPerplexity of {dense['evaluation_tokens']:,} held-out tokens; dense: {dense['dense_perplexity']:.2f}. "
        + "In brackets: the share of the feed-forward networks' weights that decoding need not read. "
        + f"Thresholds from {dense.get('threshold_rows', THRESHOLD_ROWS)} rows of each network's inputs, drawn at "
        + f"random from {dense['calibration_tokens']:,} tokens of other documents. Commit {commits(rows)}."
    )


def perplexities(rows: list[Line], labels: dict[str, str]) -> str:
    """A row for each sparsity, a column for each method; a sentence for a method that was not measured at all of them.

    labels: what the page calls each method."""
    levels = by_level(rows)
    whole = [m for m in labels if all(m in at for at in levels.values())] or list(labels)
    cells = [[f"{level:.0%}", *(_perplexity(at[m]) if m in at else "" for m in whole)] for level, at in levels.items()]
    some = []
    for m in (m for m in labels if m not in whole):
        known = [f"{level:.0%} {_perplexity(at[m])}" for level, at in levels.items() if m in at]
        some.append(f"Measured at fewer sparsities, {labels[m]}: {', '.join(known)}")
    return table(["sparsity", *(labels[m] for m in whole)], cells) + "".join(f"\n\n{one}." for one in some)


def _perplexity(line: Line) -> str:
    return f"{line['perplexity']:.2f} ({line['reads_saved']:.0%})"


def blocks(lines: list[Line]) -> str:
    """TEAL's perplexity at each sparsity for the feed-forward alone and for all seven maps, and what each saves."""
    rows = named(lines, "blocks")
    methods = [name for name in BLOCKS if any(line["method"] == name for line in rows)]
    one = rows[0]
    seen = {m: next(line["calibration_tokens"] for line in rows if line["method"] == m) for m in methods}
    return (
        perplexities(rows, {m: BLOCKS[m] for m in methods})
        + f"\n\nPerplexity of {one['evaluation_tokens']:,} held-out tokens in {one['dtype']}; dense: "
        + f"{one['dense_perplexity']:.2f}. In brackets: the share of the weights of all seven maps that decoding need "
        + f"not read. Thresholds from {one.get('threshold_rows', THRESHOLD_ROWS)} rows of each map's inputs, drawn at "
        + f"random from {', '.join(f'{tokens:,} tokens ({BLOCKS[m]})' for m, tokens in seen.items())}. "
        + f"Commit {commits(rows)}."
    )


def speed(line: Line) -> float:
    """How many times as fast as dense in the same rounds."""
    return 1.0 / float(line["ratios"]["dense"])


def timed(lines: list[Line], name: str, key: str = "sparsity") -> dict[float, dict[str, Line]]:
    """Timed rows that have a peer, by level and method."""
    found: dict[float, dict[str, Line]] = {}
    for line in named(lines, name):
        if line["ratios"] and key in line["conditions"]:
            found.setdefault(line["conditions"][key], {})[line["conditions"]["method"]] = line
    return dict(sorted(found.items()))


def decode(lines: list[Line]) -> str:
    """Tokens a second of the whole model, and times the dense model's speed."""
    levels = timed(lines, "decode")
    methods = methods_of(levels)
    cells = [
        [f"{level:.0%}", *(f"{tokens_per_second(at[m]):.1f} ({speed(at[m]):.2f}×)" if m in at else "" for m in methods)]
        for level, at in levels.items()
    ]
    every = [line for at in levels.values() for line in at.values()]
    dense = [line for line in named(lines, "decode") if not line["ratios"]]
    again = [line for line in named(lines, "decode") if line["conditions"].get("again")]
    again = [line for line in again if line["conditions"]["beside"] in methods]
    beside = ", ".join(
        f"{tokens_per_second(line):.1f} beside {line['conditions']['beside']}"
        for line in dense
        if line["conditions"]["beside"] in methods
    )
    return (
        table(["sparsity", *methods], cells)
        + f"\n\nTokens a second{processor(every)}, greedy, batch 1; in brackets relative to dense in the same rounds "
        + f"({beside}). {slower(levels, noise(again))} {place(every)}"
    )


def processor(lines: list[Line]) -> str:
    """What a second is, where it is not one of the wall's clock."""
    return " of the processor" if any(line["conditions"].get("clock") == "processor" for line in lines) else ""


def noise(again: list[Line]) -> dict[str, float]:
    """How much a second dense model differed from the first beside each method, and at least a hundredth."""
    return {line["conditions"]["beside"]: max(0.01, abs(speed(line) - 1)) for line in again}


def slower(levels: dict[float, dict[str, Line]], margins: dict[str, float]) -> str:
    """Which settings are not faster than dense by more than the method's margin, a hundredth if none, in words."""
    rows = [(f"{m} at {level:.0%}", speed(line) - 1, margins.get(m, 0.01)) for level, at in levels.items()
            for m, line in at.items()]  # fmt: skip
    even = [name for name, gain, margin in rows if abs(gain) <= margin]
    worse = [name for name, gain, margin in rows if gain < -margin]
    within = ", ".join(f"{margin:.1%} ({m})" for m, margin in margins.items()) or "1.0%"
    said = [f"As fast as dense: {', '.join(even)}."] if even else []
    said += [f"Slower: {', '.join(worse)}."] if worse else []
    told = f"What a second dense model differed by counts as none, and 1% at least: {within}. " if margins else ""
    return told + (" ".join(said) or f"Every setting is faster than dense by more than {within}.")


def predictor(lines: list[Line]) -> str:
    """What recall costs in computed neurons, perplexity and time."""
    times = timed(lines, "decode", "recall")
    rows = named(lines, "predictor")
    cells = [
        [
            f"{line['recall_target']:.0%}",
            f"{line['recall']:.1%}",
            f"{line['computed_share']:.1%}",
            f"{line['perplexity']:.2f}",
            *([f"{speed(times[line['recall_target']]['predictor']):.2f}×"] if line["recall_target"] in times else []),
        ]
        for line in rows
    ]
    head = ["recall asked for", "recall on held-out text", "neurons computed", "perplexity"]
    head += ["decoding speed to dense"] if times else []
    one = rows[0]
    return (
        table(head, cells)
        + f"\n\nRank {one['rank']}; to be told: the {one['active_share']:.1%} of neurons that CETT keeps at "
        + f"{one['sparsity']:.0%} sparsity. Perplexity without a predictor: {one['perplexity_without']:.2f}, of "
        + f"{one['evaluation_tokens']:,} tokens; trained on {one['training_tokens']:,}. "
        + f"Commit {commits(rows)}."
        + (_beside_dense([at["predictor"] for at in times.values()]) if times else "")
    )


def _beside_dense(timed_rows: list[Line]) -> str:
    said = f" The decoding speed is relative to dense in the same rounds, by seconds{processor(timed_rows)}. "
    return said + place(timed_rows)


def choices(lines: list[Line]) -> str:
    """What the layers measured of each projection, and how many of them chose the sparse way."""
    found: dict[str, dict[float, Line]] = {}
    for line in named(lines, "choice"):
        setting = line["conditions"]
        if "sparsity" in setting:
            found.setdefault(f"{setting['method']}, {setting['projection']}", {})[setting["sparsity"]] = line
    levels = sorted({level for at in found.values() for level in at})
    cells = [[place, *(_choice(at[level]) if level in at else "" for level in levels)] for place, at in found.items()]
    return table(["projection", *(f"{level:.0%}" for level in levels)], cells)


def _choice(line: Line) -> str:
    share = f"{line['sparse']} of {line['sparse'] + line['dense']}"
    return share if line["sparse_s"] is None else f"{line['dense_s'] / line['sparse_s']:.2f}× ({share})"


def methods_of(levels: dict[float, dict[str, Line]]) -> list[str]:
    """Methods in the order of their first row."""
    return list(dict.fromkeys(method for at in levels.values() for method in at))


def tokens_per_second(line: Line) -> float:
    """Of a decode row."""
    return float(line["conditions"]["new_tokens"] / line["median_s"])


def commits(lines: Iterable[Line]) -> str:
    """The commits of the records, each once."""
    return ", ".join(f"`{commit}`" for commit in dict.fromkeys(line["commit"] for line in lines))


def place(lines: list[Line]) -> str:
    """Where timed rows were made."""
    made = dict.fromkeys(f"{machine(line)} with {line['threads']} threads, torch {line['torch']}" for line in lines)
    return f"Measured on {'; '.join(made)}; commit {commits(lines)}."


TABLES: dict[str, Callable[[list[Line]], str]] = {
    "quality": quality, "blocks": blocks, "decode": decode, "choices": choices, "predictor": predictor,
}  # fmt: skip


def fill(text: str, lines: list[Line]) -> str:
    """``text`` with every marked table replaced. Raises: ValueError if a marker names no table."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        kind = {"choices": "choice"}.get(name, name)
        body = TABLES[name](lines) if named(lines, kind) else "*No record yet.*"
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def draw(lines: list[Line]) -> str:
    """The figure: what is lost against what need not be read, and what that gives in time."""
    rows = [line for line in named(lines, "quality") if line["method"] != "dense"]
    lost = {
        m: [(r["reads_saved"], r["perplexity"] / r["dense_perplexity"]) for r in rows if r["method"] == m]
        for m in present(rows)
    }
    gained: dict[str, list[tuple[float, float]]] = {}
    for level, at in timed(lines, "decode").items():
        for method, line in at.items():
            gained.setdefault(method, []).append((level, speed(line)))
    return figure(
        [
            Panel("perplexity, times dense", "feed-forward weights not read", lost, largest=3.0),
            Panel("decoding speed, times dense", "sparsity", gained, largest=None),
        ],
        order=ORDER,
    )


def collect() -> None:
    """Put the records of runs/ among the committed ones: the newest of each name and conditions stays.

    Raises: FileNotFoundError if there are none; ValueError if one names a folder of this machine.
    """
    found = [*read(ROOT / "runs" / "smollm2-activation.jsonl"), *read(ROOT / "runs" / "benchmarks.jsonl")]
    names = ("quality", "blocks", "predictor", "decode", "choice", "thresholded")
    wanted = [line for line in found if line["name"] in names]
    if not wanted:
        raise FileNotFoundError("runs/ must hold records: run python -m benchmarks.activation_smollm2")
    lines = newest([*read(SOURCE), *wanted])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if str(ROOT) in text:
        raise ValueError("records must name no folder of this machine: run the command from the project's root")
    SOURCE.write_text(text)


def newest(lines: list[Line]) -> list[Line]:
    """The last record of each name and setting, in the order in which they first came."""
    last: dict[str, Line] = {}
    for line in lines:
        setting = line.get("conditions") or {key: line.get(key) for key in ("method", "sparsity", "recall_target")}
        last[json.dumps([line["name"], setting])] = line
    return list(last.values())


def main() -> None:
    """Collect if asked, then write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="first copy the records of the newest runs")
    if parser.parse_args().collect:
        collect()
    lines = read(SOURCE)
    PAGE.write_text(fill(PAGE.read_text(), lines))
    FIGURE.write_text(draw(lines))


if __name__ == "__main__":
    main()
