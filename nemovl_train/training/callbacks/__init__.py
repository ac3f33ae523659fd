"""Side jobs of the train loop."""

from nemovl_train.training.callbacks import trackers
from nemovl_train.training.callbacks.base import Callback
from nemovl_train.training.callbacks.metrics import MetricsFile
from nemovl_train.training.callbacks.profile import Profile
from nemovl_train.training.callbacks.progress import ProgressLine

__all__ = ["Callback", "MetricsFile", "Profile", "ProgressLine", "trackers"]
