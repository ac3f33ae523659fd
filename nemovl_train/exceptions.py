"""The errors a user of the training side can act on, all under `UserError`; the command line turns them into exit codes."""

from collections.abc import Sequence

from data_pipelines.exceptions import DataError, UserError

__all__ = ["CheckpointError", "ConfigError", "ConversionError", "DataError", "LayoutError", "UserError"]


class ConfigError(UserError):
    """One or more problems of a composed config, all reported together.

    Args:
        problems: One sentence each: the key, its value, what is allowed, the nearest legal value.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        head = "the configuration has 1 problem" if len(self.problems) == 1 else f"the configuration has {len(self.problems)} problems"
        super().__init__("\n".join([f"{head}:", *(f"  - {p}" for p in self.problems)]))


class LayoutError(UserError):
    """A parallel layout that the model or the number of processes does not allow."""


class CheckpointError(UserError):
    """A checkpoint folder that is incomplete, damaged or belongs to another run."""


class ConversionError(UserError):
    """A Hugging Face folder, or a checkpoint, that cannot be converted without loss."""
