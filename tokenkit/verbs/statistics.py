"""What norms that whiten a teacher's states have to know of them: measured before a run, or kept from one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from tokenkit.data.batch import collate, reading_of
from tokenkit.data.example import Row, make_examples
from tokenkit.data.records import Record
from tokenkit.data.stream import Rows
from tokenkit.models.paired import Paired
from tokenkit.models.statistics import teacher_statistics, weights_fingerprint
from tokenkit.train.parallel import ranks
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.record import data_identity
from tokenkit.verbs.sides import Sides, wanted_of


def measure_teacher(run: DistillRun, task: TextTask, sides: Sides, rows: Rows) -> int:
    """Gives every loss that needs them its statistics; how many passes over the text that took."""
    pairs = [part for part in task.projectors.paired.values() if isinstance(part, Paired)]
    asking = [paired for paired in pairs if paired.needs_statistics]
    if not asking:
        return 0
    some = rows[: run.teacher_statistics.rows]
    identity = data_identity(run.data, some, sides.teacher_tokenizer)
    if isinstance(sides.teacher, Record):
        identity["teacher weights"] = sides.teacher.manifest.identity["teacher weights"]
    else:
        identity["teacher weights"] = weights_fingerprint(sides.teacher.model)
    folder = run.teacher_statistics.folder or run.output / "statistics"
    if ranks().mesh is not None:  # several processes measure together, and each would look for what another writes
        folder = Path(mkdtemp())
    return sum(_measure(paired, folder, identity, run, task, sides, some) for paired in asking)


def _measure(
    paired: Paired,
    folder: Path,
    identity: dict[str, str | int],
    run: DistillRun,
    task: TextTask,
    sides: Sides,
    rows: Sequence[Row],
) -> int:
    passes = 0

    def read(layers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal passes
        passes += 1
        reading = reading_of(run.data, sides.student_tokenizer, sides.teacher_tokenizer)
        record = sides.teacher if isinstance(sides.teacher, Record) else None
        for first in range(0, len(rows), run.train.batch_size):
            numbers = [*range(first, min(first + run.train.batch_size, len(rows)))]
            some = [rows[number] for number in numbers]
            examples = make_examples(some, sides.student_tokenizer, sides.teacher_tokenizer, reading)
            batch = collate(examples, numbers, record, wanted_of(task.objective)).to(task.device)
            known = {**batch.tensors, **task.teacher_tensors(batch)}
            yield paired.teacher_layers(known, layers), known["teacher_token_mask"]

    places = paired.teacher_places
    with torch.no_grad():
        moments = teacher_statistics(folder, {**identity, "of": paired.teacher_leaf}, places, read)
    paired.set_statistics(moments)
    return passes
