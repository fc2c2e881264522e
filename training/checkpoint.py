"""Checkpoints that are whole or absent, and resume exactly.

``ROOT/step-00000100/`` holds config.json, model.safetensors and tokenizer.json (a folder that
``Transformer.from_pretrained`` reads), optimizer.safetensors, state.safetensors, state.json, and manifest.json with
the size and hash of each. ``ROOT/latest`` names the newest. Tensors are safetensors, the rest JSON: nothing unpickles.

A checkpoint is written in a hidden folder, flushed, renamed, and only then is ``latest`` replaced: a kill or a full
disk at any moment leaves the previous checkpoint as it was.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from pruning.dynamic import SparseAdamW
from training.durable import replace_durably, sync_folder, write_durably
from training.optim import Optimizers
from training.same_model import check_same_model
from training.state import join_tensors, split_tensors
from training.tokenizer import Tokenizer
from transformer import Transformer

LATEST, MANIFEST = "latest", "manifest.json"
MODEL, OPTIMIZER, STATE, STATE_TENSORS = "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"
Write = Callable[[Path, bytes], None]


def save_checkpoint(
    root: Path,
    *,
    step: int,
    model: Transformer,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    keep: int = 2,
    write: Write = write_durably,
) -> Path:
    """Write the checkpoint of ``step`` and make it the latest; keep the newest ``keep`` up to it, remove older ones.

    state: nested dicts and lists of tensors and JSON values. write(path, content) puts a file on the disk.
    Returns its folder. Raises: OSError, naming the checkpoint that is still good, if the disk is full or fails.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    root.mkdir(parents=True, exist_ok=True)
    folder, aside = root / f"step-{step:08d}", root / f".writing-{step:08d}"
    remove_unfinished(root)
    try:
        aside.mkdir()
        _write_files(aside, model, optimizers, tokenizer, state, write)
        complete(aside, folder, keep=keep, write=write)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise failed_to_write(error, folder, latest_checkpoint(root)) from error
    return folder


def complete(aside: Path, folder: Path, *, keep: int, write: Write = write_durably) -> None:
    """Give the files of ``aside`` a manifest, flush them, move them to ``folder`` and make that the latest.

    The newest ``keep`` checkpoints up to it stay.
    """
    files = {p.name: {"bytes": p.stat().st_size, "blake2b": _hash(p)} for p in sorted(aside.iterdir())}
    write(aside / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())
    for path in aside.iterdir():
        _flush(path)
    _put_in_place(aside, folder)
    replace_durably(folder.parent / LATEST, folder.name.encode())
    for old in [other for other in checkpoints(folder.parent) if other.name <= folder.name][:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, *, model: Transformer, optimizers: Optimizers) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser state in place, and return its ``state``.

    Raises: ValueError, naming the file and what to do, if a file is missing, cut short or changed, the weights have
    other shapes than the model's or are another model's, or the moments are another optimiser's. Nothing is changed
    then.
    """
    weights, slots, state = read_checkpoint(folder)
    check_shapes(weights, model.state_dict(), folder / MODEL)
    check_same_model(folder, model)
    load_optimizers(optimizers, slots, model=model)
    model.load_state_dict(weights)
    return state


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights by name, optimiser state by ``slot:name``, state) of a checkpoint.

    Raises: ValueError, naming the file and what to do, if a file is missing, cut short or changed.
    """
    verify(folder)
    weights, slots = _read_tensors(folder, MODEL), _read_tensors(folder, OPTIMIZER)
    state = join_tensors(json.loads((folder / STATE).read_text()), _read_tensors(folder, STATE_TENSORS))
    return weights, slots, state


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that was completed, or None.

    ``latest`` names it; if that file is empty (a disk that failed), the newest folder that is whole is taken.
    Raises: FileNotFoundError if ``latest`` names a folder that is not there.
    """
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if not name:
        return next((folder for folder in reversed(checkpoints(root)) if _is_whole(folder)), None)
    folder = root / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{pointer} names {folder.name}, which is not there: {_instead(folder)}")
    return folder


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises: ValueError naming the first that differs and what to do."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: {folder.name} is not a whole checkpoint; {_instead(folder)}")
    try:
        files = _files(manifest)
    except ValueError as error:
        raise ValueError(f"{manifest} was cut short or is not JSON ({error}); {_instead(folder)}") from error
    for name, written in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != written["bytes"]:
            raise ValueError(f"{file} has {size} bytes of {written['bytes']}: it was cut short; {_instead(folder)}")
        if _hash(file) != written["blake2b"]:
            raise ValueError(f"{file} is not what was written (hash differs); {_instead(folder)}")


def check_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path) -> None:
    """Raises: ValueError if names or shapes differ from the model's ``own``, naming the first."""
    wanted = {name: list(tensor.shape) for name, tensor in own.items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{file} is of another shape: {name} is {found.get(name, 'absent')}, this run's model has"
                f" {wanted.get(name, 'none')}: resume with the [model] and [data] settings that made it,"
                " or start a new --out"
            )


def optimizer_tensors(optimizers: Optimizers, *, model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state as ``slot:parameter name``."""
    return {
        f"{slot}:{name}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizers.owner(parameter).state.get(parameter, {}).items()
    }


def load_optimizers(optimizers: Optimizers, tensors: Mapping[str, Tensor], *, model: nn.Module) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises: ValueError if a tensor belongs to no parameter, a table's moments are not row-wise Adam's, or the others not
    those of the optimiser that a run has with or without ``optim.sparse_state``. Nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        slot, _, name = key.partition(":")
        if name not in parameters:
            raise ValueError(f"the optimiser state {key!r} belongs to no parameter of this model")
        rowwise = optimizers.owner(parameters[name]) is optimizers.tables
        wanted = parameters[name].shape[:1] if rowwise else parameters[name].shape
        if slot == "exp_avg_sq" and value.shape != wanted:
            raise ValueError(
                f"the optimiser state {key!r} must have shape {list(wanted)}, got {list(value.shape)}:"
                " it is another optimiser's; start a new --out"
            )
        if slot in ("mean", "exp_avg") and not rowwise and (slot == "mean") != isinstance(optimizers.main, SparseAdamW):
            made, have = ("true", "false") if slot == "mean" else ("false", "true")
            raise ValueError(
                f"the optimiser state {key!r} was made with optim.sparse_state = {made}, this run has {have}:"
                " resume with the one that made it, or start a new --out"
            )
    for key, value in tensors.items():
        slot, _, name = key.partition(":")
        parameter = parameters[name]
        owner = optimizers.owner(parameter)
        # a fused optimiser counts its steps on the parameter's device, any other on the CPU
        here = value.ndim > 0 or owner.defaults.get("fused")
        owner.state[parameter][slot] = value.to(parameter.device) if here else value


def checkpoint_bytes(model: nn.Module) -> int:
    """About how large a checkpoint is: weights and two moments of AdamW for each."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())


def _write_files(
    folder: Path,
    model: Transformer,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    write: Write,
) -> None:
    plain, tensors = split_tensors(state)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    write(folder / OPTIMIZER, safetensors.save(optimizer_tensors(optimizers, model=model)))
    write(folder / STATE_TENSORS, safetensors.save(tensors))
    write(folder / STATE, json.dumps(plain).encode())


def _put_in_place(aside: Path, folder: Path) -> None:
    sync_folder(aside)
    retired = folder.with_name(f".retired-{folder.name}")
    if folder.exists():  # the same step again, after resuming from an earlier one
        folder.rename(retired)
    aside.rename(folder)
    sync_folder(folder.parent)
    if retired.exists():
        shutil.rmtree(retired)


def remove_unfinished(root: Path) -> None:
    """Remove what a process left that died while it wrote a checkpoint."""
    for pattern in (".writing-*", ".retired-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def failed_to_write(error: BaseException, folder: Path, good: Path | None) -> OSError:
    """The error to raise: what failed, and the checkpoint that is still good."""
    kept = f"{good} is intact: resume from it" if good else "no checkpoint was complete before it"
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        free = shutil.disk_usage(folder.parent).free
        message = f"disk full ({free / 2**20:.0f} MiB free) while writing {folder}; free some space; {kept}"
        return OSError(errno.ENOSPC, message)
    return OSError(getattr(error, "errno", None) or errno.EIO, f"could not write {folder}: {error}; {kept}")


def _instead(folder: Path) -> str:
    for other in reversed(checkpoints(folder.parent)):
        if other != folder and _is_whole(other):
            return f"resume from the one before with --checkpoint {other}"
    return "there is no other whole checkpoint: start again with --overwrite, or in a new --out"


def _is_whole(folder: Path) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = _files(manifest)
    except ValueError:
        return False
    return all((folder / n).is_file() and (folder / n).stat().st_size == f["bytes"] for n, f in files.items())


def _files(manifest: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return files


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.load_file(folder / name)
    except SafetensorError as error:
        raise ValueError(f"{folder / name} is not readable ({error}); {_instead(folder)}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
