"""The blocks of a model: found, and run one by one on a calibration set as the model itself would run them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch

_CACHES = ("past_key_values", "past_key_value", "cache")


@dataclass(frozen=True)
class Call:
    """What a block was called with, next to the hidden states (its first argument, or `hidden_states`)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool

    def run(self, block: nn.Module, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The block on these hidden states, and the hidden states it gives."""
        if self.by_name:
            return hidden_states(block(*self.arguments, **self.keywords, hidden_states=hidden))
        return hidden_states(block(hidden, *self.arguments, **self.keywords))

    def same(self, other: "Call") -> bool:
        """Whether the other block was handed the very same objects."""
        return (
            (self.by_name, len(self.arguments), [*self.keywords])
            == (other.by_name, len(other.arguments), [*other.keywords])
            and all(a is b for a, b in zip(self.arguments, other.arguments, strict=True))
            and all(a is b for a, b in zip(self.keywords.values(), other.keywords.values(), strict=True))
        )


@dataclass
class Recorded:
    """One dense pass: hidden states before the first block, for each batch, and calls[block][batch].

    chained: every block was called once a batch, in order, on the very output of the block before it."""

    states: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    chained: bool = True


class _Enough(Exception):
    """What is needed is recorded: the rest of the model need not run."""


def hidden_states(output: Any) -> Float[Tensor, "..."]:
    """The hidden states that a block returned: its output, or the first of a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"a block must return hidden states or a tuple that starts with them, got {type(first).__name__}"
        )
    return first


def find_blocks(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> tuple[str, list[nn.Module]]:
    """Name and members of the nn.ModuleList that holds most of the prunable weights; the outermost of equal ones.

    ("", []) if no list holds any."""
    sizes = {id(parameter): parameter.numel() for parameter in weights.values()}
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(sizes.get(id(parameter), 0) for parameter in module.parameters())
            best = (held, name, list(module)) if held > best[0] else best
    return best[1], best[2]


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model on a batch of ids or keywords; labels stay out."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**{key: value for key, value in batch.items() if key != "labels"})


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """config.use_cache is off while inside: a replayed block must not append to a cache."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None or config is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def record_calls(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> Recorded:
    """Run the dense model on each batch, keeping what each block is called with.

    Hidden states are kept of the first block only; other arguments by reference. The first batch runs to the end of the
    model; later ones as far as blocks get arguments that no block before them got in the first, which in most models is
    the first block: the others are called as the first one was.
    Raises: ValueError if a block is called with a cache, or without hidden states."""
    recorded = Recorded(calls=[[] for _ in blocks])
    alike = list(range(len(blocks)))
    for batch in batches:
        first = not recorded.states
        needed = max(alike, default=-1) + 1
        reached = _record_batch(model, blocks, batch, recorded, needed=needed, whole=first)
        recorded.chained &= reached == needed
        if not recorded.chained:
            break
        if first:
            alike = _first_alike([calls[0] for calls in recorded.calls])
        for calls, like in zip(recorded.calls[needed:], alike[needed:], strict=True):
            calls.append(recorded.calls[like][-1])
    return recorded


def _first_alike(calls: Sequence[Call]) -> list[int]:
    """For each call the first one with the same arguments."""
    return [next(j for j, other in enumerate(calls) if call.same(other)) for call in calls]


def _record_batch(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, recorded: Recorded, *, needed: int, whole: bool
) -> int:
    """How many of the first ``needed`` blocks were called in order, each on the output of the one before; ``whole``: to
    the model's end, to see that none is called twice."""
    reached, output = 0, None

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal reached
        hidden, call = _split(block, args, kwargs)
        if reached == needed or block is not blocks[reached] or (reached and hidden is not output):
            reached = -1
            raise _Enough
        recorded.calls[reached].append(call)
        if not reached:
            recorded.states.append(hidden)
        reached += 1
        if reached == needed and not whole:
            raise _Enough

    def after(block: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        nonlocal output
        output = hidden_states(result)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        with suppress(_Enough):
            run_model(model, batch)
    return reached


def _split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    given = [name for name in _CACHES if kwargs.get(name) is not None]
    if given:
        raise ValueError(f"calibration must run without a cache, got {given[0]} in {type(block).__name__}")
    if args:
        return args[0], Call(args[1:], dict(kwargs), by_name=False)
    if "hidden_states" not in kwargs:
        raise ValueError(f"{type(block).__name__} must be called with hidden states first, got {sorted(kwargs)}")
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest, by_name=True)
