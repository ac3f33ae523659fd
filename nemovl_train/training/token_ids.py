"""Ids of special tokens that both the model's config and the tokenizer name."""

from data_pipelines.tokenizer import BOS, IMAGE, IMAGE_END, IMAGE_START, TURN_END, UNK, TextTokenizer
from nemovl_train.config.schema import ModelConfig
from nemovl_train.exceptions import ConfigError

_TEXT = {"pad": UNK, "bos": BOS, "eos": TURN_END}
_MEDIA = {"image": IMAGE, "image_start": IMAGE_START, "image_end": IMAGE_END}


def refuse_other_ids(model: ModelConfig, tokenizer: str) -> None:
    """Compare `model.tokens` with the tokenizer.

    Training would notice little: the model looks for other ids than the data hold, and answers never end.

    Args:
        model: Config of the model; without a tower its media tokens mean nothing.
        tokenizer: Folder with `tokenizer.json`.

    Raises:
        ConfigError: Names every id that differs.
        DataError: The tokenizer cannot be read.
    """
    media = "vision" in model.parts
    found = TextTokenizer(tokenizer, media=media)
    wanted = {**_TEXT, **(_MEDIA if media else {})}
    problems = [
        f"model.tokens.{name}={getattr(model.tokens, name)}: {found.path} has {token} at {found.special(token)}"
        for name, token in wanted.items()
        if getattr(model.tokens, name) != found.special(token)
    ]
    if problems:
        raise ConfigError([*problems, "set these ids, or data.tokenizer to the tokenizer of this model"])
