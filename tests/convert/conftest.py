"""Exported folders of the tiny model."""

from pathlib import Path

import pytest

from nemovl_train.convert.hf_export import export_canonical

from .tiny import CONFIG, random_tensors


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges, large enough to have a chat template beside it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """One exported folder of each kind; never written to."""
    root = tmp_path_factory.mktemp("folders")
    out = {}
    for kind in ("vlm", "language", "vision"):
        tensors = random_tensors(kind=kind)
        tokenizer = None if kind == "vision" else tokenizer_dir
        out[kind] = export_canonical(
            tensors.items(), CONFIG, root / kind, kind=kind, tokenizer=tokenizer, card={"recipe": "test"}
        )
    return out
