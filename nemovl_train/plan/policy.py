"""How a training program spends memory and work. `TRAINER` is what `nemovl train` does; it has no other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes a trained parameter takes besides its weight.

    Attributes:
        gradient: Of the gradient, held whole by every rank that holds the weight.
        optimizer: Of master weight and moments, shared out by the distributed optimizer.
    """

    gradient: int
    optimizer: int


FP32_STATES = StateBytes(gradient=4, optimizer=12)
BF16_MOMENTS = StateBytes(gradient=4, optimizer=6)
"""bfloat16 moments, and 16 bits that make a float32 master weight of the bfloat16 one."""
LEAN_STATES = StateBytes(gradient=2, optimizer=6)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Choices of a training program that decide memory and time.

    Attributes:
        states: Bytes of gradient and optimizer state of a bfloat16 weight.
        full_recompute_layers: Language layers, from the first, that keep their input alone; None is all of them.
        tower_recompute: The tower keeps each block's input alone.
        fused_gated_norm: The gated norm keeps no input of its own: it is part of the scan's kernel or, over context
            parallel ranks, reads the scan's output again.
        loss_chunk: Positions whose logits exist at a time, made again in backward; None is all at once.
        head_everywhere: Logits are made at every position, not at the supervised ones alone.
    """

    states: StateBytes = FP32_STATES
    full_recompute_layers: int | None = 0
    tower_recompute: bool = False
    fused_gated_norm: bool = True
    loss_chunk: int | None = 2048
    head_everywhere: bool = False


TRAINER = Policy()
"""What `nemovl train` does in this version."""

NOT_YET = {
    "tower recomputed": Policy(tower_recompute=True),
    "everything recomputed": Policy(tower_recompute=True, full_recompute_layers=None),
    "everything recomputed, bfloat16 moments": Policy(
        tower_recompute=True, full_recompute_layers=None, states=BF16_MOMENTS
    ),
}
"""What training cannot do yet, from the least change to the largest: plans say which would make a run fit."""
