"""Under which tile and frame budget a sample fits a pack: arithmetic on sizes, before any medium is opened."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.media.rules import MediaShape, RenderRules, lay_out, smaller_budgets
from data_pipelines.template import frame_label_tokens
from data_pipelines.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Budget under which a sample fits, and its length then."""

    max_tiles: int
    max_frames: int
    length: int


def shrink_sample(
    shapes: Sequence[MediaShape], text_tokens: int, limit: int, rules: RenderRules, tokenizer: TextTokenizer
) -> Fit | None:
    """Largest smaller budget under which a sample has at most `limit` tokens.

    Args:
        shapes: Its media.
        text_tokens: Tokens that are not visual features, at the full budget.
        limit: Tokens of a pack.
        rules: The run's rules.
        tokenizer: Counts the frame labels, which depend on the frames taken.

    Returns:
        The fit, or None when even one tile an image and one frame a video is too much.
    """
    words = text_tokens - _media_tokens(shapes, rules.max_tiles, rules.max_frames, rules, tokenizer)[0]
    if words > limit:
        return None
    for max_tiles, max_frames in smaller_budgets(rules):
        length = words + sum(_media_tokens(shapes, max_tiles, max_frames, rules, tokenizer))
        if length <= limit:
            return Fit(max_tiles=max_tiles, max_frames=max_frames, length=length)
    return None


def least_tokens(
    shapes: Sequence[MediaShape], text_tokens: int, total_tokens: int, rules: RenderRules, tokenizer: TextTokenizer
) -> int:
    """Tokens of a sample under the smallest budget: a pack below this can never hold it."""
    budgets = smaller_budgets(rules)
    if not shapes or not budgets:
        return total_tokens
    words = text_tokens - _media_tokens(shapes, rules.max_tiles, rules.max_frames, rules, tokenizer)[0]
    return min(total_tokens, words + sum(_media_tokens(shapes, *budgets[-1], rules, tokenizer)))


def _media_tokens(
    shapes: Sequence[MediaShape], max_tiles: int, max_frames: int, rules: RenderRules, tokenizer: TextTokenizer
) -> tuple[int, int]:
    """Tokens of the frame labels, and of the visual features."""
    labels = visual = 0
    for shape in shapes:
        layout = lay_out(shape, rules, max_tiles=max_tiles, max_frames=max_frames)
        visual += sum(layout.tile_tokens(rules.tokens_per_tile))
        # <img> and </img> around every frame
        labels += frame_label_tokens(layout.frame_times, tokenizer) + 2 * len(layout.frame_times)
    return labels, visual
