"""Errors that a user can act on. Everything else is a bug of ours and may surface as an assertion."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to type next."""


class DataError(UserError):
    """A record, file or dataset folder that cannot be used as it is."""
