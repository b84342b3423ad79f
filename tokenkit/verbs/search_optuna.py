"""Bayesian search: optuna's tree of Parzen estimators proposes, its pruners give up, a SQLite file remembers.

TPE: Bergstra+ 2011. Hyperband: Li+ 2018, 1603.06560. Optuna is an extra: `pip install tokenkit-torch[search]`.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, Literal

from tokenkit.config import UserError
from tokenkit.verbs.runner import in_turn
from tokenkit.verbs.search_builtin import MOST_INVALID
from tokenkit.verbs.space import AnyDimension, Choice, FloatRange, Space, drawn
from tokenkit.verbs.trials import Trial, Trials

STORAGE, STUDY, KEPT = "study.db", "tokenkit", "trial"


def import_optuna() -> ModuleType:
    """The library; UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "method: tpe needs optuna, which is not installed; pip install optuna, or write method=random or halving"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class OptunaSearch:
    """A study in `study.db`. Trials that a kill left open are gone on with, under their numbers.

    The sampler is made anew for every trial, from the seed and the trial's number: an interrupted search, with one job,
    proposes what an undisturbed one would have.
    """

    def __init__(
        self,
        trials: Trials,
        space: Space,
        folder: Path,
        *,
        seed: int,
        startup: int,
        pruner: Literal["none", "median", "hyperband"],
        eta: int,
        most_steps: int,
    ):
        self.optuna, self.trials, self.space, self.seed, self.startup = import_optuna(), trials, space, seed, startup
        pruners = self.optuna.pruners
        self.study = self.optuna.create_study(
            storage=f"sqlite:///{folder / STORAGE}",
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner={
                "none": pruners.NopPruner,
                "median": lambda: pruners.MedianPruner(n_startup_trials=startup),
                "hyperband": lambda: pruners.HyperbandPruner(
                    min_resource=min(trials.rungs, default=1), max_resource=most_steps, reduction_factor=eta
                ),
            }[pruner](),
        )
        self._lock = RLock()

    def run(self, number: int, jobs: int, say: Callable[[Trial], None]) -> list[Trial]:
        """Trials until `number` of them made runs, those of earlier calls included."""
        running = self.optuna.trial.TrialState.RUNNING
        open_trials = [t for t in self.study.get_trials(deepcopy=False) if t.state == running]
        started = len([t for t in self.finished() if t.status != "invalid"])
        tasks: list[Any] = [*open_trials, *[None] * max(0, number - started - len(open_trials))]

        def work(known: Any) -> None:
            """One trial that is a run; one that was cut off, if it is known."""
            while len(self.study.get_trials(deepcopy=False)) <= MOST_INVALID * number:
                trial = self._one(known)
                say(trial)
                if trial.status != "invalid":
                    return
                known = None

        in_turn(work, tasks, jobs)
        return self.finished()

    def finished(self) -> list[Trial]:
        """What the study remembers of the trials that have ended."""
        kept: list[dict[str, Any]] = [
            t.user_attrs[KEPT] for t in self.study.get_trials(deepcopy=False) if KEPT in t.user_attrs
        ]
        for one in kept:
            one["scores"] = {int(step): value for step, value in one["scores"].items()}  # JSON has no whole keys
        return [Trial(**one) for one in kept]

    def _one(self, known: Any) -> Trial:
        with self._lock:
            trial, values = self._asked(known)

        told = {} if known is None else known.intermediate_values

        def prune(step: int, value: float) -> bool:
            if any(step < other for other in told):
                return False  # it was let pass there, before it was cut off
            with self._lock:
                if step not in told:
                    trial.report(value, step)
                return bool(trial.should_prune())

        found = self.trials.take(trial.number, values, prune)
        states = self.optuna.trial.TrialState
        state = {"done": states.COMPLETE, "pruned": states.PRUNED}.get(found.status, states.FAIL)
        with self._lock:
            trial.set_user_attr(KEPT, asdict(found))
            self.study.tell(trial, found.score if state == states.COMPLETE else None, state=state)
        return found

    def _asked(self, known: Any) -> tuple[Any, dict[str, Any]]:
        """A trial and its values: a new one, or one that was cut off."""
        number = len(self.study.get_trials(deepcopy=False)) if known is None else known.number
        self.study.sampler = self.optuna.samplers.TPESampler(
            n_startup_trials=self.startup, seed=(self.seed * 1_000_003 + number) % 2**32
        )
        trial = self.study.ask() if known is None else self.optuna.trial.Trial(self.study, known._trial_id)

        def suggest(key: str, dimension: AnyDimension) -> Any:
            if isinstance(dimension, Choice):  # by place: a choice may be a whole section
                return dimension.choices[trial.suggest_categorical(key, list(range(len(dimension.choices))))]
            if isinstance(dimension, FloatRange):
                return trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log)
            return trial.suggest_int(key, dimension.low, dimension.high, step=dimension.step, log=dimension.log)

        return trial, drawn(self.space, suggest)
