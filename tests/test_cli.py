"""The command: verbs, exit codes, Hydra's flags, and what is not imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemovl_train import cli
from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode, guarded

ROOT = Path(__file__).parent.parent
STAGE = "recipe=tiny/stage1_sft_16k"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_verb_and_the_exit_codes(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == ExitCode.OK
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert "75" in out
    assert run(capsys)[0] == ExitCode.USAGE
    assert run(capsys, "trn")[0] == ExitCode.USAGE
    assert run(capsys, "--version")[1].startswith("nemovl ")


@pytest.mark.parametrize(
    "argv", [["train"], ["schedule"], ["recipes", "list"], ["data", "make-demo"], ["data", "plan"], ["data", "bench"],
             *(["data", verb] for verb in ("import", "validate", "stats", "show", "dedup", "export")),
             *(["data", verb] for verb in ("frames", "render-pdf")),
             ["data", "quarantine", "restore"], ["convert", "export"],
             ["launch", "torchrun"], ["generate"], ["eval"], ["report"], ["doctor"], ["plan"]],
    ids=" ".join,
)  # fmt: skip
def test_every_verb_has_help(capsys, argv: list[str]):
    code, out, _ = run(capsys, *argv, "--help")
    assert code == ExitCode.OK
    assert argv[0] in out


def test_help_and_config_errors_import_no_torch():
    code = (
        "import sys\n"
        "from nemovl_train.cli import main\n"
        "for argv in (['--help'], ['data', '--help'], ['data', 'import', '--help'], ['data', 'show', '--help'],"
        " ['convert', '--help'], ['launch', '--help'], ['recipes', 'list'],"
        " ['generate', '--help'], ['eval', '--help'], ['eval', 'nowhere'],"
        " ['train', 'recipe=tiny/stage1_sft_16k', 'optm.lr=1'], ['schedule', 'recipe=tiny/schedule', 'stages=[]'],"
        " ['train', 'recipe=tiny/stage1_sft_16k', 'parallel.cp=2'],"
        " ['schedule', 'recipe=nano_12b_v2_vl/schedule', 'cluster=h100_x4'],"
        " ['launch', 'torchrun', 'recipe=tiny/stage1_sft_16k', '--nproc', '2', '--dry-run'],"
        " ['plan', 'recipe=nano_12b_v2_vl/schedule'], ['plan', '--calibration']):\n"
        "    try:\n"
        "        main(argv)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_train_and_schedule_hand_over_a_checked_config(capsys, monkeypatch):
    seen = []
    fake = type(sys)("fake")
    fake.run = lambda config: seen.append(config) or 75
    # Whole packages are replaced: importing the real ones would load torch and megatron-core.
    monkeypatch.setitem(sys.modules, "nemovl_train.training.trainer", fake)
    monkeypatch.setitem(sys.modules, "nemovl_train.schedule.chain", fake)
    import nemovl_train.schedule
    import nemovl_train.training

    monkeypatch.setattr(nemovl_train.training, "trainer", fake, raising=False)
    monkeypatch.setattr(nemovl_train.schedule, "chain", fake, raising=False)
    assert run(capsys, "train", STAGE, "optim.lr=0.5")[0] == ExitCode.REQUEUE
    assert run(capsys, "schedule", "recipe=tiny/schedule", "run.name=mine")[0] == ExitCode.REQUEUE
    assert seen[0].optim.lr == 0.5
    assert seen[1].run.name == "mine"
    # What a run ran on is noted before it starts; everything else is the trainer's.
    assert [path.as_posix() for path in Path().rglob("*.*")] == ["runs/tiny/environment.json"]
    sweep = ["train", "-m", STAGE, "optim.lr=0.5,0.25", "run.stage=lr_${optim.lr}"]
    assert run(capsys, *sweep)[0] == ExitCode.REQUEUE
    assert [(c.optim.lr, c.run.stage) for c in seen[2:]] == [(0.5, "lr_0.5"), (0.25, "lr_0.25")]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["train"], "recipe=NAME is missing"),
        (["train", STAGE, STAGE], "more than once"),
        (["train", STAGE, "optim.lrr=1"], "did you mean optim.lr?"),
        (["train", STAGE, "--cfg", "job", "+typo=1"], "typo is not an option"),
        (["train", "-m", STAGE, "optim.lr=1,2"], "a folder of its own"),
        (["train", STAGE, "--config-dir", "nowhere"], "no such folder"),
        (["train", STAGE, "--experimental-rerun", "x"], "not supported"),
        (["train", STAGE, "--config-name", "x"], "--config-dir"),
        (["schedule", STAGE], "nemovl train"),
        (["recipes", "show", "tiny/nope"], "not among"),
        (["generate", "nowhere", "--prompt", "x"], "no such file or folder"),
        (["report", "nowhere"], "no such run folder"),
        (["launch", "torchrun", STAGE, "--nproc", "0"], "between 1 and"),
        (["launch", "torchrun", STAGE, "--nproc", "3", "parallel.tp=2"], "3 processes"),
        (["train", STAGE, "parallel.cp=2"], "does not divide the one process; set parallel.cp=1, or start a multiple"),
        (["train", STAGE, "parallel.cp=3"], "set parallel.cp=2"),
        (["schedule", "recipe=nano_12b_v2_vl/schedule", "cluster=h100_x4"], "does not divide the one process"),
        (["launch", "torchrun", STAGE, "--nproc", "2", "--nnodes", "2"], "give HOST:PORT of the first of 2 nodes"),
        (["plan"], "recipe=NAME is missing"),
        (["plan", "recipe=tiny/nope"], "not among"),
        (["plan", STAGE, "parallel.tp=3"], "set parallel.tp=2"),
        (["plan", STAGE, "--search"], "cluster.gpus=8"),
        (["plan", "recipe=tiny/schedule", "--search"], "takes one stage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_code_2_with_one_message(capsys, argv: list[str], part: str):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (ExitCode.USAGE, "")
    assert part in err
    assert "Traceback" not in err


def test_hydra_flags_show_the_config_in_any_order(capsys):
    code, out, _ = run(capsys, "train", "--cfg", "job", "--resolve", "-p", "optim", STAGE, "optim.lr=0.5")
    assert code == ExitCode.OK
    assert "lr: 0.5" in out
    assert run(capsys, "train", STAGE, "--cfg", "job", "-p", "optim", "optim.lr=0.5")[1] == out
    code, out, _ = run(capsys, "schedule", "recipe=tiny/schedule", "--info", "defaults")
    assert (code, "recipe/tiny/schedule" in out) == (ExitCode.OK, True)
    assert not os.listdir(".")


def test_shell_completion_knows_verbs_recipes_and_options(capsys, monkeypatch):
    def completed(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        return run(capsys, "-sc", "query=bash")[1].split()

    assert completed("nemovl sch") == list(cli.VERBS)
    assert "recipe=tiny/stage0_projector_warmup" in completed("nemovl train recipe=tiny/st")
    assert completed(f"nemovl train {STAGE} optim.b") == ["optim.beta1=", "optim.beta2="]
    monkeypatch.delenv("COMP_LINE")
    assert "complete" in run(capsys, "-sc", "install=bash")[1]


def test_recipes_list_show_copy(capsys):
    code, out, err = run(capsys, "recipes", "list", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert (code, err) == (ExitCode.OK, "")
    assert listed["tiny/schedule"]["kind"] == "schedule"
    assert "tiny/schedule" in run(capsys, "recipes", "list")[1]
    assert "nemovl train" in run(capsys, "recipes", "show", "tiny/stage1_sft_16k")[1]
    code, out, _ = run(capsys, "recipes", "copy", "tiny/stage1_sft_16k", "mine.yaml")
    assert "nemovl train recipe=mine.yaml" in out
    assert run(capsys, "train", "recipe=mine.yaml", "--cfg", "job", "-p", "run")[0] == ExitCode.OK


def test_torchrun_line_is_printed_and_started(capsys, monkeypatch):
    code, out, _ = run(capsys, "launch", "torchrun", STAGE, "--nproc", "2", "--dry-run", "run.name=a_b")
    assert code == ExitCode.OK
    assert "--nproc-per-node=2" in out
    assert "SIGUSR1" in out
    assert out.rstrip().endswith(f"-m nemovl_train.train {STAGE} run.name=a_b")
    chain = run(capsys, "launch", "torchrun", "recipe=tiny/schedule", "--nproc", "2", "--dry-run")[1]
    assert chain.rstrip().endswith("-m nemovl_train.cli schedule recipe=tiny/schedule")
    pair = ["--nnodes", "2", "--rendezvous", "node1:29500", "--max-restarts", "3"]
    shared = run(capsys, "launch", "torchrun", STAGE, "--nproc", "2", "--dry-run", *pair)[1]
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 --rdzv-id=tiny-stage1_sft_16k" in shared
    assert "--max-restarts=3" in shared
    started = []
    monkeypatch.setattr("launch.torchrun.run_node", lambda job, program, **options: started.append(job) or 75)
    assert run(capsys, "launch", "torchrun", STAGE, "--nproc", "1")[0] == ExitCode.REQUEUE
    assert started[0].nproc == 1


def test_plan_prints_tables_or_one_document(capsys):
    stage = "recipe=nano_12b_v2_vl/stage1_sft_16k"
    code, out, _ = run(capsys, "plan", stage, "cluster=h100_x8")
    assert code == ExitCode.OK
    for part in ("8 x H100 80 GB (1 node)", "13.18B", "53,644 steps", "GiB of 79.6", "MFU", " left"):
        assert part in out, part
    tight = run(capsys, "plan", stage, "cluster=h100_x4", "recompute.language=none")[1]
    for part in ("warnings", "set recompute.language=full recompute.vision=full"):
        assert part in tight, part
    one = json.loads(run(capsys, "plan", stage, "--json", "cluster=h100_x8")[1])
    assert one["layout"]["tp"] == 8
    ranked = json.loads(run(capsys, "plan", stage, "cluster=h100_x8", "--json", "--search")[1])
    assert len(ranked) > 3
    assert run(capsys, "plan", stage, "cluster=h100_x8", "--search")[1].count("TP ") >= len(ranked)
    chain = json.loads(run(capsys, "plan", "recipe=nano_12b_v2_vl/schedule", "--json")[1])
    assert len(chain["stages"]) == 5
    assert chain["total"]["gpu_hours"] == pytest.approx(sum(s["time"]["gpu_hours"] for s in chain["stages"]), rel=1e-3)
    assert "GPU-hours" in run(capsys, "plan", "recipe=nano_12b_v2_vl/schedule")[1]
    assert "tp2_cp2_32k" in run(capsys, "plan", "--calibration")[1]
    assert len(json.loads(run(capsys, "plan", "--calibration", "--json")[1])) == 11
    assert "usage: nemovl plan" in run(capsys, "plan", stage, "--serch")[2]
    assert "gpus: 8" in run(capsys, "plan", stage, "cluster=h100_x8", "--cfg", "job", "-p", "cluster")[1]
    assert not os.listdir(".")
    # Hydra makes the folder of a sweep before its jobs.
    sweep = run(capsys, "plan", "-m", stage, "cluster=h100_x8,h100_x64")[1]
    assert [name in sweep for name in ("on 8 x H100", "on 64 x H100")] == [True, True]


def test_doctor_reports_one_document(capsys):
    code, out, _ = run(capsys, "doctor", "--json", "--folder", "somewhere/new")
    report = json.loads(out)
    assert code == (ExitCode.OK if report["ok"] else ExitCode.FAILED)
    assert {"python", "torch", "accelerator", "free memory", "open files", "run folder"} <= {
        c["name"] for c in report["checks"]
    }
    assert not os.listdir(".")


def test_errors_become_exit_codes(capsys):
    def fail(error: BaseException):
        raise error

    assert guarded(lambda: fail(UserError("what to do"))) == ExitCode.USAGE
    assert capsys.readouterr().err == "error: what to do\n"
    assert guarded(lambda: fail(RuntimeError("bug"))) == ExitCode.FAILED
    assert "Traceback" in capsys.readouterr().err
    assert guarded(lambda: fail(KeyboardInterrupt())) == ExitCode.INTERRUPTED
    assert [int(code) for code in ExitCode] == [0, 1, 2, 75, 130]
