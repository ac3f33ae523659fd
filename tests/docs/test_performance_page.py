"""The measured tables of docs/performance.md are what the result files say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_result_files_say():
    module = table()
    page = module.PAGE.read_text()
    assert page == module.with_tables(page, module.tables(module.result_files())), "run python benchmarks/table.py"


def test_a_changed_number_changes_the_page(tmp_path):
    module = table()
    stored = (ROOT / "benchmarks/results/2026-11-25_train_units_1xh100.json").read_text()
    assert "49665.03167942613" in stored
    path = tmp_path / "2026-11-25_train_units_1xh100.json"
    path.write_text(stored.replace("49665.03167942613", "1234.0"))
    assert "| 1,234 | 51.0% | 45.2 |" in module.tables([path])
