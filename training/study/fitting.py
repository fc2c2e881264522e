"""A short training run on given batches, as the diagnostics ask for one: a cell's own rates, optimiser and method."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pruning import Masks
from pruning.batches import Batch, next_token_loss
from training.config import RunConfig
from training.moments import Sparsifier, add_gates, all_agree, finish_all, parametrised
from training.optim import clip, gradient_norm, lr_multiplier, make_optimizers, set_lr
from training.sparsity import make_sparsifiers
from transformer import Transformer


class HeldZeros:
    """The zeros that a model has, held (a :class:`training.moments.Sparsifier`)."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._masks = model, Masks.of(model)

    def before_step(self, optimizer: Any) -> bool:
        """Clear the gradients of absent weights, which would count in the norm that clips."""
        own = dict(self.model.named_parameters())
        for name, kept in self._masks.kept.items():
            if (gradient := own[name].grad) is not None:
                gradient.masked_fill_(~kept, 0)
        return True

    def after_step(self, optimizer: Any) -> None:
        """Set back to 0 what was 0."""
        self._masks.apply(self.model)

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": self._masks.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Take the masks back."""
        self._masks = Masks.from_state_dict(state["masks"])


class Fit:
    """train(model, batches): ``steps`` steps on the batches in turn, by the cell's optimiser and schedule.

    The method of the cell's [sparsify] section takes part, or, with hold, the zeros that the model has already.
    lr: another peak rate than the cell's. watch(step, model): called after each step, counted from 1; the model trains
    on as it was before, whatever mode it is left in.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        steps: int,
        hold: bool = False,
        lr: float | None = None,
        watch: Callable[[int, nn.Module], None] | None = None,
    ) -> None:
        self.config, self.steps, self.hold, self.watch = config, steps, hold, watch
        self.lr = config.optim.lr if lr is None else lr

    def __call__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Train in place; the zeros are in the weights at the end.

        Raises: ValueError for a model that is no Transformer, unless its zeros are held."""
        optim = self.config.optim
        methods = self._methods(model)
        optimizers = make_optimizers(model, lr=self.lr, weight_decay=optim.weight_decay, betas=optim.betas,
                                     eps=optim.eps)  # fmt: skip
        add_gates(methods, optimizers.main)
        model.train()
        for step in range(self.steps):
            factor = lr_multiplier(step, steps=self.steps, kind=optim.schedule, final=optim.final,
                                   warmup=min(optim.warmup, self.steps // 4))  # fmt: skip
            set_lr(optimizers.main, self.lr * factor)
            batch = batches[step % len(batches)]
            with parametrised(methods):
                (next_token_loss(model, batch) / self.config.train.batch).backward()
            if all_agree(methods, optimizers.main):
                clip(model.parameters(), gradient_norm(model.parameters()), limit=optim.clip)
                optimizers.step()
            optimizers.zero_grad()
            for method in methods:
                method.after_step(optimizers.main)
            if self.watch is not None:
                self.watch(step + 1, model)
                model.train()
        finish_all(methods)

    def _methods(self, model: nn.Module) -> list[Sparsifier]:
        if self.hold:
            return [HeldZeros(model)]
        if not isinstance(model, Transformer):
            raise ValueError(f"model must be a Transformer for a method of [sparsify], got {type(model).__name__}")
        return make_sparsifiers(self.config.sparsify, model, steps=self.config.train.steps, seed=self.config.seed)
