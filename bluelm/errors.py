"""Errors that a user can act on; each class carries the exit code of the command line."""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """A failure that is told to the user in full: what was wrong, where, and what to do.

    Args:
        problem: one sentence, what was wrong.
        where: file, tensor or layer.
        fix: what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, where: object = None, fix: str | None = None) -> None:
        self.problem = problem
        self.where = None if where is None else str(where)
        self.fix = fix
        lines = [problem]
        if self.where:
            lines.append(f"  where: {self.where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


class InputError(ExportError):
    """Bad input or configuration: a checkpoint, text, recipe, budget or option that cannot be used."""

    exit_code = 2


class OutOfMemoryError(ExportError):
    """This machine has not the memory that was asked for: with less, or on a larger one, the same would run."""

    exit_code = 2


class ChangedInputError(InputError):
    """A file of the input is not any more what it was when the work began."""


class BudgetError(ExportError):
    """A budget failed."""

    exit_code = 3


class TargetError(ExportError):
    """The target cannot hold or run this model."""

    exit_code = 4


class UnavailableError(ExportError):
    """A device, an emulator or a vendor's SDK is not available here."""

    exit_code = 5


class InterruptedRun(ExportError):  # noqa: N818  (the user's act, not an error of theirs or ours)
    """The run was interrupted and can be resumed."""

    exit_code = 6
