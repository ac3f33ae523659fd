"""The `nemovl` command: verbs only. A verb's module is imported when it is chosen, so that --help answers at once."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemovl_train import __version__
from nemovl_train.console import setup_logging
from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode, guarded

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = """exit codes: 0 done (or nothing left to do), 1 failed, 2 bad usage, config or input,
75 saved after a stop was asked for: start the same command again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Returns:
        An exit code, see `nemovl_train.exit_codes`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    return guarded(lambda: _dispatch(arguments))


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    if verb == "train":
        from nemovl_train.train import train

        return train(argv[1:])
    if verb == "schedule":
        return _schedule(argv[1:])
    if verb == "plan":
        from nemovl_train.plan.cli import plan

        return plan(argv[1:])
    if verb in ("-sc", "--shell-completion"):
        from nemovl_train.config.app import complete

        return complete(argv, list(VERBS))
    parser = build_parser(verb)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(args, "run"):
        parser.print_help()
        return ExitCode.USAGE
    if rest:
        # Overrides that stand behind an option, which argparse does not collect.
        args.overrides += rest
    return int(args.run(args))


def build_parser(verb: str = "") -> argparse.ArgumentParser:
    """The whole command's parser; only the chosen verb has its arguments."""
    parser = argparse.ArgumentParser(
        prog="nemovl",
        description="Train and fine-tune Nemotron Nano V2 VL.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemovl {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs", required=False)
    for name, (text, register) in VERBS.items():
        if name == verb and register is not None:
            register(subparsers)
        else:
            subparsers.add_parser(name, help=text, add_help=False)
    return parser


def _schedule(argv: Sequence[str]) -> int:
    from nemovl_train.config.app import USAGE, run_app
    from nemovl_train.config.compose import compose_stage
    from nemovl_train.config.schema import RunConfig, ScheduleConfig
    from nemovl_train.config.validate import refuse_processes

    if {"-h", "--help"} & set(argv):
        what = "Runs a chain of stages; continues where it stopped, and ends at once when all is done."
        print(USAGE.format(verb="schedule", what=what))
        return ExitCode.OK

    def job(config: RunConfig | ScheduleConfig) -> int:
        assert isinstance(config, ScheduleConfig)
        refuse_processes([compose_stage(config, stage) for stage in config.stages])
        from nemovl_train.schedule import chain

        return chain.run(config)

    return run_app("schedule", argv, job)


def _add_recipes(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("recipes", help="list, show and copy what is shipped")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="names, kinds and one line each")
    listing.add_argument("--json", action="store_true", help="print one JSON document")
    listing.set_defaults(run=_list_recipes)
    show = verbs.add_parser("show", help="print the file of a recipe")
    show.add_argument("name", help="as in recipe=NAME")
    show.set_defaults(run=_show_recipe)
    copy = verbs.add_parser("copy", help="copy a recipe to edit; run it as recipe=TARGET")
    copy.add_argument("name", help="as in recipe=NAME")
    copy.add_argument("target", type=Path, help="a new .yaml file, or a folder")
    copy.set_defaults(run=_copy_recipe)


def _list_recipes(args: argparse.Namespace) -> int:
    from nemovl_train.config import recipes

    rows = [(name, recipes.recipe_kind(name), recipes.describe(name)) for name in recipes.list_recipes()]
    if args.json:
        print(json.dumps([{"name": name, "kind": kind, "about": about} for name, kind, about in rows], indent=1))
        return ExitCode.OK
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, kind, about in rows:
        print(f"{name:<{width}}  {kind:<8}  {about}")
    return ExitCode.OK


def _show_recipe(args: argparse.Namespace) -> int:
    from nemovl_train.config import recipes

    print(recipes.recipe_path(args.name).read_text(encoding="utf-8"), end="")
    return ExitCode.OK


def _copy_recipe(args: argparse.Namespace) -> int:
    from nemovl_train.config import recipes

    target = recipes.copy_recipe(args.name, args.target)
    if recipes.recipe_kind(args.name) == "schedule":
        print(f"wrote {target}; run it with: nemovl schedule recipe={target} run.name=NAME")
    else:
        # Under its old stage name it would meet the finished run of the recipe that it was copied from.
        print(
            f"wrote {target}; run it with: nemovl train recipe={target} run.stage=NAME trainer.init_from=STAGE_FOLDER"
        )
    return ExitCode.OK


def _add_data(subparsers: Subparsers) -> None:
    from data_pipelines.cli import add_data_commands
    from nemovl_train.data_verbs import add_recipe_verbs

    add_recipe_verbs(add_data_commands(subparsers))


def _add_convert(subparsers: Subparsers) -> None:
    from nemovl_train.convert.cli import add_convert_commands

    add_convert_commands(subparsers)


def _add_launch(subparsers: Subparsers) -> None:
    from launch.torchrun import add_launch_commands

    add_launch_commands(subparsers)


def _add_generate(subparsers: Subparsers) -> None:
    from nemovl_train.inference.cli import add_generate_command

    add_generate_command(subparsers)


def _add_eval(subparsers: Subparsers) -> None:
    from nemovl_train.evaluation.cli import add_eval_command

    add_eval_command(subparsers)


def _add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("report", help="write a run's self-contained report.html")
    parser.add_argument("run_dir", type=Path, help="run folder, such as runs/tiny")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir}: there is no such run folder")
    from nemovl_train.report.html import write_report

    written = write_report(args.run_dir)
    print(json.dumps({"report": str(written)}) if args.json else f"wrote {written}")
    return ExitCode.OK


def _add_watch(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("watch", help="what a run is doing now")
    parser.add_argument("run_dir", type=Path, help="run folder, such as runs/tiny")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print one view and return")
    parser.add_argument("--json", action="store_true", help="print one JSON document and return")
    parser.set_defaults(run=_watch)


def _watch(args: argparse.Namespace) -> int:
    if not args.every > 0:
        raise UserError(f"--every {args.every}: above 0 seconds")
    from nemovl_train.report.watch import watch

    return watch(args.run_dir, every=args.every, once=args.once, as_json=args.json)


def _add_simulate(subparsers: Subparsers) -> None:
    from nemovl_train.schedule.simulate_cli import add_simulate_command

    add_simulate_command(subparsers)


def _add_doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("doctor", help="check this machine and installation")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs go (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from nemovl_train import doctor

    return doctor.run(args.folder, as_json=args.json)


VERBS: dict[str, tuple[str, Callable[[Subparsers], None] | None]] = {
    "train": ("one stage or fine-tune: nemovl train recipe=NAME [key=value ...]", None),
    "schedule": ("a chain of stages; continues where it stopped", None),
    "plan": ("before a launch: does it fit, how long does it take, what does it cost", None),
    "simulate": ("a schedule on paper: data, steps, failures, time to finish", _add_simulate),
    "recipes": ("list, show and copy what is shipped", _add_recipes),
    "data": ("make and look at datasets", _add_data),
    "convert": ("to and from Hugging Face folders", _add_convert),
    "launch": ("the same run on several processes", _add_launch),
    "generate": ("answer questions about images and videos", _add_generate),
    "eval": ("score an exported model on held-out sets and benchmarks", _add_eval),
    "watch": ("what a run is doing now, in the terminal", _add_watch),
    "report": ("a run's self-contained report.html", _add_report),
    "doctor": ("check this machine and installation", _add_doctor),
}
"""Help line and parser of every verb; None where Hydra reads the arguments."""


if __name__ == "__main__":
    sys.exit(main())
