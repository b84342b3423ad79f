"""The models of a task, for what is changed from outside while it trains: noise, compilation, other kernels."""

from typing import Protocol, runtime_checkable

from tokenkit.models.view import ModelView


@runtime_checkable
class LanguageModels(Protocol):
    """A task with a student that reads text, and a teacher, unless that is a record or none."""

    student: ModelView
    teacher: ModelView | None
