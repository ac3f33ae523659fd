"""SLURM scripts: what they ask for, that a shell reads them as meant, and what may not enter them."""

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from launch.program import Program, program_of
from launch.site import ContainerConfig, SlurmConfig, load_site, read_excluded, seconds_of, site_problems
from launch.slurm import render, short_lead
from nemovl_train import cli
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.parallel.legality import placement_problems

FULL = ["recipe=nano_12b_v2_vl/schedule", "cluster=h100_x64"]
TINY = ["recipe=tiny/stage1_sft_16k", "slurm.nodes=1", "slurm.processes_per_node=1", "slurm.gpu_request=none"]
VARIANTS = {
    "plain": [],
    "lists": ["slurm.partition=[batch,spare]", "slurm.account=vlm", "slurm.qos=high", "slurm.exclude=['bad[1-3]']"],
    "two kinds": ["slurm.components=[{nodes: 6, partition: [a]}, {nodes: 2, partition: [b], constraint: h100}]"],
    "slices": ["slurm.slices=4"],
    "slices without bad nodes": ["slurm.slices=4", "slurm.preflight=true", "slurm.exclude_file=bad_nodes.txt"],
    "array": ["slurm.slices=4", "slurm.slice_jobs=array"],
    "stragglers": ["slurm.exclude_stragglers=true", "slurm.exclude_file=bad_nodes.txt", "slurm.exclude=[node1]"],
    "stragglers in a container": [
        "slurm.exclude_stragglers=true",
        "slurm.exclude_file=bad_nodes.txt",
        "slurm.container={runtime: pyxis, image: /x/nemovl.sqsh}",
    ],
    "pyxis": ["slurm.container={runtime: pyxis, image: /x/nemovl.sqsh, mounts: ['/data:/data:ro']}"],
    "apptainer": ["slurm.container={runtime: apptainer, image: nemovl.sif, mounts: ['/data:/data']}"],
    "preflight": ["slurm.preflight=true", "slurm.exclude_file=bad_nodes.txt"],
    "environment": ["slurm.environment={NEMOVL_DATA: /lustre/data, NCCL_IB_HCA: '^mlx5_1'}", "slurm.gpu_request=gres"],
}


@functools.cache
def full() -> Program:
    """Composing five stages takes a second; what scripts are made of them does not depend on the test."""
    return program_of(FULL, nodes=None, per_node=None)


def rendered(*words: str) -> str:
    return render(full(), load_site(None, words), nodes=8, per_node=8, workdir=Path.cwd()).text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("extra", VARIANTS.values(), ids=VARIANTS)
def test_scripts_are_what_a_shell_and_shellcheck_accept(tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.sh"
    path.write_text(rendered(*extra))
    for command in (["bash", "-n"], [str(Path(sys.executable).parent / "shellcheck")]):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in path.read_text().splitlines() if line != line.rstrip()]
    assert not list(tmp_path.glob("runs*"))


def test_shellcheck_would_find_an_unquoted_value(tmp_path):
    """The control of the test above: the tool is there and looks."""
    path = tmp_path / "bad.sh"
    path.write_text("#!/usr/bin/env bash\nrm -rf $1/x\n")
    tool = str(Path(sys.executable).parent / "shellcheck")
    assert subprocess.run([tool, str(path)], capture_output=True).returncode == 1


def test_the_recipe_decides_nodes_and_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = directives(rendered(*VARIANTS["lists"], "slurm.time=1-02:00:00", "slurm.signal_lead=600"))
    wanted = {"--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=batch,spare", "--account=vlm"}
    wanted |= {"--signal=USR1@600", "--time=1-02:00:00", "--requeue", "--open-mode=append", "--exclude=bad[1-3]"}
    assert wanted <= set(asked)
    assert len(asked) == len(set(asked))
    text = rendered()
    assert "--nproc 8 --nnodes 8" in text
    assert "-m nemovl_train.cli schedule recipe=nano_12b_v2_vl/schedule cluster=h100_x64" in text
    assert seconds_of("1-02:00:05") == 26 * 3600 + 5


def test_kinds_of_nodes_and_containers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = rendered(*VARIANTS["two kinds"])
    first, second = text.split("#SBATCH hetjob")
    assert {"--nodes=6", "--partition=a"} <= set(directives(first))
    assert set(directives(second)) >= {"--nodes=2", "--partition=b", "--constraint=h100", "--gpus-per-node=8"}
    assert "--het-group=0,1" in text
    left_out = rendered(*VARIANTS["two kinds"], "slurm.exclude=[bad1]").split("#SBATCH hetjob")
    assert ["--exclude=bad1" in directives(part) for part in left_out] == [True, True]
    assert "--container-image=/x/nemovl.sqsh --container-mounts=/data:/data:ro" in rendered(*VARIANTS["pyxis"])
    assert f"apptainer exec --nv --bind /data:/data --pwd {tmp_path} nemovl.sif python -m launch.node" in rendered(
        *VARIANTS["apptainer"]
    )


INJECTIONS = ["a\n#SBATCH --uid=0", "a'b", 'a"b', "$(id)", "`id`", "a b", "a;id", "${HOME}", "a\\", "a&&id"]
FIELDS = ["account", "qos", "reservation", "constraint", "workdir", "exclude_file", "caches", "python", "time"]


@pytest.mark.parametrize("bad", INJECTIONS)
def test_no_field_can_become_a_directive_or_a_command(bad):
    for key in FIELDS:
        assert site_problems(SlurmConfig(**{key: bad})), key
    for key in ("partition", "exclude"):
        assert site_problems(SlurmConfig(**{key: (bad,)})), key
    for box in ({"image": bad}, {"image": "x", "mounts": (f"/a:{bad}",)}):
        assert site_problems(SlurmConfig(container=ContainerConfig(runtime="pyxis", **box)))
    assert site_problems(SlurmConfig(environment={bad: "x"}))
    if bad != "a b":  # which is quoted
        assert site_problems(SlurmConfig(environment={"X": bad}))


@pytest.mark.parametrize("bad", ["run.name=a\nb", "trainer.init_from=$(id)", "trainer.init_from=`id`"])
def test_no_override_can_become_a_command(bad):
    with pytest.raises(ConfigError, match="override"):
        program_of(["recipe=tiny/stage1_sft_16k", bad], nodes=1, per_node=1)


def test_what_is_quoted_arrives_as_it_was(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    override = "trainer.init_from='a; \"b\" #SBATCH $HOME'"
    words = ["recipe=tiny/stage1_sft_16k", "slurm.nodes=1", "slurm.processes_per_node=1", override]
    assert cli.main(["launch", "slurm", *words, "--json", "--dry-run"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    (line,) = [line for line in text.splitlines() if line.startswith("node run ")]
    assert override in shlex.split(line)


def test_a_folder_that_no_directive_can_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "with space").mkdir()
    monkeypatch.chdir(tmp_path / "with space")
    assert cli.main(["launch", "slurm", *TINY, "--dry-run"]) == 2
    assert "use plain names" in capsys.readouterr().err


def test_all_problems_of_a_site_come_together(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("partitions: [a]\ntime: 1:00:00\nsignal_lead: 7200\ngpu_request: gress\npreflight: true\n")
    with pytest.raises(ConfigError) as caught:
        load_site(file, ["slurm.nodes=0", "slurm.container.image=x"])
    text = str(caught.value)
    assert len(caught.value.problems) == 6, text
    for part in ("did you mean partition?", "nearest: 1800", "did you mean gres?", "slurm.exclude_file=", "nodes=0"):
        assert part in text, part
    for options in (["slurm.exclude_file=bad.txt"], ["slurm.preflight=true"]):
        with pytest.raises(ConfigError, match=r"first component alone; name nodes in slurm\.exclude") as caught:
            load_site(None, ["slurm.components=[{nodes: 1}]", *options])
        assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(tmp_path / "absent.yaml", [])


def test_tensor_parallel_ranks_stay_in_a_node(capsys):
    def problems(tp, cp, nodes, per_node):
        return placement_problems(ParallelConfig(tp=tp, cp=cp), nodes, per_node)

    assert not problems(8, 8, 64, 8)  # CP over whole nodes
    assert not problems(2, 2, 2, 8)
    assert not problems(8, 1, 1, 4)  # a single domain
    assert "set parallel.tp=4" in problems(8, 1, 2, 4)[0]
    assert "set parallel.cp=2" in problems(4, 3, 3, 8)[0]
    words = ["recipe=nano_12b_v2_vl/stage1_sft_16k", "cluster=h100_x64", "slurm.processes_per_node=2", "slurm.nodes=32"]
    assert cli.main(["launch", "slurm", *words, "--dry-run"]) == 2
    assert "reach over nodes of 2 processes; set parallel.tp=2" in capsys.readouterr().err


def test_a_short_lead_is_said_before_the_job_waits_in_the_queue(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["launch", "slurm", *FULL, "slurm.signal_lead=30", "--dry-run"])
    found = capsys.readouterr()
    assert "slurm.signal_lead=30: one step and one checkpoint take" in found.err
    assert {"--nodes=8", "--gpus-per-node=8"} <= set(directives(found.out))
    assert short_lead(SlurmConfig(signal_lead=7000), 200.0) is None
    assert "slurm.signal_lead=301" in (short_lead(SlurmConfig(signal_lead=100), 200.0) or "")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = FakeSlurm(tmp_path / "slurm", nodes=1)
    monkeypatch.setenv("PATH", fake.environment["PATH"])
    monkeypatch.setenv("FAKE_SLURM", str(fake.spool))
    return fake


def test_slices_follow_each_other(slurm, capsys):
    assert cli.main(["launch", "slurm", *TINY, "slurm.slices=3"]) == 0
    assert "submitted 1, 2, 3" in capsys.readouterr().out
    calls = slurm.submitted()
    assert [call[1:-1] for call in calls] == [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]
    assert "--no-requeue" in Path(calls[0][-1]).read_text()


def test_slices_as_an_array_are_one_submission(slurm, capsys):
    assert cli.main(["launch", "slurm", *TINY, "slurm.slices=3", "slurm.slice_jobs=array", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("job.sh  # x 1")
    assert cli.main(["launch", "slurm", *TINY, "slurm.slices=3", "slurm.slice_jobs=array"]) == 0
    assert "submitted 1:" in capsys.readouterr().out
    (call,) = slurm.submitted()
    asked = directives(Path(call[-1]).read_text())
    assert "--array=1-3%1" in asked
    assert any(line.endswith("/%A_%a.log") for line in asked)
    assert call[1:-1] == []
    two = ["slurm.slices=3", "slurm.slice_jobs=array", "slurm.components=[{nodes: 1}]"]
    assert cli.main(["launch", "slurm", TINY[0], "slurm.processes_per_node=1", *two]) == 2
    assert "set slurm.slice_jobs=chain" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["chain", "array"])
def test_slices_that_are_not_needed_any_more_are_taken_out_of_the_queue(slurm, tmp_path, monkeypatch, form):
    end = functools.partial(end_with, slurm, tmp_path, monkeypatch)
    more = ["slurm.slices=3", f"slurm.slice_jobs={form}"]
    # The second launch has the numbers 4 to 6, or 2 as an array; of those of another run there are more than of these.
    waiting = "2\n" if form == "array" else "5\n6\n"
    (slurm.spool / "waiting").write_text(f"90\n{waiting}91\n")
    assert end(code=0, report=75, extra=more)[0] == 75
    assert not slurm.said("cancelled"), "there is more to do"
    assert end(code=0, report=0, extra=more)[0] == 0
    assert slurm.said("cancelled").split() == ["--state=PENDING", *waiting.split()]
    assert end(code=1, report=2, extra=more)[0] == 2
    assert slurm.said("cancelled"), "a bad config would end every one of them"
    script = Path(slurm.submitted()[-1][-1])
    monkeypatch.setenv("REPORT", "")
    counts = []
    for restart in range(5):
        assert slurm.run(script, restart, lambda: False, timeout_s=20)[0] == 1
        counts.append(bool(slurm.said("cancelled")))
    assert counts == [False, False, False, True, True], "slices share the count of failures in a row"


def test_without_a_job_of_this_run_nothing_is_taken_out_of_the_queue(slurm, tmp_path, monkeypatch):
    """scancel with a state and no number means every waiting job of the user."""
    (slurm.spool / "waiting").write_text("90\n")
    assert end_with(slurm, tmp_path, monkeypatch, code=0, report=0, extra=["slurm.slices=2"])[0] == 0
    script = Path(slurm.submitted()[-1][-1])
    for text in ("", None):
        noted = script.parent / "jobs"
        noted.unlink() if text is None else noted.write_text(text)
        assert slurm.run(script, 1, lambda: False, timeout_s=20)[0] == 0
    assert slurm.said("cancelled") == ""


def test_a_launch_notes_its_jobs_as_it_gets_them(slurm, tmp_path, monkeypatch, capsys):
    noted = tmp_path / "runs/tiny/stage1_sft_16k/slurm/jobs"
    assert cli.main(["launch", "slurm", *TINY]) == 0
    assert noted.read_text() == "1\n"
    (slurm.spool / "refuse").write_text("batch")
    monkeypatch.setenv("REFUSE_AFTER", "3")
    assert cli.main(["launch", "slurm", *TINY, "slurm.slices=4"]) == 2
    assert "submitted before that: 2 3" in capsys.readouterr().err
    assert noted.read_text() == "1\n2\n3\n"


def test_errors_of_sbatch_are_one_message(slurm, capsys, monkeypatch):
    (slurm.spool / "refuse").write_text("batch")
    assert cli.main(["launch", "slurm", *TINY]) == 2
    assert "invalid partition specified: batch" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["launch", "slurm", *TINY]) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err


NODE = """#!/usr/bin/env bash
# Stands for the interpreter on a node: leaves the exit codes that the test wants.
case "$*" in
*doctor.preflight*) exit "$PREFLIGHT" ;;
*doctor.stragglers*) exec sleep "${STRAGGLERS_SLEEP:-0}" ;;
esac
while [ "$1" != --report ]; do shift; done
[ -z "$REPORT" ] || echo "$REPORT" >"$2"
exit "$CODE"
"""


def end_with(slurm, tmp_path, monkeypatch, *, code=0, report="", preflight=0, extra=()) -> tuple[int, bool, str]:
    (tmp_path / "fake_python").write_text(NODE)
    (tmp_path / "fake_python").chmod(0o755)
    for name, value in (("CODE", code), ("REPORT", report), ("PREFLIGHT", preflight)):
        monkeypatch.setenv(name, str(value))
    assert cli.main(["launch", "slurm", *TINY, f"slurm.python={tmp_path}/fake_python", *extra]) == 0
    script = Path(slurm.submitted()[-1][-1])
    ended, log = slurm.run(script, 0, lambda: False, timeout_s=20)
    return ended, slurm.requeued(), log


def test_the_script_acts_on_how_the_run_ended(slurm, tmp_path, monkeypatch):
    end = lambda **how: end_with(slurm, tmp_path, monkeypatch, **how)[:2]  # noqa: E731
    assert end(code=0, report=0) == (0, False)
    assert end(code=0, report=75) == (75, True)
    assert end(code=1, report=2) == (2, False)  # a bad config stays bad
    # A crash is tried again, a limited number of times; a slice that saved starts the count anew.
    assert [end(code=1)[1] for _ in range(5)] == [True, True, True, False, False]
    assert end(code=0, report=75) == (75, True)
    assert end(code=137) == (137, True)
    assert end(code=0, report=75, extra=["slurm.slices=2"]) == (75, False)


def test_refused_nodes_are_left_out_of_a_new_job(slurm, tmp_path, monkeypatch):
    options = ["slurm.preflight=true", f"slurm.exclude_file={tmp_path}/bad.txt"]
    (tmp_path / "bad.txt").write_text("node7  # slow link\nnode3\n\n")
    named = [*options, "slurm.exclude=[node1]"]
    ended, requeued, log = end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=named)
    assert (ended, requeued) == (1, False)
    assert "going on without node1,node3,node7" in log
    assert slurm.submitted()[-1][:2] == ["--parsable", "--exclude=node1,node3,node7"]
    script = Path(slurm.submitted()[-1][-1])
    assert "#SBATCH --exclude=node1,node7,node3" in script.read_text()  # a later launch leaves them out as well
    assert (script.parent / "jobs").read_text() == "1\n2\n", "the launch's own and the script's"


def again(slurm, **values) -> tuple[int, int, str]:
    """Run the last submitted script again: exit code, jobs that it submitted, log."""
    for name, value in values.items():
        os.environ[name] = str(value)  # undone by the fixtures: `end_with` has set them with monkeypatch
    before = len(slurm.submitted())
    code, log = slurm.run(Path(slurm.submitted()[-1][-1]), 1, lambda: False, timeout_s=20)
    return code, len(slurm.submitted()) - before, log


def test_moves_are_counted_in_a_row(slurm, tmp_path, monkeypatch):
    options = ["slurm.preflight=true", f"slurm.exclude_file={tmp_path}/bad.txt", "slurm.max_failures=1"]
    (tmp_path / "bad.txt").write_text("node7\n")
    assert end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=options)[0] == 1
    ended, submitted, log = again(slurm)
    assert (ended, submitted) == (1, 0), "the preflight ends the job at the limit"
    assert "going on" not in log
    assert "after 1 of at most 1 in a row" in log
    for report in (75, 0):
        assert again(slurm, PREFLIGHT=0, REPORT=report)[:2] == (report, 0)
        assert again(slurm, PREFLIGHT=1)[:2] == (1, 1), "a slice that ended well starts the count anew"
    assert end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=options)[0] == 1
    assert len(slurm.submitted()) == 6, "and so does a launch"


def test_a_slow_node_never_ends_a_run(slurm, tmp_path, monkeypatch):
    """Even where no failure is allowed the first one is left out; when another job gets it too, that one goes on."""
    (tmp_path / "bad.txt").write_text("localhost  # slow\n")
    options = [f"slurm.exclude_file={tmp_path}/bad.txt", "slurm.max_failures=0"]
    ended, _, log = end_with(slurm, tmp_path, monkeypatch, report=75, extra=options)
    assert ended == 1
    assert "going on without localhost" in log
    assert len(slurm.submitted()) == 2
    ended, submitted, log = again(slurm)
    assert (ended, submitted) == (75, 0)
    assert "going on with localhost" in log
    assert "going on without" not in log
    (slurm.spool / "refuse").write_text("batch")
    ended, submitted, log = again(slurm)
    assert (ended, submitted) == (75, 0), "no other job to be had"
    assert "sbatch took no other job" in log


def test_a_job_that_waited_while_its_nodes_were_excluded_makes_room_for_another(slurm, tmp_path, monkeypatch):
    """The job was submitted with nothing to leave out; its node came onto the list before it started."""
    options = [f"slurm.exclude_file={tmp_path}/bad.txt"]
    assert end_with(slurm, tmp_path, monkeypatch, code=0, report=0, extra=options)[0] == 0
    script = Path(slurm.submitted()[-1][-1])
    (tmp_path / "bad.txt").write_text("localhost  # slow\nnode9\n")
    code, log = slurm.run(script, 1, lambda: False, timeout_s=20)
    assert code == 1
    assert "given localhost" in log
    assert slurm.submitted()[-1][1] == "--exclude=localhost,node9"
    (tmp_path / "bad.txt").write_text("node9\n")
    assert slurm.run(script, 2, lambda: False, timeout_s=20)[0] == 0


def test_slices_in_the_queue_learn_of_refused_nodes(slurm, tmp_path, monkeypatch):
    options = ["slurm.preflight=true", f"slurm.exclude_file={tmp_path}/bad.txt", "slurm.slices=3"]
    (tmp_path / "bad.txt").write_text("node7\nnode3\n")
    (slurm.spool / "waiting").write_text("2\n3\n41\n2\n")  # 41 is of another run
    assert end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=options)[0] == 1
    assert slurm.said("updates").splitlines() == [
        "JobId=2 ExcNodeList=node3,node7",
        "JobId=3 ExcNodeList=node3,node7",
    ]
    assert len(slurm.submitted()) == 3, "the launch's own; no job beside them"
    (slurm.spool / "waiting").unlink()
    ended, _, log = again(slurm, PREFLIGHT=1)
    assert ended == 1
    assert "no slice waits" in log
    assert "going on" not in log


def test_the_script_asks_for_slow_nodes_after_a_run(slurm, tmp_path, monkeypatch, capsys):
    """The stand-in for the interpreter writes down how it was called."""
    options = ["slurm.exclude_stragglers=true", f"slurm.exclude_file={tmp_path}/bad.txt"]
    monkeypatch.setattr(sys.modules[__name__], "NODE", NODE.replace("case", f'echo "$*" >>{tmp_path}/calls\ncase', 1))
    assert end_with(slurm, tmp_path, monkeypatch, code=0, report=75, extra=options)[:2] == (75, True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "nemovl_train.train" in calls[0]
    folder = tmp_path / "runs/tiny/stage1_sft_16k"
    assert calls[1] == f"-m nemovl_train.doctor.stragglers {folder} --exclude-file {tmp_path}/bad.txt"
    # One that hangs, as on a file system that does, keeps the job from its next turn for a limited time alone.
    monkeypatch.setenv("STRAGGLERS_SLEEP", "15")
    monkeypatch.setenv("NEMOVL_STRAGGLERS_SECONDS", "0.3")
    began = time.monotonic()
    assert again(slurm)[0] == 75
    assert slurm.requeued()
    assert time.monotonic() - began < 12
    capsys.readouterr()
    assert cli.main(["launch", "slurm", *TINY, "slurm.exclude_stragglers=true", "--dry-run"]) == 2
    assert "exclude_stragglers=true needs a file" in capsys.readouterr().err


def test_exclude_files_hold_names_alone(tmp_path):
    file = tmp_path / "bad.txt"
    assert read_excluded(file) == []
    file.write_text("# seen slow\nnode1\nnode1 # again\nnode[3-4]\n")
    assert read_excluded(file) == ["node1", "node[3-4]"]
    file.write_text("node1 --uid=0\n")
    with pytest.raises(ConfigError, match="not the name of a node"):
        read_excluded(file)
