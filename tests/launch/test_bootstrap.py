"""`launch/bootstrap.sh` with stand-ins for the interpreters: what it picks, what it repeats, what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cp", "cut", "dirname", "env", "flock", "ls", "mkdir", "readlink", "rm", "sha256sum", "uname")

WORKING = """#!/usr/bin/env bash
echo "$0 $*" >>"$CALLS"
case "$1 ${2:-}" in
    "-c import sys; print(sys.prefix)") dirname "$(dirname "$0")" ;;
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip") [ "$3" != install ] || exit "${PIP_EXIT:-0}" ;;
    "--version "*) echo "Python 3.12.9" ;;
esac
"""
SHIM = "#!/usr/bin/env bash\necho 'version not selected' >&2\nexit 127\n"


class Machine:
    """A checkout, a PATH and a home of their own."""

    def __init__(self, root: Path) -> None:
        self.checkout, self.bin, self.home = root / "check out", root / "bin", root / "home"
        for folder in (self.checkout / "launch", self.bin, self.home):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "bootstrap.sh", self.checkout / "launch")
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            if found:
                (self.bin / tool).symlink_to(found)
        self.calls = root / "calls"

    def put(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        environment = {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls), **env}
        script = str(self.checkout / "launch" / "bootstrap.sh")
        return subprocess.run([script], env=environment, capture_output=True, text=True)

    def called(self, words: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if words in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_failing_shim_is_passed_over_for_the_real_interpreter(machine: Machine):
    machine.put(machine.bin / "python3.12", SHIM)
    machine.put(machine.bin / "python3", SHIM)
    real = machine.home / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12"
    machine.put(real, WORKING)
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert str(real) in machine.called("-m venv --clear")[0]
    assert len(machine.called("pip install")) == 1
    assert (machine.checkout / ".venv" / "nemovl-complete").is_file()


def test_second_time_does_nothing_and_a_changed_pyproject_installs_again(machine: Machine):
    machine.put(machine.bin / "python3.12", WORKING)
    assert machine.run().returncode == 0
    assert machine.run().returncode == 0
    assert machine.calls.read_text() == ""
    (machine.checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert machine.run().returncode == 0
    assert (len(machine.called("-m venv")), len(machine.called("pip install"))) == (0, 1)


def test_an_interrupted_install_is_continued(machine: Machine):
    machine.put(machine.bin / "python3.12", WORKING)
    failed = machine.run(PIP_EXIT="1")
    assert failed.returncode == 2
    assert "The same command continues it" in failed.stderr
    kept = machine.checkout / ".venv" / "lib-already-downloaded"
    kept.touch()
    assert machine.run().returncode == 0
    assert machine.called("-m venv") == []
    assert kept.exists()


def test_a_broken_environment_is_made_again(machine: Machine):
    machine.put(machine.bin / "python3", WORKING)
    machine.put(machine.checkout / ".venv" / "bin" / "python", SHIM)
    assert machine.run().returncode == 0
    assert len(machine.called("-m venv --clear")) == 1


def test_no_python_says_what_to_install(machine: Machine):
    machine.put(machine.bin / "python3.12", SHIM)
    done = machine.run()
    assert done.returncode == 2
    assert "no working Python 3.12" in done.stderr
    assert "uv python install 3.12" in done.stderr
    assert not (machine.checkout / ".venv").exists()


def test_uv_is_asked_last(machine: Machine):
    real = machine.home / "uv" / "python3.12"
    machine.put(real, WORKING)
    machine.put(machine.bin / "uv", f"#!/usr/bin/env bash\necho '{real}'\n")
    assert machine.run().returncode == 0
    assert str(real) in machine.called("-m venv")[0]


def test_uv_downloads_only_where_nothing_else_was_found(machine: Machine):
    real = machine.home / "uv" / "python3.12"
    uv = f"""#!/usr/bin/env bash
echo "uv $*" >>"$CALLS"
[ "$2" != install ] || cp '{machine.home}/download' '{real}'
[ "$2" != find ] || {{ [ -e '{real}' ] && echo '{real}'; }}
"""
    machine.put(machine.bin / "uv", uv)
    machine.put(machine.home / "download", WORKING)
    real.parent.mkdir()
    machine.put(machine.bin / "python3.12", WORKING)
    assert machine.run().returncode == 0
    assert machine.called("uv ") == []
    shutil.rmtree(machine.checkout / ".venv")
    (machine.bin / "python3.12").unlink()
    assert machine.run().returncode == 0
    assert len(machine.called("uv python install 3.12")) == 1
    assert str(real) in machine.called("-m venv")[0]


def test_a_named_interpreter_is_used(machine: Machine):
    named = machine.home / "my python"
    machine.put(named, WORKING)
    machine.put(machine.bin / "python3.12", WORKING)
    assert machine.run(NEMOVL_PYTHON=str(named)).returncode == 0
    assert str(named) in machine.called("-m venv")[0]


def test_other_platforms_are_refused(machine: Machine):
    (machine.bin / "uname").unlink()
    machine.put(machine.bin / "uname", "#!/usr/bin/env bash\necho Darwin\n")
    done = machine.run()
    assert done.returncode == 2
    assert "Linux x86-64" in done.stderr


def test_the_makefile_has_the_documented_targets():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["check", "demo", "help", "test", "test-all"]


def test_an_environment_behind_a_link_is_used_and_never_emptied(machine: Machine):
    """`venv --clear` follows a link: it would empty the environment of another checkout."""
    machine.put(machine.bin / "python3.12", WORKING)
    other = machine.home / "other"
    machine.put(other / "bin" / "python", WORKING)
    (machine.checkout / ".venv").symlink_to(other)
    done = machine.run()
    assert (done.returncode, machine.called("-m venv"), machine.called("-m pip")) == (0, [], [])
    machine.put(other / "bin" / "python", SHIM)
    done = machine.run()
    assert done.returncode == 2
    assert f"is a link to {other}" in done.stderr
    assert (other / "bin" / "python").is_file()
