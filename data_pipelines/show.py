"""What the model sees: a pack's tokens by role in the loss, its documents, weights, tiles and frames.

`view_pack` describes a pack once; the terminal and the page are two ways of printing that.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.text import Text

from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaLayout, RenderRules, lay_out
from data_pipelines.pack import BuiltPack, PackBuilder
from data_pipelines.schema import IGNORE_LABEL, Pack
from data_pipelines.sources import PlannedPack, PlannedSample
from data_pipelines.tokenizer import IMAGE, TextTokenizer

MASKED, TRAINED, SPECIAL, VISUAL = "masked", "trained", "special", "visual"
_STYLES = {MASKED: "dim", TRAINED: "bold green", SPECIAL: "yellow", VISUAL: "cyan"}
_TILE_PIXELS = 112
_MAX_PICTURES = 400


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: `masked`, `trained`, `special` (not trained) or `visual`.
        text: What they say; for visual tokens what they stand for.
        tokens: How many.
        weight: Loss weight of each, 0 where not trained.
        ids: Their ids; empty for visual tokens, which are all alike.
    """

    kind: str
    text: str
    tokens: int
    weight: float
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Medium:
    """One image or video of a document.

    Attributes:
        kind: `image` or `video`.
        columns: Columns of the grid; 1 for a video.
        rows: Rows of the grid; 1 for a video.
        thumbnail: The last tile is the whole image.
        first_tile: Number of its first tile in the pack.
        tiles: How many tiles it has.
        times: Seconds of each frame of a video.
    """

    kind: str
    columns: int
    rows: int
    thumbnail: bool
    first_tile: int
    tiles: int
    times: tuple[float, ...]


@dataclass(frozen=True)
class Document:
    """One sample of a pack: boundaries in tokens, runs and media."""

    key: str
    dataset: str
    start: int
    stop: int
    trained: int
    weight_sum: float
    runs: tuple[Run, ...]
    media: tuple[Medium, ...]


@dataclass(frozen=True)
class View:
    """A pack as a person reads it.

    Attributes:
        title: What it is.
        size: Tokens of the pack.
        padding: Tokens of the tail.
        documents: Samples in order.
        left_out: Samples that could not be used, with the reason.
        tiles: [T, 3, P, P] uint8.
    """

    title: str
    size: int
    padding: int
    documents: tuple[Document, ...]
    left_out: tuple[str, ...]
    tiles: torch.Tensor

    def as_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {
            "title": self.title,
            "size": self.size,
            "padding": self.padding,
            "left_out": list(self.left_out),
            "documents": [
                {
                    **{name: getattr(d, name) for name in ("key", "dataset", "start", "stop", "trained", "weight_sum")},
                    "runs": [{**run.__dict__, "ids": list(run.ids)} for run in d.runs],
                    "media": [{**medium.__dict__, "times": list(medium.times)} for medium in d.media],
                }
                for d in self.documents
            ],
        }


def sample_config(dataset: Dataset, row: int, rules: RenderRules, tokenizer: Path) -> tuple[DataConfig, PlannedPack]:
    """Config and plan of a pack that holds one sample at its full budget and nothing else."""
    length = int(dataset.lengths[row])
    config = DataConfig(
        tokenizer=str(tokenizer),
        seq_length=length,
        **asdict(rules),
    )
    sample = PlannedSample(dataset.name, row, rules.max_tiles, rules.max_frames, length)
    return config, PlannedPack(0, (sample,))


def view_pack(
    config: DataConfig, datasets: Mapping[str, Dataset], tokenizer: TextTokenizer, planned: PlannedPack, title: str
) -> View:
    """Build a planned pack the way training does, and describe it.

    Args:
        config: Rules, loss weights and length.
        datasets: Opened sources by the names that `planned` uses.
        tokenizer: The run's tokenizer.
        planned: Which samples.
        title: What to call it.
    """
    rules = RenderRules.from_config(config)
    built = PackBuilder(config, datasets, rules, tokenizer).build(planned)
    layouts = _layouts(built, planned, datasets, rules)
    pack = built.pack
    media = _media(pack, layouts)
    bounds = pack.cu_seqlens.tolist()
    documents = tuple(
        _document(pack, i, key, bounds[i], bounds[i + 1], media, tokenizer) for i, key in enumerate(pack.sample_keys)
    )
    left_out = tuple(f"{bad.key} of {bad.dataset_id} ({bad.reason}): {bad.message}" for bad in built.outcomes if bad)
    padding = int(pack.stats["padding"])
    return View(title, len(pack.input_ids), padding, documents, left_out, pack.tiles)


def _layouts(
    built: BuiltPack, planned: PlannedPack, datasets: Mapping[str, Dataset], rules: RenderRules
) -> list[MediaLayout]:
    """Layout of every medium of the pack, by its number there."""
    used = [s for s, outcome in zip(planned.samples, built.outcomes, strict=True) if outcome is None]
    return [
        lay_out(shape, rules, max_tiles=sample.max_tiles, max_frames=sample.max_frames)
        for sample in used
        for shape in datasets[sample.source].shapes(sample.row)
    ]


def _media(pack: Pack, layouts: Sequence[MediaLayout]) -> dict[int, Medium]:
    """Media by the position of their first image token, in the order in which the text places them."""
    media = {}
    starts, owners = pack.tile_token_start.tolist(), pack.media_of_tile.tolist()
    for tile, (start, owner) in enumerate(zip(starts, owners, strict=True)):
        if tile and owners[tile - 1] == owner:
            continue
        layout = layouts[owner]
        columns, rows = layout.grid
        media[start] = Medium(
            layout.kind, columns, rows, layout.thumbnail, tile, layout.tiles, tuple(layout.frame_times)
        )
    return media


def _document(
    pack: Pack, number: int, key: str, start: int, stop: int, media: Mapping[int, Medium], tokenizer: TextTokenizer
) -> Document:
    span = slice(start, stop)
    ids, weights = pack.input_ids[span].numpy(), pack.loss_weight[span].numpy()
    targets = pack.labels[span].numpy() != IGNORE_LABEL
    # A token counts as trained where it is predicted, which is one place before its own.
    trained = np.concatenate([[False], targets[:-1]])
    token_weights = np.concatenate([[np.float32(0)], weights[:-1]])
    own = {at - start: medium for at, medium in media.items() if start <= at < stop}
    return Document(
        key=key,
        dataset=pack.dataset_ids[number],
        start=start,
        stop=stop,
        trained=int(targets.sum()),
        weight_sum=round(float(weights.sum(dtype=np.float64)), 4),
        runs=tuple(_runs(ids, trained, token_weights, own, tokenizer)),
        media=tuple(own.values()),
    )


def _runs(
    ids: np.ndarray, trained: np.ndarray, weights: np.ndarray, media: Mapping[int, Medium], tokenizer: TextTokenizer
) -> list[Run]:
    image, specials = tokenizer.special(IMAGE), tokenizer.added_ids
    kinds = [
        VISUAL if i == image else TRAINED if t else SPECIAL if i in specials else MASKED
        for i, t in zip(ids.tolist(), trained.tolist(), strict=True)
    ]
    runs: list[Run] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        same = end < len(ids) and kinds[end] == kinds[begin] and weights[end] == weights[begin] and end not in media
        if same:
            continue
        part = tuple(ids[begin:end].tolist())
        if kinds[begin] == VISUAL:
            runs.append(Run(VISUAL, _medium_text(media.get(begin), end - begin), end - begin, 0.0, ()))
        else:
            weight = round(float(weights[begin]), 6)
            runs.append(Run(kinds[begin], tokenizer.decode(part), end - begin, weight, part))
        begin = end
    return runs


def _medium_text(medium: Medium | None, tokens: int) -> str:
    if medium is None:
        return f"[frame: {tokens} tokens]"
    if medium.kind == "video":
        return f"[video of {medium.tiles} frames; first frame: {tokens} tokens]"
    thumbnail = " + thumbnail" if medium.thumbnail else ""
    return f"[image: {medium.columns}x{medium.rows} tiles{thumbnail}, {tokens} tokens]"


def terminal_text(view: View) -> Text:
    """The view as styled text: trained green, masked dim, special yellow, visual cyan."""
    out = Text()
    out.append(f"{view.title}: {view.size} tokens, {len(view.documents)} samples, {view.padding} padding\n", "bold")
    out.append("legend: ")
    for kind in (MASKED, TRAINED, SPECIAL, VISUAL):
        out.append(kind, _STYLES[kind])
        out.append(" ")
    out.append("\n")
    for line in view.left_out:
        out.append(f"left out: {line}\n", "red")
    for number, document in enumerate(view.documents):
        out.append(
            f"\n--- {number}: {document.key} of {document.dataset}, tokens {document.start} to {document.stop}, "
            f"{document.trained} trained, weight {document.weight_sum:g}\n",
            "bold",
        )
        for run in document.runs:
            out.append(run.text.replace("\n", "\\n\n"), _STYLES[run.kind])
        out.append("\n")
        weights = sorted({run.weight for run in document.runs if run.kind == TRAINED})
        out.append(f"    loss weight of a token: {', '.join(f'{weight:g}' for weight in weights) or 'none'}\n")
        for medium in document.media:
            if medium.times:
                out.append(f"    frames at {', '.join(f'{t:.2f}' for t in medium.times)} s\n")
    return out


def write_page(view: View, path: Path) -> Path:
    """Write the view as one HTML file that loads nothing from anywhere.

    Raises:
        DataError: The file cannot be written.
    """
    shown = min(len(view.tiles), _MAX_PICTURES)
    page = (
        templates()
        .get_template("show.html")
        .render(view=view, pictures=[_picture(tile) for tile in view.tiles[:shown]], shown=shown)
    )
    return write_html(path, page)


def write_html(path: Path, page: str) -> Path:
    """Write a page in one move.

    Raises:
        DataError: The place cannot be written.
    """
    work = path.with_name(f".{path.name}.partial")
    try:
        work.write_text(page, encoding="utf-8")
        work.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; name another file with --html") from error
    return path


@cache
def templates() -> Environment:
    """The pages of the data verbs; everything put into them is escaped, since it is other people's text."""
    return Environment(
        loader=PackageLoader("data_pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _picture(tile: torch.Tensor) -> str:
    """A tile [3, P, P] as a data: URL."""
    image = Image.fromarray(tile.permute(1, 2, 0).numpy())
    image.thumbnail((_TILE_PIXELS, _TILE_PIXELS))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
