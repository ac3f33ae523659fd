"""Every conversation format becomes the same record, and media keep their bytes."""

import base64
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.importers import job
from data_pipelines.importers.conversations import draft_of
from data_pipelines.importers.formats import choose_format


def test_llava_list(tmp_path, bring, imported, picture, texts):
    (tmp_path / "src/coco").mkdir(parents=True)
    photo = picture(40, 30, "JPEG")
    (tmp_path / "src/coco/1.jpg").write_bytes(photo)
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure, \"really\"? [}"}, {"from": "gpt", "value": "Yes."},
    ]  # fmt: skip
    rows = [{"id": "a", "image": "coco/1.jpg", "conversations": turns}, {"id": "t", "conversations": turns[2:]}]
    (tmp_path / "src/train.json").write_text(json.dumps(rows, indent=2))
    assert bring(tmp_path / "src")["format"] == "llava"
    (first, media), (second, none) = imported()
    assert texts(first) == ["<image>\nWhat is it?", "A cat.", 'Sure, "really"? [}', "Yes."]
    assert first["messages"][0]["content"][0] == {"type": "image", "image": "image0.jpg", "source": "coco/1.jpg"}
    assert media == {"image0.jpg": photo}
    assert (texts(second), none) == (['Sure, "really"? [}', "Yes."], {})


def test_nemotron_v2_with_media_tars_and_video_metadata(tmp_path, bring, imported, picture, clip, lines):
    media = tmp_path / "src/set/media"
    media.mkdir(parents=True)
    video, photo = clip(40), picture(30, 30)
    with tarfile.open(media / "shard_000000.tar", "w") as tar:
        for name, data in (("clips/v.mp4", video), ("p.png", photo)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    metadata = {"video_duration": 4.0, "video_num_frames": 40, "video_fps": 10, "video_width": 32, "video_height": 32}
    content = [
        {"type": "video", "video": "clips/v.mp4", "metadata": metadata},
        {"type": "image", "image": "media/p.png", "metadata": {"width": 30}},
        {"type": "text", "text": "what?"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "grey"}]}
    lines(tmp_path / "src/set/set.jsonl", [{"id": "v", "messages": [{"role": "user", "content": content}, answer]}])
    assert bring(tmp_path / "src")["format"] == "nemotron-v2"
    ((record, stored),) = imported()
    assert stored == {"video0.mp4": video, "image1.png": photo}
    assert record["messages"][0]["content"][0]["metadata"] == metadata


def test_each_subset_has_its_own_media(tmp_path, bring, imported, picture, lines):
    """The same name in two subsets is two pictures; the same name twice in one is refused."""
    photos = {name: picture(20, 20, seed=i) for i, name in enumerate(("one", "two"))}
    for name, photo in photos.items():
        media = tmp_path / f"src/{name}/media"
        media.mkdir(parents=True)
        write_member(media / "shard_0.tar", "p.png", photo)
        content = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "q"}]
        row = {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
        lines(tmp_path / f"src/{name}/{name}.jsonl", [row])
    bring(tmp_path / "src")
    assert {record["id"]: media["image0.png"] for record, media in imported()} == photos
    write_member(tmp_path / "src/one/media/shard_1.tar", "p.png", photos["two"])
    with pytest.raises(DataError, match=r"in several tar files \(one/media/shard_0.tar, one/media/shard_1.tar\)"):
        bring(tmp_path / "src", tmp_path / "second")


@pytest.mark.parametrize("name", ["a#b", "a?b", "50%23", "a b"])
def test_any_name_of_the_output_folder(tmp_path, bring, imported, picture, lines, name):
    photo = one_in_a_tar(tmp_path / "src", lines, picture(20, 20))
    bring(tmp_path / "src", tmp_path / name)
    assert imported(tmp_path / name)[0][1] == {"image0.png": photo}


def test_a_tar_that_was_replaced_is_indexed_again(tmp_path, bring, imported, picture, lines, monkeypatch):
    one_in_a_tar(tmp_path / "src", lines, picture(20, 20))
    with monkeypatch.context() as patch:
        patch.setattr(job, "publish", stopped)
        with pytest.raises(DataError, match="No space left"):
            bring(tmp_path / "src")
    new = picture(20, 20, seed=1)
    with tarfile.open(tmp_path / "src/media/shard_0.tar", "w") as tar:
        for name, data in (("other.png", picture(90, 90)), ("p.png", new)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    bring(tmp_path / "src")
    assert imported()[0][1] == {"image0.png": new}


def stopped(*args, **options):
    raise OSError(28, "No space left on device")


def one_in_a_tar(folder, lines, photo):
    """A Nemotron v2 source of one record whose picture, `p.png`, is in `media/shard_0.tar`."""
    (folder / "media").mkdir(parents=True)
    write_member(folder / "media/shard_0.tar", "p.png", photo)
    content = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "q"}]
    row = {"id": "a", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    lines(folder / "set.jsonl", [row])
    return photo


def write_member(path, name, data):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, BytesIO(data))


def test_reasoning_is_turned_on_where_there_is_a_trace(tmp_path, bring, imported, lines, texts):
    traced = "<think>\nwhy</think>because"
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": traced}]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"},
                      {"role": "assistant", "content": traced}]},
        {"messages": [{"role": "user", "content": "q /think"}, {"role": "assistant", "content": traced}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "plain"}]},
    ]  # fmt: skip
    lines(tmp_path / "chat.jsonl", rows)
    bring(tmp_path / "chat.jsonl", think=True)
    assert [texts(record)[:-1] for record, _ in imported()] == [["/think", "q"], ["S/think", "q"], ["q /think"], ["q"]]


def test_openai_parts_and_data_urls(tmp_path, bring, imported, picture, lines):
    photo = picture(20, 20)
    url = "data:image/png;base64," + base64.b64encode(photo).decode()
    content = [{"type": "text", "text": "Read "}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "7"},
    ]
    lines(tmp_path / "src/chat.jsonl", [{"messages": messages}])
    assert bring(tmp_path / "src/chat.jsonl")["format"] == "openai"
    ((record, media),) = imported()
    assert record["id"] == "chat.jsonl-0000000"
    assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
    assert media == {"image0.png": photo}


def test_sharegpt_images_go_where_their_marks_are(tmp_path, bring, imported, picture, lines, texts):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(20, 20, seed=i))
    turns = [
        {"from": "human", "value": "A <image> and B <image>"}, {"from": "gpt", "value": "ok"},
        {"from": "human", "value": "<image> C"}, {"from": "gpt", "value": "ok"},
    ]  # fmt: skip
    lines(tmp_path / "chat.jsonl", [{"conversations": turns, "images": ["0.png", "1.png", "2.png"], "system": "S"}])
    assert bring(tmp_path / "chat.jsonl")["format"] == "sharegpt"
    ((record, media),) = imported()
    assert texts(record)[0] == "S"
    kinds = [[item["type"] for item in m["content"]] for m in record["messages"]]
    assert kinds[1:] == [["image", "image", "text"], ["text"], ["image", "text"], ["text"]]
    assert [media[f"image{i}.png"] for i in range(3)] == [picture(20, 20, seed=i) for i in range(3)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "<image> <image>"}], "image": "a.png"}, r"2 <image> .* 1 image"),
        ({"conversations": [{"from": "cow", "value": "moo"}]}, "role 'cow' is not one of"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "type 'audio'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a", "b"]}, "1 image items"),
        ({"texts": [{"question": "a"}]}, "must hold 'user' and 'assistant'"),
        ({"prompt": "a"}, "no messages, conversations or texts"),
    ],
)  # fmt: skip
def test_bad_conversations_say_what_is_wrong(row, reason):
    with pytest.raises(DataError, match=reason):
        draft_of(row)


def test_auto_says_what_it_found_or_what_to_do(tmp_path, picture):
    with pytest.raises(DataError, match="there is no such file"):
        choose_format(tmp_path / "none", "auto")
    with pytest.raises(DataError, match="nothing is fetched"):
        choose_format(Path("https://a.b/c"), "auto")
    with pytest.raises(DataError, match="is not one of auto, nemotron-v2"):
        choose_format(tmp_path, "lava")
    with pytest.raises(DataError, match="nothing that is known"):
        choose_format(tmp_path, "auto")
    (tmp_path / "a.png").write_bytes(picture(8, 8))
    with pytest.raises(DataError, match=r"put metadata\.jsonl beside them, one line like"):
        choose_format(tmp_path, "auto")
