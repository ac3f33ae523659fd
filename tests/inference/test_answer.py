"""From an exported folder and files to a text, and what is refused on the way."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import small_vlm
import torch

from data_pipelines.tokenizer import TextTokenizer
from nemovl_train import cli
from nemovl_train.convert.checkpoints import export_checkpoint, import_checkpoint, load_tensors, single_process_model
from nemovl_train.convert.hf_config import read_media_budget
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_layout import RELEASED_MEDIA, MediaBudget
from nemovl_train.exceptions import ConversionError, DataError, UserError
from nemovl_train.inference.answer import Decoding, Question, answer, answer_all
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import build_prompt
from nemovl_train.inference.sampling import Sampling

MEDIA = MediaBudget(max_num_tiles=4, use_thumbnail=True, video_fps=2.0, video_max_frames=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of each kind."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("folders")
    tokenizers = {
        "vlm": small_vlm.write_tokenizer(root / "vlm_tokenizer"),
        "language": small_vlm.write_tokenizer(root / "text_tokenizer", media=False),
        "vision": None,
    }
    for kind, tokenizer in tokenizers.items():
        tensors = small_vlm.weights(kind).items()
        export_canonical(tensors, small_vlm.CONFIG, root / kind, kind=kind, tokenizer=tokenizer, card={}, media=MEDIA)
    return {kind: root / kind for kind in tokenizers}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "page.png"
    path.write_bytes(small_vlm.picture(5, 150, 70))
    return path


def clip_bytes(frames: int = 30, fps: int = 10) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.full((32, 32, 3), 5 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def by_hand(folder: Path, record: dict, media: dict[str, bytes], count: int) -> str:
    tokenizer = TextTokenizer(folder)
    prompt = build_prompt(record, media, tokenizer, small_vlm.RULES)
    with single_process_model(small_vlm.CONFIG, torch.float32) as model:
        load_tensors(model, small_vlm.weights().items())
        ids = generate(model.eval(), [prompt], max_new_tokens=count)[0]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answer_is_that_of_the_exported_model(folders, image):
    record = small_vlm.question("what is this?", images=1)
    expected = by_hand(folders["vlm"], record, {"0.png": image.read_bytes()}, 8)
    assert answer(folders["vlm"], "what is this?", images=[image], decoding=Decoding(max_new_tokens=8)) == expected
    system = {"role": "system", "content": "a"}
    record = {"id": "q", "messages": [system, *small_vlm.question("what? /think")["messages"]]}
    expected = "<think>\n" + by_hand(folders["vlm"], record, {}, 8)
    assert answer(folders["vlm"], "what? ", system="a", think=True, decoding=Decoding(max_new_tokens=8)) == expected


def test_questions_are_answered_as_if_alone(folders, image, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip_bytes())
    questions = [
        Question("what is this?", images=[image, image]),
        Question("which?"),
        Question("what is this?", videos=[video], system="a"),
    ]
    together = answer_all(folders["vlm"], questions, decoding=Decoding(max_new_tokens=6))
    assert together == [answer_all(folders["vlm"], [q], decoding=Decoding(max_new_tokens=6))[0] for q in questions]
    assert len(set(together)) > 1


def test_text_only_model(folders, image):
    assert answer(folders["language"], "what is <image>?", decoding=Decoding(max_new_tokens=4))
    with pytest.raises(UserError, match=r"text-only model, which cannot see .*page\.png"):
        answer(folders["language"], "what?", images=[image])


def test_folders_that_cannot_answer_are_named(folders, tmp_path):
    with pytest.raises(ConversionError, match=r"not an exported model, it has no config\.json"):
        answer(tmp_path, "x")
    (tmp_path / "hf").symlink_to(folders["vlm"])
    with pytest.raises(ConversionError, match=f"give {tmp_path / 'hf'}"):
        answer(tmp_path, "x")
    with pytest.raises(ConversionError, match="vision tower alone"):
        answer(folders["vision"], "x")


def test_media_that_cannot_be_used_are_named(folders, image, tmp_path):
    whole, clip = image.read_bytes(), clip_bytes()
    files = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "words.png": b"no picture",
        "drawing.gif": b"GIF89a" + bytes(40),
        "cut.mp4": clip[: len(clip) // 2],
        "words.mp4": b"no video",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        kind = "videos" if name.endswith("mp4") else "images"
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            answer(folders["vlm"], "what?", **{kind: [tmp_path / name]})
    with pytest.raises(DataError, match=r"drawing\.gif.*JPEG, PNG, WEBP are accepted"):
        answer(folders["vlm"], "what?", images=[tmp_path / "drawing.gif"])
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read"):
        answer(folders["vlm"], "what?", images=[tmp_path])
    with pytest.raises(DataError, match="2 <image> in the text but 1 image"):
        answer(folders["vlm"], "<image> or <image>?", images=[image])


def test_media_budget_travels_with_the_folder(folders, tmp_path):
    assert read_media_budget(folders["vlm"]) == MEDIA
    again = export_checkpoint(import_checkpoint(folders["vlm"], tmp_path / "ours"), tmp_path / "hf")
    assert read_media_budget(again) == MEDIA
    path = again / "preprocessor_config.json"
    document = json.loads(path.read_text())
    assert answer(again, "which?", decoding=Decoding(max_new_tokens=2))
    released = {k: v for k, v in document.items() if not k.startswith("video_") and k != "max_num_tiles"}
    path.write_text(json.dumps(released))
    assert read_media_budget(again) == RELEASED_MEDIA
    path.write_text(json.dumps(released | {"max_num_tiles": "many", "use_thumbnail": 1, "video_fps": -1}))
    with pytest.raises(ConversionError, match=r"(?s)max_num_tiles is 'many'.*use_thumbnail is 1.*video_fps is -1"):
        read_media_budget(again)


def test_command(folders, image, capsys):
    words = ["generate", str(folders["vlm"]), "--prompt", "what is this?", "--image", str(image)]
    assert cli.main([*words, "--max-new-tokens", "5", "--json", "--system", "a", "--think"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = answer(
        folders["vlm"], "what is this?", images=[image], system="a", think=True, decoding=Decoding(max_new_tokens=5)
    )
    assert printed == {"prompt": "what is this?", "answer": expected}
    image.write_bytes(image.read_bytes()[:60])
    assert cli.main(words) == 2
    assert "page.png" in capsys.readouterr().err
    assert cli.main([*words, "--max-new-tokens", "0"]) == 2
    assert "max_new_tokens is 0: at least 1" in capsys.readouterr().err


def test_command_with_many_questions_and_draws(folders, image, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(clip_bytes())
    rows = [
        {"prompt": "what is this?", "images": ["page.png"]},
        {"prompt": "which?", "think": True, "system": "a"},
        {"prompt": "what?", "videos": ["clip.mp4"]},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    words = ["generate", str(folders["vlm"]), "--questions", str(file), "--max-new-tokens", "6", "--json"]
    how = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--video-pruning-rate", "0.75"]
    assert cli.main([*words, *how]) == 0
    printed = [row["answer"] for row in json.loads(capsys.readouterr().out)]
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7)
    decoding = Decoding(max_new_tokens=6, sampling=sampling, video_pruning_rate=0.75)
    questions = [
        Question("what is this?", images=[image]),
        Question("which?", system="a", think=True),
        Question("what?", videos=[tmp_path / "clip.mp4"]),
    ]
    assert printed == [answer(folders["vlm"], **vars(q), decoding=decoding) for q in questions]
    assert cli.main(words) == 0
    assert [row["answer"] for row in json.loads(capsys.readouterr().out)] != printed
    file.write_text('{"prompt": "x", "image": "page.png"}')
    assert cli.main(words) == 2
    assert "questions.jsonl:1: 'image' cannot be used" in capsys.readouterr().err
    assert cli.main([*words, "--prompt", "x"]) == 2
    assert "give --prompt TEXT for one question, or --questions FILE" in capsys.readouterr().err


def test_stop_tokens(folders):
    free = answer(folders["vlm"], "what is this?", decoding=Decoding(max_new_tokens=8))
    tokenizer = TextTokenizer(folders["vlm"])
    ids = tokenizer.encode_text(free)
    with pytest.raises(UserError, match=r"stop text 'no such token' is \d+ tokens"):
        answer(folders["vlm"], "what?", decoding=Decoding(stop=["no such token"]))
    with pytest.raises(UserError, match=r"(?s)max_new_tokens is 0.*video_pruning_rate is 1\.0"):
        Decoding(max_new_tokens=0, video_pruning_rate=1.0)
    text = tokenizer.decode(ids[-1:])
    cut = answer(folders["vlm"], "what is this?", decoding=Decoding(max_new_tokens=8, stop=[text]))
    assert free.startswith(cut)
    assert len(cut) < len(free)
