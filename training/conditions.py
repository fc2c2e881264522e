"""Where and how a result was made: what stands beside every number."""

import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def conditions(*, device: torch.device, seed: int, dtype: str) -> dict[str, str | int]:
    """Command, commit, device, versions, threads, seed and number format of this process."""
    return {
        "command": command(),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "dtype": dtype,
    }


def command() -> str:
    """What was typed, without the folder that the program lies in."""
    program = Path(sys.argv[0]).name
    return shlex.join(["sparse-transformers" if program == "__main__.py" else program, *sys.argv[1:]])


def commit() -> str:
    """Short hash of the checkout that this package lies in, "+" where files differ from it; "none" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "none"
    return result.stdout.strip() or "none"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """Most bytes of memory that this process has held at once (resident; GPU memory not counted)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
