from collections import Counter

import numpy as np
import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaShape, RenderRules, lay_out
from data_pipelines.order import keyed_permutation
from data_pipelines.packing import pack_lengths
from data_pipelines.plan import TOO_LONG, Fit, Plan, PlanSource, shrink_sample
from data_pipelines.template import encode_record


def source(name="a", lengths=(5,), weight=1.0, shrink=lambda row, limit: None):
    full = Fit(max_tiles=4, max_frames=8, length=0)
    return PlanSource(
        name=name, weight=weight, lengths=np.asarray(lengths), full=full, shrink=shrink, identity=f"hash {len(lengths)}"
    )


def plan(sources, **options):
    return Plan(sources, **{"seed": 1, "seq_length": 100, "packing": "bfd", "window_samples": 64, **options})


def drawn(plan, windows):
    return [(s.source, s.row) for k in windows for pack in plan.window(k).packs for s in pack]


def random_lengths(count, high=100, seed=0):
    return np.random.default_rng(seed).integers(1, high + 1, count)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_keyed_permutation_is_one(size):
    image = keyed_permutation(np.arange(size), size, "key")
    assert sorted(image.tolist()) == list(range(size))
    np.testing.assert_array_equal(keyed_permutation(np.array([size - 1]), size, "key"), image[-1:])
    if size > 60:
        assert (image != keyed_permutation(np.arange(size), size, "other")).mean() > 0.9


def test_keyed_permutation_never_changes():
    """The order is part of what a resumed run relies on: a change here needs a new PLAN_VERSION."""
    assert keyed_permutation(np.arange(10), 10, "order 1234 a 0").tolist() == [3, 1, 8, 6, 5, 4, 9, 7, 2, 0]


@pytest.mark.parametrize("mode", ["bfd", "sequential", "none"])
def test_packing_places_every_item_once(mode):
    lengths = random_lengths(500).tolist()
    packs = pack_lengths(lengths, 100, mode)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    assert all(sum(lengths[i] for i in pack) <= 100 and pack == sorted(pack) for pack in packs)


def test_best_fit_fills_packs():
    lengths = random_lengths(4096, high=40).tolist()
    fill = {m: sum(lengths) / (100 * len(pack_lengths(lengths, 100, m))) for m in ("bfd", "sequential", "none")}
    assert fill["bfd"] > 0.995 > fill["sequential"] > 0.8 > fill["none"]


def test_every_epoch_holds_every_sample_once():
    lengths = random_lengths(150)
    p = plan([source(lengths=lengths)], window_samples=64)
    seen = Counter(drawn(p, range(75)))  # 75 windows of 64 are 32 epochs of 150
    assert set(seen.values()) == {32}
    assert len(seen) == 150


def test_window_covers_at_most_one_epoch():
    p = plan([source(lengths=random_lengths(50))], window_samples=4096)
    assert p.window_samples == 50
    for k in range(3):
        assert sorted(row for _, row in drawn(p, [k])) == list(range(50))
    assert drawn(p, [0]) != drawn(p, [1])


def test_blend_keeps_its_shares_at_every_point():
    sources = [source("a", random_lengths(100), 0.7), source("b", random_lengths(37), 0.2), source("c", [9] * 500, 0.1)]
    p = plan(sources, window_samples=64)
    counts: Counter = Counter()
    for k in range(50):
        counts.update(name for name, _ in drawn(p, [k]))
        for s in sources:
            assert abs(counts[s.name] - s.weight * 64 * (k + 1)) <= 1


def test_names_seeds_and_epochs_have_their_own_order():
    lengths = random_lengths(64)
    orders = [
        drawn(plan([source("a", lengths)]), [0]),
        drawn(plan([source("b", lengths)]), [0]),
        drawn(plan([source("a", lengths)], seed=2), [0]),
        drawn(plan([source("a", lengths)]), [1]),
    ]
    assert len({tuple(row for _, row in order) for order in orders}) == 4


def test_any_pack_can_be_asked_for_first():
    sources = [source("a", random_lengths(100), 2), source("b", random_lengths(31, seed=1), 1)]
    straight = plan(sources)
    packs = [straight.pack(i) for i in range(300)]
    assert [pack.index for pack in packs] == list(range(300))
    for i in (299, 0, 150):
        assert plan(sources).pack(i) == packs[i]


def test_hash_follows_what_the_stream_depends_on():
    base = plan([source(lengths=[5, 6])]).hash
    assert plan([source(lengths=[5, 6])]).hash == base
    others = [
        plan([source(lengths=[5, 6, 7])]),
        plan([source("b", [5, 6])]),
        plan([source(lengths=[5, 6])], seed=2),
        plan([source(lengths=[5, 6])], packing="none"),
        plan([source(lengths=[5, 6]), source("z", [1])]),
    ]
    assert len({base, *(p.hash for p in others)}) == 6
    assert plan([source(lengths=[5, 6], weight=3.0), source("z", [1], weight=0.0)]).hash == base


def test_too_long_samples_shrink_or_are_dropped_and_counted():
    def shrink(row, limit):
        return Fit(max_tiles=1, max_frames=2, length=60) if row == 1 else None

    p = plan([source(lengths=[50, 150, 150], shrink=shrink)], packing="none")
    window = p.window(0)
    assert sorted((pack[0].row, pack[0].max_tiles, pack[0].length) for pack in window.packs) == [(0, 4, 50), (1, 1, 60)]
    assert window.dropped == {TOO_LONG: 1}
    assert len(window.fits) == 1
    p.pack(3)
    assert p.dropped == {TOO_LONG: 2}
    assert p.shrunk == 2


def test_bad_blends_are_refused():
    for sources, options, reason in [
        ([], {}, "is empty"),
        ([source(weight=0)], {}, "no weight above 0"),
        ([source(weight=-1)], {}, "weight is -1"),
        ([source(lengths=[])], {}, "has no samples"),
        ([source()], {"packing": "tetris"}, "'tetris' is not one of"),
    ]:
        with pytest.raises(DataError, match=reason):
            plan(sources, **options)
    with pytest.raises(DataError, match="no sample fits into 100 tokens"):
        plan([source(lengths=[101] * 9)]).pack(0)


def test_shrunk_length_is_what_the_template_makes_of_it(tokenizer, record):
    rules = RenderRules(
        template="nano_v2_vl", tile_size=64, max_tiles=12, use_thumbnail=True, video_fps=2.0, max_frames=16
    )
    shapes = (MediaShape("image", 640, 480), MediaShape("video", 32, 32, 10.0, 200))
    sample = record("r", "q", "a", images=1, videos=1)

    def length(max_tiles, max_frames):
        layouts = [lay_out(s, rules, max_tiles=max_tiles, max_frames=max_frames) for s in shapes]
        return len(encode_record(sample, layouts, tokenizer, tokens_per_tile=4).input_ids), layouts

    full, layouts = length(12, 16)
    text = full - 4 * sum(layout.tiles for layout in layouts)
    for limit in range(full - 1, 60, -7):
        fit = shrink_sample(shapes, text, limit, rules, tokenizer)
        if fit is None:
            assert length(1, 1)[0] > limit
        else:
            assert fit.length == length(fit.max_tiles, fit.max_frames)[0] <= limit
