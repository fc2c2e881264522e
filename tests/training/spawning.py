"""Processes for tests of many ranks: forked from one that has imported what they need, torch and its compiler above
all, for which each would else take seconds of a core."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds that a loaded machine may take
FORKING = multiprocessing.get_context("forkserver")
# imported once, unchecked; what each rank patches, it patches for itself
FORKING.set_forkserver_preload(
    ["pytest", "torch._dynamo", "training.cli", "training.distributed", "tests.training.distributed_cases"]
)


class Rank:
    """python -m MODULE ARGUMENTS… in a process of its own; standard error goes to a file, standard output nowhere."""

    def __init__(self, module: str, arguments: Sequence[str], errors: Path | None, environment: dict[str, str]) -> None:
        self.errors = errors
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | environment
        self.process = FORKING.Process(target=_run, args=(module, tuple(arguments), errors, environment))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """As of subprocess: None while it runs, -signal where one ended it."""
        return self.process.exitcode

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The return code, or None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def said(self) -> str:
        """Its standard error, once it has ended."""
        assert self.wait() is not None and self.errors is not None
        return self.errors.read_text()


def _run(module: str, arguments: tuple[str, ...], errors: Path | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for path, stream in ((os.devnull, sys.stdout), (errors, sys.stderr)):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream.fileno())
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def spawn(module: str, world: int, folder: Path, *cases: str) -> None:
    """python -m MODULE RANK WORLD FOLDER CASE… for every rank, each of which must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[module, str(rank), str(world), str(folder), *cases] for rank in range(world)]
    with started(commands, [{}] * world) as running:
        assert [rank.wait() for rank in running] == [0] * world


@contextmanager
def launched(module: str, world: int, *arguments: str, **variables: str) -> Iterator[list[Rank]]:
    """python -m MODULE ARGUMENTS… for every rank as torchrun starts them, with a store that outlives them; no agent
    that stops the others once one has failed. Standard error is kept."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world), **variables,
    }  # fmt: skip
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    with started([[module, *arguments]] * world, ranks) as running:
        yield running


@contextmanager
def started(commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[list[Rank]]:
    """python -m COMMAND… each; killed at the end. Standard error is kept of those with variables of their own."""
    with tempfile.TemporaryDirectory() as folder:
        running = [
            Rank(module, arguments, Path(folder) / str(number) if environment else None, environment)
            for number, ((module, *arguments), environment) in enumerate(zip(commands, environments, strict=True))
        ]
        try:
            yield running
        finally:
            for rank in running:
                rank.process.kill()
                rank.process.join()
