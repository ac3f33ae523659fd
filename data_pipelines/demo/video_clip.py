"""Questions on what happens over time in a short generated video."""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image, ImageDraw

from data_pipelines.demo.keyed import draw_in_split, keyed_random
from data_pipelines.demo.records import Sample, sample_id, video_sample

NAME = "video_clip"
SIDE = 64
FPS = 8
FRAMES_PER_SLOT = 4  # a slot is half a second: sampling at 2 fps, or more densely, misses none
SLOTS = (4, 8)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "white": (245, 245, 245),
    "purple": (140, 40, 170),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
QUESTIONS = {
    "direction": ("Which way does the square move?", "In which direction does the square go?"),
    "first": ("Which colour is the square at the start?", "What colour is the square first?"),
    "last": ("Which colour is the square at the end?", "What colour does the square become?"),
    "flashes": ("How many times does the light flash?", "Count the flashes."),
}
_BACKGROUND = (25, 25, 25)
_BOX = 20


@dataclass(frozen=True)
class Slot:
    """Half a second: a square of `colour` with its left-top corner at (x, y) px; no square when `colour` is empty."""

    colour: str
    x: int
    y: int


@dataclass(frozen=True)
class Clip:
    """A clip's content.

    Attributes:
        kind: `move`, `change` (of colour) or `flash`.
        truth: Answer by question kind.
        slots: Half seconds in order; positions between two slots of a moving square are interpolated.
    """

    kind: str
    truth: tuple[tuple[str, str], ...]
    slots: tuple[Slot, ...]


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """Clips of 2 to 4 seconds at 8 fps, 64 x 64 px, with one temporal question each."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        clip = draw_in_split(rng, split, draw_clip)
        kind, answer = rng.choice(clip.truth)
        frames = render(clip)
        metadata = {
            "video_duration": len(frames) / FPS,
            "video_num_frames": len(frames),
            "video_fps": float(FPS),
            "video_width": SIDE,
            "video_height": SIDE,
        }
        question = rng.choice(QUESTIONS[kind])
        yield video_sample(sample_id(NAME, split, index), encode_mp4(frames), metadata, question, answer)


def draw_clip(rng: random.Random) -> Clip:
    """Random content of a random kind."""
    return rng.choice((_draw_move, _draw_change, _draw_flash))(rng, rng.randint(*SLOTS))


def _draw_move(rng: random.Random, slots: int) -> Clip:
    name, (dx, dy) = rng.choice(tuple(DIRECTIONS.items()))
    room = SIDE - _BOX
    travel = rng.randint(room * 2 // 3, room)
    start, across = rng.randint(0, room - travel), rng.randint(0, room)
    path = [start + round(travel * i / (slots - 1)) for i in range(slots)]
    if dx + dy < 0:
        path.reverse()
    colour = rng.choice(tuple(COLOURS))
    places = [(at, across) if dx else (across, at) for at in path]
    return Clip("move", (("direction", name),), tuple(Slot(colour, x, y) for x, y in places))


def _draw_change(rng: random.Random, slots: int) -> Clip:
    first, last = rng.sample(tuple(COLOURS), 2)
    turn = rng.randint(1, slots - 1)
    x, y = rng.randint(0, SIDE - _BOX), rng.randint(0, SIDE - _BOX)
    shown = tuple(Slot(first if i < turn else last, x, y) for i in range(slots))
    return Clip("change", (("first", first), ("last", last)), shown)


def _draw_flash(rng: random.Random, slots: int) -> Clip:
    # Flashes sit on odd slots: a dark slot lies between any two, and the clip starts dark.
    odd = range(1, slots, 2)
    count = rng.randint(1, len(odd))
    lit = set(rng.sample(odd, count))
    x, y, colour = rng.randint(0, SIDE - _BOX), rng.randint(0, SIDE - _BOX), rng.choice(tuple(COLOURS))
    shown = tuple(Slot(colour if i in lit else "", x, y) for i in range(slots))
    return Clip("flash", (("flashes", str(count)),), shown)


def render(clip: Clip) -> list[np.ndarray]:
    """Frames [SIDE, SIDE, 3] uint8 at 8 fps; the first frame of every slot shows the slot as it is written."""
    frames = []
    for number, slot in enumerate(clip.slots):
        following = clip.slots[min(number + 1, len(clip.slots) - 1)]
        for step in range(FRAMES_PER_SLOT):
            canvas = Image.new("RGB", (SIDE, SIDE), _BACKGROUND)
            if slot.colour:
                x = slot.x + round((following.x - slot.x) * step / FRAMES_PER_SLOT)
                y = slot.y + round((following.y - slot.y) * step / FRAMES_PER_SLOT)
                ImageDraw.Draw(canvas).rectangle((x, y, x + _BOX - 1, y + _BOX - 1), fill=COLOURS[slot.colour])
            frames.append(np.asarray(canvas))
    return frames


def encode_mp4(frames: list[np.ndarray]) -> bytes:
    """MPEG-4 part 2 in mp4: FFmpeg's own encoder, one thread, no version strings: equal frames give equal bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 400_000
        stream.gop_size = FPS
        stream.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
