"""`nemovl plan`: what a recipe needs and how long it takes, before anything is launched."""

import json
from collections.abc import Sequence

from nemovl_train.config.app import USAGE, run_app, split_recipe
from nemovl_train.config.compose import compose_stage, recipe_kind
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.plan.calibration import compare
from nemovl_train.plan.planner import make_plan, to_json
from nemovl_train.plan.projection import projection
from nemovl_train.plan.search import search
from nemovl_train.plan.text import calibration_text, plan_text, schedule_text, search_text

SEARCH, JSON, CALIBRATION = "--search", "--json", "--calibration"
_WHAT = """Says whether a run is legal, fits and how long it takes: parameters, memory, time, traffic, cost, warnings.
Needs no GPU and no data; cluster=NAME, or cluster.gpus=N cluster.gpu=TYPE, says what for.

  --search             rank the legal layouts for these GPUs
  --json               print one JSON document
  --calibration        no recipe: measured runs against their plans"""


def plan(argv: Sequence[str]) -> int:
    """Plans a recipe, or each stage of a schedule.

    Args:
        argv: `recipe=NAME`, overrides, flags of the planner and of Hydra.

    Returns:
        An exit code.

    Raises:
        ConfigError: Every problem of the config; layouts that cannot run among them.
        UserError: Flags that do not go together.
    """
    if {"-h", "--help"} & set(argv):
        print(USAGE.format(verb="plan", what=_WHAT))
        return ExitCode.OK
    as_json = JSON in argv
    if CALIBRATION in argv:
        print(json.dumps(compare(), indent=1) if as_json else calibration_text())
        return ExitCode.OK
    rest = [text for text in argv if text not in (SEARCH, JSON)]
    recipe, _ = split_recipe([text for text in rest if not text.startswith("-")])
    kind = recipe_kind(recipe)
    if kind == "schedule" and SEARCH in argv:
        raise UserError(f"{SEARCH} takes one stage: give the recipe of a stage, with the same cluster=NAME")

    def job(config: RunConfig | ScheduleConfig) -> int:
        print(_schedule(config, as_json) if isinstance(config, ScheduleConfig) else _run(config, argv))
        return ExitCode.OK

    return run_app(kind, rest, job, reads_only="plan")


def _run(config: RunConfig, argv: Sequence[str]) -> str:
    if SEARCH in argv:
        plans = search(config)
        return json.dumps([to_json(found) for found in plans], indent=1) if JSON in argv else search_text(plans)
    made = make_plan(config)
    return json.dumps(to_json(made), indent=1) if JSON in argv else plan_text(made)


def _schedule(config: ScheduleConfig, as_json: bool) -> str:
    plans = [make_plan(compose_stage(config, stage)) for stage in config.stages]
    if not as_json:
        return schedule_text(plans)
    stages = [to_json(made) for made in plans]
    total = {
        "hours": round(sum(made.hours for made in plans), 2),
        "gpu_hours": round(sum(made.hours * made.grid.gpus for made in plans), 1),
    }
    return json.dumps({"stages": stages, "total": total, "projection": projection(plans)}, indent=1)
