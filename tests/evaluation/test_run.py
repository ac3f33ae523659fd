"""Teacher-forced scores against what they stand for: real greedy answers, and sums of cross entropy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_vlm
import torch
from recompute import extended, pack_prompts

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.dataset import Dataset
from data_pipelines.loader import heldout_packs
from data_pipelines.schema import Pack
from data_pipelines.shards import write_dataset
from data_pipelines.template import NO_TRACE, TRACE_START
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.config.schema import EvalConfig, ParallelConfig, RunConfig
from nemovl_train.evaluation.predictions import write_predictions
from nemovl_train.evaluation.run import Score, evaluation_data, score_pack, score_source
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt, build_prompt
from nemovl_train.model.batch import PackBatch
from nemovl_train.parallel.layout import Layout

NEW_TOKENS = 10


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture(scope="module")
def model(layout):
    return small_vlm.build(layout)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(small_vlm.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer"))


@pytest.fixture(scope="module")
def config(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that evaluates two datasets, one with images."""
    root = tmp_path_factory.mktemp("data")
    media = {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
    samples = {
        "text": [(small_vlm.question(f"which {i}?", answer="one " * (1 + i % 3), key=f"t{i}"), {}) for i in range(23)],
        "image": [
            (small_vlm.question("what?", images=1, answer="a", key=f"i{i}"), {"0.png": small_vlm.picture(i)})
            for i in range(7)
        ],
    }
    folder = tokenizer.path.parent
    for name, rows in samples.items():
        write_dataset(root / name, {"heldout": rows}, name=name, tokenizer=folder, **media)
    sources = {name: str(root / name) for name in samples}
    return RunConfig(
        model=small_vlm.CONFIG,
        data=DataConfig(tokenizer=str(folder), **media),
        evaluation=EvalConfig(sources=sources, seq_length=160, max_samples=21),
    )


def finished(prompt: Prompt, answer: list[int], tail: list[int], forced: int) -> Pack:
    """A pack of one sample as training renders it: `forced` ids of the prompt, then answer and tail, are supervised."""
    whole = extended(prompt, (*answer, *tail))
    pack, _ = pack_prompts([whole])
    begin, end = len(prompt.input_ids) - forced, len(whole.input_ids)
    labels = pack.labels.clone()
    labels[begin - 1 : end - 1] = pack.input_ids[begin:end]
    return replace(pack, labels=labels)


def test_exact_match_is_greedy_generation(model, layout, tokenizer, monkeypatch):
    """References from the model's own answers, whole or spoiled at one place: the score agrees with generation."""
    records = [small_vlm.question(f"what {n} is this?" * (1 + n % 3), images=n % 2) for n in range(12)]
    media = [{"0.png": small_vlm.picture(n)} if n % 2 else {} for n in range(12)]
    prompts = [build_prompt(r, m, tokenizer, small_vlm.RULES) for r, m in zip(records, media, strict=True)]
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    inner = [i for ids in free for i in set(ids[1:])]
    eos = max(set(inner), key=inner.count)  # the token that ends most answers plays the end of turn
    monkeypatch.setattr(model, "sizes", replace(model.sizes, tokens=replace(model.sizes.tokens, eos=eos)))
    answers = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    forced = tokenizer.encode_text(NO_TRACE)
    newline = tokenizer.encode_text("\n")
    matches = 0
    for prompt, written in zip(prompts, answers, strict=True):
        spoiled = [[(i + 1) % 300 if k == at else i for k, i in enumerate(written)] for at in range(len(written))]
        for reference in [written, [*written, 5], written[:-1], *spoiled]:
            if eos in reference:
                continue
            pack = finished(prompt, reference, [eos, *newline], len(forced))
            score = score_pack(model, pack, layout, forced=[forced], eos=eos)
            # An answer that was cut off has no end of turn, so it equals no reference.
            expected = reference == written and len(written) < NEW_TOKENS
            assert (score.samples, score.matches) == (1, int(expected)), (written, reference)
            assert score.tokens == len(forced) + len(reference) + 1 + len(newline)
            matches += score.matches
    assert matches >= 4


@pytest.mark.parametrize(("switch", "given"), [("", NO_TRACE), (" /think", TRACE_START)])
def test_what_is_given_or_follows_the_end_is_not_scored(switch, given, model, layout, tokenizer, monkeypatch):
    """The random model writes neither the given prefix nor the newline: a match shows that they do not count."""
    prompt = build_prompt(small_vlm.question(f"what is this?{switch}"), {}, tokenizer, small_vlm.RULES)
    written = generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0]
    eos = next(i for i in written[1:] if i != written[0])
    answer = written[: written.index(eos)]
    monkeypatch.setattr(model, "sizes", replace(model.sizes, tokens=replace(model.sizes.tokens, eos=eos)))
    forced, newline = tokenizer.encode_text(given), tokenizer.encode_text("\n")
    pack = finished(prompt, answer, [eos, *newline], len(forced))
    at = (pack.labels >= 0).nonzero()[:, 0]
    with torch.no_grad():
        right = model.logits(PackBatch.from_pack(pack, layout), at).argmax(-1) == pack.labels[at]
    assert not right[: len(forced)].all()
    assert not right[-len(newline) :].all()
    assert right[len(forced) : -len(newline)].all()
    assert score_pack(model, pack, layout, forced=[forced], eos=eos).matches == 1
    # Without knowing what is given, the prefix counts as part of the answer.
    assert score_pack(model, pack, layout, forced=[], eos=eos).matches == 0


def test_every_turn_of_a_sample_must_match(model, layout, tokenizer, monkeypatch):
    prompt = build_prompt(small_vlm.question("what is this?"), {}, tokenizer, small_vlm.RULES)
    written = generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0]
    eos = next(i for i in written[1:] if i != written[0])
    first = finished(prompt, written[: written.index(eos)], [eos], 0)
    labels = first.labels.clone()
    # A second turn, somewhere in the question, whose target the model does not write.
    labels[2], labels[3] = 299, eos
    score = score_pack(model, first, layout, forced=[], eos=eos)
    both = score_pack(model, replace(first, labels=labels), layout, forced=[], eos=eos)
    assert (score.matches, both.matches, both.samples) == (1, 0, 1)


def test_a_sample_without_the_end_of_a_turn_matches_nothing(model, layout, tokenizer):
    """All of its tokens are right, but generation would not have stopped there."""
    prompt = build_prompt(small_vlm.question("what is this?"), {}, tokenizer, small_vlm.RULES)
    written = generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0]
    absent = next(i for i in range(300) if i not in written)
    assert score_pack(model, finished(prompt, written, [], 0), layout, forced=[], eos=absent).matches == 0


def test_a_damaged_picture_is_left_out_of_the_predictions(model, layout, tokenizer, tmp_path, caplog):
    media = {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
    rows = [
        (small_vlm.question("what?", images=1, answer="a", key=f"i{i}"), {"0.png": small_vlm.picture(i)})
        for i in range(3)
    ]
    folder = write_dataset(tmp_path / "set", {"heldout": rows}, name="set", tokenizer=tokenizer.path.parent, **media)
    place = Dataset.open(folder, "heldout").row(1)["media"][0]
    with (folder / "heldout-00000.tar").open("r+b") as shard:
        shard.seek(place["offset"])
        shard.write(bytes(place["size"]))
    config = RunConfig(
        model=small_vlm.CONFIG,
        data=DataConfig(tokenizer=str(tokenizer.path.parent), **media),
        evaluation=EvalConfig(sources={"pictures": str(folder)}, seq_length=160, predictions=3),
    )
    write_predictions(model, config, evaluation_data(config), tokenizer, tmp_path)
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["key"] for row in found] == ["i0", "i2"]
    assert "no prediction for sample 'i1' of pictures" in caplog.text


@pytest.mark.parametrize("name", ["text", "image"])
def test_loss_is_the_mean_cross_entropy_of_supervised_tokens(name, model, layout, tokenizer, config):
    data = evaluation_data(config)
    score = score_source(model, data, name, config, layout, tokenizer)
    nats, tokens, keys = 0.0, 0, []
    for pack in heldout_packs(data, name, tokens_per_tile=4, split="heldout", max_samples=21):
        with torch.no_grad():
            losses = model(PackBatch.from_pack(pack, layout))
        nats += float(losses[pack.labels >= 0].double().sum())
        tokens += int((pack.labels >= 0).sum())
        keys += pack.sample_keys
    assert (score.samples, score.tokens) == (len(keys), tokens)
    assert keys == [f"{name[0]}{i}" for i in range(21 if name == "text" else 7)]
    assert score.row()["loss"] == pytest.approx(nats / tokens, rel=1e-6)


def test_data_parallel_ranks_share_the_samples_out(model, layout, tokenizer, config):
    data = evaluation_data(config)
    options = {"tokens_per_tile": 4, "split": "heldout", "max_samples": 21}
    whole = [key for pack in heldout_packs(data, "text", **options) for key in pack.sample_keys]
    packs = [list(heldout_packs(data, "text", **options, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert len({len(own) for own in packs}) == 1
    keys = [[key for pack in own for key in pack.sample_keys] for own in packs]
    assert all(keys)
    assert sorted(key for own in keys for key in own) == sorted(whole)
    # What the ranks add up to is what one process scores. Their sum is taken here: each group has one member.
    ranks = [replace(layout, dp=3, dp_rank=rank) for rank in range(3)]
    total = Score()
    for own in ranks:
        total.add(score_source(model, data, "text", config, own, tokenizer))
    alone = score_source(model, data, "text", config, layout, tokenizer)
    assert (total.samples, total.tokens, total.matches) == (alone.samples, alone.tokens, alone.matches)
    assert total.nats == pytest.approx(alone.nats, rel=1e-6)


def test_nothing_to_score_has_no_numbers(model, layout, config):
    pack, _ = pack_prompts([Prompt((1, 10, 11), torch.empty((0, 3, 64, 64), dtype=torch.uint8), ())])
    assert score_pack(model, pack, layout, forced=[], eos=12) == Score()
    assert Score().row() == {"loss": None, "exact_match": None, "samples": 0, "supervised_tokens": 0}
    source = evaluation_data(config).sources["text"]
    assert source == SourceConfig(path=str(Path(config.evaluation.sources["text"])), split="heldout")
