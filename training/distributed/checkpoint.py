"""Checkpoints of many ranks, each of which writes and reads its own part; read by any number of ranks.

``ROOT/step-00000100/`` holds the shards and the metadata of torch.distributed.checkpoint, state.json, what each rank
keeps for itself in rank-00000.json, …, config.json and tokenizer.json, and manifest.json with the size and hash of
each. It is written in a hidden folder and renamed once every rank has written, as :mod:`training.checkpoint` does.

Every tensor is stored under its name as one, whether ranks hold all of it, a shard of a DTensor, or some of the experts
of a stack; so any other layout finds it.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from pruning.sharding import Layout
from training.checkpoint import (
    STATE,
    Write,
    check_shapes,
    complete,
    failed_to_write,
    latest_checkpoint,
    load_optimizers,
    optimizer_tensors,
    read_checkpoint,
    remove_unfinished,
    verify,
)
from training.distributed.active_moments import in_rows, in_shape
from training.distributed.faults import Tell
from training.optim import Optimizers
from training.same_model import check_same_model
from training.state import join_tensors, random_state, split_tensors
from training.tokenizer import Tokenizer
from transformer import Transformer

METADATA = ".metadata"
MODEL, OPTIMIZER, SHARED, RANK = "model/", "optimizer/", "shared/", "rank/"
OWN = ("random", "compressor")  # parts of the state that every rank has for itself


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written by this module."""
    return (folder / METADATA).is_file()


def gathered_tensors(
    model: nn.Module,
    optimizers: Optimizers,
    state: Mapping[str, Any],
    *,
    layouts: Mapping[str, Layout],
    rank: int,
    copy: bool,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors by key, what is left of the state, what is left of this rank's own) for :func:`write_sharded`.

    copy: the tensors shall not change when training goes on.
    """
    weights, slots = model.state_dict(), optimizer_tensors(optimizers, model=model)
    if copy:
        weights, slots = ({key: tensor.detach().clone() for key, tensor in part.items()} for part in (weights, slots))
    found = {f"{MODEL}{key}": tensor for key, tensor in weights.items()}
    found |= {f"{OPTIMIZER}{key}": tensor for key, tensor in in_shape(slots, model, layouts).items()}
    found = laid_out(found, layouts)
    shared, tensors = split_tensors({key: value for key, value in state.items() if key not in OWN})
    own, own_tensors = split_tensors({key: value for key, value in state.items() if key in OWN})
    found |= {f"{SHARED}{key}": tensor for key, tensor in tensors.items()}
    found |= {f"{RANK}{rank}/{key}": tensor for key, tensor in own_tensors.items()}
    return found, shared, own


def laid_out(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The tensors with those of spread experts, and of their optimiser slots, as DTensors that share their memory;
    numbers, and the rows of a whole stack's moments, as they are."""
    found = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(MODEL).removeprefix(OPTIMIZER).rpartition(":")[2]
        found[key] = layouts[name](tensor) if name in layouts and tensor.ndim > 1 else tensor
    return found


def write_sharded(
    folder: Path,
    *,
    tensors: dict[str, Tensor],
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    model: Transformer,
    tokenizer: Tokenizer,
    keep: int,
    write: Write,
    rank: int,
    tell: Tell,
    group: dist.ProcessGroup,
) -> None:
    """Write this rank's part of a checkpoint; rank 0 completes it once all have. Every rank calls it.

    Raises: OSError, on every rank, naming the checkpoint that is still good, if one of them could not write.
    """
    aside = folder.with_name(f".writing-{folder.name.removeprefix('step-')}")
    ranks = len(_together(lambda: _prepare(aside) if rank == 0 else None, folder, tell=tell))
    _together(lambda: _write_part(aside, tensors, own, write, rank, group), folder, tell=tell)

    def finish() -> None:
        model.config.save(aside / "config.json")
        tokenizer.save(aside)
        write(aside / STATE, json.dumps({**shared, "ranks": ranks}).encode())
        complete(aside, folder, keep=keep, write=write)

    _together(finish if rank == 0 else lambda: None, folder, tell=tell)


def load_sharded(
    folder: Path, *, model: Transformer, optimizers: Optimizers, layouts: Mapping[str, Layout], rank: int, tell: Tell
) -> dict[str, Any]:
    """Put this rank's part of the weights and optimiser state in place, and return the state. Every rank calls it.

    With another number of ranks than wrote it, ``random`` is seeded anew from (step, rank), and ``compressor`` holds
    an equal share of the sum of what all ranks had not sent.
    Raises: ValueError, on every rank, if a file is damaged or the checkpoint is of another model.
    """
    ranks = _checked(folder, rank=rank, tell=tell)
    reader = dcp.FileSystemReader(folder)
    stored = {
        key: entry
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state = json.loads((folder / STATE).read_text())
    weights = laid_out({f"{MODEL}{key}": tensor for key, tensor in model.state_dict().items()}, layouts)
    models = {key: torch.empty(entry.size, device="meta") for key, entry in stored.items() if key.startswith(MODEL)}
    check_shapes(_under(models, MODEL), _under(weights, MODEL), folder)
    check_same_model(folder, model)
    slots = _empty_slots(stored, model)
    held = laid_out({f"{OPTIMIZER}{key}": tensor for key, tensor in slots.items()}, layouts)
    writers = [rank] if state["ranks"] == ranks else list(range(state["ranks"]))
    wanted = (SHARED, *(f"{RANK}{writer}/" for writer in writers))
    rest = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(wanted)
    }
    dcp.load({**weights, **held, **rest}, storage_reader=reader, no_dist=not dist.is_initialized())
    load_optimizers(optimizers, in_rows(slots, model, layouts), model=model)
    shared: dict[str, Any] = join_tensors(state, _under(rest, SHARED))
    return shared | _own_state(folder, rest, writers, step=state["step"], rank=rank, ranks=ranks)


def load_whole(
    folder: Path, *, model: Transformer, optimizers: Optimizers, layouts: Mapping[str, Layout], rank: int
) -> dict[str, Any]:
    """What one process wrote (:func:`training.checkpoint.save_checkpoint`), for each rank its part of it.

    Generators are seeded anew from (step, rank). Raises: as :func:`training.checkpoint.load_checkpoint`.
    """
    weights, slots, state = read_checkpoint(folder)
    check_shapes(weights, laid_out(model.state_dict(), layouts), folder)
    check_same_model(folder, model)
    parameters = dict(model.named_parameters())
    empty = {key: _empty_slot(slot.shape, slot.dtype, parameters[key.partition(":")[2]]) for key, slot in slots.items()}
    for key, part in laid_out(empty, layouts).items():
        fill(part, slots[key])
    load_optimizers(optimizers, in_rows(empty, model, layouts), model=model)
    for key, part in laid_out(model.state_dict(), layouts).items():
        fill(part, weights[key])
    return {**state, "random": reseeded(state["step"], rank)}


@torch.no_grad()
def fill(part: Tensor, whole: Tensor) -> None:
    """Copy into a DTensor its shard of ``whole``, into any other tensor all of it."""
    if isinstance(part, DTensor):
        mesh = part.device_mesh
        whole = distribute_tensor(whole.to(mesh.device_type), mesh, part.placements, src_data_rank=None)
        part.to_local().copy_(whole.to_local())
    else:
        part.copy_(whole)


def _own_state(
    folder: Path, tensors: Mapping[str, Tensor], writers: list[int], *, step: int, rank: int, ranks: int
) -> dict[str, Any]:
    read = {
        writer: join_tensors(json.loads((folder / own_file(writer)).read_text()), _under(tensors, f"{RANK}{writer}/"))
        for writer in writers
    }
    if writers == [rank]:
        own: dict[str, Any] = read[rank]
        return own
    kept = {"random": reseeded(step, rank)}
    if "compressor" in read[0]:
        kept["compressor"] = shared_out([read[writer]["compressor"] for writer in writers], ranks)
    return kept


def shared_out(states: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """A :meth:`training.compression.GradientCompressor.state_dict` for each of ``ranks``: Σ over states / ranks.

    The sum over ranks of what was not sent stays what it was.
    """
    found: dict[str, Any] = {**states[0]}
    for kind in ("residuals", "velocities"):
        names = {name for state in states for name in state[kind]}
        found[kind] = {
            name: sum(state[kind][name] for state in states if name in state[kind]) / ranks for name in sorted(names)
        }
    return found


def reseeded(step: int, rank: int) -> dict[str, Any]:
    """Generators for a rank that goes on at ``step`` among another number of ranks."""
    seed = int(np.random.SeedSequence((step, rank)).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return random_state()


def own_file(rank: int) -> str:
    """Name of the file with what a rank keeps for itself."""
    return f"rank-{rank:05d}.json"


def _prepare(aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(aside.parent)
    aside.mkdir()


def _write_part(
    aside: Path, tensors: dict[str, Tensor], own: Mapping[str, Any], write: Write, rank: int, group: dist.ProcessGroup
) -> None:
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=group)
    write(aside / own_file(rank), json.dumps(own).encode())


def _together(act: Callable[[], None], folder: Path, *, tell: Tell) -> list[str]:
    """Act, and fail on every rank if it failed on one; one text a rank otherwise."""
    problem: BaseException | None = None
    try:
        act()
    except (OSError, dcp.api.CheckpointException) as error:
        problem = error
    told = tell("" if problem is None else str(problem))
    reasons = [text for text in told if text]
    if reasons:
        shutil.rmtree(folder.with_name(f".writing-{folder.name.removeprefix('step-')}"), ignore_errors=True)
        good = latest_checkpoint(folder.parent)
        raise failed_to_write(problem or OSError(reasons[0]), folder, good) from problem
    return told


def _checked(folder: Path, *, rank: int, tell: Tell) -> int:
    """Rank 0 compares the files with the manifest for all. Returns the number of ranks."""
    problem = ""
    if rank == 0:
        try:
            verify(folder)
        except ValueError as error:
            problem = str(error)
    told = tell(problem)
    if told[0]:
        raise ValueError(told[0])
    return len(told)


def _empty_slots(stored: Mapping[str, TensorStorageMetadata], model: nn.Module) -> dict[str, Tensor]:
    """Zeros for every slot of the optimiser that the checkpoint has."""
    parameters = dict(model.named_parameters())
    found = {}
    for key in [key.removeprefix(OPTIMIZER) for key in stored if key.startswith(OPTIMIZER)]:
        _, _, name = key.partition(":")
        if name not in parameters:
            raise ValueError(f"the optimiser state {key!r} belongs to no parameter of this model")
        entry = stored[f"{OPTIMIZER}{key}"]
        found[key] = _empty_slot(entry.size, entry.properties.dtype, parameters[name])
    return found


def _empty_slot(size: torch.Size, dtype: torch.dtype, parameter: nn.Parameter) -> Tensor:
    """Zeros, laid out as the parameter; but a number as it is, and the rows of SparseAdamW."""
    if len(size) == 0:
        return torch.zeros(())
    if len(size) != parameter.ndim:
        return torch.zeros(size, dtype=dtype, device=parameter.device)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
