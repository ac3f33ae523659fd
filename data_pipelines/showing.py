"""Which sample or pack `nemovl data show` is asked for: folders, a run's config, and the plan between them."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.config import CostConfig, DataConfig, LossWeightConfig, ReadConfig, ShuffleConfig, SourceConfig
from data_pipelines.dataset import Dataset, read_info
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import RenderRules
from data_pipelines.plan import build_plan
from data_pipelines.quality.validate import find_tokenizer
from data_pipelines.show import View, sample_config, view_pack
from data_pipelines.tokenizer import TextTokenizer


def sample_view(folder: Path, *, split: str, row: int | None, key: str | None, tokenizer: Path | None) -> View:
    """One sample of a dataset folder at its full budget.

    Args:
        folder: Dataset folder.
        split: Split.
        row: Row of the manifest; the first when None.
        key: Id of the sample, instead of a row.
        tokenizer: Folder of the tokenizer; the dataset folder's own when None.

    Raises:
        DataError: No such sample, or not the folder's tokenizer.
    """
    rules = RenderRules(**read_info(folder)["rules"])
    place = _tokenizer(folder, tokenizer)
    dataset = Dataset.open(folder, split, tokenizer=TextTokenizer(place))
    number = _row_of(dataset, key) if key is not None else row or 0
    if not 0 <= number < len(dataset):
        raise DataError(f"split {split!r} of {folder} has samples 0 to {len(dataset) - 1}, not {number}")
    config, planned = sample_config(dataset, number, rules, place)
    title = f"{dataset.name} / {split}, sample {number}"
    return view_pack(config, {dataset.name: dataset}, TextTokenizer(place), planned, title)


def pack_view(
    folders: Sequence[Path],
    number: int,
    *,
    split: str | None,
    seq_length: int,
    seed: int,
    config: Path | None,
    tokenizer: Path | None,
) -> View:
    """A pack of the stream that some folders, or a run, give.

    Args:
        folders: Dataset folders, blended with equal weights; not used when a config is given.
        number: Number of the pack.
        split: Split of the folders; `train` when None.
        seq_length: Tokens of a pack of the folders.
        seed: Seed of the order; a config brings its own.
        config: A run's resolved `config.yaml`.
        tokenizer: Folder of the tokenizer; that of the config, or of the first folder, when None.

    Raises:
        DataError: A config without data, folders with different rules, or no such pack.
    """
    if number < 0:
        raise DataError(f"--pack {number}: packs are numbered from 0")
    if config:
        data, seed, step_packs = _run_config(config, seed)
    else:
        data, step_packs = _folders_config(folders, split, seq_length, tokenizer), 1
    if tokenizer is not None:
        data = replace(data, tokenizer=str(tokenizer))
    rules, text = RenderRules.from_config(data), TextTokenizer(data.tokenizer)
    datasets = {
        name: Dataset.open(source.path, source.split, rules=rules, tokenizer=text)
        for name, source in data.sources.items()
    }
    planned = build_plan(data, datasets, rules, text, seed=seed, step_packs=step_packs).pack(number)
    return view_pack(data, datasets, text, planned, f"pack {number}")


def _row_of(dataset: Dataset, key: str) -> int:
    row = next((i for i in range(len(dataset)) if dataset.key(i) == key), None)
    if row is None:
        raise DataError(
            f"split {dataset.split!r} of {dataset.folder} has no sample {key!r}; ids are in its Parquet file"
        )
    return row


def _tokenizer(folder: Path, given: Path | None) -> Path:
    place = find_tokenizer(folder, given)
    if place is None:
        raise DataError(f"{folder} holds no tokenizer of its own: name the one it was counted with, --tokenizer FOLDER")
    return place


def _folders_config(folders: Sequence[Path], split: str | None, seq_length: int, tokenizer: Path | None) -> DataConfig:
    rules: dict[str, Any] = read_info(folders[0])["rules"]
    names = [f"{read_info(folder)['name']}" for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    sources = {
        name: SourceConfig(path=str(folder), split=split or "train")
        for name, folder in zip(names, folders, strict=True)
    }
    return DataConfig(sources=sources, tokenizer=str(_tokenizer(folders[0], tokenizer)), seq_length=seq_length, **rules)


def _run_config(path: Path, seed: int) -> tuple[DataConfig, int, int]:
    """Data part, seed and packs of a step of a resolved config."""
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = dict(spec["data"])
        sources = {name: SourceConfig(**source) for name, source in data.pop("sources").items()}
        sections = {"loss": LossWeightConfig, "cost": CostConfig, "read": ReadConfig, "shuffle": ShuffleConfig}
        parts = {name: section(**data.pop(name, {})) for name, section in sections.items()}
        known = {field.name for field in fields(DataConfig)}
        config = DataConfig(sources=sources, **parts, **{k: v for k, v in data.items() if k in known})
        trainer = spec.get("trainer", {})
        return config, int(trainer.get("seed", seed)), int(trainer.get("global_batch", 1))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} is not a run's resolved config ({error}); it is config.yaml in a stage's folder, or the output of "
            "nemovl train recipe=NAME --cfg job --resolve"
        ) from error
