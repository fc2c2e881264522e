"""The numbers of a run of `prune`, before and after, as words and as a table for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from training.page import change, count, data_size

Record = Mapping[str, Any]


def encodes(record: Record) -> bool:
    """Whether the model is an encoder, judged by its embeddings."""
    return "found" in record["before"]


def title(record: Record) -> str:
    """What was done, in a phrase."""
    parts = [f"{report['achieved']:.0%} of the {plural(report['kind'])} removed" for report in record["units"]]
    if record["weights"] is not None:
        share = record["weights"]["zeros"] / max(record["weights"]["total"], 1)
        structure = record["arguments"]["structure"]
        how = record["arguments"]["method"] + (f", {structure}" if structure else "")
        parts.append(f"{share:.0%} of the weights zero ({how})")
    if record.get("recovery"):
        parts.append(f"recovered in {record['recovery']['steps']} steps")
    return ", ".join(parts)


def comparison(record: Record) -> Iterator[tuple[str, str, str, str]]:
    """(what, before, after, change) of every number measured on both; the first three on held-out text."""
    before, after, sizes, speed = record["before"], record["after"], record["sizes"], record["speed"]
    yield from (_embeddings if encodes(record) else _losses)(before, after)
    for key, name, show in (("parameters", "parameters", count), ("nonzeros", "parameters not 0", count),
                            ("bytes", "bytes, dense", data_size)):  # fmt: skip
        first, second = sizes["before"][key], sizes["after"][key]
        yield name, show(first), show(second), change(second, first)
    if record.get("budget"):
        budget = record["budget"]
        spread = "{:.1%}–{:.1%}".format(*budget["quartiles"]) if budget.get("quartiles") else ""
        yield f"{budget['budget']} (budget {budget['asked']:.1%})", "100.0%", f"{budget['achieved']:.1%}", spread
    if sizes["compact_bytes"] is not None:
        dense = sizes["before"]["bytes"]
        yield "bytes, compact", "", data_size(sizes["compact_bytes"]), change(sizes["compact_bytes"], dense)
    tokens = speed["shape"][0] * speed["shape"][1]
    yield (f"pass, {tokens:,} tokens", milliseconds(speed, "before"), milliseconds(speed, "after"),
           "in spread" if in_the_spread(speed) else change(speed["after_s"], speed["before_s"]))  # fmt: skip


def _losses(before: Record, after: Record) -> Iterator[tuple[str, str, str, str]]:
    yield "loss (nats/token)", f"{before['loss']:.4f}", f"{after['loss']:.4f}", by(before, after, "loss")
    yield "perplexity", perplexity_of(before), perplexity_of(after), by(before, after, "perplexity")
    if before["bits_per_byte"] is not None:
        yield ("bits per byte", f"{before['bits_per_byte']:.4f}", f"{after['bits_per_byte']:.4f}",
               by(before, after, "bits_per_byte"))  # fmt: skip


def _embeddings(before: Record, after: Record) -> Iterator[tuple[str, str, str, str]]:
    yield "passages found", f"{before['found']:.1%}", f"{after['found']:.1%}", by(before, after, "found")
    for key, name in (("agreement", "agreement of pairs"), ("cosine", "cosine to the whole"),
                      ("error", "error of the states")):  # fmt: skip
        if after[key] is not None:
            yield name, _four(before[key]), _four(after[key]), ""


def headline(found: Record) -> str:
    """The number that a model is known by: perplexity, or the share of passages that an encoder finds."""
    return f"{found['found']:.1%}" if "found" in found else perplexity_of(found)


def headline_name(record: Record) -> str:
    """What `headline` is."""
    return "held-out passages found" if encodes(record) else "held-out perplexity"


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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


def plural(kind: str) -> str:
    """Units of a kind."""
    return "channels of the width" if kind == "width" else f"{kind.replace('_', ' ')}s"


def perplexity_of(found: Record) -> str:
    """As many digits as matter; a power of e where it is large."""
    perplexity = found["perplexity"]
    if perplexity is None or perplexity >= 1e7:
        return f"e^{found['loss']:.1f}"
    return f"{perplexity:,.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def by(before: Record, after: Record, key: str) -> str:
    """The change as a share; nothing where there is none to tell."""
    if not before[key] or after[key] is None:
        return ""
    return change(after[key], before[key])


def milliseconds(speed: Record, side: str) -> str:
    """Median and half the interquartile range."""
    return f"{1e3 * speed[f'{side}_s']:.2f} ± {500 * speed[f'{side}_iqr_s']:.2f} ms"
