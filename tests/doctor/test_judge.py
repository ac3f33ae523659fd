"""Which nodes are bad, from what nodes say, and reading what nvidia-smi says."""

import errno
import fcntl
import json
import threading
from dataclasses import asdict, replace

import pytest

from launch.site import read_excluded
from nemovl_train.doctor.exclude import add_excluded
from nemovl_train.doctor.facts import Gpu, NodeFacts, collect_facts, parse_gpus, parse_links, write_rate
from nemovl_train.doctor.judge import as_document, as_text, judge
from nemovl_train.doctor.preflight import neighbour_pairs, parse_facts

H100 = "NVIDIA H100 80GB HBM3"
GOOD = NodeFacts(
    node="node0",
    versions={"torch": "2.11.0", "triton": "3.6.0"},
    gpus=[Gpu(name=H100, driver="570.86.15", memory_mib=81559, ecc_errors=0)] * 8,
    links={"NVLink": 28},
    open_files=65536,
    shared_memory_bytes=64 * 2**30,
    write_rate=2e9,
    all_reduce_rate=350e9,
    pair_rate=90e9,
)
NODES = [replace(GOOD, node=f"node{number}") for number in range(5)]
TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPIX\t0-47\t0
GPU1\tNV18\t X \tNV18\tNV18\tNODE\t0-47\t0
GPU2\tNV18\tNV18\t X \tSYS\tSYS\t48-95\t1
GPU3\tNV18\tNV18\tSYS\t X \tSYS\t48-95\t1
NIC0\tPIX\tNODE\tSYS\tSYS\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_equal_nodes_are_good_and_rates_may_vary():
    assert judge(NODES) == {}
    assert judge([replace(node, write_rate=(0.7 + 0.15 * i) * 2e9) for i, node in enumerate(NODES)]) == {}
    assert judge([GOOD]) == {}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"versions": {"torch": "2.10.0", "triton": "3.6.0"}}, "torch: 2.10.0, other nodes have 2.11.0"),
        ({"gpus": GOOD.gpus[:7]}, f"GPUs: 7 x {H100}, other nodes have 8 x {H100}"),
        ({"gpus": [replace(GOOD.gpus[0], driver="550.1"), *GOOD.gpus[1:]]}, "driver: 550.1, 570.86.15, other"),
        ({"gpus": [replace(GOOD.gpus[0], ecc_errors=3), *GOOD.gpus[1:]]}, "3 uncorrected memory errors"),
        ({"links": {"NVLink": 27, "SYS": 1}}, "pairs of GPUs without NVLink: 1 over SYS"),
        ({"open_files": 1024}, "1024 open files at most; set ulimit -n 4096"),
        ({"shared_memory_bytes": 64 * 2**20}, "shared memory has 0.1 GiB"),
        ({"clock_offset": -42.0}, "its clock is off by -42.0 s"),
        ({"write_rate": 0.5e9}, "writing to the run folder: 0.50 GB/s, the median is 2.00"),
        ({"all_reduce_rate": 150e9}, "all-reduce inside the node: 150.00 GB/s"),
        ({"pair_rate": 9e9}, "all-reduce with its neighbours: 9.00 GB/s"),
        ({"problems": ["nvidia-smi does not answer: x"]}, "nvidia-smi does not answer"),
    ],
)
def test_a_bad_node_is_named_with_its_reason(change, part):
    facts = [*NODES[:3], replace(NODES[3], **change), NODES[4]]
    bad = judge(facts)
    assert set(bad) == {"node3"}
    assert any(part in reason for reason in bad["node3"]), bad
    assert "bad node node3" in as_text(facts, bad)
    assert json.loads(json.dumps(as_document(facts, bad)))["ok"] is False


def test_a_silent_node_is_named():
    assert judge(NODES[:3], ["node9"]) == {"node9": ["did not answer in time"]}


def test_two_nodes_cannot_tell_which_of_them_is_slow():
    assert judge([NODES[0], replace(NODES[1], write_rate=1e8)]) == {}


def test_reading_nvidia_smi():
    assert parse_links(TOPOLOGY) == {"NVLink": 5, "SYS": 1}
    with pytest.raises(ValueError, match="XYZ"):
        parse_links(TOPOLOGY.replace("NV18", "XYZ"))
    text = f"0, {H100}, 570.86.15, 81559, 0\n1, {H100}, 570.86.15, 81559, [N/A]\n"
    assert parse_gpus(text) == GOOD.gpus[:2]
    with pytest.raises(ValueError):
        parse_gpus("No devices were found")


def test_facts_of_this_machine(tmp_path):
    facts = collect_facts(tmp_path / "run", write_bytes=2**24)
    assert facts.open_files > 0
    assert facts.versions["torch"].startswith("2.")
    assert facts.write_rate > 0 or facts.problems
    assert list((tmp_path / "run").iterdir()) == []
    assert parse_facts(json.dumps(asdict(facts)).encode()) == facts


def test_a_folder_that_cannot_be_written_is_a_problem_of_the_node(tmp_path):
    (tmp_path / "file").write_text("")
    facts = collect_facts(tmp_path / "file" / "run")
    assert any("cannot write to" in problem for problem in facts.problems)
    assert judge([facts])
    with pytest.raises(OSError):
        write_rate(tmp_path / "file" / "run", "x", 2**24)


def test_every_node_meets_both_neighbours():
    for nodes in range(1, 9):
        met = {node: set() for node in range(nodes)}
        for pairs in neighbour_pairs(nodes):
            assert len({node for pair in pairs for node in pair}) == 2 * len(pairs), "one pair at a time"
            for a, b in pairs:
                met[a].add(b)
                met[b].add(a)
        assert met == {n: {m for m in (n - 1, n + 1) if 0 <= m < nodes} for n in range(nodes)}


def test_bad_nodes_are_added_once(tmp_path):
    path = tmp_path / "lists" / "bad.txt"
    add_excluded(path, {"node3": ["slow"]})
    add_excluded(path, {"node3": ["slow"], "node4": ["gone"]})
    lines = path.read_text().splitlines()
    assert [line.split("  #")[0] for line in lines] == ["node3", "node4"]
    assert lines[1].endswith("gone")


def test_a_list_that_ends_in_half_a_line_keeps_its_names(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("node7")
    add_excluded(path, {"node9": ["slow"]})
    assert read_excluded(path) == ["node7", "node9"]
    add_excluded(path, {"node7": ["slow"]})
    assert len(path.read_text().splitlines()) == 2


def test_runs_that_share_a_list_take_turns(tmp_path):
    """The other run adds the same node while this one waits."""
    path = tmp_path / "bad.txt"
    added = []
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        mine = threading.Thread(target=lambda: added.append(add_excluded(path, {"node3": ["slow"]})))
        mine.start()
        mine.join(0.3)
        assert mine.is_alive(), "it waits for the other run"
        other.write("node3  # seen by the other run\n")
    mine.join(10)
    assert added == [[]]
    assert path.read_text() == "node3  # seen by the other run\n"


def test_a_file_system_without_locks_takes_names_all_the_same(tmp_path, monkeypatch, caplog):
    def refused(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert add_excluded(tmp_path / "bad.txt", {"node3": ["slow"]}) == ["node3"]
    assert "cannot be locked: No locks available" in caplog.text


def test_a_machine_with_a_dead_link_fails(monkeypatch):
    from nemovl_train.doctor import machine

    def found(links):
        monkeypatch.setattr(machine, "ask_links", lambda: links)
        return machine._links()

    assert found({"NVLink": 28}).status == "ok"
    assert found({"PHB": 6}).status == "ok"  # a machine without NVLink
    assert found({"NVLink": 27, "SYS": 1}).status == "fail"
    monkeypatch.setattr(machine, "open_file_limit", lambda: 256)
    assert (machine._open_files().status, machine._open_files().hint) == ("warn", "ulimit -n 4096")
