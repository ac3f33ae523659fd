"""What is in the wheel, and that it works without the checkout."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nemovl_train.config.recipes import list_groups, list_recipes

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOTS = ("data_pipelines", "launch", "nemovl_train")


def test_every_package_is_listed():
    found = {".".join(path.relative_to(ROOT).parent.parts) for top in ROOTS for path in (ROOT / top).rglob("*.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed - {"nemovl_train._recipes", "nemovl_train._configs"} == found, "update [tool.setuptools] packages"


def test_exact_pins():
    pins = {"torch==2.11.0", "megatron-core==0.19.2", "hydra-core==1.3.8", "webdataset==1.0.2"}
    assert pins <= set(PROJECT["project"]["dependencies"])
    assert set(PROJECT["project"]["optional-dependencies"]) == {"gpu", "deepspeed", "wandb", "tensorboard", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    names = [*ROOTS, "recipes", "configs", "tests", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *[str(ROOT / name) for name in names], str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next((work / "dist").glob("nemovl-*.whl"))


def test_wheel_has_recipes_and_configs_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for recipe in list_recipes():
        assert f"nemovl_train/_recipes/{recipe}.yaml" in names
    for group, options in list_groups().items():
        assert all(f"nemovl_train/_configs/{group}/{option}.yaml" in names for option in options)
    assert {"nemovl_train/_configs/train.yaml", "nemovl_train/_configs/schedule.yaml"} <= set(names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(ROOTS)
    assert not [name for name in names if "test_" in name or name.endswith(".pyc")]
    missing = [
        path for top in ROOTS for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".jinja", ".html", ".css", ".sh") and path.relative_to(ROOT).as_posix() not in names
    ]  # fmt: skip
    assert missing == []


def test_wheel_finds_its_recipes_from_any_folder(wheel: Path, tmp_path: Path):
    """Unpacked rather than installed: the same files, and no installer to wait for."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import nemovl_train, sys; assert '/site/' in nemovl_train.__file__, nemovl_train.__file__\n"
        "from nemovl_train.cli import main\n"
        "sys.exit(main(['schedule', 'recipe=tiny/schedule', '--cfg', 'job', '-p', 'run']))"
    )
    script = tmp_path / "probe.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{code}\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "name: tiny" in done.stdout


@pytest.mark.slow
def test_installed_wheel_runs_its_command(wheel: Path, tmp_path: Path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    # The dependencies of the environment that runs the tests serve: installing them again takes minutes.
    site = next((venv / "lib").glob("python3*")) / "site-packages"
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--force-reinstall"], check=True)
    done = subprocess.run(
        [str(venv / "bin" / "nemovl"), "recipes", "list"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == list_recipes()[0]
