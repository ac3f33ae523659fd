"""Where an imported folder comes from: a path, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from nemovl_train.exceptions import ConversionError

# Weights, documents and chat templates. No code, no pickles: they are not even fetched.
PATTERNS = ("*.safetensors", "*.json", "*.jinja")
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


def local_folder(source: str) -> Path:
    """The folder that a source names; a repository's files are fetched into the hub's cache first.

    Args:
        source: A path, or `hf:ORGANISATION/NAME@REVISION` (the default branch without a revision).

    Raises:
        ConversionError: There is no such folder, the name is not one, or the files cannot be had from here.
    """
    if not source.startswith("hf:"):
        path = Path(source)
        if not path.is_dir():
            raise ConversionError(f"{path} is not a folder; a repository is hf:ORGANISATION/NAME")
        return path
    match = _HUB.fullmatch(source)
    if match is None:
        raise ConversionError(f"{source} is no repository; write hf:ORGANISATION/NAME or hf:ORGANISATION/NAME@REVISION")
    import huggingface_hub

    repo, revision = match["repo"], match["revision"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the client passes on whatever its HTTP library raises
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f"{source} cannot be fetched ({reason[0] if reason else type(error).__name__}); where there is no "
            "network, copy the repository's safetensors and JSON files to a folder elsewhere and name that folder"
        ) from error
