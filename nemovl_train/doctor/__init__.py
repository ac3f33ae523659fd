"""`nemovl doctor`: does this machine, or every node of a cluster, have what a run needs?"""

from nemovl_train.doctor.machine import Check, collect, run

__all__ = ["Check", "collect", "run"]
