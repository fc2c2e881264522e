"""What a study declares: arms, each a change of one base run; learning rates that all of them try; seeds; a budget."""

import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from training.config import DataConfig, RunConfig, from_dict
from training.records import Line
from training.run import flat
from training.sparsify_config import READS, SparsifyConfig, unread
from training.study.question import Question
from training.study.records import cells_by_key, regimes_by_key
from training.study.widening import tried

FOLDER = Path("examples/studies")
SET_BY_STUDY = ("optim.lr", "seed", "out", "data.validation")
# They decide where a cell runs and what it leaves behind, not what it computes.
NOT_IN_KEY = frozenset({"out", "data.cache", "train.threads", "train.keep", "train.save_every", "train.log_every",
                        "train.tensorboard"})  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One contender. changes: dotted keys over the base, e.g. {"model.router": "switch"}.

    flops: 'match' must use as many active FLOPs a token as the reference, 'free' may differ. ranked: False keeps it
    out of the verdict. grid: False leaves it out of the study's grid. rate_of: the arm whose best learning rate it
    takes, instead of a sweep of its own. measures: besides the study's. note: printed below the table.
    """

    name: str
    label: str
    changes: dict = field(default_factory=dict)
    flops: Literal["match", "free"] = "match"
    ranked: bool = True
    grid: bool = True
    rate_of: str | None = None
    measures: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Study:
    """A declared experiment.

    base: the tables of a run config. arm: the contenders, ``reference`` one of their names. lrs: peak learning rates,
    each tried by every arm with the first seed, for ``sweep_steps`` steps (the run's own if left out); the best of an
    arm is run with every seed. validation: share of the documents that the sweep's cells do not train on and that
    chooses the rates, while the held-out text compares the arms; 0: the held-out text does both. beyond: rates that an
    arm may try besides, each the next beyond the end of its sweep at which its best rate is, until the best is inside
    (:mod:`training.study.widening`). memory_lr: whether the rate is also that of the tables of memories. match_flops:
    relative tolerance of equal active FLOPs. grid: dotted key → values; an arm other than the reference becomes one arm
    for each combination; with sweep_at, dotted key → value, only those of these values have a sweep, and the others of
    the same arm take its best rate. expected: what was expected beforehand. measures: taken of the model at the end of
    each cell of full length (:mod:`training.study.measures`). regimes: further trainings of every arm, each with a
    sweep of its own over ``regime_lrs`` (``lrs`` if left out) with the first seed, then all seeds at the best rate
    (:mod:`training.study.regimes`); ``regime_changes``: regime → dotted keys over the base there. ask: questions that
    the page answers besides the comparison with the reference. sections: more parts of the page
    (:mod:`training.study.page`). speeds: whether step times are taken. why: paragraphs below the answers, in the
    study's words: what its arms say of where the expectations do not hold.
    """

    name: str
    question: str
    base: dict
    arm: tuple[Arm, ...]
    reference: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    budget_minutes: float
    match_flops: float = 0.02
    sweep_steps: int | None = None
    validation: float = 0.0
    beyond: int = 0
    memory_lr: bool = False
    grid: dict = field(default_factory=dict)
    sweep_at: dict = field(default_factory=dict)
    expected: str | None = None
    measures: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ()
    regime_lrs: tuple[float, ...] = ()
    regime_changes: dict = field(default_factory=dict)
    ask: tuple[Question, ...] = ()
    sections: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    speeds: bool = True

    def __post_init__(self) -> None:
        grids = ((arm, self.grid if arm.grid and arm.name != self.reference else {}) for arm in self.arm)
        variants = (variant for arm, grid in grids for variant in _over_grid(arm, grid, self.sweep_at))
        object.__setattr__(self, "arm", tuple(variants))
        _check(self)

    def named(self, name: str) -> Arm:
        """The arm of this name. Raises: ValueError if there is none."""
        found = [arm for arm in self.arm if arm.name == name]
        if not found:
            raise ValueError(f"arm must be one of {', '.join(arm.name for arm in self.arm)}, got {name!r}")
        return found[0]

    @property
    def steps(self) -> int:
        """Optimiser steps of the base run."""
        return int(flat(self.base)["train.steps"])

    @property
    def chosen_by(self) -> str:
        """The number in a sweep cell's record by which rates are chosen."""
        return "validation_bits_per_byte" if self.validation else "bits_per_byte"


@dataclass(frozen=True)
class Cell:
    """One training run of a study. steps None: the arm's own. regime: None, or which of the study's. validation: share
    of the documents kept from training."""

    arm: Arm
    lr: float
    seed: int
    steps: int | None = None
    regime: str | None = None
    validation: float = 0.0


def find_study(name: str) -> Path:
    """The file of a study: a path that ends in .toml, or a name in examples/studies.

    Raises: FileNotFoundError naming the studies that are there.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml"))) or f"none in {FOLDER}"
        raise FileNotFoundError(f"no study at {path}; studies here: {known}")
    return path


def load_study(path: Path) -> Study:
    """Read a study.

    Raises: ValueError for bad TOML, an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    study: Study = from_dict(Study, record, where=str(path))
    return study


def sweep_cells(study: Study, lines: Sequence[Line] = ()) -> list[Cell]:
    """Every arm at every learning rate with the first seed; rates outermost, so that every arm is timed early. Then the
    rates beyond the sweep's ends that the records ask for.

    Arms that take another's rate have none."""
    arms, known = [arm for arm in study.arm if arm.rate_of is None], cells_by_key(lines)

    def cell(arm: Arm, lr: float) -> Cell:
        return Cell(arm, lr, study.seeds[0], study.sweep_steps, validation=study.validation)

    def rates(arm: Arm) -> list[float]:
        return tried(study.lrs, beyond=study.beyond, look=lambda lr: known.get(cell_key(study, cell(arm, lr))),
                     score=study.chosen_by)  # fmt: skip

    further = [cell(arm, lr) for arm in arms for lr in rates(arm)[len(study.lrs) :]]
    return [cell(arm, lr) for lr in study.lrs for arm in arms] + further


def seed_cells(study: Study, best: dict[str, float]) -> list[Cell]:
    """Every arm of ``best`` (arm's name → learning rate) with every seed at full length."""
    return [Cell(arm, best[arm.name], seed) for seed in study.seeds for arm in study.arm if arm.name in best]


def regime_sweep(study: Study, regime: str, lines: Sequence[Line] = ()) -> list[Cell]:
    """Every arm in the regime at every rate of ``regime_lrs`` with the first seed, then those beyond the ends."""
    given, known = study.regime_lrs or study.lrs, regimes_by_key(lines)

    def cell(arm: Arm, lr: float) -> Cell:
        return Cell(arm, lr, study.seeds[0], regime=regime)

    def rates(arm: Arm) -> list[float]:
        return tried(given, beyond=study.beyond, look=lambda lr: known.get(cell_key(study, cell(arm, lr))),
                     score="score")  # fmt: skip

    further = [cell(arm, lr) for arm in study.arm for lr in rates(arm)[len(given) :]]
    return [cell(arm, lr) for lr in given for arm in study.arm] + further


def regime_seeds(study: Study, regime: str, best: dict[str, float]) -> list[Cell]:
    """Every arm of ``best`` (arm's name → learning rate) in the regime with every seed."""
    return [replace(cell, regime=regime) for cell in seed_cells(study, best)]


def measures_of(study: Study, cell: Cell) -> tuple[str, ...]:
    """What is measured when the cell ends; nothing after a short run of a sweep, or in a regime."""
    if cell.regime is not None or cell.validation:
        return ()
    return (*study.measures, *cell.arm.measures) if cell.steps in (None, study.steps) else ()


def declared(study: Study, cell: Cell) -> dict[str, Any]:
    """The settings that a cell states, flat: the base, its regime's changes, the arm's, rate, seed and steps."""
    base = flat(study.base) | flat(study.regime_changes.get(cell.regime or "", {}))
    values = base | flat(cell.arm.changes) | {"optim.lr": cell.lr, "seed": cell.seed}
    if study.memory_lr:
        values["optim.memory_lr"] = cell.lr
    if cell.validation:
        values["data.validation"] = cell.validation
    return values if cell.steps is None else values | {"train.steps": cell.steps}


def cell_key(study: Study, cell: Cell) -> str:
    """A hash of the settings that decide the cell's numbers. It depends on the study's text alone."""
    values = {name: value for name, value in declared(study, cell).items() if name not in NOT_IN_KEY}
    if measures := measures_of(study, cell):
        values["measures"] = measures
    if cell.regime is not None:
        values["regime"] = cell.regime
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def run_config(study: Study, cell: Cell, *, out: Path, threads: int) -> RunConfig:
    """The cell as a training run: of the base's [sparsify] what the arm's method reads, of its own changes all.

    Raises: ValueError naming the arm where its settings are wrong."""
    stated, own = declared(study, cell), flat(cell.arm.changes)
    method = stated.get("sparsify.method", SparsifyConfig.method)
    others = {f"sparsify.{word}" for word in unread(method)} - own.keys() if method in READS else set()
    values = {name: value for name, value in stated.items() if name not in others}
    values |= {"out": str(out), "train.threads": threads}
    config: RunConfig = from_dict(RunConfig, _nested(values), where=f"arm {cell.arm.name!r} of study {study.name!r}")
    return config


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in values.items():
        *tables, key = name.split(".")
        place = root
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    return root


def _over_grid(arm: Arm, grid: dict, sweep_at: dict) -> list[Arm]:
    if not grid:
        return [arm]
    variants = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        suffix, changes = _suffix(chosen), flat(arm.changes) | chosen
        named = replace(arm, name=f"{arm.name} {suffix}", label=f"{arm.label}, {suffix}", changes=changes, grid=False)
        swept = chosen | sweep_at
        variants.append(named if swept == chosen else replace(named, rate_of=f"{arm.name} {_suffix(swept)}"))
    return variants


def _suffix(chosen: dict) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in chosen.items())


def _check(study: Study) -> None:
    names = [arm.name for arm in study.arm]
    if len(set(names)) != len(names):
        raise ValueError(f"arms must have different names, got {', '.join(names)}")
    study.named(study.reference)
    odd = [f"{key} = {value}" for key, value in study.sweep_at.items() if value not in study.grid.get(key, [])]
    if odd:
        raise ValueError(f"sweep_at must be of the grid's values, got {', '.join(odd)}")
    for arm in study.arm:
        if arm.rate_of is not None and (arm.rate_of == arm.name or study.named(arm.rate_of).rate_of is not None):
            raise ValueError(f"rate_of of arm {arm.name!r} must be an arm with a sweep of its own, got {arm.rate_of!r}")
    for question in study.ask:
        question.check(names)
    for name, several in {"lrs": study.lrs, "seeds": study.seeds}.items():
        if not several or len(set(several)) != len(several):
            raise ValueError(f"{name} must be at least one value, each once, got {list(several)}")
    for name, rates in {"lrs": study.lrs, "regime_lrs": study.regime_lrs}.items():
        if not all(lr > 0 for lr in rates) or len(set(rates)) != len(rates):
            raise ValueError(f"{name} must be positive, each once, got {list(rates)}")
    if not 0 < study.budget_minutes < math.inf:
        raise ValueError(f"budget_minutes must be positive, got {study.budget_minutes}")
    if study.validation and study.regimes:
        raise ValueError(f"validation must be 0 with regimes, which choose by their own text, got {study.validation}")
    if study.beyond < 0:
        raise ValueError(f"beyond must be at least 0, got {study.beyond}")
    if not study.match_flops >= 0:
        raise ValueError(f"match_flops must be at least 0, got {study.match_flops}")
    base = flat(study.base)
    left = 1 - base.get("data.held_out", DataConfig.held_out)
    if not 0 <= study.validation < left:
        raise ValueError(f"validation must be in [0, 1 - data.held_out={left:g}), got {study.validation}")
    if "train.steps" not in base or base.get("train.dtype", "auto") == "auto":
        raise ValueError("base must state train.steps, and train.dtype other than 'auto', which a busy machine changes")
    if study.sweep_steps is not None and not 0 < study.sweep_steps <= base["train.steps"]:
        raise ValueError(f"sweep_steps must be in [1, train.steps={base['train.steps']}], got {study.sweep_steps}")
    for place, values in [
        ("base", base),
        *((name, flat(changes)) for name, changes in study.regime_changes.items()),
        *((f"arm {arm.name!r}", flat(arm.changes)) for arm in study.arm),
    ]:
        taken = [name for name in SET_BY_STUDY if name in values]
        if taken:
            raise ValueError(f"{place} must not set {', '.join(taken)}: the study does")
