"""Answers from an exported Hugging Face folder, with our own model: what `nemovl generate` runs.

    from pathlib import Path
    from nemovl_train.inference.answer import Question, answer, answer_all

    answer(Path("runs/tiny/hf"), "Which digit is this?", images=[Path("digit.png")])
    answer_all(Path("runs/tiny/hf"), [Question("2 + 2?"), Question("What moves?", videos=(Path("clip.mp4"),))])

The folder's config, weights, tokenizer and preprocessor config decide everything; no code from it is run. `Decoding`
says how long answers may be, how tokens are chosen, and how much of a video is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.media.image import decode_image
from data_pipelines.media.rules import RenderRules
from data_pipelines.media.video import probe
from data_pipelines.template import TEMPLATES, TRACE_START, reasoning_on
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.convert.checkpoints import load_tensors, single_process_model
from nemovl_train.convert.hf_config import read_media_budget
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.hf_layout import RELEASED_MEDIA
from nemovl_train.exceptions import ConversionError, DataError, UserError
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt, build_prompt
from nemovl_train.inference.sampling import GREEDY, Sampling
from nemovl_train.model.vlm import NemotronVL


@dataclass(frozen=True)
class Question:
    """One question and what it is about.

    Attributes:
        prompt: The question. `<image>` and `<video>` in it stand for the media if there is one for each; without any,
            images come first, then videos, then the text.
        images: JPEG, PNG or WebP files.
        videos: Files that FFmpeg reads.
        system: System text.
        think: Turn reasoning on; `/think` and `/no_think` in the texts do the same, and the last one wins.
    """

    prompt: str
    images: Sequence[Path] = ()
    videos: Sequence[Path] = ()
    system: str = ""
    think: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        sampling: How tokens are chosen; the most likely one by default.
        stop: Texts of tokens that end an answer, besides the end of a turn; each must be one token.
        video_pruning_rate: Share of each video's visual tokens to drop (Efficient Video Sampling), in [0, 1).
    """

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    video_pruning_rate: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}: at least 1")
        if not 0 <= self.video_pruning_rate < 1:
            problems.append(
                f"video_pruning_rate is {self.video_pruning_rate}: at least 0 (all tokens) and below 1; 0.75 is usual"
            )
        if problems:
            raise UserError("\n".join(problems))


def answer(
    folder: Path,
    prompt: str,
    *,
    images: Sequence[Path] = (),
    videos: Sequence[Path] = (),
    system: str = "",
    think: bool = False,
    decoding: Decoding | None = None,
) -> str:
    """Answer one question; see `Question` for the arguments and `answer_all` for result and errors."""
    return answer_all(folder, [Question(prompt, images, videos, system, think)], decoding)[0]


def answer_all(folder: Path, questions: Sequence[Question], decoding: Decoding | None = None) -> list[str]:
    r"""Answer several questions with one loaded model, together, each as if it were asked alone.

    Args:
        folder: Exported folder of a vision-language or text-only model.
        questions: What to ask.
        decoding: How; greedy and at most 128 tokens when None.

    Returns:
        One text per question. With reasoning on it begins with `<think>\n` and the trace, which `</think>` ends.

    Raises:
        ConversionError: The folder is not an export, is damaged, or holds a tower alone.
        DataError: A medium cannot be read, or tags in a prompt do not match its media; the file is named.
        UserError: Images or videos for a text-only model, or a stop text that is not one token.
    """
    exported = ExportedModel(folder)
    # Everything that can be wrong with a question is found before the weights are read.
    asked = [exported.asked(*_record(question, folder, exported.with_vision)) for question in questions]
    stop = exported.stop_ids(decoding.stop if decoding else ())
    with exported.loaded() as model:
        return exported.answers(model, asked, decoding or Decoding(), stop)


@dataclass(frozen=True)
class Asked:
    """A rendered question, and whether its answer begins inside a reasoning trace."""

    prompt: Prompt
    reasoning: bool


class ExportedModel:
    """An exported folder, opened: its rules at once, its weights when they are asked for.

    Args:
        folder: Exported folder of a vision-language or text-only model.

    Raises:
        ConversionError: The folder is not an export, is damaged, or holds a tower alone.
    """

    def __init__(self, folder: Path) -> None:
        self._source = _open_folder(folder)
        self.config = self._source.config
        self.with_vision = "vision" in self.config.parts
        self.tokenizer = TextTokenizer(folder, media=self.with_vision)
        self.rules = _rules(self._source, self.with_vision)

    def asked(self, record: Mapping[str, Any], media: Mapping[str, bytes]) -> Asked:
        """Render a record of the dataset schema; its last answer, if it has one, is left out.

        Raises:
            DataError: The record or one of its media cannot be used.
        """
        messages = record["messages"][:-1] if record["messages"][-1]["role"] == "assistant" else record["messages"]
        return Asked(build_prompt(record, media, self.tokenizer, self.rules), reasoning_on(messages))

    def stop_ids(self, stop: Sequence[str]) -> list[int]:
        """Ids of stop texts.

        Raises:
            UserError: One of them is not one token.
        """
        ids = [self.tokenizer.token_ids(text) for text in stop]
        problems = [
            f"stop text {text!r} is {len(found)} tokens; give texts of one token each"
            for text, found in zip(stop, ids, strict=True)
            if len(found) != 1
        ]
        if problems:
            raise UserError("\n".join(problems))
        return [found[0] for found in ids]

    @contextmanager
    def loaded(self) -> Iterator[NemotronVL]:
        """The model with its weights, in evaluation mode, on the GPU where there is one."""
        with single_process_model(self.config, self._source.dtype) as model:
            load_tensors(model, self._source.tensors())
            yield model.eval()

    def answers(
        self, model: NemotronVL, asked: Sequence[Asked], decoding: Decoding, stop: Sequence[int] = ()
    ) -> list[str]:
        """Texts of the answers, in order; see `answer_all`."""
        written = generate(
            model,
            [question.prompt for question in asked],
            max_new_tokens=decoding.max_new_tokens,
            sampling=decoding.sampling,
            stop=stop,
            video_pruning_rate=decoding.video_pruning_rate,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        return [f"{TRACE_START}{t}" if q.reasoning else t for t, q in zip(texts, asked, strict=True)]


def _open_folder(folder: Path) -> HFFolder:
    if not (folder / "config.json").is_file():
        inside = folder / "hf"
        hint = inside if (inside / "config.json").is_file() else "a folder that `nemovl convert export` wrote"
        raise ConversionError(f"{folder} is not an exported model, it has no config.json; give {hint}")
    source = HFFolder(folder)
    if source.kind == "vision":
        raise ConversionError(
            f"{folder} holds a vision tower alone, which answers nothing; give a whole model's folder"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ConversionError(f"{folder} has no tokenizer.json; export it again with --tokenizer DIR")
    return source


def _rules(source: HFFolder, with_vision: bool) -> RenderRules:
    budget = read_media_budget(source.path) if with_vision else RELEASED_MEDIA
    return RenderRules(
        template=TEMPLATES[0],
        tile_size=source.config.vision.tile_size,
        max_tiles=budget.max_num_tiles,
        use_thumbnail=budget.use_thumbnail,
        video_fps=budget.video_fps,
        max_frames=budget.video_max_frames,
    )


def _record(question: Question, folder: Path, with_vision: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The question as a record of the dataset schema, with the bytes of its media by member name."""
    paths = [*(("image", path) for path in question.images), *(("video", path) for path in question.videos)]
    if paths and not with_vision:
        raise UserError(
            f"{folder} holds a text-only model, which cannot see {paths[0][1]}; ask without images and videos"
        )
    items: list[dict[str, Any]] = []
    media: dict[str, bytes] = {}
    for number, (kind, path) in enumerate(paths):
        member = f"{kind}{number}"
        media[member], metadata = read_medium(kind, path)
        items.append({"type": kind, kind: member, "metadata": metadata})
    # The switch is taken out of the text again, so the system block is the caller's.
    system = question.system + ("/think" if question.think else "")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*items, {"type": "text", "text": question.prompt}]})
    return {"id": "question", "messages": messages}, media


def read_medium(kind: str, path: Path) -> tuple[bytes, dict[str, Any]]:
    """Bytes of a file that decodes, and what a record says about it.

    Args:
        kind: `image` or `video`.
        path: The file.

    Raises:
        DataError: It cannot be read; it is named.
    """
    try:
        data = path.read_bytes()
        if kind == "image":
            decode_image(data)
            return data, {}
        shape = probe(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return data, {
        "video_width": shape.width,
        "video_height": shape.height,
        "video_fps": shape.fps,
        "video_num_frames": shape.frames,
    }
