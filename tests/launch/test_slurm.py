"""SLURM scripts: what they ask for, that a shell reads them as meant, and what may not enter them."""

import functools
import json
import shlex
import subprocess
import sys
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
    more = ["slurm.slices=5", f"slurm.slice_jobs={form}"]
    assert end(code=0, report=75, extra=more)[0] == 75
    assert not slurm.said("cancelled"), "there is more to do"
    assert end(code=0, report=0, extra=more)[0] == 0
    assert "--state=PENDING" in (cancelled := slurm.said("cancelled"))
    assert "--name=nemovl" in cancelled
    assert end(code=1, report=2, extra=more)[0] == 2
    assert slurm.said("cancelled"), "a bad config would end every one of them"
    script = Path(slurm.submitted()[-1][-1])
    monkeypatch.setenv("REPORT", "")
    counts = []
    for restart in range(5):
        assert slurm.run(script, restart, lambda: False, timeout_s=20)[0] == 1
        counts.append(bool(slurm.said("cancelled")))
    assert counts == [False, False, False, True, True], "slices share the count of failures in a row"


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
*doctor.stragglers*) exit 0 ;;
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
    assert "without node1,node3,node7" in log
    assert slurm.submitted()[-1][0] == "--exclude=node1,node3,node7"
    script = Path(slurm.submitted()[-1][-1])
    assert "#SBATCH --exclude=node1,node7,node3" in script.read_text()  # a later launch leaves them out as well
    monkeypatch.setenv("NEMOVL_MOVES", "3")
    before = len(slurm.submitted())
    end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=options)
    assert len(slurm.submitted()) == before + 1  # the test's own submission alone: no fourth move
    assert end_with(slurm, tmp_path, monkeypatch, preflight=0, report=0, extra=options)[0] == 0


def test_a_job_that_waited_while_its_nodes_were_excluded_makes_room_for_another(slurm, tmp_path, monkeypatch):
    """The job was submitted with nothing to leave out; its node came onto the list before it started."""
    options = [f"slurm.exclude_file={tmp_path}/bad.txt"]
    assert end_with(slurm, tmp_path, monkeypatch, code=0, report=0, extra=options)[0] == 0
    script = Path(slurm.submitted()[-1][-1])
    (tmp_path / "bad.txt").write_text("localhost  # slow\nnode9\n")
    code, log = slurm.run(script, 1, lambda: False, timeout_s=20)
    assert code == 1
    assert "given localhost" in log
    assert slurm.submitted()[-1][0] == "--exclude=localhost,node9"
    (tmp_path / "bad.txt").write_text("node9\n")
    assert slurm.run(script, 2, lambda: False, timeout_s=20)[0] == 0


def test_slices_in_the_queue_learn_of_refused_nodes(slurm, tmp_path, monkeypatch):
    options = ["slurm.preflight=true", f"slurm.exclude_file={tmp_path}/bad.txt", "slurm.slices=3"]
    (tmp_path / "bad.txt").write_text("node7\nnode3\n")
    (slurm.spool / "waiting").write_text("41\n42\n41\n")
    before = len(slurm.submitted())
    assert end_with(slurm, tmp_path, monkeypatch, preflight=1, extra=options)[0] == 1
    assert slurm.said("updates").splitlines() == [
        "JobId=41 ExcNodeList=node3,node7",
        "JobId=42 ExcNodeList=node3,node7",
    ]
    assert len(slurm.submitted()) == before + 3, "the launch's own; no job beside them"


def test_the_script_asks_for_slow_nodes_after_a_run(slurm, tmp_path, monkeypatch, capsys):
    """The stand-in for the interpreter writes down how it was called."""
    options = ["slurm.exclude_stragglers=true", f"slurm.exclude_file={tmp_path}/bad.txt"]
    monkeypatch.setattr(sys.modules[__name__], "NODE", NODE.replace("case", f'echo "$*" >>{tmp_path}/calls\ncase', 1))
    assert end_with(slurm, tmp_path, monkeypatch, code=0, report=75, extra=options)[:2] == (75, True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "nemovl_train.train" in calls[0]
    folder = tmp_path / "runs/tiny/stage1_sft_16k"
    assert calls[1] == f"-m nemovl_train.doctor.stragglers {folder} --exclude-file {tmp_path}/bad.txt"
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
