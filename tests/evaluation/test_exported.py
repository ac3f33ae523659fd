"""`nemovl eval` on a small exported model: scores equal those of answers that were asked for one by one."""

import json
from pathlib import Path

import pytest
import small_vlm
import torch
from test_public_benchmarks import docvqa, ocr

from data_pipelines.shards import write_dataset
from nemovl_train import cli
from nemovl_train.convert.checkpoints import load_tensors, single_process_model
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_layout import MediaBudget
from nemovl_train.evaluation.metrics import anls, edit_similarity, token_f1
from nemovl_train.inference.answer import Decoding, Question, answer_all
from nemovl_train.inference.sampling import Sampling
from nemovl_train.model.batch import PackBatch
from nemovl_train.report.html import write_report

MEDIA = MediaBudget(max_num_tiles=4, use_thumbnail=True, video_fps=2.0, video_max_frames=8)
QUESTIONS = ["what is this?", "which one?", "what digit shows the image?"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An exported model, a held-out set whose second reference is what the model says, and two benchmarks."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("eval")
    tokenizer = small_vlm.write_tokenizer(root / "tokenizer")
    export_canonical(
        small_vlm.weights().items(),
        small_vlm.CONFIG,
        root / "hf",
        kind="vlm",
        tokenizer=tokenizer,
        card={},
        media=MEDIA,
    )
    said = answer_all(root / "hf", [Question(q) for q in QUESTIONS], Decoding(max_new_tokens=6))
    references = ["a", said[1], f"<think>\nwhy\n</think>{said[2][:2]}"]
    rows = [
        (small_vlm.question(q, answer=r, key=f"k{i}"), {})
        for i, (q, r) in enumerate(zip(QUESTIONS, references, strict=True))
    ]
    media = {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
    write_dataset(root / "words", {"heldout": rows}, name="words", tokenizer=tokenizer, **media)
    docvqa(root / "docvqa")
    ocr(root / "ocr")
    return root


def run(root: Path, *words: str, capsys) -> dict:
    assert cli.main(["eval", str(root / "hf"), "--json", "--max-new-tokens", "6", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_those_of_the_answers(root, capsys):
    data = f"{root / 'words'}:strict_match,token_f1,edit_similarity"
    found = run(root, "--data", data, capsys=capsys)
    row = found["sources"]["words"]
    said = answer_all(root / "hf", [Question(q) for q in QUESTIONS], Decoding(max_new_tokens=6))
    references = ["a", said[1], said[2][:2].strip()]
    assert [a["answer"] for a in row["answers"]] == said
    assert [a["references"] for a in row["answers"]] == [[r] for r in references]
    assert row["metrics"]["strict_match"] == pytest.approx(1 / 3)
    for name, metric in (("token_f1", token_f1), ("edit_similarity", edit_similarity)):
        mean = sum(metric(a, [r]) for a, r in zip(said, references, strict=True)) / 3
        assert row["metrics"][name] == pytest.approx(mean)
    assert (row["samples"], row["left_out"]) == (3, 0)
    assert found["decoding"]["sampling"] == {"temperature": 0.0, "top_p": 1.0, "seed": 0}


def test_loss_is_that_of_the_training_forward(root, capsys):
    from data_pipelines.config import DataConfig, SourceConfig
    from data_pipelines.loader import heldout_packs

    row = run(root, "--data", str(root / "words"), "--seq-length", "256", capsys=capsys)["sources"]["words"]
    media = {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
    data = DataConfig(
        sources={"words": SourceConfig(path=str(root / "words"))},
        tokenizer=str(root / "tokenizer"),
        seq_length=512,
        **media,
    )
    nats, tokens = 0.0, 0
    with single_process_model(small_vlm.CONFIG, torch.float32) as model, torch.no_grad():
        load_tensors(model, small_vlm.weights().items())
        for pack in heldout_packs(data, "words", tokens_per_tile=4, split="heldout"):
            losses = model.eval()(PackBatch.from_pack(pack, model.layout))
            nats, tokens = nats + float(losses.double().sum()), tokens + int((pack.labels >= 0).sum())
    assert row["supervised_tokens"] == tokens
    assert row["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_a_set_that_was_counted_with_fewer_tokens_of_its_videos(root, capsys):
    """Its loss is that of training at this rate; answers are written at the one asked for, none here."""
    items = [{"type": "video", "video": "v"}, {"type": "text", "text": "what moves?"}]
    asked = [{"role": "user", "content": items}, {"role": "assistant", "content": "it"}]
    samples = [({"id": "clip", "messages": asked}, {"v": small_vlm.clip(8)})]
    rows = {}
    for rate in (0.0, 0.5):
        out, media = root / f"clips{rate}", {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
        write_dataset(
            out, {"heldout": samples}, name="c", tokenizer=root / "tokenizer", video_pruning_rate=rate, **media
        )
        (rows[rate],) = run(root, "--data", str(out), "--seq-length", "512", capsys=capsys)["sources"].values()
    assert rows[0.0]["answers"] == rows[0.5]["answers"]
    assert rows[0.0]["supervised_tokens"] == rows[0.5]["supervised_tokens"] > 0
    assert abs(rows[0.0]["loss"] - rows[0.5]["loss"]) > 1e-4


def test_benchmarks_reasoning_and_draws(root, capsys):
    benchmarks = ["--benchmark", f"docvqa={root / 'docvqa'}", "--benchmark", f"ocrbench={root / 'ocr'}"]
    how = ["--think", "--temperature", "1.2", "--top-p", "0.9", "--seed", "3"]
    found = run(root, *benchmarks, *how, capsys=capsys)
    assert found["think"] is True
    assert set(found["sources"]) == {"docvqa", "ocrbench"}
    ocr_row = found["sources"]["ocrbench"]
    assert {name: g["samples"] for name, g in ocr_row["groups"].items()} == {
        "Regular Text Recognition": 1,
        "HME100k": 1,
    }
    row = found["sources"]["docvqa"]
    text = "Who?\nAnswer the question using a single word or phrase."
    (root / "7.png").write_bytes((root / "docvqa/documents/7.png").read_bytes())
    question = Question(text, images=[root / "7.png"], think=True)
    decoding = Decoding(max_new_tokens=6, sampling=Sampling(temperature=1.2, top_p=0.9, seed=3))
    expected = answer_all(root / "hf", [question], decoding)
    assert [a["answer"] for a in row["answers"]] == expected
    # The trace was not ended in six tokens: nothing of it is an answer.
    assert expected[0].startswith("<think>\n")
    assert row["metrics"]["anls"] == anls("", ["Ann", "ann"]) == 0.0
    plain = run(root, *benchmarks, capsys=capsys)
    assert plain["sources"]["docvqa"]["answers"] != row["answers"]


def test_samples_that_cannot_be_asked_are_counted(root, capsys, tmp_path):
    docvqa(tmp_path)
    (tmp_path / "documents/7.png").write_bytes(b"no picture")
    assert cli.main(["eval", str(root / "hf"), "--json", "--benchmark", f"docvqa={tmp_path}"]) == 0
    out, log = capsys.readouterr()
    row = json.loads(out)["sources"]["docvqa"]
    assert (row["samples"], row["left_out"], row["metrics"]) == (0, 1, {"anls": None})
    assert "left out: 49" in log


def test_results_reach_files_and_the_report(root, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    words = [
        "--data",
        str(root / "words"),
        "--out",
        str(tmp_path / "out/found.json"),
        "--report",
        str(tmp_path / "run"),
    ]
    found = run(root, *words, "--label", "final", capsys=capsys)
    assert json.loads((tmp_path / "out/found.json").read_text()) == found
    assert json.loads((tmp_path / "run/evaluations/final.json").read_text()) == found
    page = write_report(tmp_path / "run").read_text()
    score = 100 * found["sources"]["words"]["metrics"]["exact_match"]
    for text in ("<h3>final</h3>", "words", f"{score:.1f}%"):
        assert text in page
    assert cli.main(["eval", str(root / "hf"), "--max-new-tokens", "6", "--data", str(root / "words")]) == 0
    assert f"{score:.1f}%" in capsys.readouterr().out


def test_all_mistakes_are_told_at_once(root, capsys, tmp_path):
    words = ["--data", f"{root / 'words'}:exact", "--benchmark", "docqa=x", "--benchmark", "ai2d=nowhere"]
    assert cli.main(["eval", str(tmp_path / "none"), *words, "--max-samples", "0"]) == 2
    said = capsys.readouterr().err
    for text in (
        "none: there is no such folder",
        "no metric 'exact'; did you mean exact_match?",
        "did you mean docvqa?",
    ):
        assert text in said
    for text in ("there is no folder 'nowhere'; write NAME=DIR", "--max-samples 0: at least 1"):
        assert text in said
    assert cli.main(["eval", str(root / "hf")]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
