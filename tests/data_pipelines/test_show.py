"""What is shown is what training gets: spans, weights, grids and frames of real packs."""

import base64
import io
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import RenderRules
from data_pipelines.plan import build_plan
from data_pipelines.schema import IGNORE_LABEL
from data_pipelines.show import MASKED, SPECIAL, TRAINED, VISUAL, terminal_text, view_pack, write_page
from data_pipelines.showing import pack_view, sample_view


@pytest.fixture(scope="module")
def view(configure, mixed_folder, tokenizer):
    config = configure({"mixed": mixed_folder})
    rules = RenderRules.from_config(config)
    datasets = {"mixed": Dataset.open(mixed_folder, "train")}
    plan = build_plan(config, datasets, rules, tokenizer, seed=3, step_packs=1)
    views = ((view_pack(config, datasets, tokenizer, plan.pack(n), f"pack {n}"), plan.pack(n)) for n in range(20))
    return next(v for v in views if {m.kind for d in v[0].documents for m in d.media} == {"image", "video"})


def test_runs_add_up_to_the_pack(view):
    shown, planned = view
    assert sum(d.stop - d.start for d in shown.documents) + shown.padding == shown.size == 400
    assert [d.stop - d.start for d in shown.documents] == [sample.length for sample in planned.samples]
    for document in shown.documents:
        assert sum(run.tokens for run in document.runs) == document.stop - document.start
        trained = [run for run in document.runs if run.kind == TRAINED]
        assert sum(run.tokens for run in trained) == document.trained > 0
        # square weights: n tokens of 1 / sqrt(n)
        assert document.weight_sum == pytest.approx(document.trained**0.5, rel=1e-3)
        assert all(run.weight == 0 for run in document.runs if run.kind != TRAINED)
        assert trained[0].text.startswith("<think></think>answer")
        assert trained[-1].text.endswith("<SPECIAL_12>\n")
        assert {run.kind for run in document.runs} <= {MASKED, TRAINED, SPECIAL, VISUAL}


def test_media_have_the_grids_of_the_tiles(view, mixed_folder):
    shown, _ = view
    assert {m.kind for d in shown.documents for m in d.media} == {"image", "video"}
    assert sum(m.tiles for d in shown.documents for m in d.media) == len(shown.tiles)
    for document in shown.documents:
        visual = sum(run.tokens for run in document.runs if run.kind == VISUAL)
        assert visual == 4 * sum(m.tiles for m in document.media)
        for medium in document.media:
            assert len(medium.times) == (medium.tiles if medium.kind == "video" else 0)
            if medium.kind == "image":
                assert medium.columns * medium.rows + medium.thumbnail == medium.tiles


def test_the_terminal_colours_what_is_trained(view):
    shown, _ = view
    text = terminal_text(shown)
    spans = [text.plain[s.start : s.end] for s in text.spans if s.style == "bold green"]
    assert any(span.startswith("<think></think>answer") for span in spans)
    assert "frames at 0.00, " in text.plain
    assert "[image: " in text.plain


def test_the_page_loads_nothing_and_escapes_texts(tmp_path, write, record, picture, tokenizer_folder):
    evil = record("e", "<script>alert(1)</script>", 'a"><img src=http://x>', images=1)
    folder = write(tmp_path / "d", [(evil, {"image0.png": picture(130, 60)})])
    shown = sample_view(folder, split="train", row=None, key="e", tokenizer=tokenizer_folder)
    page = write_page(shown, tmp_path / "p.html").read_text()
    assert "default-src 'none'" in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r"<script|<img src=http", page)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == len(shown.tiles) == 3
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0])))).astype(int)
    assert abs(first - shown.tiles[0].permute(1, 2, 0).numpy()).mean() < 4
    with pytest.raises(DataError, match=r"cannot write .*another file with --html"):
        write_page(shown, tmp_path / "none/p.html")


def test_a_bad_sample_is_named(tmp_path, write, record, picture, tokenizer_folder):
    cut = picture(200, 200, "JPEG")[:-2000]
    folder = write(tmp_path / "d", [(record("cut", "q", "a", images=1), {"image0.png": cut})])
    shown = sample_view(folder, split="train", row=0, key=None, tokenizer=tokenizer_folder)
    assert shown.documents == ()
    assert shown.left_out[0].startswith("cut of d (image): ")
    assert "left out: cut" in terminal_text(shown).plain


def test_a_runs_own_config(tmp_path, configure, mixed_folder, tokenizer, tokenizer_folder):
    data = {"tokenizer": str(tokenizer_folder), "seq_length": 300, "tile_size": 64, "max_tiles": 4, "max_frames": 8,
            "window_samples": 32, "sources": {"m": {"path": str(mixed_folder)}}, "loss": {"mode": "token"}}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": data, "trainer": {"seed": 7}}))
    options = {"split": None, "seq_length": 1, "seed": 1, "tokenizer": None}
    shown = pack_view([], 2, config=path, **options)
    assert shown.size == 300
    assert {run.weight for d in shown.documents for run in d.runs if run.kind == TRAINED} == {1.0}
    other = {**data, "loss": {"mode": "square"}}
    path.write_text(yaml.safe_dump({"data": other, "trainer": {"seed": 8}}))
    assert [d.key for d in pack_view([], 2, config=path, **options).documents] != [d.key for d in shown.documents]
    path.write_text("data: [1]")
    with pytest.raises(DataError, match="not a run's resolved config"):
        pack_view([], 2, config=path, **options)


def test_what_is_not_there_is_said(mixed_folder, tokenizer_folder):
    with pytest.raises(DataError, match="no sample 'x'"):
        sample_view(mixed_folder, split="train", row=None, key="x", tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match="samples 0 to 59, not 60"):
        sample_view(mixed_folder, split="train", row=60, key=None, tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match="--tokenizer FOLDER"):
        sample_view(mixed_folder, split="train", row=0, key=None, tokenizer=None)


def test_labels_and_runs_are_the_same_thing(configure, mixed_folder, tokenizer):
    """The shown spans are checked against the labels of the pack, token by token."""
    from data_pipelines.pack import PackBuilder

    config = configure({"mixed": mixed_folder})
    rules = RenderRules.from_config(config)
    datasets = {"mixed": Dataset.open(mixed_folder, "train")}
    planned = build_plan(config, datasets, rules, tokenizer, seed=3, step_packs=1).pack(0)
    pack = PackBuilder(config, datasets, rules, tokenizer).build(planned).pack
    shown = view_pack(config, datasets, tokenizer, planned, "p")
    predicted = set((np.flatnonzero(pack.labels.numpy() != IGNORE_LABEL) + 1).tolist())
    for document in shown.documents:
        at = document.start
        for run in document.runs:
            span = range(at, at + run.tokens)
            assert all((i in predicted) == (run.kind == TRAINED) for i in span)
            assert run.kind == VISUAL or pack.input_ids[at : at + run.tokens].tolist() == list(run.ids)
            at += run.tokens
