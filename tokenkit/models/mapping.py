"""Which blocks of a student learn from which of a teacher: rules and explicit pairs.

Blocks are counted from 0 and without the embeddings. Any depths go together, a student deeper than its teacher too.
`skip` is PKD-Skip (Sun+ 2019, 1908.09355); that the rule matters little, and that the last blocks serve best where one
pair is enough: 2502.04499, 2310.08797.
"""

from collections.abc import Callable

from tokenkit.config import UserError
from tokenkit.losses.aligned import Layers

Pairs = list[tuple[int, int]]


def layer_pairs(layers: Layers, student_layers: int, teacher_layers: int) -> Pairs:
    """Pairs [student block, teacher block], each once, in the order of the student's blocks; never empty.

    Of explicit pairs the order stays, and a negative number counts from the end.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise UserError(
            f"layers: a student of {student_layers} and a teacher of {teacher_layers} blocks; each needs one"
        )
    if isinstance(layers, list):
        return _explicit(layers, student_layers, teacher_layers)
    return RULES[layers](student_layers, teacher_layers)


def _explicit(pairs: Pairs, student_layers: int, teacher_layers: int) -> Pairs:
    if not pairs:
        raise UserError("layers: no pairs; write a rule, such as layers: uniform, or pairs, such as layers: [[-1, -1]]")
    found: Pairs = []
    for student, teacher in pairs:
        pair = (
            _block(student, student_layers, "student", (student, teacher)),
            _block(teacher, teacher_layers, "teacher", (student, teacher)),
        )
        if pair in found:
            raise UserError(f"layers: the pair {[student, teacher]} stands twice; keep one")
        found.append(pair)
    return found


def _block(number: int, count: int, side: str, pair: tuple[int, int]) -> int:
    if not -count <= number < count:
        raise UserError(
            f"layers: {list(pair)} asks for block {number} of the {side}, which has {count}; write a number from "
            f"{-count} to {count - 1}"
        )
    return number % count


def _all(students: int, teachers: int) -> Pairs:
    if students != teachers:
        raise UserError(
            f"layers: all needs equally many blocks, but the student has {students} and the teacher {teachers}; write "
            "layers: uniform"
        )
    return [(i, i) for i in range(students)]


def _last(count: int) -> Callable[[int, int], Pairs]:
    def pairs(students: int, teachers: int) -> Pairs:
        if min(students, teachers) < count:
            raise UserError(
                f"layers: last_{count} needs {count} blocks on both sides, but the student has {students} and the "
                f"teacher {teachers}; write layers: last"
            )
        return [(students - i, teachers - i) for i in range(count, 0, -1)]

    return pairs


def _uniform(students: int, teachers: int) -> Pairs:
    """Block i learns from round((i + 1) n_t / n_s) - 1, halves upwards, and never from before the first."""
    ends = [(2 * (i + 1) * teachers + students) // (2 * students) - 1 for i in range(students)]
    return [(i, max(end, 0)) for i, end in enumerate(ends)]


def _uniform_cons(students: int, teachers: int) -> Pairs:
    """The deeper side is cut into as many runs of consecutive blocks as the other has blocks; no block is left out."""
    fewer, more = min(students, teachers), max(students, teachers)
    runs = [(i, j) for i in range(fewer) for j in range(i * more // fewer, (i + 1) * more // fewer)]
    return runs if students <= teachers else [(j, i) for i, j in runs]


def _uniform_and_last(students: int, teachers: int) -> Pairs:
    """Block i learns from floor(i n_t / n_s), where its share of the depth begins, and from the last one."""
    return [(i, j) for i in range(students) for j in sorted({i * teachers // students, teachers - 1})]


def _skip(students: int, teachers: int) -> Pairs:
    """Every k-th block of the deeper side, k = floor(deeper / shallower), without the last pair, which logits teach.

    Where one side has a single block, that pair is all there is.
    """
    fewer = min(students, teachers)
    pairs = [((i + 1) * (students // fewer) - 1, (i + 1) * (teachers // fewer) - 1) for i in range(fewer - 1)]
    return pairs or [(students - 1, teachers - 1)]


RULES: dict[str, Callable[[int, int], Pairs]] = {
    "all": _all,
    "last": _last(1),
    "last_2": _last(2),
    "last_3": _last(3),
    "last_4": _last(4),
    "uniform": _uniform,
    "uniform_cons": _uniform_cons,
    "uniform_and_last": _uniform_and_last,
    "skip": _skip,
    "all_to_one": lambda students, teachers: [(i, teachers - 1) for i in range(students)],
    "full_cross": lambda students, teachers: [(i, j) for i in range(students) for j in range(teachers)],
}
