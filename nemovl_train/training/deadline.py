"""When a run has to be over, and when it therefore has to begin its last save."""

from __future__ import annotations

import os
import time

SAFETY = 1.5
"""A save is expected to take this many times what the last one took: others use the file system too."""

_FIRST_SAVE_SECONDS = 60.0  # assumed until a save was measured


class Deadline:
    """Stops a run before its scheduler does.

    Args:
        limit_s: Seconds after the start of this process group; 0 takes the end that SLURM gives the job in
            SLURM_JOB_END_TIME (sbatch manual, output environment variables), if there is one.
    """

    def __init__(self, limit_s: float) -> None:
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self.at: float | None = time.time() + limit_s if limit_s > 0 else float(end) if end.isdigit() else None
        self.longest_step = 0.0

    def near(self, save_seconds: float | None) -> bool:
        """Whether one more step would leave too little time to save.

        Args:
            save_seconds: What the last save took; None before the first.
        """
        if self.at is None:
            return False
        needed = SAFETY * (_FIRST_SAVE_SECONDS if save_seconds is None else save_seconds) + self.longest_step
        return time.time() + needed >= self.at
