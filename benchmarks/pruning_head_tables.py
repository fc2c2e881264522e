"""Tables of models without some of their heads: SmolLM2 and a sentence encoder."""

import math
from collections import Counter
from collections.abc import Collection
from statistics import mean

from benchmarks.pruning_figures import CHANCE, head_curves, heads_before
from benchmarks.readme_tables import Line, table

# sequences that smollm2_heads scores on, where they are not those of all
OTHERS = {"leave one out": 1, "hard-concrete gates": 40}


def named(lines: list[Line], name: str) -> list[Line]:
    """The records of one name, in the order written."""
    return [line for line in lines if line["name"] == name]


def made(rows: list[Line]) -> str:
    """How, and at what commits."""
    commits = ", ".join(f"`{text}`" for text in dict.fromkeys(line["commit"] for line in rows))
    return f"{rows[-1]['dtype']} forward passes, torch {rows[-1]['torch']}, commit {commits}."


def heads(lines: list[Line]) -> str:
    """Perplexity of each importance at each fraction of heads; chance as the mean of its seeds."""
    curves, rows = head_curves(lines), heads_before(lines)
    fractions = sorted({fraction for curve in curves.values() for fraction in curve})
    one = rows[-1]
    cells = [[label, *(f"{curve[f]:,.1f}" if f in curve else "" for f in fractions)] for label, curve in curves.items()]
    return (
        table(["heads removed", *(f"{fraction:.0%}" for fraction in fractions)], cells)
        + f"\n\nPerplexity; dense {one['dense_perplexity']:.2f}. {math.prod(one['evaluation']):,} held-out tokens of "
        + f"{one['text']}, {one['calibration'][0]} sequences to score on{_others(curves)}. {made(rows)}"
    )


def _others(labels: Collection[str]) -> str:
    said = [f"{count} for {label}" for label, count in OTHERS.items() if label in labels]
    return f" ({', '.join(said)})" if said else ""


def shrunk(lines: list[Line]) -> str:
    """Parameters, file and time of the shrunk models."""
    sizes = {line["fraction"]: line for line in named(lines, "heads-sizes")}
    old = [line for line in named(lines, "heads") if "pruned_s" in line]
    timed = {line["fraction"]: line for line in [*old, *named(lines, "heads-times")]}
    rows = {line["fraction"]: line for line in [*old, *sizes.values()]}
    cells = [
        [f"{fraction:.0%}", f"{line['achieved']:.1%}", f"{line['parameters'] / 1e6:.1f} M",
         f"{sizes[fraction]['file_bytes'] / 1e6:,.1f} MB" if fraction in sizes else "",
         *_timed(timed.get(fraction))]
        for fraction, line in sorted(rows.items())
    ]  # fmt: skip
    head = ["heads asked", "removed", "parameters", "file", "forward, whole", "forward, shrunk", "times as fast"]
    clock = list(timed.values())
    file = "The file that save_pretrained writes, float32. " if sizes else ""
    return table(head, cells) + (
        f"\n\n{file}Forward passes of 4 x 512 tokens without the head, in turns on {clock[-1]['threads']} thread(s). "
        f"{made([*sizes.values(), *clock])}"
    )


def _timed(line: Line | None) -> list[str]:
    if line is None:
        return ["", "", ""]
    whole, pruned = line["whole_s"], line["pruned_s"]
    return [f"{whole * 1e3:.0f} ms", f"{pruned * 1e3:.0f} ms", f"{whole / pruned:.2f}"]


def recovery(lines: list[Line]) -> str:
    """Before and after a few steps of training, by importance; and the whole model trained by the same."""
    rows = [line for line in named(lines, "heads") if "recovered_steps" in line]
    # the setting of most: a table compares what had the same
    setting = Counter(map(_setting, rows)).most_common(1)[0][0]
    rows = [line for line in rows if _setting(line) == setting]
    # of chance the seeds that were recovered, before and after
    recovered = {line["importance"] for line in rows}
    before = _by_label([line for line in heads_before(lines) if line["importance"] in recovered])
    after = _by_label(rows)
    seeds = sum(name.startswith(CHANCE) for name in recovered)
    fractions = sorted({fraction for importance, fraction in after if importance != "none"})
    labels = [label for label in dict.fromkeys(label for label, _ in after) if label != "none"]
    cells = [
        [label, *(f"{values[label, f]:,.1f}" if (label, f) in values else "" for f in fractions
                  for values in (before, after))]
        for label in labels
    ]  # fmt: skip
    head = ["heads removed", *(f"{f:.0%}{word}" for f in fractions for word in ("", ", recovered"))]
    whole = after.get(("none", 0.0))
    same = f" Chance: {seeds} of the seeds." if seeds else ""
    if whole is not None:
        same += f" The whole model trained so: {rows[0]['dense_perplexity']:.1f}, then {whole:.1f}."
    return (
        table(head, cells)
        + f"\n\nPerplexity; {setting[0]} steps of {setting[1]} x 512 tokens, the same for all.{same} {made(rows)}"
    )


def _by_label(rows: list[Line]) -> dict[tuple[str, float], float]:
    """(importance, fraction) → perplexity, chance as the mean of its seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for line in rows:
        label = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        found.setdefault((label, line["fraction"]), []).append(line["perplexity"])
    return {at: mean(values) for at, values in found.items()}


def _setting(line: Line) -> tuple[int, int]:
    return line["recovered_steps"], line.get("recovered_batch", 4)


def agreement(lines: list[Line]) -> str:
    """Agreement with the whole encoder before and after recovery, by heads removed; chance as the mean of its seeds."""
    rows = named(lines, "encoder")
    seeds = len({line["importance"] for line in rows if line["importance"].startswith(CHANCE)})
    return _encoder(lines, "agreement") + (
        f"\n\nCorrelation of the cosine similarities of all pairs among {rows[-1]['sentences']} held-out sentences of "
        f"{rows[-1]['text']} with the whole encoder's. {rows[-1]['model']}, {seeds} seeds of chance. {made(rows)}"
    )


def found(lines: list[Line]) -> str:
    """The share of docstrings found, before and after recovery, by heads removed."""
    one = named(lines, "encoder")[-1]
    whole = next(line for line in named(lines, "encoder") if line["importance"] == "none")
    return _encoder(lines, "found") + (
        f"\n\nShare of {one['docstrings']} docstrings whose first line finds its second paragraph as the nearest; "
        f"the whole encoder finds {whole['found']:.3f}."
    )


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


def shrunk_encoder(lines: list[Line]) -> str:
    """Parameters, file and speed of the sentence encoder without the heads that matter least by gradient."""
    rows = [line for line in named(lines, "minilm") if line["importance"] == "gradient"]
    files = {line["fraction"]: line["file_bytes"] for line in named(lines, "encoder") if "file_bytes" in line}
    cells = [
        [f"{line['fraction']:.0%}", f"{line['parameters'] / 1e6:.1f} M",
         f"{files[line['fraction']] / 1e6:.1f} MB" if line["fraction"] in files else "", f"{line['speedup']:.2f}"]
        for line in rows
    ]  # fmt: skip
    whole = f" The whole encoder's file has {files[0.0] / 1e6:.1f} MB." if 0.0 in files else ""
    return table(["heads removed", "parameters", "file", "times as fast"], cells) + (
        f"\n\n{rows[0]['model']}, float32, in turns with the whole encoder on {rows[0]['threads']} thread(s).{whole} "
        f"Torch {rows[0]['torch']}, commit `{rows[0]['commit']}`."
    )
