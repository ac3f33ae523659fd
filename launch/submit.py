"""`nemovl launch slurm`: renders the script of a run, shows it, or hands it to sbatch."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from launch.program import Program, program_of
from launch.site import SlurmConfig, load_site
from launch.slurm import Script, render, short_lead
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.exceptions import UserError
from nemovl_train.plan.planner import make_plan


def add_slurm_command(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `launch slurm`."""
    parser = verbs.add_parser("slurm", help="on a SLURM cluster: render a script and submit it")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="recipe=NAME key=value slurm.key=value",
        help="as for nemovl train or nemovl schedule; slurm.key=value changes the site's options",
    )
    parser.add_argument("--site", type=Path, help="YAML file with the site's options")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the commands, submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_slurm)


def _slurm(args: argparse.Namespace) -> int:
    site = load_site(args.site, [text for text in args.overrides if text.startswith("slurm.")])
    recipe = [text for text in args.overrides if not text.startswith("slurm.")]
    program = program_of(recipe, nodes=site.node_count, per_node=site.processes_per_node)
    cluster = program.stages[0].cluster
    per_node = site.processes_per_node or cluster.gpus_per_node
    nodes = site.node_count or -(-(cluster.gpus or per_node) // per_node)
    script = render(program, site, nodes=nodes, per_node=per_node, workdir=Path.cwd())
    notes = [*program.notes, *_lead(program, site)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    jobs = [] if args.dry_run else submit(script)
    if args.json:
        found = {"script": str(script.path), "text": script.text, "nodes": nodes, "jobs": jobs, "notes": notes}
        print(json.dumps(found, indent=1))
    elif args.dry_run:
        print(script.text, end="")
        calls = 1 if script.array else site.slices
        print(f"# {' '.join(sbatch_line(script, '' if calls == 1 else 'JOB_BEFORE'))}  # x {calls}")
    else:
        print(f"submitted {', '.join(jobs)}: {script.path}; logs beside it; cancel with: scancel {' '.join(jobs)}")
    return 0


def submit(script: Script) -> list[str]:
    """Write the script and submit its slices; returns the job numbers.

    They are also noted beside the script, behind those of earlier launches: a slice takes the others out of the queue
    when the run is done.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    script.path.parent.mkdir(parents=True, exist_ok=True)
    script.path.write_text(script.text, encoding="utf-8")
    for count in ("failures.slices", "moves"):  # of an earlier launch
        (script.path.parent / count).unlink(missing_ok=True)
    noted = script.path.parent / "jobs"
    jobs: list[str] = []
    for _ in range(1 if script.array else script.slices):
        line = sbatch_line(script, jobs[-1] if jobs else "")
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise UserError(
                "sbatch is not on PATH: submit from a login node of the cluster, or look at the script with --dry-run"
            ) from error
        except subprocess.CalledProcessError as error:
            already = f"; submitted before that: {' '.join(jobs)}" if jobs else ""
            raise UserError(f"sbatch refused {script.path}: {error.stderr.strip()}{already}") from error
        # With --parsable: the number, and behind a semicolon the cluster where there are several.
        jobs.append(done.stdout.strip().partition(";")[0])
        # After each one, since the first may start, and the next be refused, before all are submitted.
        before = noted.read_text(encoding="utf-8") if noted.is_file() else ""
        replace_text(noted, f"{before}{jobs[-1]}\n")
    return jobs


def sbatch_line(script: Script, before: str) -> list[str]:
    """The command that submits a slice, after another job however that one ends."""
    after = [f"--dependency=afterany:{before}"] if before else []
    return ["sbatch", "--parsable", *after, str(script.path)]


def _lead(program: Program, site: SlurmConfig) -> list[str]:
    """Whether any stage needs more time to save than the signal leaves it."""
    plans = [make_plan(stage) for stage in program.stages]
    warning = short_lead(site, max(plan.time.total + plan.checkpoint_seconds for plan in plans))
    return [warning] if warning else []
