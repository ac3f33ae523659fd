"""What FP8 training asks of a config: formats, hardware, and sizes that its kernels can multiply. Imports no torch.

Transformer Engine's FP8 products want every dimension a multiple of 16 (docs of `transformer_engine.pytorch.autocast`),
and the block-wise form gathers tokens of tensor parallel ranks in FP8 only where each rank has whole blocks of 128
(`pytorch/distributed.py`, 2.20.2); otherwise it does so in bfloat16 and says so in every layer.
"""

from collections.abc import Iterator

from nemovl_train.config.nearest import nearest_multiples
from nemovl_train.config.schema import LanguageConfig, RunConfig

FP8 = ("none", "blockwise")
WIDTH_UNIT = 16
TOKEN_BLOCK = 128
_WITHOUT_FP8 = ("a100_80gb",)
"""Types of GPU that multiply no FP8."""


def fp8_problems(config: RunConfig) -> Iterator[str]:
    """Every reason why a config cannot train in FP8, each with the nearest that can; none when FP8 is off."""
    if config.precision.fp8 != "blockwise":
        return
    yield from _formats(config)
    if "language" in config.model.parts:
        yield from _tokens(config)
        yield from _language_widths(config)
    if "vision" in config.model.parts:
        yield from _vision(config)


def inner_layers(layers: int, ends: int) -> range:
    """Places of the layers that multiply in FP8 when so many at each end do not."""
    return range(ends, max(layers - ends, ends))


def _formats(config: RunConfig) -> Iterator[str]:
    said = "precision.fp8=blockwise"
    if config.precision.params != "bf16":
        yield f"{said} needs precision.params=bf16; set it, or precision.fp8=none"
    if config.precision.backend == "torch":
        yield f"{said} needs precision.backend=te (Transformer Engine); set it, or precision.fp8=none"
    if config.engine.name != "megatron":
        yield f"{said} is for engine.name=megatron; set precision.fp8=none with engine.name={config.engine.name}"
    if config.cluster.gpu in _WITHOUT_FP8:
        yield f"{said}: cluster.gpu={config.cluster.gpu} has no FP8; set precision.fp8=none"


def _tokens(config: RunConfig) -> Iterator[str]:
    """Tokens of a rank, which the layout's own rule (whole chunks of the scan) need not make whole blocks."""
    ranks = config.parallel.tp * config.parallel.cp
    length, unit = config.data.seq_length, TOKEN_BLOCK * ranks
    if ranks > 0 and length % unit:
        yield (
            f"data.seq_length={length}: precision.fp8=blockwise wants a multiple of {TOKEN_BLOCK} on each of "
            f"parallel.tp x parallel.cp = {ranks} ranks; nearest: {nearest_multiples(length, unit)}"
        )


def _language_widths(config: RunConfig) -> Iterator[str]:
    """Widths of a tensor parallel rank's share of the linear layers."""
    size, tp = config.model.language, config.parallel.tp
    if tp < 1:
        return
    if size.hidden_size % WIDTH_UNIT:
        yield _width("model.language.hidden_size", size.hidden_size)
    split = split_widths(size)
    wrong = [f"{name} {width}" for name, width in split.items() if width % (WIDTH_UNIT * tp)]
    if wrong:
        fits = (t for t in range(tp, 0, -1) if not any(width % (WIDTH_UNIT * t) for width in split.values()))
        smaller = next(fits, None)
        advice = f"nearest: parallel.tp={smaller}" if smaller else "set precision.fp8=none"
        yield (
            f"parallel.tp={tp}: precision.fp8=blockwise wants a multiple of {WIDTH_UNIT} columns on each rank of "
            f"{', '.join(wrong)}; {advice}"
        )


def split_widths(size: LanguageConfig) -> dict[str, int]:
    """Widths that tensor parallel ranks share in the linear layers of a pattern, by what they are."""
    widths = {}
    if "M" in size.hybrid_pattern:
        states = 2 * size.mamba_num_groups * size.mamba_state_dim
        widths["Mamba projection"] = 2 * size.mamba_inner_size + states + size.mamba_num_heads
        widths["Mamba output"] = size.mamba_inner_size
    if "*" in size.hybrid_pattern:
        widths["queries, keys and values"] = (size.num_attention_heads + 2 * size.num_query_groups) * size.head_dim
        widths["attention output"] = size.num_attention_heads * size.head_dim
    if "-" in size.hybrid_pattern:
        widths["MLP"] = size.ffn_hidden_size
    return widths


def _vision(config: RunConfig) -> Iterator[str]:
    vision, projector = config.model.vision, config.model.projector
    widths = {"model.projector.ffn_hidden_size": projector.ffn_hidden_size}
    if inner_layers(vision.num_layers, config.precision.bf16_blocks):
        widths |= {f"model.vision.{key}": getattr(vision, key) for key in ("hidden_size", "ffn_hidden_size")}
        tokens = (vision.tile_size // max(vision.patch_size, 1)) ** 2 + vision.prefix_tokens
        if tokens % WIDTH_UNIT:
            # Extra prefix tokens are cut off behind the tower, so a checkpoint can be given some.
            more = vision.prefix_tokens + -tokens % WIDTH_UNIT
            yield (
                f"model.vision.prefix_tokens={vision.prefix_tokens}: a tile has {tokens} tokens, and "
                f"precision.fp8=blockwise wants a multiple of {WIDTH_UNIT}; nearest: {more}, or keep the tower in bf16 "
                f"with precision.bf16_blocks={-(-vision.num_layers // 2)}"
            )
    for key, width in widths.items():
        if width % WIDTH_UNIT:
            yield _width(key, width)
    if config.model.tokens_per_tile % WIDTH_UNIT:
        yield (
            f"model.vision.tile_size={vision.tile_size}: a tile gives {config.model.tokens_per_tile} visual tokens, "
            f"precision.fp8=blockwise wants a multiple of {WIDTH_UNIT}; set precision.fp8=none"
        )


def _width(key: str, width: int) -> str:
    near = nearest_multiples(width, WIDTH_UNIT)
    return f"{key}={width}: precision.fp8=blockwise wants a multiple of {WIDTH_UNIT}; nearest: {near}"
