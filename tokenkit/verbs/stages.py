"""`stages:` of a distilling run: the run file several times over, each stage on the model that the last one left.

A stage is the run with its own keys put over the others, in a run folder of its own. It begins with the last stage's
model; what was done once to the student (tokenizer, shape, expanded inputs) is not done again unless it asks for it.
Whoever taught the first stage teaches them all: without a teacher of its own that is the model before every change.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenkit.config import UserError, resolved
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.parallel import leads
from tokenkit.verbs.card import read_object
from tokenkit.verbs.distill import distill, say
from tokenkit.verbs.distill_run import DistillRun

SUMMED = ("steps", "tokens", "bytes")
SHOWN = ("zero_shot_bits_per_byte", "trained_bits_per_byte", "retention", *SUMMED)


def distill_stages(run: DistillRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains the stages one after another; the results that are also in `output/results.json`.

    A resumed run goes on in the stage that it was left in, and takes the results of finished ones as they are. A run
    without stages is `distill`.
    """
    if not run.stages:
        return distill(run, resume=resume, quiet=quiet)
    stages = run.by_stage()
    if leads():
        RunFolder(run.output).claim(resolved(run), resume=resume)
    found: dict[str, dict[str, Any]] = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        done = read_object(stage.output / "results.json")
        if done is None:
            say(f"stage {number} of {len(stages)}: {name}", quiet or not leads())
            begun = (stage.output / "run.yaml").is_file()
            try:
                done = distill(stage, resume=begun, quiet=quiet)
            except UserError as error:
                raise UserError(f"stages.{name}: {error}") from None
        found[name] = done
    if not leads():
        return {}
    results = _summed(run, stages, found)
    write_json(run.output / "results.json", results)
    return results


def _summed(run: DistillRun, stages: Mapping[str, DistillRun], found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of the last stage from where the first began, and the figures of each."""
    first, last = next(iter(found.values())), [*found.values()][-1]
    return {
        **last,
        "name": run.output.name,
        "zero_shot_bits_per_byte": first["zero_shot_bits_per_byte"],
        "zero_shot": first["zero_shot"],
        "transfer": first["transfer"],
        **{key: sum(results[key] for results in found.values()) for key in SUMMED},
        "stages": {name: {key: results[key] for key in SHOWN} for name, results in found.items()},
        "model": str(last_folder(run) / "model"),
    }


def last_folder(run: DistillRun) -> Path:
    """The run folder with the finished model: the last stage's, or that of a run without stages."""
    return [*run.by_stage().values()][-1].output
