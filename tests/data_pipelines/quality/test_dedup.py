"""Duplicates against pairs whose relation is known by construction, and exact Jaccard similarities."""

import io
import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.loader import PackStream
from data_pipelines.quality.dedup import find_duplicates
from data_pipelines.quality.fingerprint import image_hash, text_signature
from nemovl_train import cli

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with very large jugs of red ink"


def words(seed, count=60):
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), count))


def photo(seed, width=160, height=120):
    small = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("changed", [0, 2, 6, 20, 60])
def test_signatures_estimate_the_jaccard_similarity(changed):
    first, second = words(1).split(), words(1).split()
    second[:changed] = words(2).split()[:changed]
    texts = [" ".join(first), " ".join(second)]
    sets = [{t[i : i + 5] for i in range(len(t) - 4)} for t in texts]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    one, two = map(text_signature, texts)
    assert abs((one == two).mean() - exact) < 0.12
    assert (text_signature(texts[0].upper().replace(" ", " \n")) == one).all()
    assert (text_signature(texts[0], part=1) == one).mean() < 0.05


def test_long_and_empty_texts_have_signatures():
    long = words(3, 40_000)
    assert (text_signature(long) == text_signature(long + " end")).mean() > 0.95
    assert (text_signature("") == text_signature(" ")).all()
    assert (text_signature("3") == text_signature("8")).mean() < 0.05


def test_image_hashes_survive_compression_and_size_but_not_another_picture():
    hashes = [image_hash(saved(photo(seed))) for seed in range(40)]
    for seed in range(40):
        copy = photo(seed).resize((97, 80), Image.Resampling.LANCZOS)
        assert (image_hash(saved(copy, "JPEG", quality=60)) ^ hashes[seed]).bit_count() <= 4
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 8
    with pytest.raises(DataError, match="not a readable image"):
        image_hash(b"no image")


@pytest.fixture
def samples(record):
    """Keys say what they are: a pair (x, x') is alike, everything else is not."""
    text = {f"text-{i}": words(10 + i) for i in range(30)}
    # One in about fifty shingles changes; ids, spacing and case do not count.
    text["text-3'"] = text["text-3"].upper()
    text["text-4'"] = text["text-4"][:-4]
    found = [(record(key, f"What about {key[:6]}?", value), {}) for key, value in text.items()]
    for i in range(12):
        found.append((record(f"photo-{i}", "What is it?", f"It is {i}.", images=1), {"image0.png": saved(photo(i))}))
    copy = saved(photo(5).resize((200, 150)), "JPEG", quality=70)
    found.append((record("photo-5'", "what is it?", "It is 5.", images=1), {"image0.png": copy}))
    # The same picture, another question or answer; another picture with the same question and answer.
    found.append((record("asked", "Which colour is its left half?", "It is 5.", images=1), {"image0.png": copy}))
    found.append((record("said", "What is it?", "A wizard.", images=1), {"image0.png": copy}))
    found.append((record("other", "What is it?", "It is 5.", images=1), {"image0.png": saved(photo(77))}))
    found.append((record("photo-7''", "What is it?", "It is 7.", images=1), {"image0.png": saved(photo(7))}))
    return found


def test_exactly_the_pairs_that_are_alike_are_found(samples, write, tmp_path):
    folder = write(tmp_path / "ds", samples)
    report = find_duplicates([folder])
    pairs = {(d.kind, d.key, d.of_key) for d in report.duplicates}
    assert pairs == {
        ("near", "text-3'", "text-3"),
        ("near", "text-4'", "text-4"),
        ("near", "photo-5'", "photo-5"),
        ("exact", "photo-7''", "photo-7"),
    }
    assert report.samples == len(samples)
    assert find_duplicates([folder], workers=2) == report
    assert [d.key for d in find_duplicates([folder], exact_only=True).duplicates] == ["photo-7''"]
    assert len(find_duplicates([folder], text_similarity=0.5).duplicates) >= 4


def test_bands_find_what_comparing_all_pairs_finds(write, record, tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for i in range(90):
        text = words(int(rng.integers(60))).split()
        for place in rng.integers(0, 60, rng.integers(0, 8)):
            text[place] = "changed"
        picture = photo(int(rng.integers(6)))
        made.append((record(f"s{i}", "q", " ".join(text), images=1), {"image0.png": saved(picture)}))
    folder = write(tmp_path / "ds", made)
    found = {d.key for d in find_duplicates([folder], text_similarity=0.8).duplicates}
    answers = [text_signature(r["messages"][1]["content"], part=1) for r, _ in made]
    hashes = [image_hash(m["image0.png"]) for _, m in made]
    expected = {
        f"s{j}"
        for j in range(90)
        for i in range(j)
        if (hashes[i] ^ hashes[j]).bit_count() <= 4 and (answers[i] == answers[j]).mean() >= 0.8
    }
    assert len(expected) > 4
    # A sample that is like one that is itself left out may stay.
    assert found <= expected
    assert len(expected - found) <= 3


def test_held_out_samples_stay_and_the_plan_leaves_duplicates_out(samples, write, tmp_path, configure, capsys):
    from data_pipelines.shards import write_dataset

    leaked = [samples[0], samples[35]]
    settings = {"name": "ds", "tile_size": 64, "max_tiles": 4, "max_frames": 8}
    tokenizer = configure({}).tokenizer
    folder = write_dataset(tmp_path / "ds", {"train": samples, "heldout": leaked}, tokenizer=tokenizer, **settings)
    assert cli.main(["data", "dedup", str(folder), "--quarantine", "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["set_aside"] == len(report["duplicates"]) == 6
    across = [d for d in report["duplicates"] if d["of_split"] == "heldout"]
    assert {d["key"] for d in across} == {"text-0", samples[35][0]["id"]}
    gone = {d["key"] for d in report["duplicates"]}
    assert len(Dataset.open(folder, "heldout")) == 2
    config = configure({"ds": folder}, window_samples=4096, seq_length=2000)
    stream = PackStream(config, tokens_per_tile=4, seed=1, global_batch=1)
    passed = islice(stream, stream.plan.window_packs)
    seen = {key for packs in passed for pack in packs for key in pack.sample_keys}
    stream.close()
    assert seen == {record["id"] for record, _ in samples} - gone
    assert cli.main(["data", "quarantine", "list", str(folder)]) == 0
    assert "duplicate: same messages and media as" in capsys.readouterr().out
    assert find_duplicates([folder]).duplicates == []


def test_folders_are_kept_in_the_order_they_are_named(samples, write, tmp_path):
    one, two = write(tmp_path / "one", samples[:3]), write(tmp_path / "two", samples[2:8])
    (found,) = [d for d in find_duplicates([one, two]).duplicates if d.kind == "exact"]
    assert (found.folder, found.of_folder) == (str(two), str(one))
    (found,) = [d for d in find_duplicates([two, one]).duplicates if d.kind == "exact"]
    assert (found.folder, found.of_folder) == (str(one), str(two))
    with pytest.raises(DataError, match="named twice"):
        find_duplicates([one, one])


def test_wrong_thresholds_are_refused(write, samples, tmp_path, capsys):
    folder = str(write(tmp_path / "ds", samples[:2]))
    assert cli.main(["data", "dedup", folder, "--text-similarity", "0.1"]) == 2
    assert "between 0.5 and 1" in capsys.readouterr().err
