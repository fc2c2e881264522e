"""What `prune` did, as a page and as a table. Every number is read from the record in prune.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from training.page import (
    change,
    count,
    data_size,
    definitions,
    duration,
    figure,
    note,
    page,
    paragraph,
    sample,
    section,
    table,
    tiles,
)
from training.prune_figures import heat_figure, layer_figure, units_figure

RECORD = "prune.json"
DENSE_ZEROS = (
    "Single zeros in a dense matrix are multiplied like any other number: they make no pass faster, and the file no "
    "smaller, until the matrices are stored and run in a sparse format (pruning.save_compact, pruning.choose_execution)"
    ". Whole units that are gone save both."
)
Record = Mapping[str, Any]


def write_prune_report(folder: Path, *, output: Path | None = None) -> Path:
    """Make the page anew from ``folder``/prune.json; returns its path."""
    path = output if output is not None else folder / "report.html"
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    path.write_text(prune_report_html(record), encoding="utf-8")
    return path


def prune_report_html(record: Record) -> str:
    """The page. Sections without numbers are left out."""
    parts = (_tiles(record), _cost(record), *_units(record), _weights(record), _errors(record), _sensitivity(record),
             _speed(record), _command(record))  # fmt: skip
    return page(
        f"{title(record)}: perplexity {_number(record['before'])} → {_number(record['after'])}",
        kicker=f"sparse-transformers · prune {Path(record['model']).name}",
        lead=_lead(record),
        body=[part for part in parts if part],
        footer=f"Written by sparse-transformers prune from {RECORD} in this folder.",
    )


def title(record: Record) -> str:
    """What was done, in a phrase."""
    parts = [f"{report['achieved']:.0%} of the {_plural(report['kind'])} removed" for report in record["units"]]
    if record["weights"] is not None:
        share = record["weights"]["zeros"] / max(record["weights"]["total"], 1)
        structure = record["arguments"]["structure"]
        how = record["arguments"]["method"] + (f", {structure}" if structure else "")
        parts.append(f"{share:.0%} of the weights zero ({how})")
    return ", ".join(parts)


def comparison(record: Record) -> Iterator[tuple[str, str, str, str]]:
    """(what, before, after, change) of every number measured on both; the first three on held-out text."""
    before, after, sizes, speed = record["before"], record["after"], record["sizes"], record["speed"]
    yield "loss (nats/token)", f"{before['loss']:.4f}", f"{after['loss']:.4f}", _by(before, after, "loss")
    yield "perplexity", _number(before), _number(after), _by(before, after, "perplexity")
    if before["bits_per_byte"] is not None:
        yield ("bits per byte", f"{before['bits_per_byte']:.4f}", f"{after['bits_per_byte']:.4f}",
               _by(before, after, "bits_per_byte"))  # fmt: skip
    for key, name, show in (("parameters", "parameters", count), ("nonzeros", "parameters not 0", count),
                            ("bytes", "bytes, dense", data_size)):  # fmt: skip
        first, second = sizes["before"][key], sizes["after"][key]
        yield name, show(first), show(second), change(second, first)
    if sizes["compact_bytes"] is not None:
        dense = sizes["before"]["bytes"]
        yield "bytes, compact", "", data_size(sizes["compact_bytes"]), change(sizes["compact_bytes"], dense)
    tokens = speed["shape"][0] * speed["shape"][1]
    yield (f"pass, {tokens:,} tokens", _milliseconds(speed, "before"), _milliseconds(speed, "after"),
           "in spread" if in_the_spread(speed) else change(speed["after_s"], speed["before_s"]))  # fmt: skip


def in_the_spread(speed: Record) -> bool:
    """Whether the medians are no further apart than half the interquartile ranges together."""
    return abs(speed["after_s"] - speed["before_s"]) <= (speed["after_iqr_s"] + speed["before_iqr_s"]) / 2


def numbers_table(record: Record) -> Table:
    """The comparison for a terminal."""
    shown = Table(title=title(record), title_justify="left")
    for name, side in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        shown.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in comparison(record):
        shown.add_row(*row)
    return shown


def _tiles(record: Record) -> str:
    before, after, sizes = record["before"], record["after"], record["sizes"]
    left = sizes["after"]["nonzeros"] / max(sizes["before"]["nonzeros"], 1)
    speed = record["speed"]["before_s"] / record["speed"]["after_s"]
    return tiles([
        ("Before", _number(before), "held-out perplexity", "second"),
        ("After", _number(after), "held-out perplexity", "first"),
        ("Parameters not 0", f"{left:.0%}", f"{count(sizes['after']['nonzeros'])} left", ""),
        ("Forward pass", f"{speed:.2f}×", _remark(record["speed"]), ""),
    ])  # fmt: skip


def _remark(speed: Record) -> str:
    return "as fast, within the spread" if in_the_spread(speed) else "as fast, run dense"


def _lead(record: Record) -> str:
    text = record["text"]
    held = f"{text['held_out_windows']:,} held-out sequences of {text['held_out_length']} tokens of {text['corpus']}"
    if not text["sequences"]:
        return f"Measured on {held}; nothing was calibrated."
    few = "" if text["sequences"] == text["asked"] else f" (there was no text for the {text['asked']} asked for)"
    return f"Measured on {held}; calibrated on {text['sequences']} × {text['length']} other tokens{few}."


def _cost(record: Record) -> str:
    rows = [list(row) for row in comparison(record)]
    said = note(" ".join(record["notes"])) if record["notes"] else ""
    about = "The loss is on held-out text; a pass is a forward pass, median ± half the interquartile range."
    return section(
        "What it cost, what it saves", paragraph(about), table(("", "before", "after", "change"), rows), said
    )


def _units(record: Record) -> Iterator[str]:
    for report in record["units"]:
        gone = sum(map(len, report["removed"].values()))
        total = gone + sum(map(len, report["kept"].values()))
        text = (
            f"{gone} of {total} {_plural(report['kind'])} are gone from the tensors themselves "
            f"({report['achieved']:.1%}; {report['asked']:.1%} was asked for): "
            f"{report['parameters_before']:,} parameters became {report['parameters_after']:,}, and no mask remains."
        )
        drawing = units_figure(report)
        yield section(f"{_plural(report['kind']).capitalize()} removed", paragraph(text),
                      figure(drawing) if drawing else "")  # fmt: skip


def _weights(record: Record) -> str:
    weights = record["weights"]
    if weights is None:
        return ""
    drawing = layer_figure(weights["by_name"])
    text = (
        f"{weights['zeros']:,} of {weights['total']:,} weights of matrices are zero, by "
        f"{record['arguments']['method']}; embeddings, routers, norms and the output head stay dense. "
        "masks.safetensors says which."
    )
    return section("Zeros by layer", paragraph(text), figure(drawing) if drawing else "")


def _errors(record: Record) -> str:
    matrices = [] if record["weights"] is None else record["weights"]["matrices"]
    errors = {one["name"]: one["error"] for one in matrices}
    drawing = heat_figure(errors, name="errors", title="output error", show=lambda value: f"{value:.2g}",
                          alt="Output error of each matrix by layer")  # fmt: skip
    if drawing is None:
        return ""
    text = (
        "Σ‖(w − w₀)·x‖² as a share of Σ‖w₀·x‖² over the calibration rows that reached the matrix, each layer fed by "
        "the pruned layers before it."
    )
    unseen = [one["name"] for one in matrices if not one["rows"]]
    left = note(f"No calibration token reached {', '.join(unseen)}: pruned by magnitude.") if unseen else ""
    return section("Output error of each matrix", paragraph(text), figure(drawing), left)


def _sensitivity(record: Record) -> str:
    found = record["sensitivity"]
    if found is None:
        return ""
    drawings = []
    for index, level in enumerate(found["levels"]):
        rises = {name: values[index] for name, values in found["rises"].items()}
        drawings.append(heat_figure(rises, name=f"sensitivity-{index}", title=f"rise of the loss at {level:.0%} zeros",
                                    show=lambda value: f"{value:.2g}",
                                    alt=f"Rise of the loss when one matrix is {level:.0%} zero"))  # fmt: skip
    text = (
        "How much the loss rises (nats a token) when one matrix alone loses its smallest weights, before any weight "
        "was pruned; below 0 counts as 0 in the shade. Experts of a layer are averaged."
    )
    return section("Sensitivity", paragraph(text), *(figure(drawing) for drawing in drawings if drawing))


def _speed(record: Record) -> str:
    speed = record["speed"]
    text = (
        f"Both models ran a forward pass over {speed['shape'][0]} × {speed['shape'][1]} tokens in turn, "
        f"{speed['rounds']} times, dense: {_milliseconds(speed, 'before')} before, {_milliseconds(speed, 'after')} "
        "after (median ± half the interquartile range). "
    )
    return section("Speed", paragraph(text + DENSE_ZEROS))


def _command(record: Record) -> str:
    items = [(key.replace("_", " "), str(value)) for key, value in record["conditions"].items() if key != "command"]
    items += [
        ("architecture", record["architecture"]),
        ("files", data_size(record["sizes"]["folder_bytes"])),
        ("time to prune", duration(record["pruning_seconds"])),
        ("time in all", duration(record["seconds"])),
    ]
    if record["resumed_blocks"]:
        items.append(("resumed", f"behind {record['resumed_blocks']} finished blocks; times are of this session"))
    again = (
        "" if record["recover"] is None else paragraph("Train on, holding the zeros:") + sample("", record["recover"])
    )
    return section("The command", sample("$ ", record["command"]), again, definitions(items))


def _plural(kind: str) -> str:
    return "channels of the width" if kind == "width" else f"{kind}s"


def _number(found: Record) -> str:
    perplexity = found["perplexity"]
    if perplexity is None or perplexity >= 1e7:
        return f"e^{found['loss']:.1f}"
    return f"{perplexity:,.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _by(before: Record, after: Record, key: str) -> str:
    if before[key] is None or after[key] is None:
        return ""
    return change(after[key], before[key])


def _milliseconds(speed: Record, side: str) -> str:
    return f"{1e3 * speed[f'{side}_s']:.2f} ± {500 * speed[f'{side}_iqr_s']:.2f} ms"
