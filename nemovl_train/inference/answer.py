"""Answers from an exported Hugging Face folder, with our own model: what `nemovl generate` runs.

    from pathlib import Path
    from nemovl_train.inference.answer import Question, answer, answer_all

    answer(Path("runs/tiny/hf"), "Which digit is this?", images=[Path("digit.png")])
    answer_all(Path("runs/tiny/hf"), [Question("2 + 2?"), Question("What moves?", videos=(Path("clip.mp4"),))])

The folder's config, weights, tokenizer and preprocessor config decide everything; no code from it is run. Decoding is
greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
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

MAX_NEW_TOKENS = 128


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


def answer(
    folder: Path,
    prompt: str,
    *,
    images: Sequence[Path] = (),
    videos: Sequence[Path] = (),
    system: str = "",
    think: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """Answer one question; see `Question` for the arguments and `answer_all` for result and errors."""
    question = Question(prompt, images, videos, system, think)
    return answer_all(folder, [question], max_new_tokens=max_new_tokens)[0]


def answer_all(folder: Path, questions: Sequence[Question], *, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    r"""Answer several questions with one loaded model, each as if it were asked alone.

    Args:
        folder: Exported folder of a vision-language or text-only model.
        questions: What to ask.
        max_new_tokens: Longest answer in tokens.

    Returns:
        One text per question. With reasoning on it begins with `<think>\n` and the trace, which `</think>` ends.

    Raises:
        ConversionError: The folder is not an export, is damaged, or holds a tower alone.
        DataError: A medium cannot be read, or tags in a prompt do not match its media; the file is named.
        UserError: Images or videos for a text-only model.
    """
    source = _open_folder(folder)
    # Everything that can be wrong with a question is found before the weights are read.
    with_vision = "vision" in source.config.parts
    tokenizer = TextTokenizer(folder, media=with_vision)
    rules = _rules(source, with_vision)
    records = [_record(question, folder, with_vision) for question in questions]
    prompts = [build_prompt(record, media, tokenizer, rules) for record, media in records]
    answers = _generate(source, prompts, max_new_tokens)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    thinking = [reasoning_on(record["messages"]) for record, _ in records]
    return [f"{TRACE_START}{text}" if on else text for text, on in zip(texts, thinking, strict=True)]


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
        media[member], metadata = _read_medium(kind, path)
        items.append({"type": kind, kind: member, "metadata": metadata})
    # The switch is taken out of the text again, so the system block is the caller's.
    system = question.system + ("/think" if question.think else "")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*items, {"type": "text", "text": question.prompt}]})
    return {"id": "question", "messages": messages}, media


def _read_medium(kind: str, path: Path) -> tuple[bytes, dict[str, Any]]:
    """Bytes of a file that decodes, and what a record says about it. Errors name the file."""
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


def _generate(source: HFFolder, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    with single_process_model(source.config, source.dtype) as model:
        load_tensors(model, source.tensors())
        return generate(model.eval(), prompts, max_new_tokens=max_new_tokens)
