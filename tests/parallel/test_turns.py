"""Nodes take turns: threads stand for ranks, with a barrier of their own."""

import threading
import time
from types import SimpleNamespace

import pytest

from nemovl_train.parallel import turns


def run(monkeypatch, *, ranks, per_node, at_once, fails=None):
    """Intervals at work of every rank, and the errors that ranks got."""
    meeting, here = threading.Barrier(ranks, timeout=10), threading.local()
    world = SimpleNamespace(get_world_size=lambda: ranks, get_rank=lambda: here.rank, barrier=meeting.wait)
    monkeypatch.setattr(turns, "dist", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    intervals, errors = {}, {}

    def action():
        began = time.monotonic()
        time.sleep(0.05)
        intervals[here.rank] = (began, time.monotonic())
        if here.rank == fails:
            raise ValueError("damaged")
        return here.rank

    def rank(number):
        here.rank = number
        try:
            assert turns.in_turns(action, at_once) == number
        except ValueError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return intervals, errors


def overlap(a, b):
    return a[0] < b[1] and b[0] < a[1]


def test_a_node_waits_until_those_before_it_have_read(monkeypatch):
    found, errors = run(monkeypatch, ranks=6, per_node=2, at_once=1)
    assert not errors
    for a in range(6):
        for b in range(a + 1, 6):
            assert overlap(found[a], found[b]) == (a // 2 == b // 2), (a, b)


@pytest.mark.parametrize("at_once", [0, 3, 8])
def test_without_a_limit_all_read_together(monkeypatch, at_once):
    found, _ = run(monkeypatch, ranks=3, per_node=1, at_once=at_once)
    assert all(overlap(found[0], found[rank]) for rank in (1, 2))


def test_a_failure_is_its_own_ranks_and_the_others_have_their_turns(monkeypatch):
    found, errors = run(monkeypatch, ranks=3, per_node=1, at_once=1, fails=1)
    assert errors == {1: "damaged"}
    assert set(found) == {0, 1, 2}
