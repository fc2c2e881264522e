"""Probes: declared measurements for which a grid of held-out losses is not enough (masks handed on, traces, paths)."""

from training.probes.command import probe_command, write_probe_page
from training.probes.runner import Experiment, Lab, run_probe
from training.probes.spec import Probe, is_probe, load_probe

__all__ = [
    "Experiment",
    "Lab",
    "Probe",
    "is_probe",
    "load_probe",
    "probe_command",
    "run_probe",
    "write_probe_page",
]
