"""What a run of `prune` has finished, kept in OUT/.partial until the result is whole."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pruning.calibrated import Finished, MatrixReport
from training.durable import replace_durably
from training.prune_arguments import PARTIAL

RUN = "run.json"


class Partial:
    """Records by name, and the `pruning.calibrated.Journal` of a calibrated method: one file a block, whole or absent.

    Nothing is unpickled."""

    def __init__(self, out: Path) -> None:
        self.folder = out / PARTIAL

    def start(self, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Begin, or go on where the same arguments, model, text and software began.

        Raises: ValueError naming the first that differs; if the record is missing, for it is written first of all."""
        if not resume:
            self.folder.mkdir()
            self.keep(RUN, dict(fingerprint))
            return
        began = self.kept(RUN)
        if began is None:
            raise ValueError(f"{self.folder} has no {RUN}: remove the folder and start again without --resume")
        for name in fingerprint.keys() | began.keys():
            if began.get(name) != fingerprint.get(name):
                raise ValueError(f"--resume must find what the stopped run began with: {name} was {began.get(name)}, "
                                 f"got {fingerprint.get(name)}; or remove {self.folder} to start anew")  # fmt: skip

    def keep(self, name: str, record: Any) -> None:
        """Keep a record that JSON can hold."""
        replace_durably(self.folder / name, json.dumps(record).encode())

    def kept(self, name: str) -> Any:
        """The record of this name; None if there is none."""
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def blocks(self) -> int:
        """Number of finished blocks."""
        return len(list(self.folder.glob("block-*.safetensors")))

    def read(self, index: int) -> Sequence[Finished] | None:
        """The finished matrices of a block. Raises: ValueError if its file is damaged."""
        file = self._file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as held:
                reports = [MatrixReport(**one) for one in json.loads(held.metadata()["matrices"])]
                return [
                    Finished(one, held.get_tensor(f"weight {one.name}"), held.get_tensor(f"kept {one.name}"))
                    for one in reports
                ]
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): remove it, and --resume prunes that block again") from error

    def write(self, index: int, matrices: Sequence[Finished]) -> None:
        """Keep the matrices of a block."""
        tensors = {f"weight {one.report.name}": one.weight.contiguous() for one in matrices}
        tensors |= {f"kept {one.report.name}": one.kept.contiguous() for one in matrices}
        reports = json.dumps([asdict(one.report) for one in matrices])
        replace_durably(self._file(index), save(tensors, metadata={"matrices": reports}))

    def remove(self) -> None:
        """The run has ended, or has nothing worth going on from."""
        shutil.rmtree(self.folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"
