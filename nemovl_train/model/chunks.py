"""How much is at work at a time where the model cuts its input into pieces. Imports no torch: plans read it too."""

LOGIT_BYTES = 400 * 2**20
"""Most bytes of logits at a time. More rows at a time mean fewer passes over the weight's gradient, which each reads
and writes whole: at 132,096 rows, hidden 5120 and bf16 this is 1,536 positions, of which that pass costs a third."""
FLOAT_LOGITS = 2**24
"""Most logits in float32."""
TILES_AT_A_TIME = 128
"""Tiles that go through the tower at once; at the released size the widest activation is then 1.4 GB in bf16."""
TILES_ENCODED_AGAIN = 4
"""Tiles whose activations exist at the same time in the backward pass of a tower that keeps pixels only."""

_ROW_MULTIPLE = 128
"""Positions at a time are a multiple of this, a matrix tile."""


def rows_at_a_time(vocabulary: int, width: int) -> int:
    """Positions whose logits exist at the same time.

    Args:
        vocabulary: Rows of the head on one rank.
        width: Bytes of a logit.
    """
    return max(LOGIT_BYTES // (vocabulary * width) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
