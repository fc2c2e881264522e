"""What `prune` did, as a page. Every number is read from the record in prune.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.page import (
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
from training.prune_figures import heat_figure, layer_figure, line_figure, units_figure
from training.prune_numbers import (
    comparison,
    encodes,
    headline,
    headline_name,
    in_the_spread,
    milliseconds,
    plural,
    title,
)
from training.prune_recovery import smoothed

RECORD = "prune.json"
DENSE_ZEROS = (
    "Single zeros in a dense matrix are multiplied like any other number: they make no pass faster, and the file no "
    "smaller, until the matrices are stored and run in a sparse format (pruning.save_compact, pruning.choose_execution)"
    ". Whole units that are gone save both."
)
EMBEDDINGS = (
    "An encoder predicts no next token. A held-out passage is found if, of all second halves, its own is the nearest "
    "to its first half. Agreement is the correlation of the cosines of all pairs of passages with those that the whole "
    "model gives; cosine, of each passage's embedding with the whole model's; error, Σ‖h − h₀‖² / Σ‖h₀‖² of the last "
    "hidden states. Heads on top of the encoder are kept, and not measured."
)
RECOVERED = {
    "distill": "the loss is KL(parent ‖ model) of the next token, nats",
    "retrain": "the loss is the cross-entropy of the next token, nats",
    "encoder": "the loss is 1 − cosine to the parent's embedding plus the relative error of the last hidden states",
}
Record = Mapping[str, Any]


def write_prune_report(folder: Path, *, output: Path | None = None) -> Path:
    """Make the page anew from ``folder``/prune.json; returns its path."""
    path = output if output is not None else folder / "report.html"
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    path.write_text(prune_report_html(record), encoding="utf-8")
    return path


def prune_report_html(record: Record) -> str:
    """The page. Sections without numbers are left out."""
    parts = (_tiles(record), _cost(record), *_units(record), _weights(record), _errors(record), _recovered(record),
             _sensitivity(record), _speed(record), _command(record))  # fmt: skip
    return page(
        f"{title(record)}: {'passages found' if encodes(record) else 'perplexity'} {headline(record['before'])} → "
        f"{headline(record['after'])}",
        kicker=f"sparse-transformers · prune {Path(record['model']).name}",
        lead=_lead(record),
        body=[part for part in parts if part],
        footer=f"Written by sparse-transformers prune from {RECORD} in this folder.",
    )


def _tiles(record: Record) -> str:
    before, after, sizes = record["before"], record["after"], record["sizes"]
    left = sizes["after"]["nonzeros"] / max(sizes["before"]["nonzeros"], 1)
    speed = record["speed"]["before_s"] / record["speed"]["after_s"]
    return tiles([
        ("Before", headline(before), headline_name(record), "second"),
        ("After", headline(after), headline_name(record), "first"),
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
    about = EMBEDDINGS if encodes(record) else "The loss is on held-out text."
    about += " A pass is a forward pass, median ± half the interquartile range."
    if (record.get("budget") or {}).get("quartiles"):
        about += (
            " The share of the latency is the median of all rounds that timed what is left, its change their quartiles."
        )
    return section(
        "What it cost, what it saves", paragraph(about), table(("", "before", "after", "change"), rows), said
    )


def _units(record: Record) -> Iterator[str]:
    for report in record["units"]:
        gone = sum(map(len, report["removed"].values()))
        total = gone + sum(map(len, report["kept"].values()))
        took = record.get("budget") or report
        asked = "what the budget takes" if record.get("budget") else f"{report['asked']:.1%} was asked for"
        text = (
            f"{gone} of {total} {plural(report['kind'])} are gone from the tensors themselves "
            f"({report['achieved']:.1%}; {asked}): "
            f"{took['parameters_before']:,} parameters became {took['parameters_after']:,}, and no mask remains."
            f"{_ranked(record, report['kind'])}"
        )
        drawing = units_figure(report)
        yield section(f"{plural(report['kind']).capitalize()} removed", paragraph(text),
                      figure(drawing) if drawing else "")  # fmt: skip


def _ranked(record: Record, kind: str) -> str:
    name = record["arguments"].get("importance")
    return f" The least important went first, by {name}." if name and kind in ("head", "neuron") else ""


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


def _recovered(record: Record) -> str:
    found = record.get("recovery")
    if found is None:
        return ""
    words = RECOVERED[found["by"] if not encodes(record) else "encoder"]
    how = f"adapters of rank {found['rank']}, merged" if found["rank"] else "all weights"
    text = (
        f"{found['steps']} steps of AdamW on {found['batch']} × {found['length']} tokens each, out of "
        f"{found['sequences']:,} sequences of the training text, at a rate of up to {found['rate']:g}; {how}; {words}. "
        f"{_held(found)}From {headline(found['before'])} to {headline(record['after'])} "
        f"{headline_name(record)}; {headline(record['before'])} before pruning."
    )
    drawing = line_figure(found["losses"], smoothed(found["losses"]), name="recovery", title="loss of each step",
                          alt="Loss of each step of the recovery")  # fmt: skip
    return section("Recovery", paragraph(text), figure(drawing))


def _held(recovery: Record) -> str:
    """What became of the zeros; nothing where the record does not say how many there were."""
    if "held" not in recovery:
        return ""
    if not recovery["held"]:
        return "No weight of a matrix was zero. "
    return f"The {recovery['held']:,} weights of matrices that were zero, by whichever run, stayed zero. "


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
    nats = "of finding a passage's second half by its first, nats a passage" if encodes(record) else "nats a token"
    text = (
        f"How much the loss rises ({nats}) when one matrix alone loses its smallest weights, before any weight "
        "was pruned; below 0 counts as 0 in the shade. Experts of a layer are averaged."
    )
    return section("Sensitivity", paragraph(text), *(figure(drawing) for drawing in drawings if drawing))


def _speed(record: Record) -> str:
    speed = record["speed"]
    text = (
        f"Both models ran a forward pass over {speed['shape'][0]} × {speed['shape'][1]} tokens in turn, "
        f"{speed['rounds']} times, dense: {milliseconds(speed, 'before')} before, {milliseconds(speed, 'after')} "
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
    return section("The command", sample("$ ", record["command"]), _again(record), definitions(items))


def _again(record: Record) -> str:
    if record["recover"] is None:
        return ""
    words = "Train on, holding the zeros:" if "--sparsify." in record["recover"] else "Train on:"
    first = f"Whole layers went, so change CONFIG.toml's [[model.layer]] tables first: {record['tables']}."
    return paragraph(words) + sample("", record["recover"]) + (paragraph(first) if record["tables"] else "")
