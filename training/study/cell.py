"""One cell: its job, the training run, and the record that it leaves."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from training.checkpoint import latest_checkpoint
from training.conditions import commit, device_name
from training.config import RunConfig, from_dict, to_dict
from training.durable import replace_durably
from training.finite import NonFiniteError
from training.metrics import FILE_NAME as METRICS
from training.records import Line, read_lines
from training.run import remove_checkpoints, train
from training.study.cost import sparse_cost
from training.study.measures import take_measures
from training.study.records import DIVERGED, DONE
from training.study.regimes import REGIMES
from training.trainer import CHECKPOINTS, Outcome, choose_device

JOB, RECORD = "job.json", "record.json"
STOPPED = 75  # EX_TEMPFAIL: the same job goes on from its checkpoint


def write_job(config: RunConfig, facts: Line, *, measures: Sequence[str] = ()) -> Path:
    """Leave a job in the run's folder: the run, what its record starts with, and what is measured in the end."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / JOB
    replace_durably(path, json.dumps({"config": to_dict(config), "facts": facts, "measures": list(measures)}).encode())
    return path


def run_cell(job: Path) -> int:
    """Train, or go on training, and write ``record.json`` beside the job; returns the process's exit status.

    A loss that is not finite is a result (status "diverged"), not an error.
    """
    record = json.loads(job.read_text(encoding="utf-8"))
    config: RunConfig = from_dict(RunConfig, record["config"], where=str(job))
    started = time.perf_counter()
    if record["facts"]["kind"] == "regime":
        result = in_regime(config, record["facts"]["regime"])
        _leave(config, record["facts"] | result, started)
        return 0
    try:
        outcome = train(config, resume=latest_checkpoint(config.out / CHECKPOINTS) is not None)
    except NonFiniteError as error:
        result = {"status": DIVERGED, "error": str(error), "bits_per_byte": None, "loss": None}
    else:
        if outcome.stopped is not None:
            return STOPPED
        result = _result(config, outcome, record["facts"])
        if record["measures"]:
            result["measures"] = take_measures(record["measures"], config, outcome.checkpoint)
    _leave(config, record["facts"] | result, started)
    remove_checkpoints(config.out / CHECKPOINTS)
    return 0


def in_regime(config: RunConfig, name: str) -> Line:
    """The run's ``values`` in this regime, and of them the ``score`` that chooses the rate; both None, status
    "diverged", where it is not finite."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    values, score = REGIMES[name].take(config), REGIMES[name].score
    if not math.isfinite(values[score]):
        return {"status": DIVERGED, "score": None, "values": None}
    return {"status": DONE, "score": values[score], "values": values}


def _leave(config: RunConfig, line: Line, started: float) -> None:
    timed = line | _conditions(config) | {"wall_seconds": time.perf_counter() - started}
    replace_durably(config.out / RECORD, json.dumps(timed).encode())


def _result(config: RunConfig, outcome: Outcome, facts: Line) -> Line:
    # A cell killed between its last step and its record has its evaluation in the metrics.
    lines = [line for line in read_lines(config.out / METRICS) if "bits_per_byte" in line]
    return {
        "status": DONE,
        "bits_per_byte": lines[-1]["bits_per_byte"],
        **{name: lines[-1][name] for name in ("validation_bits_per_byte",) if name in lines[-1]},
        "loss": lines[-1]["eval_loss"],
        "train_loss": outcome.loss if outcome.loss == outcome.loss else None,
        "tokens": outcome.tokens,
        "training_flops": 3 * facts["flops_per_token"] * outcome.tokens,
        "seconds": outcome.seconds,
        **sparse_cost(config, outcome, facts),
    }


def _conditions(config: RunConfig) -> Line:
    return {
        "commit": commit(),
        "device": device_name(choose_device(config.train.device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": config.train.dtype,
    }
