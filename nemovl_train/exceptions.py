"""The errors a user of the training side can act on, all under `UserError`; each becomes an exit code."""

from collections.abc import Sequence

from data_pipelines.exceptions import DataError, UserError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "DataError",
    "LayoutError",
    "RunFailedError",
    "UserError",
]


class ConfigError(UserError):
    """One or more problems of a composed config, all reported together.

    Args:
        problems: One sentence each: the key, its value, what is allowed, the nearest legal value.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"the configuration has {count} problem{'s' * (count != 1)}"
        super().__init__("\n".join([f"{head}:", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Survive the way to another process: by default the finished text would be taken for the problems."""
        return type(self), (self.problems,)


class LayoutError(UserError):
    """A parallel layout that the model or the number of processes does not allow."""


class CheckpointError(UserError):
    """A checkpoint folder that is incomplete, damaged or belongs to another run."""


class RunFailedError(Exception):
    """A run ended for a reason that is nobody's input, and the message says all there is: no traceback helps."""


class ConversionError(UserError):
    """A Hugging Face folder, or a checkpoint, that cannot be converted without loss."""
