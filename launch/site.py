"""What a SLURM cluster wants to be told: one small YAML file a site, and `slurm.key=value` on the command line.

Every value ends up in a script that a shell reads, so each has a pattern, and what does not match is refused: a value
with a line break, a quote or `$()` cannot become a directive or a command.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from nemovl_train.config.build import build
from nemovl_train.config.nearest import did_you_mean
from nemovl_train.exceptions import ConfigError

RUNTIMES = ("none", "pyxis", "apptainer")
GPU_REQUESTS = ("gpus-per-node", "gres", "none")
SLICE_JOBS = ("chain", "array")
MOST_SLICES = 1000

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_CONSTRAINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._*()\[\]-]*([&|][A-Za-z0-9._*()\[\]-]+)*")
_HOSTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(\[[0-9,-]+\])?")
_PATH = re.compile(r"[A-Za-z0-9._~/@+%-][A-Za-z0-9._~/@+=,%-]*")
_IMAGE = re.compile(r"[A-Za-z0-9._/][A-Za-z0-9._~/@+=#:%-]*")
_MOUNT = re.compile(r"[A-Za-z0-9._/][A-Za-z0-9._/@+-]*:[A-Za-z0-9._/][A-Za-z0-9._/@+-]*(:(ro|rw))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9._~/@+=,:%^ -]*")
_TIME = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """How the software reaches the nodes.

    Attributes:
        runtime: `none` (an environment that every node sees), `pyxis` (srun starts enroot containers), `apptainer`.
        image: Image file, or a reference that enroot understands.
        mounts: `HOST:CONTAINER` pairs, `:ro` behind them for read-only.
    """

    runtime: str = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """Nodes of one kind in a job of several kinds (a heterogeneous job).

    Attributes:
        nodes: How many.
        partition: Partitions, any of which will do.
        constraint: Features of a node.
    """

    nodes: int = 1
    partition: tuple[str, ...] = ()
    constraint: str = ""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """A site's SLURM options.

    Attributes:
        partition: Partitions, any of which will do: the one that starts first takes the job.
        account: Account to charge.
        qos: Quality of service.
        reservation: Reservation to use.
        constraint: Features that every node must have.
        time: Time limit of one slice, `[DAYS-]HOURS:MINUTES:SECONDS`.
        nodes: Nodes; those of the recipe's `cluster` when None.
        processes_per_node: Processes of each node; `cluster.gpus_per_node` when None.
        components: Nodes of different kinds; takes the place of `nodes`, `partition` and `constraint`.
        gpu_request: How GPUs are asked for: `gpus-per-node`, `gres`, or `none` where nodes come whole.
        cpus_per_task: Cores of a node; the site's default when None.
        exclusive: Ask for whole nodes.
        signal_lead: Seconds before the time limit at which the run is asked to save: a step and a save must fit.
        max_failures: Times in a row that a job is queued again after a failure that was no request to stop; as often,
            and at least once, a job that has nodes to leave out makes room for another.
        slices: Jobs that follow each other, for sites where jobs cannot be queued again; 1 uses requeueing.
        slice_jobs: `chain` submits every slice as a job that depends on the one before; `array` submits them at once as
            a job array of which one task runs at a time.
        max_restarts: Times that torchrun starts the processes again without leaving the job.
        preflight: Test nodes and links before every start, and leave bad nodes out.
        exclude: Nodes to leave out.
        exclude_file: File of nodes to leave out, one a line; the preflight and `exclude_stragglers` add to it. Not for
            jobs with `components`.
        exclude_stragglers: Add nodes that the others waited for all along, by the run's own metrics, after every slice.
        stagger_seconds: Seconds between the starts of two nodes, so that not all read the same files at once.
        caches: Folder on a node's own disk for compiled kernels.
        python: Interpreter, as the nodes or the container know it; empty for the one that renders the script, or for
            `python` where a container starts.
        workdir: Folder where the job starts; the current one when empty.
        environment: Variables to set.
        container: How the software reaches the nodes.
    """

    partition: tuple[str, ...] = ()
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    time: str = "4:00:00"
    nodes: int | None = None
    processes_per_node: int | None = None
    components: tuple[ComponentConfig, ...] = ()
    gpu_request: str = "gpus-per-node"
    cpus_per_task: int | None = None
    exclusive: bool = True
    signal_lead: int = 900
    max_failures: int = 3
    slices: int = 1
    slice_jobs: str = "chain"
    max_restarts: int = 0
    preflight: bool = False
    exclude: tuple[str, ...] = ()
    exclude_file: str = ""
    exclude_stragglers: bool = False
    stagger_seconds: float = 0.2
    caches: str = "/tmp/nemovl-caches"  # noqa: S108  a cache that anyone may lose
    python: str = ""
    workdir: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    container: ContainerConfig = field(default_factory=ContainerConfig)

    @property
    def node_count(self) -> int | None:
        """Nodes of all components, or `nodes`."""
        return sum(part.nodes for part in self.components) if self.components else self.nodes


def load_site(file: Path | None, changes: Sequence[str]) -> SlurmConfig:
    """Reads a site file and applies `slurm.key=value` changes.

    Args:
        file: YAML file with the keys of `SlurmConfig`; None for the defaults.
        changes: As on the command line, values in YAML.

    Raises:
        ConfigError: Every problem: unknown keys, values that SLURM or a shell would read as something else.
    """
    problems: list[str] = []
    values = _read(file) if file else {}
    for text in changes:
        _change(values, text, problems)
    site = build(SlurmConfig, values, problems)
    problems = [problem if problem.startswith("slurm.") else f"slurm.{problem}" for problem in problems]
    problems += [f"slurm.{problem}" for problem in site_problems(site)]
    if problems:
        raise ConfigError(problems)
    return site


def seconds_of(time: str) -> int:
    """A time limit in seconds; the text has passed its check."""
    match = _TIME.fullmatch(time)
    assert match, time
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def site_problems(site: SlurmConfig) -> list[str]:
    """Problems of a site's options, `key=value: what is allowed`."""
    return [*_patterns(site), *_numbers(site), *_container(site), *_environment(site)]


def refuse_path(path: Path) -> None:
    """Refuses a folder that a `#SBATCH` line, which knows no quotes, could not name.

    Raises:
        ConfigError: It has spaces, quotes or other special characters.
    """
    if not _PATH.fullmatch(str(path)):
        raise ConfigError([f"run.root: {str(path)!r} has characters that an #SBATCH line cannot hold; use plain names"])


def read_excluded(path: Path) -> list[str]:
    """Nodes of an exclude file: one a line, `#` starts a remark. A file that is not there excludes nobody.

    Raises:
        ConfigError: A line is not the name of a node.
    """
    if not path.is_file():
        return []
    names = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = list(dict.fromkeys(name for name in names if name))
    bad = [name for name in found if not _HOSTS.fullmatch(name)]
    if bad:
        raise ConfigError([f"{path}: {bad[0]!r} is not the name of a node; write one name a line"])
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its numbers in base 60: 4:00:00 is a time, not 14400."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", _TIME), *found] if first.isdigit() else found
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a safe loader


def _read(file: Path) -> dict[str, Any]:
    try:
        values = _parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"--site {file}: cannot be read ({error})"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"--site {file}: must hold keys and values, such as partition: [batch]"])
    return {str(key): value for key, value in values.items()}


def _change(values: dict[str, Any], text: str, problems: list[str]) -> None:
    key, _, raw = text.removeprefix("slurm.").partition("=")
    try:
        value = _parse(raw)
    except yaml.YAMLError:
        problems.append(f"slurm.{key}={raw!r}: not understood; write a value or a [list]")
        return
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            problems.append(f"slurm.{key}: slurm.{section} has no keys of its own")
            return
        values = inner
    values[name] = "" if value is None else value


def _fits(key: str, value: str, pattern: re.Pattern[str], what: str) -> Iterator[str]:
    if not pattern.fullmatch(value):
        yield f"{key}={value!r}: {what}; quotes, line breaks, spaces and $ would change the script"


def _patterns(site: SlurmConfig) -> Iterator[str]:
    for key in ("account", "qos", "reservation"):
        if value := getattr(site, key):
            yield from _fits(key, value, _WORD, "a name")
    kinds = [("", site), *((f"components.{number}.", part) for number, part in enumerate(site.components))]
    for prefix, part in kinds:
        assert isinstance(part, SlurmConfig | ComponentConfig)
        for name in part.partition:
            yield from _fits(f"{prefix}partition", name, _WORD, "names of partitions")
        if part.constraint:
            yield from _fits(f"{prefix}constraint", part.constraint, _CONSTRAINT, "features joined by & or |")
    for name in site.exclude:
        yield from _fits("exclude", name, _HOSTS, "names of nodes")
    for key in ("workdir", "exclude_file", "python"):
        if value := getattr(site, key):
            yield from _fits(key, value, _PATH, "a path")
    yield from _fits("caches", site.caches, _PATH, "a path")
    if not _TIME.fullmatch(site.time):
        yield f"time={site.time!r}: write [DAYS-]HOURS:MINUTES:SECONDS, such as 4:00:00"
    choosable = (("gpu_request", GPU_REQUESTS), ("slice_jobs", SLICE_JOBS), ("container.runtime", RUNTIMES))
    for key, choices in choosable:
        value = site.container.runtime if "." in key else getattr(site, key)
        if value not in choices:
            yield f"{key}={value!r} is not a choice{did_you_mean(value, choices)}"


def _numbers(site: SlurmConfig) -> Iterator[str]:
    for key, least in (("nodes", 1), ("processes_per_node", 1), ("cpus_per_task", 1)):
        value = getattr(site, key)
        if value is not None and value < least:
            yield f"{key}={value}: at least {least}"
    for key, least in (("signal_lead", 1), ("max_failures", 0), ("max_restarts", 0), ("stagger_seconds", 0)):
        if not getattr(site, key) >= least:
            yield f"{key}={getattr(site, key)}: at least {least}"
    if not 1 <= site.slices <= MOST_SLICES:
        yield f"slices={site.slices}: between 1 and {MOST_SLICES}"
    for number, part in enumerate(site.components):
        if part.nodes < 1:
            yield f"components.{number}.nodes={part.nodes}: at least 1"
    if site.components and (site.nodes or site.partition or site.constraint):
        yield "components: each names its own nodes, partition and constraint; leave those of the whole job out"
    if _TIME.fullmatch(site.time) and site.signal_lead >= seconds_of(site.time):
        limit = seconds_of(site.time)
        yield f"signal_lead={site.signal_lead}: less than the time limit of {limit} s; nearest: {max(limit // 2, 1)}"
    found_late = [key for key in ("exclude_file", "preflight", "exclude_stragglers") if getattr(site, key)]
    if site.components and found_late:
        yield (
            f"components: not together with {', '.join(found_late)}, since what sbatch is told beside a script reaches "
            "the first component alone; name nodes in slurm.exclude=[NODE], which goes into all of them"
        )
    elif found_late and not site.exclude_file:
        for key in found_late:
            yield f"{key}=true needs a file for the nodes that it leaves out; add slurm.exclude_file=bad_nodes.txt"
    if site.slice_jobs == "array" and site.components:
        yield "slice_jobs=array: SLURM has no arrays of jobs with components; set slurm.slice_jobs=chain"


def _container(site: SlurmConfig) -> Iterator[str]:
    box = site.container
    if box.runtime == "none":
        for item in fields(box):
            if item.name != "runtime" and getattr(box, item.name):
                yield f"container.{item.name} is set, but container.runtime=none; set container.runtime=pyxis"
        return
    yield from _fits("container.image", box.image, _IMAGE, "an image file or reference")
    for mount in box.mounts:
        yield from _fits("container.mounts", mount, _MOUNT, "HOST:CONTAINER")


def _environment(site: SlurmConfig) -> Iterator[str]:
    for name, value in site.environment.items():
        yield from _fits("environment", name, _VARIABLE, "names of variables")
        yield from _fits(f"environment.{name}", value, _VALUE, "letters, digits and ._~/@+=,:%^-")
