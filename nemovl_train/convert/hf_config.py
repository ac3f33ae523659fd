"""Reads a Hugging Face folder's config into a `ModelConfig`, and writes the folder's small files.

Sizes that the weights know (rows, prefix tokens, position grid, widths) are taken from the safetensors headers; the
rest must be in the config. What our model cannot express is an error, never ignored.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemovl_train.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from nemovl_train.convert import hf_layout
from nemovl_train.convert import llama as llama_layout
from nemovl_train.convert.carried import Carried
from nemovl_train.convert.fp8 import CONFIG_KEY
from nemovl_train.convert.mapping import report
from nemovl_train.convert.names import constant_names, is_llama, language_prefix, vision_prefix
from nemovl_train.convert.tensor_files import TensorFolder, read_json
from nemovl_train.convert.token_ids import following_tags, read_media_tags, read_token_ids
from nemovl_train.exceptions import ConversionError

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PREPROCESSOR = "preprocessor_config.json"
OMNI_FOLDER = "transformers_omni"
PATTERN = {"linear_attention": "M", "mamba": "M", "mlp": "-", "full_attention": "*", "attention": "*"}
# Settings of `nemotron_h` that our language model has fixed: field -> the only value it can express.
FIXED_LANGUAGE = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": False,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
}
FIXED_VLM = {"downsample_ratio": hf_layout.PIXEL_SHUFFLE, "ps_version": "v2", "image_tag_type": "internvl"}
# In an `args` block without sizes, the layer norm and its epsilon are those of timm's vision transformer.
TIMM_EPS = 1e-6


ARCHITECTURES = {
    "vlm": (hf_layout.VLM_ARCHITECTURE, llama_layout.VLM_ARCHITECTURE),
    "language": (hf_layout.LANGUAGE_ARCHITECTURE, llama_layout.LANGUAGE_ARCHITECTURE),
    "vision": hf_layout.VISION_ARCHITECTURES,
}


def folder_kind(document: Mapping[str, Any], where: Path) -> str:
    """`vlm`, `language` or `vision`, from a folder's config.

    Raises:
        ConversionError: The architecture is not a known one.
    """
    names = document.get("architectures") or []
    for kind, of_kind in ARCHITECTURES.items():
        if any(name in of_kind for name in names):
            return kind
    known = [name for group in ARCHITECTURES.values() for name in group]
    raise ConversionError(
        f"{where}: architectures is {names}, none of which can be imported; known are {', '.join(known)}"
    )


def read_kind(hf_dir: Path) -> str:
    """Kind of a folder on disk, see `folder_kind`."""
    path = hf_dir / "config.json"
    return folder_kind(read_json(path), path)


def read_config(hf_dir: Path, *, tensors: TensorFolder | None = None) -> ModelConfig:
    """Sizes of the model in a folder. A part that the folder lacks keeps the defaults of `ModelConfig`.

    A text-only folder has no media tags; their ids are those they will get, right after its vocabulary.

    Args:
        hf_dir: Folder with config.json and safetensors.
        tensors: The folder's tensors, when they are open already.

    Raises:
        ConversionError: Unknown architecture, a missing field, or a setting our model cannot express.
    """
    path = hf_dir / "config.json"
    document = read_json(path)
    kind = folder_kind(document, path)
    tensors = tensors or TensorFolder(hf_dir)
    name = str(document.get("_name_or_path") or hf_dir.resolve().name)
    if kind == "vision":
        vision = _vision(document, document, tensors, kind=kind, where=path)
        return ModelConfig(name=name, parts=("vision",), vision=vision)
    llm = document if kind == "language" else need(document, "llm_config", "text_config", where=path)
    llama = llama_layout.VLM_ARCHITECTURE in document["architectures"] or (
        llama_layout.LANGUAGE_ARCHITECTURE in document["architectures"]
    )
    read_language = llama_layout.read_llama if llama else _language
    first = "model.embed_tokens.weight" if llama else "backbone.embeddings.weight"
    rows = tensors_shape(tensors, language_prefix(kind) + first)[0]
    if kind == "language":
        language = read_language(llm, rows, rows, path)
        tokens = read_token_ids(hf_dir, llm, following_tags(rows), llama=llama)
        return ModelConfig(name=name, parts=("language",), language=language, tokens=tokens)
    _refuse_other_values(document, FIXED_VLM, path)
    media = read_media_tags(hf_dir, document)
    vision = _vision(need(document, "vision_config", where=path), document, tensors, kind=kind, where=path)
    inner = tensors_shape(tensors, "mlp1.1.weight")[0]
    # The architecture's name decides between the two projectors; the tensors are then checked against it.
    projector = ProjectorConfig(ffn_hidden_size=inner)
    if llama:
        projector = replace(projector, norm="layernorm", activation="gelu", bias=True)
    return ModelConfig(
        name=name,
        # The media tags follow the text vocabulary, the placeholder first.
        language=read_language(llm, rows, media["image"], path),
        vision=vision,
        projector=projector,
        tokens=read_token_ids(hf_dir, llm, media, llama=llama),
    )


def need(document: Mapping[str, Any], *names: str, where: Path) -> Any:
    """The first of several spellings of a field that is present and not null."""
    for name in names:
        if document.get(name) is not None:
            return document[name]
    raise ConversionError(f"{where}: field {' or '.join(names)} is missing")


def tensors_shape(tensors: TensorFolder, name: str) -> tuple[int, ...]:
    """Shape of a tensor that the sizes are read from."""
    if name not in tensors.specs:
        raise ConversionError(f"{tensors.folder}: missing {name}, from which sizes are read")
    return tensors.specs[name].shape


def _refuse_other_values(document: Mapping[str, Any], fixed: Mapping[str, Any], where: Path) -> None:
    wrong = [f"{k} is {document[k]!r}, supported is {v!r}" for k, v in fixed.items() if document.get(k, v) != v]
    report(wrong, f"{where} describes a model that cannot be expressed here")


def _float(value: Any) -> float:
    """A number of a config; Transformers 5 writes what JSON has no number for as `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _language(llm: Mapping[str, Any], rows: int, base_rows: int, where: Path) -> LanguageConfig:
    _refuse_other_values(llm, FIXED_LANGUAGE, where)
    pattern = llm.get("hybrid_override_pattern")
    if pattern is None:
        types = need(llm, "hybrid_override_pattern", "layers_block_type", "layer_types", where=where)
        pattern = "".join(PATTERN.get(t, "?") for t in types)
    low, high = map(_float, llm.get("time_step_limit") or (0.0, math.inf))
    if float(low) != 0.0 or float(high) != math.inf:
        raise ConversionError(f"{where}: time_step_limit is {[low, high]}; the model's time steps have no limits")
    odd = sorted(set(pattern) - set("M-*"))
    if odd or not pattern:
        raise ConversionError(f"{where}: layers {pattern!r} hold kinds other than Mamba, attention and dense MLP")
    return LanguageConfig(
        hidden_size=need(llm, "hidden_size", where=where),
        hybrid_pattern=pattern,
        num_attention_heads=need(llm, "num_attention_heads", where=where),
        num_query_groups=need(llm, "num_key_value_heads", where=where),
        head_dim=need(llm, "head_dim", "attention_head_dim", where=where),
        ffn_hidden_size=need(llm, "intermediate_size", where=where),
        mamba_num_heads=need(llm, "mamba_num_heads", where=where),
        mamba_head_dim=need(llm, "mamba_head_dim", where=where),
        mamba_state_dim=need(llm, "ssm_state_size", where=where),
        mamba_num_groups=need(llm, "n_groups", where=where),
        conv_kernel=need(llm, "conv_kernel", where=where),
        chunk_size=need(llm, "chunk_size", where=where),
        norm_eps=need(llm, "layer_norm_epsilon", "norm_eps", "rms_norm_eps", where=where),
        max_position=need(llm, "max_position_embeddings", where=where),
        vocab_size=rows,
        base_vocab_size=base_rows,
        init_std=llm.get("initializer_range", LanguageConfig().init_std),
    )


def _vision(
    own: Mapping[str, Any], top: Mapping[str, Any], tensors: TensorFolder, *, kind: str, where: Path
) -> VisionConfig:
    prefix = vision_prefix(kind) + "model."
    blocks = prefix + "blocks."
    prefix_tokens, hidden = tensors_shape(tensors, prefix + "patch_generator.cls_token.token")
    positions = tensors_shape(tensors, prefix + "patch_generator.pos_embed")[1]
    pixels = tensors_shape(tensors, prefix + "patch_generator.embedder.weight")[1]
    patch, grid = math.isqrt(pixels // 3), math.isqrt(positions)
    if 3 * patch**2 != pixels or grid**2 != positions:
        raise ConversionError(f"{where}: {pixels} values a patch, {positions} positions: no square RGB patch and grid")
    model = str((own.get("args") or {}).get("model"))
    heads = own.get("num_attention_heads") or hf_layout.TIMM_SIZES.get(model, (0, 0, 0))[2]
    if not heads:
        raise ConversionError(f"{where}: neither num_attention_heads nor a known args.model gives the tower's heads")
    act = own.get("hidden_act", "gelu")
    activation = {v: k for k, v in hf_layout.VISION_ACTIVATIONS.items()}.get(act)
    if activation is None:
        known = list(hf_layout.VISION_ACTIVATIONS.values())
        raise ConversionError(f"{where}: activation {act!r} of the tower; known are {known}")
    mean, std = _statistics(own, top, tensors, kind, where)
    return VisionConfig(
        num_layers=len({n.split(".")[blocks.count(".")] for n in tensors.specs if n.startswith(blocks)}),
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=tensors_shape(tensors, blocks + "0.mlp.fc1.weight")[0],
        patch_size=patch,
        tile_size=top.get("force_image_size") or _tile(own, where),
        max_resolution=grid * patch,
        prefix_tokens=prefix_tokens,
        norm_eps=own.get("layer_norm_eps", TIMM_EPS),
        activation=activation,
        norm_mean=mean,
        norm_std=std,
    )


def _tile(own: Mapping[str, Any], where: Path) -> int:
    preferred = need(own, "preferred_resolution", "image_size", where=where)
    return int(preferred[0] if isinstance(preferred, list) else preferred)


def _statistics(
    own: Mapping[str, Any], top: Mapping[str, Any], tensors: TensorFolder, kind: str, where: Path
) -> tuple[Any, Any]:
    """Pixel mean and deviation: the folder's config, else its conditioner tensors. Never assumed."""
    names = constant_names(kind)
    out = []
    for field in ("norm_mean", "norm_std"):
        value = top.get(field) or own.get(field)
        tensor = names[f"input_conditioner.{field}"]
        if value is None and tensor in tensors.specs:
            value = tensors.read(tensor).float().reshape(-1).tolist()
        if value is None:
            raise ConversionError(f"{where}: neither {field} nor a tensor {tensor} says how pixels are normalised")
        out.append(tuple(float(v) for v in value))
    return out[0], out[1]


def read_media_budget(hf_dir: Path) -> hf_layout.MediaBudget:
    """How the folder makes tiles and prunes videos; what its documents leave out takes the released model's values.

    Raises:
        ConversionError: There is no preprocessor config or config, or a value that means nothing.
    """
    path = hf_dir / PREPROCESSOR
    document = read_json(path)
    budget = hf_layout.RELEASED_MEDIA
    names = [name for name in vars(budget) if name != hf_layout.PRUNING]
    found = {name: document[name] for name in names if document.get(name) is not None}
    problems = [f"{k} is {v!r}" for k, v in found.items() if not _is_like(v, getattr(budget, k))]
    report(problems, f"{path} does not say how images and videos become tiles")
    rate = read_json(hf_dir / "config.json").get(hf_layout.PRUNING) or 0.0
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ConversionError(f"{hf_dir / 'config.json'}: {hf_layout.PRUNING} is {rate!r}; at least 0 and below 1")
    return replace(budget, **found, video_pruning_rate=float(rate))


def _is_like(value: Any, default: float | bool) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, int | float if isinstance(default, float) else int) and value > 0


def write_config(
    config: ModelConfig,
    out_dir: Path,
    *,
    kind: str,
    dtype: str,
    tokenizer: Path | None = None,
    media: hf_layout.MediaBudget = hf_layout.RELEASED_MEDIA,
    carried: Carried | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write every file of a folder that is not weights: configs, chat template, tokenizer, carried Python files.

    Args:
        config: Sizes of the model.
        out_dir: Existing folder.
        kind: `vlm`, `language` or `vision`.
        dtype: Number format of the weights as Transformers spells it, e.g. `bfloat16`.
        tokenizer: Folder with `tokenizer.json`; a `chat_template.jinja` there replaces ours.
        media: How images and videos become tiles.
        carried: What the folder that the model was imported from had.
        quantization: `quantization_config` of a folder with FP8 weights.

    Returns:
        The files written.
    """
    documents = _documents(config, kind, dtype, media)
    for name in [n for n in documents if quantization and Path(n).name == "config.json"]:
        documents[name][CONFIG_KEY] = quantization
    if carried is not None:
        before = _documents(carried.config, kind, carried.dtype, carried.media)
        documents = {name: carried.document(name, before[name], now) for name, now in documents.items()}
    written = []
    for name, document in documents.items():
        (out_dir / name).parent.mkdir(exist_ok=True)
        (out_dir / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        written.append(out_dir / name)
    if kind != "vision":
        written += _copy_tokenizer(tokenizer, out_dir)
    for source in [] if carried is None else carried.python_files():
        shutil.copyfile(source, out_dir / source.name)
        written.append(out_dir / source.name)
    return written


def _documents(config: ModelConfig, kind: str, dtype: str, media: hf_layout.MediaBudget) -> dict[str, dict[str, Any]]:
    vision = config.vision
    if kind == "vlm":
        documents = {
            "config.json": hf_layout.vlm_config(config, dtype=dtype, media=media),
            PREPROCESSOR: hf_layout.preprocessor_config(vision, media),
            "processor_config.json": hf_layout.processor_config(),
        }
        if not is_llama(config.language):
            documents[f"{OMNI_FOLDER}/config.json"] = hf_layout.omni_config(config, dtype=dtype, media=media)
    elif kind == "language":
        documents = {"config.json": hf_layout.language_config(config, dtype=dtype)}
    else:
        hub = hf_layout.hub_vision_config(vision, dtype=dtype)
        documents = {"config.json": {"_name_or_path": config.name, **hub, "architectures": ["RadioModel"]}}
    if kind != "vision":
        documents["generation_config.json"] = hf_layout.generation_config(config)
    return documents


def _copy_tokenizer(tokenizer: Path | None, out_dir: Path) -> list[Path]:
    sources = [CHAT_TEMPLATE]
    if tokenizer is not None:
        if not (tokenizer / "tokenizer.json").is_file():
            raise ConversionError(f"{tokenizer} holds no tokenizer.json; name the folder that does")
        sources = [tokenizer / n for n in TOKENIZER_FILES if (tokenizer / n).is_file()]
        own = tokenizer / CHAT_TEMPLATE.name
        sources.append(own if own.is_file() else CHAT_TEMPLATE)
    for source in sources:
        shutil.copyfile(source, out_dir / source.name)
    return [out_dir / s.name for s in sources]
