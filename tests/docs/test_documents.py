"""Commands, names, options and examples in the documents are right."""

import io
import re
import shlex
from pathlib import Path

import pytest

from nemovl_train import cli
from nemovl_train.config.app import run_app
from nemovl_train.config.recipes import list_recipes

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
MADE_BY_RUNS = ("runs/", "data/", "my_stage.yaml", ".venv/", "config.yaml", "verification.md")
OPTIONS = (ROOT / "tests/config/golden/options.txt").read_text()
SECTIONS = (
    "run|adapter|model|data|parallel|precision|optim|trainer|checkpoint|evaluation|logging|parts|cluster|workload"
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    lines = "\n".join(blocks(path.read_text(), "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Runs what is quick and harmless, composes or parses the rest."""
    if words[0] in ("train", "schedule"):
        assert run_app("run" if words[0] == "train" else "schedule", words[1:], lambda config: 0) == 0
    elif words[0] in ("recipes", "plan") or "--dry-run" in words:
        assert cli.main(words) == 0
    else:
        cli.build_parser(words[0]).parse_args(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nemovl_commands_are_understood(path, tmp_path, monkeypatch, capsys):
    # In the order of the document: one command copies the recipe that a later one runs.
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        if words[0].endswith("nemovl"):
            parse(words[1:])


def test_the_pages_hold_commands():
    verbs = [words[1] for path in DOCUMENTS for words in commands(path) if words[0].endswith("nemovl")]
    expected = {"train", "schedule", "plan", "recipes", "launch", "report", "generate", "eval", "convert", "data"}
    assert expected <= set(verbs)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set()
    for path in DOCUMENTS:
        mentioned |= set(
            re.findall(r"\bmake (demo|check|help|test-all|test|[a-z-]+)(?=`|\s+#|$)", path.read_text(), re.M)
        )
    assert {"demo", "test"} <= mentioned <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_recipes_exist(path: Path):
    for name in re.findall(r"`([\w./-]+)`", path.read_text()):
        if name.startswith((*MADE_BY_RUNS, "/think", "/no_think")):
            continue
        if name.startswith(("tiny/", "finetune/", "nano_12b_v2_vl/", "nano_8b_v1_vl/")):
            assert name in list_recipes(), name
        elif "/" in name or name.endswith((".md", ".py", ".yaml", ".toml")):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(path: Path):
    for key in re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+?)(?:=[^`]*)?`", path.read_text()):
        assert f" {key}: " in OPTIONS or key.endswith(".json"), key


def test_every_page_is_in_the_index():
    text = (ROOT / "docs/index.md").read_text()
    assert all(f"]({path.name})" in text for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")


def test_six_files_to_open():
    names = re.findall(r"^\d\. `([\w/.]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(names) == 6
    assert all((ROOT / name).is_file() for name in names)


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    """In a folder that has what they name: an exported model, a picture, a video."""
    import av
    import numpy as np
    import small_vlm

    from nemovl_train.convert.hf_export import export_canonical

    monkeypatch.chdir(tmp_path)
    tokenizer = small_vlm.write_tokenizer(tmp_path / "tokenizer")
    weights = small_vlm.weights().items()
    (tmp_path / "runs/tiny").mkdir(parents=True)
    export_canonical(weights, small_vlm.CONFIG, Path("runs/tiny/hf"), kind="vlm", tokenizer=tokenizer, card={})
    Path("page.png").write_bytes(small_vlm.picture(1))
    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for shade in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * shade, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    Path("clip.mp4").write_bytes(clip.getvalue())
    examples = [code for path in DOCUMENTS for code in blocks(path.read_text(), "python")]
    assert len(examples) >= 2
    for code in examples:
        exec(compile(code, "example", "exec"), {})
    assert (tmp_path / "my_data/train.parquet").is_file()
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_every_stage_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in list_recipes() if name.startswith("tiny/stage"))
