"""Text to ids and back. Text can never turn into a special token: those are inserted by name, as ids."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from data_pipelines.exceptions import DataError

UNK, BOS, SYSTEM, ROLE, TURN_END = "<unk>", "<s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"
IMAGE, IMAGE_START, IMAGE_END = "<image>", "<img>", "</img>"
_TEXT_TOKENS = (UNK, BOS, SYSTEM, ROLE, TURN_END)
_MEDIA_TOKENS = (IMAGE, IMAGE_START, IMAGE_END)


class TextTokenizer:
    """A `tokenizer.json` with the special tokens of the released model.

    Attributes:
        vocab_size: Number of ids, added tokens included.
        pad_id: Id of `<unk>`, which fills the tail of a pack: the released tokenizer has no pad token, and its end
            token must stay in the loss.
        added_ids: Ids of all special tokens.
    """

    def __init__(self, folder: str | Path, *, media: bool = True) -> None:
        """Load `folder/tokenizer.json`.

        Args:
            folder: Folder of the tokenizer.
            media: Whether images and videos will be rendered; a text-only model's tokenizer has no tags for them.

        Raises:
            DataError: When it is missing, cannot be parsed, or lacks a special token that the template needs.
        """
        self.path = Path(folder) / "tokenizer.json"
        try:
            spec = json.loads(self.path.read_text(encoding="utf-8"))
            self._full = Tokenizer.from_str(json.dumps(spec))
        except OSError as error:
            raise DataError(
                f"no readable tokenizer at {self.path} ({error.strerror}); set data.tokenizer (--tokenizer of the "
                "data verbs) to a folder that holds tokenizer.json; the tiny recipes' is written by: nemovl data "
                "make-demo --out runs/tiny/data"
            ) from error
        except Exception as error:  # the Rust parser raises plain Exception
            raise DataError(f"{self.path} is not a tokenizer.json: {error}") from error
        named = _TEXT_TOKENS + (_MEDIA_TOKENS if media else ())
        found = {name: self._full.token_to_id(name) for name in named}
        missing = [name for name, token in found.items() if token is None]
        if missing:
            raise DataError(f"{self.path} lacks the special tokens {', '.join(missing)}, which the template inserts")
        self._specials = {name: token for name, token in found.items() if token is not None}
        # Without its added tokens the tokenizer sees '<image>' or '<SPECIAL_12>' in a text as ordinary characters.
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(spec))
        self.added_ids = frozenset(self._full.get_added_tokens_decoder())
        self.vocab_size = self._full.get_vocab_size(with_added_tokens=True)
        self.pad_id = self.special(UNK)
        canonical = {key: value for key, value in spec.items() if key not in ("version",)}
        canonical["specials"] = sorted((i, t.content) for i, t in self._full.get_added_tokens_decoder().items())
        self._digest = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def special(self, name: str) -> int:
        """Id of one of the special tokens named in this module."""
        return self._specials[name]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, in which nothing is special. Pieces are encoded alone: no merge crosses a call."""
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self.added_ids.isdisjoint(ids):
            # A model may hold the special strings in its own vocabulary and find one as a whole word.
            ids = [i for character in text for i in self._plain.encode(character, add_special_tokens=False).ids]
            if not self.added_ids.isdisjoint(ids):
                raise DataError(f"{self.path}: the text {text[:80]!r} has no encoding without special tokens")
        return ids

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text of the user's own, in which the name of a special token is that token."""
        found = self._full.token_to_id(text)
        return self.encode_text(text) if found is None else [found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; special tokens appear by name unless skipped."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def digest(self) -> str:
        """SHA-256 of what decides the ids: model, normaliser, pre-tokeniser and added tokens, in canonical JSON."""
        return self._digest
