"""Numbers that show how a router uses its experts."""

from dataclasses import dataclass

from moe.routing import Routing


@dataclass(frozen=True)
class RoutingStats:
    """One layer's routing of one batch, in plain numbers for a log line.

    loads, drops: assignments carried out and lost, by expert; entropy: mean over tokens, in nats;
    imbalance: largest load over the mean load, 1 when even, E when one expert has everything, 0 without any;
    idle: share of the experts without any assignment; drop_fraction: share of the choices lost to capacity.
    """

    loads: tuple[int, ...]
    drops: tuple[int, ...]
    entropy: float
    imbalance: float
    idle: float
    drop_fraction: float


def routing_stats(routing: Routing) -> RoutingStats:
    """Read the figures off the device: one synchronisation for each on CUDA, so call it when a line is logged."""
    loads = tuple(routing.loads().tolist())
    return RoutingStats(
        loads=loads,
        drops=tuple(routing.drops().tolist()),
        entropy=routing.entropy().item(),
        imbalance=max(loads) * len(loads) / max(sum(loads), 1),
        idle=loads.count(0) / len(loads),
        drop_fraction=routing.drop_fraction(),
    )
