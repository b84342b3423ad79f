"""Searches that need nothing but random numbers: random points with a median rule, and successive halving.

Successive halving: Jamieson and Talwalkar 2016, 1502.07943. The median rule: Golovin+ 2017 (Vizier).
"""

import math
import statistics
from collections.abc import Callable
from itertools import count
from threading import Lock

from tokenkit.verbs.runner import in_turn
from tokenkit.verbs.space import Space, random_point
from tokenkit.verbs.trials import Prune, Trial, Trials

MOST_INVALID = 10
"""Times the trials: after so many points that make no run, what there is counts."""


def random_search(
    trials: Trials,
    space: Space,
    *,
    number: int,
    seed: int,
    jobs: int,
    median_after: int | None,
    say: Callable[[Trial], None],
) -> list[Trial]:
    """Random points until `number` of them made runs; with `median_after` those below the median are given up.

    The median is of the trials with smaller numbers that came as far, and there must be as many of them as
    `median_after`: so with one job the outcome does not depend on when a search was interrupted.
    """
    found: dict[int, Trial] = {}
    lock, numbers = Lock(), count()

    def prune_of(own: int) -> Prune:
        def prune(step: int, value: float) -> bool:
            with lock:
                others = [t.scores[step] for t in found.values() if t.number < own and step in t.scores]
            return median_after is not None and len(others) >= median_after and value < statistics.median(others)

        return prune

    def work(_: int) -> None:
        """One trial that is a run."""
        while True:
            with lock:
                own = next(numbers)
            if own >= MOST_INVALID * number:
                return
            trial = trials.take(own, random_point(space, seed, own), prune_of(own))
            with lock:
                found[own] = trial
            say(trial)
            if trial.status != "invalid":
                return

    in_turn(work, range(number), jobs)
    return [found[key] for key in sorted(found)]


def successive_halving(
    trials: Trials, space: Space, *, number: int, seed: int, jobs: int, eta: int, say: Callable[[Trial], None]
) -> list[Trial]:
    """Random points, all to the first rung; of those the best `1 / eta` to the next, and so on to the end."""
    found: dict[int, Trial] = {}
    alive: list[int] = []
    for own in range(MOST_INVALID * number):
        if len(alive) == number:
            break
        trial = trials.check(own, random_point(space, seed, own))
        if trial is not None:
            found[own] = trial
            say(trial)
        else:
            alive.append(own)
    stops: list[int | None] = [*sorted(set(trials.rungs)), None]
    for stop in stops:

        def work(own: int, stop: int | None = stop) -> Trial:
            return trials.take(own, random_point(space, seed, own), lambda *_: False, until=stop)

        for trial in in_turn(work, alive, jobs):
            found[trial.number] = trial
            say(trial)
        scored = [own for own in alive if found[own].scores and found[own].status in ("done", "pruned")]
        ranked = sorted(scored, key=lambda own: (-[*found[own].scores.values()][-1], own))
        alive = ranked[: math.ceil(len(ranked) / eta)]
    return [found[key] for key in sorted(found)]
