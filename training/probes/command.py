"""``sparse-transformers study NAME`` for a study that is a probe."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from training.probes import finetuning_page, topology_page, transfer_page
from training.probes.finetuning import Finetuning
from training.probes.page import Findings, write_page
from training.probes.runner import Experiment, Lab, run_probe
from training.probes.spec import Kind, Probe, load_probe
from training.probes.topology import Topology
from training.probes.transfer import Transfer
from training.records import Line
from training.study import StudyArguments, find_study
from training.study.pool import cores
from training.study.records import FOLDER, open_records

EXPERIMENTS: dict[Kind, Callable[[Lab], Experiment]] = {
    "finetuning": Finetuning, "topology": Topology, "transfer": Transfer,
}  # fmt: skip
FINDINGS: dict[Kind, Callable[[Probe, list[Line]], Findings]] = {
    "finetuning": finetuning_page.findings, "topology": topology_page.findings, "transfer": transfer_page.findings,
}  # fmt: skip


def probe_command(arguments: StudyArguments, console: Console) -> Path:
    """Run what the arguments ask for; returns the page's path. Stopped, the same command goes on cell by cell.

    As many cells at once as --jobs, else one for each core over the probe's own threads. Raises: ValueError for a
    wrong probe, for --speed-only, which a probe has not, for more jobs than cores, and when the budget is spent;
    KeyboardInterrupt on Ctrl-C, which says what is kept.
    """
    probe = load_probe(find_study(arguments.study))
    if arguments.speed_only:
        raise ValueError("a probe times nothing: leave out --speed-only")
    if arguments.jobs is not None and not 1 <= arguments.jobs <= cores():
        raise ValueError(f"jobs must be in [1, cores={cores()}], got {arguments.jobs}")
    jobs = arguments.jobs or max(1, cores() // probe.base["train"].get("threads", cores()))
    out = FOLDER / probe.name
    records = arguments.records or out / "records.jsonl"
    if not arguments.page_only:
        run_probe(
            probe,
            EXPERIMENTS[probe.probe],
            out=out,
            records=records,
            budget=arguments.budget,
            jobs=jobs,
            console=console,
        )
    return write_probe_page(probe, open_records(records), folder=records.parent)


def write_probe_page(probe: Probe, lines: list[Line], *, folder: Path) -> Path:
    """The probe's page and figures from its records; returns the page's path."""
    return write_page(probe, lines, FINDINGS[probe.probe](probe, lines), folder=folder)
