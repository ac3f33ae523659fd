"""SLURM scripts, rendered: a pure function of a checked recipe and a site's options."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from launch.program import Program
from launch.site import ComponentConfig, SlurmConfig, read_excluded, refuse_path, seconds_of

STOP_SIGNAL = "USR1"


@dataclass(frozen=True)
class Script:
    """A rendered script.

    Attributes:
        path: Where it will lie.
        text: Its content.
        slices: Jobs to submit, each after the one before.
        array: Whether they are one array, submitted at once.
    """

    path: Path
    text: str
    slices: int
    array: bool = False


def render(program: Program, site: SlurmConfig, *, nodes: int, per_node: int, workdir: Path) -> Script:
    """Write the script of a run.

    Args:
        program: A recipe that was checked for `nodes` x `per_node` processes.
        site: Options of the cluster, checked.
        nodes: Nodes.
        per_node: Processes of each.
        workdir: Where the job starts, unless the site names another folder.
    """
    start = Path(site.workdir) if site.workdir else workdir
    folder = _folder(program, start)
    refuse_path(folder)
    script = folder / "job.sh"
    text = (
        _environment()
        .get_template("slurm.sh.jinja")
        .render(
            directives=[list(group) for group in _directives(program, site, nodes, per_node, start)],
            workdir=str(start),
            environment=site.environment,
            folder=str(folder),
            run=str(folder.parent),
            script=str(script),
            srun=list(_srun(site)),
            srun_alone=list(_srun_alone(site)),
            enter=list(_enter(site, start)),
            python=site.python or (sys.executable if site.container.runtime == "none" else "python"),
            nproc=per_node,
            nnodes=nodes,
            caches=site.caches,
            stagger=f"{site.stagger_seconds:g}",
            max_restarts=site.max_restarts,
            preflight=site.preflight,
            exclude=site.exclude,
            exclude_file=site.exclude_file,
            # A refused node is no failure of the run: also one that may not fail gets another chance.
            most_moves=max(site.max_failures, 1),
            exclude_stragglers=site.exclude_stragglers,
            max_failures=site.max_failures,
            requeue=site.slices == 1,
            program=program.arguments,
        )
    )
    return Script(script, text, site.slices, site.slice_jobs == "array")


def _folder(program: Program, start: Path) -> Path:
    return start / program.root / program.run / "slurm"


def _environment() -> Environment:
    # A shell script is not HTML: `q` is the escape that fits, and every value goes through it or through a pattern.
    environment = Environment(
        loader=PackageLoader("launch", "templates"),
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["q"] = shlex.quote
    return environment


def _directives(program: Program, site: SlurmConfig, nodes: int, per_node: int, start: Path) -> Iterator[Iterator[str]]:
    """`#SBATCH` lines, a group for each component of a heterogeneous job; the first one has the whole job's."""
    components = site.components or (
        ComponentConfig(nodes=nodes, partition=site.partition, constraint=site.constraint),
    )
    for number, part in enumerate(components):
        whole = _of_job(program, site, start) if number == 0 else ()
        yield chain(whole, _of_nodes(site, part, per_node), _excluded(site, start))


def _of_job(program: Program, site: SlurmConfig, start: Path) -> Iterator[str]:
    yield f"--job-name=nemovl-{program.run.replace('/', '-')}"
    array = site.slices > 1 and site.slice_jobs == "array"
    yield f"--output={_folder(program, start)}/{'%A_%a' if array else '%j'}.log"
    if array:
        # One task at a time: each continues where the one before it stopped.
        yield f"--array=1-{site.slices}%1"
    # A job that is queued again goes on in the same log.
    yield "--open-mode=append"
    yield "--requeue" if site.slices == 1 else "--no-requeue"
    yield f"--time={site.time}"
    # To the processes of the run, not to the script: it waits for them and acts on how they end.
    yield f"--signal={STOP_SIGNAL}@{site.signal_lead}"
    for key in ("account", "qos", "reservation"):
        if value := getattr(site, key):
            yield f"--{key}={value}"


def _of_nodes(site: SlurmConfig, part: ComponentConfig, per_node: int) -> Iterator[str]:
    if part.partition:
        yield f"--partition={','.join(part.partition)}"
    if part.constraint:
        yield f"--constraint={part.constraint}"
    yield f"--nodes={part.nodes}"
    yield "--ntasks-per-node=1"
    if site.cpus_per_task:
        yield f"--cpus-per-task={site.cpus_per_task}"
    if site.gpu_request == "gres":
        yield f"--gres=gpu:{per_node}"
    elif site.gpu_request == "gpus-per-node":
        yield f"--gpus-per-node={per_node}"
    if site.exclusive:
        yield "--exclusive"


def _excluded(site: SlurmConfig, start: Path) -> Iterator[str]:
    """For every component: what one leaves out another may still be given."""
    listed = read_excluded(start / site.exclude_file) if site.exclude_file else []
    if excluded := [*site.exclude, *listed]:
        yield f"--exclude={','.join(dict.fromkeys(excluded))}"


def _srun(site: SlurmConfig) -> Iterator[str]:
    # One failing node ends the step at once: the others would wait for it until a time-out.
    yield from ("--kill-on-bad-exit=1", "--label")
    if site.components:
        yield f"--het-group={','.join(str(number) for number in range(len(site.components)))}"
    yield from _pyxis(site)


def _srun_alone(site: SlurmConfig) -> Iterator[str]:
    """For one process on the first node."""
    if site.components:
        yield "--het-group=0"
    yield from _pyxis(site)


def _pyxis(site: SlurmConfig) -> Iterator[str]:
    if site.container.runtime == "pyxis":
        yield f"--container-image={site.container.image}"
        if site.container.mounts:
            yield f"--container-mounts={','.join(site.container.mounts)}"


def _enter(site: SlurmConfig, workdir: Path) -> Iterator[str]:
    """The command that enters a container, where srun does not do it."""
    if site.container.runtime != "apptainer":
        return
    yield from ("apptainer", "exec", "--nv")
    for mount in site.container.mounts:
        yield from ("--bind", mount)
    yield from ("--pwd", str(workdir), site.container.image)


def short_lead(site: SlurmConfig, seconds_needed: float) -> str | None:
    """A warning when the time between signal and limit holds no step and save, by their planned seconds."""
    if site.signal_lead >= seconds_needed:
        return None
    half = seconds_of(site.time) // 2
    advice = f"slurm.signal_lead={min(round(1.5 * seconds_needed) + 1, half)}"
    return (
        f"slurm.signal_lead={site.signal_lead}: one step and one checkpoint take {seconds_needed:.0f} s by plan, and a "
        f"save that does not end in time is lost; set {advice}"
    )
