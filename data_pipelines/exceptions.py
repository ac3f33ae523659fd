"""Errors that a user can act on. Everything else is a bug of ours and may surface as an assertion."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to type next."""


class DataError(UserError):
    """A record, file or dataset folder that cannot be used as it is."""


def no_dataset(folder: object, *, exists: bool) -> DataError:
    """The error of a place without a dataset folder, with the command that makes one there or of what is there."""
    if exists:
        made = f"nemovl data import {folder} --out DATASET --tokenizer FOLDER"
        return DataError(f"no dataset at {folder}: it is not a dataset folder yet; make one of it with {made}")
    made = f"nemovl data import SOURCE --out {folder} --tokenizer FOLDER"
    return DataError(f"no dataset at {folder}: no dataset folder there; make it with {made}")
