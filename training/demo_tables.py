"""The demo's results on the terminal, from its records."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.page import change, count, data_size, duration
from training.records import Records, read_records


def show(folder: Path, console: Console) -> None:
    """Print the models beside the baselines, the pruning tables, and where the time went."""
    records = read_records(folder)
    for table in (_quality(records), _heads(records), _weights(records), _time(records)):
        console.print()
        console.print(table)


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    return table


def _quality(records: Records) -> Table:
    table = _table("The same held-out text", "", "bits per byte", "parameters", "active")
    for line in records.all("result"):
        model = records.named("model", line["name"]) or {}
        sizes = (count(model["parameters"]), count(model["active_parameters"])) if model else ()
        table.add_row(records.label(line["name"]), f"{line['bits_per_byte']:.4f}", *sizes)
    for line in records.all("baseline"):
        table.add_row(line["name"], f"{line['bits_per_byte']:.4f}")
    return table


def _heads(records: Records) -> Table:
    title = "Heads removed (bits per byte; parameters, file and speed are the same before and after recovery)"
    headers = ("removed", "left", "just pruned", "recovered", "change", "parameters", "file", "tokens/s")
    table = _table(title, *headers)
    lines = records.all("heads")
    for line in lines:
        table.add_row(
            f"{line['fraction']:.0%}", str(line["heads"]), f"{line['bits_per_byte']:.4f}",
            f"{line['recovered_bits_per_byte']:.4f}",
            change(line["recovered_bits_per_byte"], lines[0]["bits_per_byte"]),
            count(line["parameters"]), data_size(line["file_bytes"]), f"{line['tokens_per_s']:,.0f}",
        )  # fmt: skip
    return table


def _weights(records: Records) -> Table:
    title = "Weights zeroed, no retraining (dense matrices: masked weights run no faster)"
    table = _table(title, "zeros", "exactly", "bits per byte")
    for line in records.all("weights"):
        exactly = f"{line['zeros']:,} of {line['weights']:,}"
        table.add_row(f"{line['sparsity']:.0%}", exactly, f"{line['bits_per_byte']:.4f}")
    return table


def _time(records: Records) -> Table:
    table = _table("Time", "", "")
    for line in records.all("phase"):
        table.add_row(line["name"], duration(line["seconds"]))
    total = records.last("total")
    if total:
        table.add_row("in all", duration(total["seconds"]))
        table.add_row("peak memory", data_size(total["peak_memory_bytes"]))
    return table
