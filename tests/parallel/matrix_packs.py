"""The small model of the layout matrix and its packs."""

from dataclasses import replace

import torch

from data_pipelines.schema import Pack
from nemovl_train.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, TokenIds, VisionConfig

IMAGE = 256
CHUNK = 16
LENGTH = 256
MODEL = ModelConfig(
    name="matrix",
    language=LanguageConfig(
        hidden_size=64,
        hybrid_pattern="M-*M",
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=16,
        ffn_hidden_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_state_dim=16,
        mamba_num_groups=4,
        chunk_size=CHUNK,
        vocab_size=IMAGE + 16,
        base_vocab_size=IMAGE,
        max_position=LENGTH,
    ),
    vision=VisionConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=96,
        tile_size=64,
        max_resolution=128,
        prefix_tokens=6,
    ),
    projector=ProjectorConfig(ffn_hidden_size=80),
    tokens=TokenIds(image=IMAGE, image_start=IMAGE + 1, image_end=IMAGE + 2, video=IMAGE + 9),
)
# Two key/value heads: four context parallel ranks, or two beside two tensor parallel ones, cannot share them.
FEW_HEADS = replace(MODEL, language=replace(MODEL.language, num_query_groups=2))
# The predecessor's kind of model.
ROTARY = replace(MODEL, language=replace(MODEL.language, hybrid_pattern="*-*-", position="rope", activation="swiglu"))
ONE_HEAD = replace(MODEL, language=replace(MODEL.language, num_query_groups=1))
# As many groups of the scan as eight ranks share.
EIGHT_GROUPS = replace(MODEL, language=replace(MODEL.language, mamba_num_groups=8))
MODELS = {"hybrid": MODEL, "eight_groups": EIGHT_GROUPS, "few_heads": FEW_HEADS, "one_head": ONE_HEAD, "rotary": ROTARY}

# Documents (length, tiles) of four packs. Lengths divide nothing; a document starts exactly where ranks of CP 2 and 4
# meet (128), others one before and after; tiles of four tokens lie across the borders of ranks.
DOCUMENTS = [
    [(37, 1), (26, 5), (65, 0), (90, 7), (38, 0)],
    [(250, 9)],
    [(7, 0), (1, 0), (119, 3), (1, 0), (100, 0), (28, 2)],
    [(129, 0), (2, 0), (125, 4)],
]
PACKS = {
    "images": [1, 1, 1, 1],
    "text": [0, 0, 0, 0],
    "first": [1, 0, 0, 0],
    "last": [0, 0, 0, 1],
}

# Documents of four packs with videos: words, media (kind, tiles, image tokens left of it), words. Clips lie across the
# borders of ranks, tokens and tiles alike; one pack has no medium, one has fewer tiles than ranks.
CLIPS = [
    [(30, [("video", 9, 20)], 25), (3, [("image", 2, 8), ("video", 13, 27)], 40), (15, [("video", 5, 4)], 25)],
    [(40, [("video", 25, 61)], 100)],
    [(100, [], 50)],
    [(7, [("video", 2, 5)], 60), (20, [("image", 1, 4)], 30)],
]


def make_packs(kind: str, mode: str = "square") -> list[Pack]:
    """The four packs, images only in those that `PACKS[kind]` marks; the third has no supervised token."""
    if kind == "clips":
        return [_clip_pack(number, documents) for number, documents in enumerate(CLIPS)]
    return [
        _pack(number, [(n, t * seen) for n, t in documents], mode, supervised=number != 2)
        for number, (documents, seen) in enumerate(zip(DOCUMENTS, PACKS[kind], strict=True))
    ]


def _pack(number: int, documents: list[tuple[int, int]], mode: str, *, supervised: bool) -> Pack:
    generator = torch.Generator().manual_seed(number)
    ids, weights, starts, begin = [], [], [], 0
    for length, tiles in documents:
        doc = torch.randint(20, IMAGE, (length,), generator=generator)
        first = 2 if length > 2 else 0
        doc[first : first + 4 * tiles] = IMAGE
        starts += [begin + first + 4 * i for i in range(tiles)]
        targets = (doc[1:] != IMAGE) & (torch.arange(1, length) % 5 > 0)
        n = max(1, int(targets.sum()))
        weight = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[mode]
        weights.append(torch.cat([targets, torch.zeros(1, dtype=torch.bool)]).float() * weight * supervised)
        ids.append(doc)
        begin += length
    media = {
        "media_of_tile": torch.zeros(len(starts), dtype=torch.int32),
        "frame_time": torch.full((len(starts),), float("nan")),
    }
    return _assemble(number, ids, weights, torch.tensor(starts, dtype=torch.int64), media, 4 * len(starts))


def _clip_pack(number: int, documents: list[tuple[int, list[tuple[str, int, int]], int]]) -> Pack:
    """Each frame is two words and its share of the tokens that are left of the video; the first frame has all four."""
    generator = torch.Generator().manual_seed(number)
    ids, weights, starts, counts, owners, times, begin = [], [], [], [], [], [], 0

    def words(count: int) -> torch.Tensor:
        return torch.randint(20, IMAGE, (count,), generator=generator)

    for before, media, after in documents:
        parts = [words(before)]
        for kind, tiles, left in media:
            owner = owners[-1] + 1 if owners else 0
            for tile in range(tiles):
                rest, others = left - 4, max(1, tiles - 1)
                count = 4 if kind == "image" or not tile else rest * tile // others - rest * (tile - 1) // others
                parts.append(words(2 if kind == "video" else 0))
                starts.append(begin + sum(map(len, parts)))
                parts.append(torch.full((count,), IMAGE))
                counts.append(count)
                owners.append(owner)
                times.append(0.5 * tile if kind == "video" else float("nan"))
        asked = sum(map(len, parts))
        ids.append(torch.cat([*parts, words(after)]))
        targets = torch.arange(len(ids[-1])) >= asked
        targets[-1] = False
        weights.append(targets.float() * int(targets.sum()) ** -0.5)
        begin += len(ids[-1])
    media = {
        "media_of_tile": torch.tensor(owners, dtype=torch.int32),
        "frame_time": torch.tensor(times),
        "tile_tokens": torch.tensor(counts, dtype=torch.int64) if counts else None,
    }
    return _assemble(number, ids, weights, torch.tensor(starts, dtype=torch.int64), media, sum(counts))


def _assemble(
    number: int,
    ids: list[torch.Tensor],
    weights: list[torch.Tensor],
    starts: torch.Tensor,
    media: dict[str, torch.Tensor | None],
    visual: int,
) -> Pack:
    generator = torch.Generator().manual_seed(1000 + number)
    begin = sum(map(len, ids))
    assert begin <= LENGTH
    sizes = [len(doc) for doc in ids] + [LENGTH - begin] * (begin < LENGTH)
    padding = torch.zeros(LENGTH - begin)
    input_ids, loss_weight = torch.cat([*ids, padding.long()]), torch.cat([*weights, padding])
    bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    tiles = torch.randint(0, 256, (len(starts), 3, 64, 64), dtype=torch.uint8, generator=generator)
    return Pack(
        index=number,
        input_ids=input_ids,
        labels=torch.where(loss_weight > 0, input_ids.roll(-1), -100),
        loss_weight=loss_weight,
        position_ids=torch.cat([torch.arange(n) for n in sizes]),
        seq_idx=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).int(),
        cu_seqlens=torch.cat([bounds, bounds[-1:]]),
        max_seqlen=LENGTH,
        tiles=tiles,
        tile_token_start=starts,
        is_thumbnail=torch.zeros(len(tiles), dtype=torch.bool),
        **media,
        sample_keys=tuple(f"{number}.{i}" for i in range(len(ids))),
        dataset_ids=("matrix",) * len(ids),
        stats={
            "tokens": begin,
            "supervised_tokens": int((loss_weight > 0).sum()),
            "visual_tokens": visual,
            "padding": LENGTH - begin,
        },
    )


def alone_pack(pack: Pack, document: int) -> Pack:
    """One document of a pack at the start of a pack of its own."""
    begin, end = pack.cu_seqlens[document : document + 2].tolist()
    rest = LENGTH - (end - begin)
    own = (pack.tile_token_start >= begin) & (pack.tile_token_start < end)
    return replace(
        pack,
        input_ids=torch.cat([pack.input_ids[begin:end], torch.zeros(rest, dtype=torch.int64)]),
        labels=torch.cat([pack.labels[begin:end], torch.full((rest,), -100)]),
        loss_weight=torch.cat([pack.loss_weight[begin:end], torch.zeros(rest)]),
        seq_idx=torch.cat([torch.zeros(end - begin), torch.ones(rest)]).int(),
        cu_seqlens=torch.tensor([0, end - begin, LENGTH, LENGTH]).int(),
        tiles=pack.tiles[own],
        tile_token_start=pack.tile_token_start[own] - begin,
    )
