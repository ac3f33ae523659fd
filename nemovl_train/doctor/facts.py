"""What one node can say about itself, without the others: versions, GPUs, links, limits, how fast it writes."""

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

VERSIONS = ("torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "triton")
WRITE_BYTES = 256 * 2**20
_CHUNK = 8 * 2**20
_GPU_QUERY = "index,name,driver_version,memory.total,ecc.errors.uncorrected.volatile.total"
_LINK = re.compile(r"NV\d+|PIX|PXB|PHB|NODE|SYS|X")
_QUERY_SECONDS = 60


@dataclass(kw_only=True)
class Gpu:
    """One GPU as its driver describes it.

    Attributes:
        name: Product name.
        driver: Version of the driver.
        memory_mib: Memory of the device.
        ecc_errors: Uncorrected memory errors since the driver was loaded; 0 where they are not counted.
    """

    name: str
    driver: str
    memory_mib: int
    ecc_errors: int


@dataclass(kw_only=True)
class NodeFacts:
    """One node.

    Attributes:
        node: Its name, as the scheduler uses it.
        versions: Of the packages that must agree.
        gpus: Its GPUs.
        links: Pairs of GPUs by the kind of link between them: `NVLink`, or the path that data takes instead.
        open_files: Files that a process may have open.
        shared_memory_bytes: Size of `/dev/shm`, through which data workers hand packs over.
        clock_offset: Seconds by which its clock is ahead of the first node's.
        write_rate: Bytes a second to the run folder.
        all_reduce_rate: Bytes a second between its own processes; None where it has one.
        pair_rate: Bytes a second with the better of its two neighbours; None on a single node.
        problems: What could not be found out.
    """

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    links: dict[str, int] = field(default_factory=dict)
    open_files: int = 0
    shared_memory_bytes: int = 0
    clock_offset: float = 0.0
    write_rate: float = 0.0
    all_reduce_rate: float | None = None
    pair_rate: float | None = None
    problems: list[str] = field(default_factory=list)


def node_name() -> str:
    """The name that goes into an exclude list."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def collect_facts(folder: Path, *, write_bytes: int = WRITE_BYTES) -> NodeFacts:
    """Ask this node; what cannot be found out becomes a problem, not an error.

    Args:
        folder: Where the run will write.
        write_bytes: Size of the file that is written there and removed.
    """
    facts = NodeFacts(node=node_name(), versions=_versions())
    facts.open_files, facts.shared_memory_bytes = open_file_limit(), shared_memory_bytes()
    if shutil.which("nvidia-smi"):
        try:
            facts.gpus = parse_gpus(_ask("nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"))
            facts.links = ask_links()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            facts.problems.append(f"nvidia-smi does not answer: {error}")
    try:
        facts.write_rate = write_rate(folder, facts.node, write_bytes)
    except OSError as error:
        facts.problems.append(f"cannot write to {folder}: {error.strerror or error}")
    return facts


def open_file_limit() -> int:
    """Files that this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def shared_memory_bytes() -> int:
    """Size of the file system through which processes share memory; 0 where there is none."""
    shared = Path("/dev/shm")  # noqa: S108  looked at, not written
    return shutil.disk_usage(shared).total if shared.is_dir() else 0


def ask_links() -> dict[str, int]:
    """Pairs of this machine's GPUs by link, as `parse_links`."""
    return parse_links(_ask("nvidia-smi", "topo", "-m"))


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from the comma-separated answer of nvidia-smi.

    Raises:
        ValueError: The answer has another form.
    """
    found = []
    for line in text.strip().splitlines():
        index, name, driver, memory, errors = (word.strip() for word in line.split(","))
        int(index)
        counted = int(errors) if errors.isdigit() else 0  # `[N/A]` on GPUs without error correction
        found.append(Gpu(name=name, driver=driver, memory_mib=int(memory), ecc_errors=counted))
    return found


def parse_links(text: str) -> dict[str, int]:
    """Pairs of GPUs by link, from the matrix that `nvidia-smi topo -m` prints.

    `NV18` is a bond of 18 NVLinks; `SYS`, `NODE`, `PHB`, `PXB` and `PIX` name the path of PCIe where there is none.
    """
    found: dict[str, int] = {}
    # A terminal gets the head of the matrix underlined.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    count = len(rows)
    for number, row in enumerate(rows):
        for cell in row[1 + number + 1 : 1 + count]:
            if not _LINK.fullmatch(cell):
                raise ValueError(f"link {cell!r} is not known")
            kind = "NVLink" if cell.startswith("NV") else cell
            found[kind] = found.get(kind, 0) + 1
    return found


def write_rate(folder: Path, name: str, size: int) -> float:
    """Bytes a second of one large file, until it is on the disk; the file is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".doctor.{name}.{os.getpid()}"
    chunk = os.urandom(_CHUNK)
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // _CHUNK):
                file.write(chunk)
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_QUERY_SECONDS).stdout
