"""How many tiles an image becomes and which frames of a video are taken: arithmetic on sizes, no pixels.

Everything here follows from metadata, so that the length of a sample is known before its media are opened.
"""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass

from data_pipelines.config import DataConfig
from data_pipelines.exceptions import DataError

PATCHES_PER_TOKEN_SIDE = 32
"""Pixels on a side that one visual token stands for: patches of 16 px, 2x2 of them merged by the pixel shuffle."""

MIN_FRAMES = 8
"""Fewest frames of a video that has as many (the public Megatron-LM flag default)."""

TILE_LADDER = (12, 8, 6, 4, 2, 1)
"""Tile budgets tried in turn for a sample that does not fit its pack (Megatron-LM multimodal `dataset_helpers`)."""


@dataclass(frozen=True, kw_only=True)
class RenderRules:
    """All that decides how a record becomes tokens and tiles, besides the tokenizer.

    Attributes:
        template: Named version of the prompt rules.
        tile_size: Side of a tile in pixels, a multiple of 32.
        max_tiles: Largest grid of one image, thumbnail not counted.
        use_thumbnail: Append the whole image as one more tile when the grid has more than one.
        video_fps: Frames sampled per second.
        max_frames: Most frames of one video.
        video_pruning_rate: Share of each video's visual tokens that are dropped.
    """

    template: str
    tile_size: int
    max_tiles: int
    use_thumbnail: bool
    video_fps: float
    max_frames: int
    video_pruning_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.tile_size < PATCHES_PER_TOKEN_SIDE or self.tile_size % PATCHES_PER_TOKEN_SIDE:
            raise DataError(f"tile_size {self.tile_size} must be a positive multiple of {PATCHES_PER_TOKEN_SIDE}")
        if self.max_tiles < 1 or self.max_frames < 1 or not self.video_fps > 0:
            raise DataError(
                f"max_tiles ({self.max_tiles}), max_frames ({self.max_frames}) must be at least 1 and "
                f"video_fps ({self.video_fps}) above 0"
            )
        if not 0 <= self.video_pruning_rate < 1:
            raise DataError(
                f"video_pruning_rate {self.video_pruning_rate} must be at least 0 (all tokens) and below 1; 0.75 is "
                "usual"
            )

    @classmethod
    def from_config(cls, config: DataConfig) -> "RenderRules":
        """The rules that a run asks for."""
        return cls(
            template=config.template,
            tile_size=config.tile_size,
            max_tiles=config.max_tiles,
            use_thumbnail=config.use_thumbnail,
            video_fps=config.video_fps,
            max_frames=config.max_frames,
            video_pruning_rate=config.video_pruning_rate,
        )

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: 256 at 512 px, 4 at 64 px."""
        return (self.tile_size // PATCHES_PER_TOKEN_SIDE) ** 2

    def digest(self, tokenizer_digest: str) -> str:
        """SHA-256 over these rules and the tokenizer: equal digests mean equal token counts."""
        values = {**asdict(self), "video_fps": float(self.video_fps), "tokenizer": tokenizer_digest}
        if not self.video_pruning_rate:
            del values["video_pruning_rate"]  # counts are those of a release that did not know it
        text = json.dumps(values)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class MediaShape:
    """Size of one image or video, as stored in the manifest.

    Attributes:
        kind: `image` or `video`.
        width: Pixels, after EXIF rotation.
        height: Pixels, after EXIF rotation.
        fps: Frames per second of a video, 0 for an image.
        frames: Frames of a video, 0 for an image.
    """

    kind: str
    width: int
    height: int
    fps: float = 0.0
    frames: int = 0


@dataclass(frozen=True)
class MediaLayout:
    """What one image or video becomes.

    Attributes:
        kind: `image` or `video`.
        grid: (columns, rows) of an image; (1, 1) for a video, whose frames are one tile each.
        thumbnail: The last tile is the whole image.
        frame_indices: Frames taken from a video, rising; empty for an image.
        frame_times: Seconds of each taken frame; empty for an image.
        frame_tokens: Visual tokens of each taken frame where a share of them is dropped; empty where every tile has
            all. Their sum is what counts: how it is shared out, the model decides.
    """

    kind: str
    grid: tuple[int, int]
    thumbnail: bool
    frame_indices: tuple[int, ...] = ()
    frame_times: tuple[float, ...] = ()
    frame_tokens: tuple[int, ...] = ()

    @property
    def tiles(self) -> int:
        """Tiles in all, thumbnail included."""
        if self.kind == "video":
            return len(self.frame_indices)
        return self.grid[0] * self.grid[1] + int(self.thumbnail)

    def tile_tokens(self, tokens_per_tile: int) -> tuple[int, ...]:
        """Visual tokens of each tile in the sequence."""
        return self.frame_tokens or (tokens_per_tile,) * self.tiles


def lay_out(shape: MediaShape, rules: RenderRules, *, max_tiles: int, max_frames: int) -> MediaLayout:
    """Tiles or frames of one medium under a budget (the rules' own, or a smaller one for a sample that is too long)."""
    if shape.kind == "video":
        indices = sample_frames(shape.frames, shape.fps, target_fps=rules.video_fps, max_frames=max_frames)
        times = tuple(frame_time(i, shape.fps) for i in indices)
        rate = rules.video_pruning_rate
        tokens = frame_tokens(len(indices), rules.tokens_per_tile, rate) if rate else ()
        return MediaLayout("video", (1, 1), False, indices, times, tokens)
    grid = choose_grid(shape.width, shape.height, max_tiles, rules.tile_size)
    return MediaLayout("image", grid, rules.use_thumbnail and grid[0] * grid[1] > 1)


def tokens_kept(frames: int, tokens_per_frame: int, rate: float) -> int:
    """Visual tokens that are left of a video: those of one frame at least (vLLM, `multimodal/video_prune/evs.py`)."""
    return max(tokens_per_frame, int(frames * tokens_per_frame * (1 - rate)))


def frame_tokens(frames: int, tokens_per_frame: int, rate: float) -> tuple[int, ...]:
    """Places for the tokens that are left: the first frame whole, as it always is, the rest spread over the others."""
    rest = tokens_kept(frames, tokens_per_frame, rate) - tokens_per_frame
    others = frames - 1
    return (tokens_per_frame, *(rest * (i + 1) // others - rest * i // others for i in range(others)))


@functools.cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is nearest to the image's, as the released model's processor does it.

    Grids are tried by rising area; on an exact tie the later, larger one wins only if the image has more than half
    its pixels (InternVL's rule, as in vLLM's `nano_nemotron_vl` processor).
    """
    assert min(width, height) > 0, (width, height)
    aspect, best, best_difference = width / height, (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(aspect - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (columns, rows), difference
    return best


def sample_frames(frames: int, fps: float, *, target_fps: float, max_frames: int) -> tuple[int, ...]:
    """Frame numbers to take: `target_fps` of the clip, at least 8 when it has them, at most `max_frames`.

    Where the count is what the rate asks for, frames are `i * fps / target_fps`; where a bound changed it, frames are
    the middles of equal segments, so that long clips are covered uniformly (paper section 3.6: 2 frames per second,
    128 at most, uniform beyond 64 s).
    """
    assert min(frames, fps) > 0, (frames, fps)
    wanted = round(frames / fps * target_fps)
    count = min(max(wanted, MIN_FRAMES), max_frames, frames)
    if count == wanted:
        return tuple(min(int(i * fps / target_fps), frames - 1) for i in range(count))
    return tuple(int((i + 0.5) * frames / count) for i in range(count))


def frame_time(index: int, fps: float) -> float:
    """Seconds of a frame, in whole milliseconds a frame as the serving code counts them (SGLang, vLLM)."""
    return index * int(1000 / fps) / 1000


def smaller_budgets(rules: RenderRules) -> list[tuple[int, int]]:
    """Budgets (max_tiles, max_frames) to try for a sample that is too long: fewer tiles first, then half the frames."""
    tiles = [t for t in TILE_LADDER if t < rules.max_tiles]
    budgets = [(t, rules.max_frames) for t in tiles]
    frames = rules.max_frames
    while frames > 1:
        frames //= 2
        budgets.append((1, frames))
    return budgets
