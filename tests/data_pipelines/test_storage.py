"""Datasets behind a URL, and storage that stalls: a real web server and a real pipe that nobody writes to."""

import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipelines.config import ReadConfig, SourceConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.loader import PackStream
from data_pipelines.storage import PatientReader, Storage

IMPATIENT = ReadConfig(timeout_s=0.3, attempts=2)


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; can stall, break off or answer with errors."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.trouble = folder, [], lambda name, first: None
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.removeprefix("/data/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        file = self.server.folder / name
        first = int(asked[1]) if asked else None
        trouble = self.server.trouble(name, first) if body else None
        if trouble == "stall":
            self.server.released.wait(20)
        if trouble == "drop":
            self.close_connection = True
            return
        if not file.is_file() or trouble == "error":
            self.send_response(404 if not file.is_file() else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        size = len(data)
        if asked:
            data = data[first : int(asked[2]) + 1 if asked[2] else None]
        if body:
            self.server.requests.append((name, first, len(data)))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if trouble == "cut" else data)
            self.close_connection = trouble == "cut"

    def log_message(self, *_):
        pass


@pytest.fixture
def server(mixed_folder):
    running = Server(mixed_folder)
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


def digests(config, count=6):
    stream = PackStream(config, tokens_per_tile=4, seed=3, global_batch=1)
    packs = [next(stream)[0] for _ in range(count)]
    stream.close()
    return [pack.digest() for pack in packs], packs


def at(config, url, **read):
    options = {**config.__dict__, "sources": {"mixed": SourceConfig(path=url)}}
    return type(config)(**{**options, "read": ReadConfig(**read)})


@pytest.fixture
def config(mixed_folder, configure):
    return configure({"mixed": mixed_folder})


def test_a_url_gives_the_packs_of_the_folder_by_ranged_reads(config, server, mixed_folder):
    assert digests(at(config, server.url))[0] == digests(config)[0]
    shard = (mixed_folder / "train-00000.tar").stat().st_size
    reads = [(first, size) for name, first, size in server.requests if name.endswith(".tar")]
    assert reads
    assert all(first is not None and size < shard / 4 for first, size in reads)


def test_workers_read_from_a_url(config, server):
    remote = at(config, server.url)
    working = type(remote)(**{**remote.__dict__, "num_workers": 1})
    assert digests(working, 2)[0] == digests(config, 2)[0]


@pytest.mark.parametrize("trouble", ["stall", "error", "cut", "drop"])
@pytest.mark.parametrize("ending", [".tar", ".parquet", ".npy", "dataset.json"])
def test_a_read_that_stalls_or_fails_once_is_tried_again(config, server, trouble, ending):
    asked = []

    def once(name, first):
        asked.append(name.endswith(ending))
        return trouble if asked[-1] and sum(asked) == 1 else None

    server.trouble = once
    assert digests(at(config, server.url, timeout_s=0.5), 2)[0] == digests(config, 2)[0]
    assert sum(asked) >= 2


@pytest.mark.parametrize("trouble", ["stall", "error", "cut", "drop"])
def test_manifest_rows_that_stall_or_fail_once_are_read_again(server, mixed_folder, monkeypatch, trouble):
    dataset = Dataset.open(server.url, "train", read=ReadConfig(timeout_s=0.5))
    monkeypatch.setattr(dataset._storage._fs, "block_size", 64)  # or the whole file is fetched when it is opened
    dataset._place(0)
    asked = []
    server.trouble = lambda name, first: asked.append(name) or (trouble if len(asked) == 1 else None)
    assert dataset.row(5) == Dataset.open(mixed_folder, "train").row(5)
    assert set(asked) == {"train.parquet"}
    assert len(asked) >= 2


def test_a_sample_whose_storage_never_answers_is_quarantined_alone(config, server, mixed_folder):
    good = digests(config)[1]
    dataset = Dataset.open(mixed_folder, "train")
    lost = good[2].sample_keys[0]
    row = next(i for i in range(len(dataset)) if dataset.key(i) == lost)
    place = dataset._range(dataset.row(row)).first
    server.trouble = lambda name, first: "stall" if name.endswith(".tar") and first == place else None
    bad = digests(at(config, server.url, timeout_s=0.4, attempts=2))[1]
    for a, b in zip(good, bad, strict=True):
        assert b.sample_keys == tuple(key for key in a.sample_keys if key != lost)
        assert b.stats.get("quarantined_storage", 0) == (lost in a.sample_keys)


def test_a_local_file_that_stalls_is_given_up(tmp_path, write, mixed_samples):
    """Opening a pipe for reading waits until somebody writes, as a dead network mount does."""
    folder = write(tmp_path / "d", mixed_samples(8), shard_mib=0.001)
    dataset = Dataset.open(folder, "train", read=IMPATIENT)
    stalled = dataset.shard_name(dataset.row(0)["shard"])
    lying_there = [i for i in range(8) if dataset.row(i)["shard"] == dataset.row(0)["shard"]]
    (folder / stalled).unlink()
    os.mkfifo(folder / stalled)
    read = dataset.read_many(range(8))
    assert [i for i, sample in enumerate(read) if isinstance(sample, DataError)] == lying_there
    assert f"sample 'text-0' in {folder}/{stalled} cannot be read: no answer within 0.3 s" in str(read[0])
    others = range(len(lying_there), 8)
    assert [read[i].record["id"] for i in others] == [dataset.key(i) for i in others]


def test_a_missing_shard_is_quarantined_by_sample(tmp_path, write, mixed_samples):
    folder = write(tmp_path / "d", mixed_samples(8), shard_mib=0.001)
    dataset = Dataset.open(folder, "train", read=ReadConfig(attempts=1))
    lost = [i for i in range(8) if dataset.row(i)["shard"] == dataset.row(3)["shard"]]
    (folder / dataset.shard_name(dataset.row(3)["shard"])).unlink()
    read = dataset.read_many(range(8))
    assert [i for i, sample in enumerate(read) if isinstance(sample, DataError)] == lost
    assert "FileNotFoundError" in str(read[3])


def test_patience_ends(tmp_path):
    reader = PatientReader(ReadConfig(timeout_s=0.05, attempts=2), Storage(str(tmp_path)))
    forever = threading.Event()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"the file cannot be read: no answer within 0.05 s \(attempts: 2\)"):
        reader.call("the file", forever.wait)
    assert time.monotonic() - began < 2
    assert reader.call("the file", lambda: 7) == 7
    forever.set()


def test_a_thread_that_was_given_up_ends_with_its_read(tmp_path):
    reader = PatientReader(ReadConfig(timeout_s=0.05, attempts=2), Storage(str(tmp_path)))
    released, threads = threading.Event(), []

    def stall():
        threads.append(threading.current_thread())
        released.wait()

    with pytest.raises(DataError):
        reader.call("the file", stall)
    released.set()
    for thread in threads:
        thread.join(2)
    assert [thread.is_alive() for thread in threads] == [False, False]


def test_a_file_that_opens_after_it_was_given_up_is_not_used(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    storage = Storage(str(tmp_path))
    reader = PatientReader(ReadConfig(timeout_s=0.1, attempts=1), storage)
    threads = []

    def read():
        threads.append(threading.current_thread())
        storage.read_range("pipe", 0, 1)

    with pytest.raises(DataError, match="no answer"):
        reader.call("the pipe", read)
    os.close(os.open(tmp_path / "pipe", os.O_WRONLY))  # the reader's open returns
    threads[0].join(2)
    assert not storage._files


def test_bugs_in_a_read_are_not_called_storage(tmp_path):
    reader = PatientReader(IMPATIENT, Storage(str(tmp_path)))
    with pytest.raises(ZeroDivisionError):
        reader.call("the file", lambda: 1 // 0)


def test_urls_that_cannot_be_read_are_refused(server):
    with pytest.raises(DataError, match=r"nosuch://bucket/data: .*give a local folder, or install"):
        Dataset.open("nosuch://bucket/data", "train")
    with pytest.raises(DataError, match=r"no dataset at http://.*/elsewhere: .*dataset.json cannot be read"):
        Dataset.open(server.url.replace("data", "elsewhere"), "train")
    server.trouble = lambda name, first: "error"
    with pytest.raises(DataError, match=r"no dataset at .*503"):
        Dataset.open(server.url, "train")
