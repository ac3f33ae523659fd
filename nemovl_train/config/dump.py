"""Configs on paper: YAML without secrets, a hash, and the difference between two."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nemovl_train.config.build import build, flatten
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exceptions import ConfigError

REDACTED = "***"
RESUME_MAY_CHANGE = (
    "parallel",
    "precision.backend",
    "recompute",
    "optim.fuse_grad_accumulation",
    "optim.offload",
    "optim.overlap_grad_reduce",
    "optim.overlap_param_gather",
    "data.num_workers",
    "data.read",
    "data.sources.*.path",
    "trainer.max_bad_steps",
    "trainer.threads",
    "trainer.check_replicas_every",
    "trainer.stall_timeout_s",
    "trainer.time_limit_s",
    "trainer.dry_run",
    "checkpoint",
    "evaluation",
    "logging",
    "profile",
    "cluster",
    "workload",
)
"""Keys that a continued run may change: they move no sample and no update rule. `*` stands for any name.
A dataset folder may move: that its content is the same, the data plan's hash says."""

_SECRET_KEY = re.compile(r"(^|_)(secret|password|passwd|token|credentials?|(api|access|private)_?key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_|ghp_|github_pat_|sk-|AKIA|glpat-|xox[abp]-)[A-Za-z0-9_-]{8,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")


class Change(NamedTuple):
    """One option that differs. A side that lacks the key has None."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def to_plain(config: RunConfig | ScheduleConfig) -> dict[str, Any]:
    """Nested dicts and lists of plain values, secrets included."""
    return json.loads(json.dumps(asdict(config)))


def redact(values: Any, key: str = "") -> Any:
    """Hides values under secret-looking keys, known access-token shapes, and logins inside URLs."""
    if isinstance(values, Mapping):
        return {name: redact(value, str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [redact(value, key) for value in values]
    if not isinstance(values, str):
        return values
    if values and _SECRET_KEY.search(key.rpartition(".")[2]):
        return REDACTED
    return _URL_LOGIN.sub(REDACTED, _SECRET_VALUE.sub(REDACTED, values))


def dump_yaml(config: RunConfig | ScheduleConfig) -> str:
    """The resolved config as YAML, secrets redacted; `load_yaml` reads it back."""
    return yaml.safe_dump(redact(to_plain(config)), sort_keys=False, default_flow_style=None, width=120)


def load_yaml[T: (RunConfig, ScheduleConfig)](cls: type[T], path: Path) -> T:
    """Reads what `dump_yaml` wrote.

    Raises:
        ConfigError: The file is missing, not YAML, or of another version of the schema.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read as a config ({error})"]) from error
    problems: list[str] = []
    config = build(cls, values, problems)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return config


def config_hash(config: RunConfig | ScheduleConfig, *, ignore: Iterable[str] = RESUME_MAY_CHANGE) -> str:
    """SHA-256 (hex) over the options that decide the result, in a fixed form.

    Args:
        config: A complete config.
        ignore: Dotted keys or sections to leave out, `*` for any name; `()` hashes everything.
    """
    leaves = sorted(_leaves(config, ignore).items())
    return hashlib.sha256(json.dumps(leaves, separators=(",", ":")).encode()).hexdigest()


def config_diff[T: (RunConfig, ScheduleConfig)](
    old: T, new: T, *, ignore: Iterable[str] = RESUME_MAY_CHANGE
) -> list[Change]:
    """Options that differ between two configs and decide the result, in the order of their keys, secrets redacted.

    Args:
        old: The config before.
        new: The config now.
        ignore: Dotted keys or sections to leave out, `*` for any name; `()` compares everything.
    """
    left, right = (redact(_leaves(config, ignore)) for config in (old, new))
    keys = sorted(left.keys() | right.keys())
    return [Change(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def _leaves(config: RunConfig | ScheduleConfig, ignore: Iterable[str]) -> dict[str, Any]:
    dropped = tuple(ignore)
    leaves = flatten(to_plain(config))
    return {k: v for k, v in leaves if not any(fnmatchcase(k, d) or fnmatchcase(k, f"{d}.*") for d in dropped)}
