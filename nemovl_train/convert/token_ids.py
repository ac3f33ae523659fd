"""Ids of media tags and of begin, end and padding, read from a folder's config, generation config and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemovl_train.config.schema import TokenIds
from nemovl_train.convert.tensor_files import read_json
from nemovl_train.exceptions import ConversionError

# Field of our TokenIds -> (field of the config, tag in the tokenizer).
MEDIA = {
    "image": ("img_context_token_id", "<image>"),
    "image_start": ("img_start_token_id", "<img>"),
    "image_end": ("img_end_token_id", "</img>"),
    "video": ("video_context_token_id", "<video>"),
}


def following_tags(base_vocab_size: int) -> dict[str, int]:
    """Ids of the media tags added after a text vocabulary (ten tags: the released order, `<video>` last)."""
    v = base_vocab_size
    return {"image": v, "image_start": v + 1, "image_end": v + 2, "video": v + 9}


def read_media_tags(hf_dir: Path, document: Mapping[str, Any]) -> dict[str, int]:
    """Ids of a vision-language folder's media tags: the config's, else those of the tags in its tokenizer.

    A model that knows no videos has no `<video>`; frames then stand at the image placeholder.

    Raises:
        ConversionError: Names every field that is missing.
    """
    tags = _added_tokens(hf_dir)
    found = {name: document.get(field) for name, (field, _) in MEDIA.items()}
    found = {name: tags.get(MEDIA[name][1]) if value is None else value for name, value in found.items()}
    if found["video"] is None and found["image"] is not None and "<image>" in tags:
        found["video"] = found["image"]
    missing = [
        f"field {field} is missing, and no tokenizer.json gives the id of {tag}"
        for name, (field, tag) in MEDIA.items()
        if found[name] is None
    ]
    if missing:
        raise ConversionError(f"{hf_dir / 'config.json'}: " + "; ".join(missing))
    return {name: int(value) for name, value in found.items() if value is not None}


def read_token_ids(hf_dir: Path, llm: Mapping[str, Any], media: Mapping[str, int], *, llama: bool) -> TokenIds:
    """All ids that the model has to know.

    Args:
        hf_dir: The folder.
        llm: Config of its text model.
        media: Ids of the media tags.
        llama: Whether the text model is a Llama.

    Raises:
        ConversionError: No end-of-turn or begin token.
    """
    path = hf_dir / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    named = {**llm, **{k: v for k, v in generation.items() if v is not None}}
    for field in ("eos_token_id", "bos_token_id"):
        if named.get(field) is None:
            raise ConversionError(f"{path}: field {field} is missing")
    eos, pad = named["eos_token_id"], llm.get("pad_token_id")
    if isinstance(eos, list):
        # Several ids may end a generation; the one that ends a turn is the tokenizer's.
        own = _special_token(hf_dir, "eos_token")
        eos = own if own in eos else eos[0]
    if pad is None:
        pad = _special_token(hf_dir, "pad_token")
    if pad is None:
        # Released tokenizers name no padding token. <unk> never occurs in the byte-level text of Nemotron's; id 0 of
        # Llama's is an ordinary character.
        pad = eos if llama else 0
    return TokenIds(**media, bos=named["bos_token_id"], eos=eos, pad=pad)


def _added_tokens(hf_dir: Path) -> dict[str, int]:
    path = hf_dir / "tokenizer.json"
    if not path.is_file():
        return {}
    return {entry["content"]: entry["id"] for entry in read_json(path).get("added_tokens") or []}


def _special_token(hf_dir: Path, name: str) -> int | None:
    """Id of a special token that the tokenizer's config names."""
    path = hf_dir / "tokenizer_config.json"
    value = read_json(path).get(name) if path.is_file() else None
    content = value.get("content") if isinstance(value, dict) else value
    return _added_tokens(hf_dir).get(content) if isinstance(content, str) else None
