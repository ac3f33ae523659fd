"""What a launcher starts on every process, and whether the recipe can run there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemovl_train.config.app import split_recipe
from nemovl_train.config.compose import compose_run, compose_schedule, compose_stage, recipe_kind
from nemovl_train.config.schema import RunConfig
from nemovl_train.config.validate import world_problems
from nemovl_train.exceptions import ConfigError
from nemovl_train.parallel.legality import placement_problems


@dataclass(frozen=True)
class Program:
    """A checked recipe as a command.

    Attributes:
        arguments: `-m MODULE ARGUMENT...`.
        kind: `run` or `schedule`.
        root: Folder that holds the runs.
        run: Name of the run, or `NAME/STAGE` of a single stage.
        stages: The stages that it runs; one for a single stage.
        notes: What is legal and worth knowing.
    """

    arguments: tuple[str, ...]
    kind: str
    root: str
    run: str
    stages: tuple[RunConfig, ...]
    notes: tuple[str, ...] = ()


def program_of(overrides: Sequence[str], *, nodes: int | None, per_node: int | None) -> Program:
    """Composes a stage or a schedule and checks it for the processes of a launch.

    Args:
        overrides: `recipe=NAME` and `key=value` changes.
        nodes: Nodes; those of `cluster` when None.
        per_node: Processes of each node; `cluster.gpus_per_node` when None.

    Raises:
        ConfigError: Every problem that was found.
    """
    recipe, changes = split_recipe(overrides)
    refuse_unprintable(changes)
    kind = recipe_kind(recipe)
    if kind == "schedule":
        schedule = compose_schedule(recipe, changes)
        stages = tuple(compose_stage(schedule, stage) for stage in schedule.stages)
        root, run, cluster = schedule.run.root, schedule.run.name, stages[0].cluster
    else:
        stages = (compose_run(recipe, changes),)
        section, cluster = stages[0].run, stages[0].cluster
        root, run = section.root, f"{section.name}/{section.stage}"
    per_node = per_node or cluster.gpus_per_node
    nodes = nodes or -(-(cluster.gpus or per_node) // per_node)
    problems = [problem for stage in stages for problem in _problems(stage, nodes, per_node)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    module = ["nemovl_train.cli", "schedule"] if kind == "schedule" else ["nemovl_train.train"]
    arguments = ("-m", *module, f"recipe={recipe}", *changes)
    notes = tuple(dict.fromkeys(note for stage in stages for note in _notes(stage, nodes, per_node)))
    return Program(arguments, kind, root, run, stages, notes)


def refuse_unprintable(texts: Sequence[str]) -> None:
    """Refuses overrides that could not be written into a script as one word that stays a word.

    Raises:
        ConfigError: A line break, another control character, or a command substitution.
    """
    problems = []
    for text in texts:
        if not text.isprintable():
            problems.append(f"{text!r}: an override is one line of printable characters")
        elif "$(" in text or "`" in text:
            problems.append(f"{text!r}: a launch does not run commands inside an override; write the value itself")
    if problems:
        raise ConfigError(problems)


def _problems(stage: RunConfig, nodes: int, per_node: int) -> Iterator[str]:
    found = world_problems(stage, nodes * per_node) or placement_problems(stage.parallel, nodes, per_node)
    yield from found


def _notes(stage: RunConfig, nodes: int, per_node: int) -> Iterator[str]:
    group = stage.parallel.tp * stage.parallel.cp
    if nodes > 1 and group > per_node:
        yield (
            f"{stage.run.stage}: parallel.tp x parallel.cp = {group} ranks share a pack over {group // per_node} nodes "
            f"of {per_node}; TP stays inside each, CP crosses the network"
        )
