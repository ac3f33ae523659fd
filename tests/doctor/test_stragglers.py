"""Slow nodes found in a run's own metrics, and what is not taken for one."""

import json

import pytest

from nemovl_train.doctor import stragglers
from nemovl_train.doctor.stragglers import main

HOSTS = [f"node{rank // 2}" for rank in range(8)]


def write_run(folder, *, slow=None, steps=20, hosts=HOSTS, factor=1.4, start=0):
    """Two ranks a node, half a second each; packs make single ranks up to a fifth slower now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(1, steps + 1):
        busy = [0.5 * (1.2 if (rank + step) % 5 == 0 else 1.0) for rank in range(len(hosts))]
        if slow is not None:
            busy[slow] *= factor
        rows.append({"step": step, "ranks": {"busy_seconds": busy, "data_seconds": [], "memory_bytes": []}})
        rows.append({"step": step})  # not every step asks all ranks
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{"event": "start", "step": 0, "hosts": ["gone"] * 8}, {"event": "start", "step": start, "hosts": hosts}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_node_that_is_slow_step_after_step_is_named_and_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run/stage", slow=5).parent
    exclude = tmp_path / "bad.txt"
    exclude.write_text("node9  # seen before\n")
    assert main([str(run), "--exclude-file", str(exclude), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["node"], found["steps"]) == ("node2", 20)
    assert 1.2 < found["ratio"] < 1.5
    lines = exclude.read_text().splitlines()
    assert lines[0] == "node9  # seen before"
    assert lines[1].startswith("node2  # ")
    assert "times as long at work" in lines[1]
    main([str(run), "--exclude-file", str(exclude)])
    assert len(exclude.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "how",
    [
        {},  # heavy packs go round
        {"slow": 5, "factor": 1.05},
        {"slow": 5, "steps": 9},
        {"slow": 5, "start": 12},  # eight steps since the last start, on other nodes than before
        {"slow": 1, "hosts": ["node0"] * 4 + ["node1"] * 4},  # which of two is slow, and which is quick?
    ],
)
def test_what_says_too_little_names_nobody(tmp_path, capsys, how):
    write_run(tmp_path, **how)
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_where_many_are_slow_the_cause_is_no_node():
    hosts = [f"node{rank}" for rank in range(10)]
    busy = [1.0] * 7 + [1.5] * 3
    assert stragglers._judge([busy] * 20, hosts) == []
    one = stragglers._judge([[1.0] * 9 + [1.5]] * 20, hosts)
    assert [slow.node for slow in one] == ["node9"]


def test_a_run_without_names_or_metrics_is_no_error(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 0
    write_run(tmp_path, slow=5)
    (tmp_path / "events.jsonl").unlink()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("no node is slower") == 2
