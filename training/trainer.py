"""The training loop."""

import errno
import math
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moe import MixtureOfDepths, MoE, NoisyTopKRouter
from training.checkpoint import Write, checkpoint_bytes, latest_checkpoint
from training.config import OptimConfig, TrainConfig
from training.data import Batch, Batches, Data, Stream
from training.durable import write_durably
from training.evaluation import Evaluation, evaluate
from training.finite import NonFiniteError, first_non_finite, refusals
from training.metrics import Metrics, NoMetrics
from training.moments import (
    Sparsifier,
    add_gates,
    all_agree,
    balance_routers,
    evaluating,
    finish_all,
    gate_moments,
    load_gate_moments,
    observe_all,
    parametrised,
    passes,
    settle_all,
)
from training.optim import longest_warmup, lr_multiplier, make_optimizers, set_lr
from training.parallel import Alone, Parallel, blame
from training.precision import choose_precision
from training.progress import Interruption, ProgressBar, interruptions
from training.sparsity import Pace
from training.state import random_state, set_random_state
from training.step import SideLosses, StepOutput, accumulate, depth_stats, routing_stats
from transformer import Transformer, generate

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. stopped: None at the last step, else the signal's name or ``stop_at``. sparsifiers: those that
    took part, as they are at the end."""

    step: int
    tokens: int
    seconds: float
    loss: float
    evaluation: Evaluation | None
    checkpoint: Path
    stopped: str | None
    sparsifiers: tuple[Sparsifier, ...] = ()


class Trainer:
    """Trains a model on tokenised data, step by step.

    out: folder for metrics.jsonl and checkpoints/. length: tokens of a sequence. sparsifiers: take part in each step
    (see :mod:`training.moments`); their own parameters join the optimiser. pace: what prunings do
    to the learning rate. write: puts checkpoint files on the disk. parallel: the processes that train this model
    together, which has been placed on them; None for one.
    Tables of memories get sparse gradients and row-wise Adam (:func:`training.optim.make_optimizers`).
    Raises: OSError before any work if the disk has no room for a checkpoint; ValueError if samples are asked for and
    the prompt has no token or leaves the model no room for one, or a load loss from routers that estimate no load.
    """

    def __init__(
        self,
        model: Transformer,
        data: Data,
        *,
        out: Path,
        length: int,
        optim: OptimConfig,
        train: TrainConfig,
        seed: int = 0,
        sparsifiers: Sequence[Sparsifier] = (),
        write: Write = write_durably,
        pace: Pace | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.parallel: Parallel = parallel or Alone()
        self.out, self.length, self.optim, self.train, self.data = out, length, optim, train, data
        self.device = choose_device(train.device)
        self.precision = choose_precision(train.dtype, device=self.device, weights=next(model.parameters()).dtype)
        self.model = model.to(self.device)
        self.model.gradient_checkpointing(train.checkpointing)
        if train.compile:
            for layer in self.model.layers:
                layer.compile()
        self.optimizers = make_optimizers(
            self.model,
            lr=optim.lr,
            memory_lr=optim.memory_lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            eps=optim.eps,
            router_lr=optim.router_lr,
            sparse_state=optim.sparse_state,
        )
        add_gates(sparsifiers, self.optimizers.main)
        self.pace = pace or Pace()
        self.batches: Stream = Batches(data.train, batch=train.batch, length=length, seed=seed)
        self.sparsifiers, self.seed, self._write = tuple(sparsifiers), seed, write
        self.side = SideLosses(
            balance=train.aux,
            scope=train.aux_scope,
            z=train.z,
            importance=train.importance,
            load=train.load,
            entropy=train.entropy,
        )
        if train.load:
            require_load_estimates(self.model)
        self.moe_layers = sum(isinstance(module, MoE) for module in self.model.modules())
        self.depth_layers = sum(isinstance(module, MixtureOfDepths) for module in self.model.modules())
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.saved: tuple[int, Path] | None = None
        if train.sample_every is not None:
            self._check_prompt()
        require_room(out, checkpoint_bytes(self.model))

    def resume(self, checkpoint: Path) -> None:
        """Go on exactly where a checkpoint was written: weights, optimiser, generators, data position, sparsifiers.

        Raises: ValueError, naming what to do, if the checkpoint is damaged or belongs to another model or other data.
        """
        state = self.parallel.load(checkpoint, model=self.model, optimizers=self.optimizers)
        if state["fingerprint"] != self.data.fingerprint:
            raise ValueError(f"{checkpoint} was trained on other text or with another tokenizer: start a new --out")
        if len(state["sparsifiers"]) != len(self.sparsifiers):
            saved, now = len(state["sparsifiers"]), len(self.sparsifiers)
            raise ValueError(f"{checkpoint} has the state of {saved} sparsifiers, this run has {now}")
        load_gate_moments(self.sparsifiers, self.optimizers.main, state.get("gates", {}))
        self.batches.load_state_dict(state["data"])
        for sparsifier, saved_state in zip(self.sparsifiers, state["sparsifiers"], strict=True):
            sparsifier.load_state_dict(saved_state)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        set_random_state(state["random"])
        self.saved = (self.step, checkpoint)

    def run(self, *, console: Console | None = None) -> Outcome:
        """Train to the last step, or until interrupted; save, and return how it ended.

        Raises: NonFiniteError if a loss or gradient is not finite (nothing is updated, the checkpoints stay);
        OSError if the disk fails.
        """
        console = console or Console(quiet=True)
        last = self.train.steps if self.train.stop_at is None else min(self.train.steps, self.train.stop_at)
        loss, result = math.nan, None
        self.model.train()
        ahead = self.model.config.sees_future
        if self.train.sample_every and ahead:
            console.print(f"train.sample_every: no samples, as layer {ahead[0]} compares a token with later ones")
        with (
            self._metrics() as metrics,
            ProgressBar(console, step=self.step, steps=self.train.steps) as bar,
            interruptions() as interruption,
        ):
            while self.step < last and not self._interrupted(interruption):
                line = self.train_step()
                loss = line["loss"]
                bar.show(line)
                if self._due(self.train.log_every):
                    metrics.write(line)
                if self._due(self.train.eval_every):
                    result = self.evaluate()
                    observe_all(self.sparsifiers, result.loss)
                    metrics.write({"step": self.step} | result.line() | self._validated())
                    console.print(f"step {self.step}: held-out {result.bits_per_byte:.4f} bits per byte")
                if self.train.sample_every and not ahead and self.step % self.train.sample_every == 0:
                    text = self.sample()
                    metrics.write({"step": self.step, "sample": text})
                    console.print(text, markup=False, highlight=False)
                if self.step % self.train.save_every == 0:
                    self.save()
        checkpoint = self.saved[1] if self.saved and self.saved[0] == self.step else self.save()
        self.parallel.finish(checkpoint, self.model)
        stopped = interruption.name or ("stop_at" if self.step < self.train.steps else None)
        return Outcome(self.step, self.tokens, self.seconds, loss, result, checkpoint, stopped, self.sparsifiers)

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of metrics.jsonl.

        Raises: NonFiniteError, before anything is updated, if the loss or the gradient's norm is not finite.
        """
        started = time.perf_counter()
        lr = self.optim.lr * self._lr_multiplier()
        set_lr(self.optimizers.main, lr)
        generators = random_state()
        batch = self.batches.next().keyed(seed=self.seed, step=self.step)
        batch = self.parallel.rows(batch).to(self.device)
        try:
            output = self._forward_backward(batch)
        except FloatingPointError as error:  # a router refuses logits that are not finite
            refused = self.parallel.refused(error)
            raise refused or self._non_finite(math.nan, math.nan, batch, generators) from error
        loss, total, norm = output.ce.item(), output.loss.item(), self.parallel.gradient_norm(self.model.parameters())
        if self.parallel.highest(not (math.isfinite(total) and math.isfinite(norm.item()))):
            raise self._non_finite(total, norm.item(), batch, generators)
        if all_agree(self.sparsifiers, self.optimizers.main):
            # a sparsifier may have cleared the gradients of absent weights: what is clipped is what is left
            left = self.parallel.gradient_norm(self.model.parameters()) if self.sparsifiers else norm
            self.parallel.clip(self.model.parameters(), left, limit=self.optim.clip)
            self.optimizers.step()
        self.optimizers.zero_grad()
        balance_routers(self.model)
        settle_all(self.sparsifiers, self.optimizers.main, others=self.optimizers.others)
        if self.step + 1 == self.train.steps:
            finish_all(self.sparsifiers)
        seconds = time.perf_counter() - started
        tokens = self.tokens + batch.inputs.numel() * self.parallel.parts
        self.step, self.tokens, self.seconds = self.step + 1, tokens, self.seconds + seconds
        line = self._line(output, loss=loss, lr=lr, norm=norm.item(), rate=batch.inputs.numel() / seconds)
        return self.parallel.reduced(line)

    def evaluate(self, tokens: np.ndarray | None = None) -> Evaluation:
        """Loss on the held-out text, or on ``tokens``, with the weights that the sparsifiers give evaluation."""
        with evaluating(self.model), parametrised(self.sparsifiers):
            result = evaluate(
                self.model,
                self.data.held_out if tokens is None else tokens,
                self.data.tokenizer,
                length=self.length,
                batch=self.train.batch,
                max_batches=self.train.eval_batches,
                autocast=self.precision.autocast(self.device),
            )
            self.parallel.rest(self.model)
        return result

    def sample(self) -> str:
        """The prompt continued by a few tokens, drawn with a generator of its own (the run's own numbers stay)."""
        ids = torch.tensor([self.data.tokenizer.encode(self.train.prompt)], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        room = self.model.config.max_length - ids.shape[1]
        new = min(self.train.sample_tokens, room)
        with evaluating(self.model), parametrised(self.sparsifiers):
            out = generate(self.model, ids, max_new_tokens=new, temperature=0.8, top_p=0.95, generator=generator)
            self.parallel.rest(self.model)
        self.model.train()
        return self.data.tokenizer.decode(out[0].tolist())

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.batches.state_dict(),
            "fingerprint": self.data.fingerprint,
            "random": random_state(),
            "sparsifiers": [sparsifier.state_dict() for sparsifier in self.sparsifiers],
            "gates": gate_moments(self.sparsifiers, self.optimizers.main),
        }
        folder = self.parallel.save(
            self.out / CHECKPOINTS,
            step=self.step,
            model=self.model,
            optimizers=self.optimizers,
            tokenizer=self.data.tokenizer,
            state=state,
            keep=self.train.keep,
            write=self._write,
        )
        self.saved = (self.step, folder)
        return folder

    def _validated(self) -> dict[str, float]:
        tokens = self.data.validation
        return {} if tokens is None else {"validation_bits_per_byte": self.evaluate(tokens).bits_per_byte}

    def _check_prompt(self) -> None:
        count, room = len(self.data.tokenizer.encode(self.train.prompt)), self.model.config.max_length
        fewest = max(1, self.model.config.seen_prefix)
        if not fewest <= count < room:
            raise ValueError(
                f"train.prompt must have from {fewest} to max_length-1={room - 1} tokens, got {count}"
                + (": at least its prefix_length, or set train.sample_every=0" if count < fewest != 1 else "")
            )

    def _metrics(self) -> Metrics | NoMetrics:
        if self.parallel.rank:
            return NoMetrics()
        return Metrics(self.out, step=self.step, tensorboard=self.train.tensorboard)

    def _interrupted(self, interruption: Interruption) -> bool:
        """Whether any process was asked to stop: all of them end after the same step."""
        number = self.parallel.highest(0 if interruption.name is None else signal.Signals[interruption.name].value)
        interruption.name = signal.Signals(number).name if number else None
        return number > 0

    def _forward_backward(self, batch: Batch, *, diagnose: bool = False) -> StepOutput:
        with refusals(), passes(self.sparsifiers) as telling:
            return accumulate(
                self.model,
                batch,
                micro_batches=self.train.accumulation,
                side=self.side,
                autocast=self.precision.autocast(self.device),
                run=telling(partial(self.parallel.forward, self.model, side=self.side)),
                around=lambda last: self.parallel.micro_batch(last=last, diagnose=diagnose),
            )

    def _lr_multiplier(self) -> float:
        steps = self.pace.steps or self.train.steps
        kind, decay_fraction = self.optim.schedule, self.optim.decay_fraction
        return self.pace.factor(self.step) * lr_multiplier(
            self.pace.clock(self.step),
            steps=steps,
            kind=kind,
            warmup=min(self.optim.warmup, longest_warmup(steps, kind=kind, decay_fraction=decay_fraction)),
            final=self.optim.final,
            decay_fraction=decay_fraction,
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.train.steps

    def _line(self, output: StepOutput, *, loss: float, lr: float, norm: float, rate: float) -> dict[str, Any]:
        stats = routing_stats(output.routings, layers=self.moe_layers)
        depth = depth_stats(output.depths, layers=self.depth_layers)
        side = {name: values.tolist() for name, values in output.side.items()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "time": round(self.seconds, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": round(rate, 1),
            "loads": stats.loads,
            "entropy": stats.entropy,
            "dropped": stats.dropped,
            "aux": sum(side.get("balance", [])),
            "z": sum(side.get("z", [])),
            "side": side,
            "passed": depth.share,
            "predicted": depth.accuracy,
        }

    def _non_finite(self, loss: float, norm: float, batch: Batch, generators: dict[str, Any]) -> NonFiniteError:
        set_random_state(generators)
        where = first_non_finite(self.model, lambda: self._forward_backward(batch, diagnose=True))
        where = blame(self.parallel, where, finite=math.isfinite(loss))
        self.optimizers.zero_grad()
        good = latest_checkpoint(self.out / CHECKPOINTS)
        kept = f"the last good checkpoint is {good}: resume" if good else "there is no checkpoint yet: start again"
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        return NonFiniteError(
            f"step {self.step + 1}: {what}, {where}; nothing was updated and {kept}"
            " with a lower --optim.lr or --train.dtype float32"
        )


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU. Raises: ValueError if the device cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:0, cuda:1, …, got {name!r}") from error
    if device.type not in {"cpu", "cuda"}:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible")
    return device


def require_load_estimates(model: Transformer) -> None:
    """Raises: ValueError, naming the layer, if a router of the model does not estimate its load."""
    for name, module in model.named_modules():
        if isinstance(module, MoE) and not isinstance(module.router, NoisyTopKRouter):
            router = type(module.router).__name__
            raise ValueError(f"train.load must be 0 unless every router is noisy_top_k, got {router} in {name}")


def require_room(folder: Path, needed: int) -> None:
    """Raises: OSError if the disk of ``folder`` has less than ``needed`` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 2**20:.0f} MiB free, a checkpoint needs about {needed / 2**20:.0f}: free some space",
        )
