"""A file read from front to back off a disk is brought into memory ahead of its reader; one read otherwise is not."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from finf_fast import _C
from finf_fast.corpus import delivery
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.reading import MAP, MAP_WHAT_IS_THERE, READ, Reading, adopting
from finf_fast.records import DamagedFile

MIB = 1 << 20
FILE = 160 * MIB
AHEAD = 31 * MIB  # less than the thread runs ahead, more than a system usually does by itself
BEYOND = 96 * MIB  # more than both together


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ahead") / "x"
    write_zeros(path, FILE)
    return path


@pytest.fixture
def path(written) -> Path:
    """That of a file of which no page is in memory."""
    evict(written)
    return written


def write_zeros(path: Path, size: int) -> None:
    """Zeros that are on the disk: a hole is in memory as soon as it is asked for."""
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
        file.write(bytes(size % MIB))
        file.flush()
        os.fsync(file.fileno())


def evict(path: Path) -> None:
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("a system that does not say what is in memory")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(50):  # what is being brought in, or lies with another processor, stays the first time
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not pages_in_memory(path).any():
                return
            time.sleep(0.02)
    finally:
        os.close(descriptor)
    pytest.skip("a file system in memory")


def pages_in_memory(path: Path) -> np.ndarray:
    """Asked in a way that, other than a reading, brings nothing in."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        found = np.empty(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        first, out = ctypes.c_void_p(pages.ctypes.data), ctypes.c_void_p(found.ctypes.data)
        assert ctypes.CDLL(None, use_errno=True).mincore(first, ctypes.c_size_t(len(pages)), out) == 0
        del pages
    return found & 1


def in_memory(path: Path, byte: int) -> bool:
    return bool(pages_in_memory(path)[byte // mmap.PAGESIZE])


def opened(path: Path) -> MappedArray:
    """The file, read by a descriptor that the system does not read ahead for: as if the disk were slow."""
    with adopting(Reading("read")):
        file = MappedFile(path)
    os.posix_fadvise(file.opened().descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return MappedArray(file, 0, np.dtype(np.uint8), (file.size,))


def read(array: MappedArray, start: int, count: int = MIB) -> None:
    assert not delivery.as_stored(array, range(start, start + 1), count).any()


def told(array: MappedArray, start: int, count: int = MIB, way: int = READ) -> dict[str, object]:
    """What the compiled reader says of a reading."""
    out = np.empty(count, np.uint8)
    rows = {"starts": 0, "first": start, "step": count, "lengths": 0, "R": 1, "length": count}
    span, rest = (
        {"way": way, "known": array.file.known[0], "begin": start, "end": start + count},
        {"item": 1, "fill": 0, "out": out.ctypes.data},
    )
    answer = array.file.opened().reader.deliver_raw(**span, **rows, threads=1, **rest)
    return dict(zip(("error", "byte", "mapped", "no_trial", "same", "seconds"), answer, strict=True))


def soon(what, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def openings(path: Path) -> int:
    """Descriptors of this process that lead to the file."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(link) and os.readlink(link) == str(path) for link in links)


def test_what_follows_is_brought_in_so_far_and_no_farther(path):
    array = opened(path)
    for start in range(0, 4 * MIB, MIB):
        read(array, start)
    assert soon(lambda: in_memory(path, 4 * MIB + AHEAD))
    assert not in_memory(path, 4 * MIB + BEYOND)
    for start in range(4 * MIB, 64 * MIB, MIB):
        read(array, start)
    assert soon(lambda: in_memory(path, 64 * MIB + AHEAD))


def test_the_disk_goes_on_after_a_reading_longer_than_that(path):
    array = opened(path)
    for start in (0, 48 * MIB):
        read(array, start, 48 * MIB)
    assert soon(lambda: in_memory(path, 96 * MIB + AHEAD))


def test_windows_that_overlap_follow_each_other(path):
    array = opened(path)
    for start in range(0, 4 * MIB, MIB):
        read(array, start, MIB + 2)
    assert soon(lambda: in_memory(path, 4 * MIB + AHEAD))


@pytest.mark.parametrize("starts", [(90, 70, 50, 30, 10), (20, 40, 60, 80), (50, 50, 50)])
def test_readings_here_and_there_bring_in_nothing_more(path, starts):
    array = opened(path)
    for start in starts:
        read(array, start * MIB)
    time.sleep(0.2)
    assert not in_memory(path, max(starts) * MIB + AHEAD)
    assert openings(path) == 1


def test_a_reader_that_begins_anew_is_run_ahead_of_again(path):
    array = opened(path)
    for begin in (BEYOND, 0):
        for start in range(begin, begin + 4 * MIB, MIB):
            read(array, start)
        assert soon(lambda begin=begin: in_memory(path, begin + 4 * MIB + AHEAD))


def test_a_reader_in_memory_that_begins_anew_is_not_said_to_wait(path):
    array = opened(path)
    for start in range(BEYOND, BEYOND + 4 * MIB, MIB):
        read(array, start)
    path.read_bytes()
    assert told(array, BEYOND + 4 * MIB)["no_trial"]
    read(array, 0, 4 << 10)
    assert not told(array, 4 << 10)["no_trial"]


def test_a_fingerprint_brings_in_its_pieces_alone(path):
    file = opened(path).file
    file.digest(hashlib.blake2b())
    time.sleep(0.2)
    assert not in_memory(path, 1 * MIB)


def test_what_the_disk_has_yet_to_bring_is_not_looked_at_through_a_mapping(path):
    """Far from where a thread may still run ahead of another test's reader. What is asked for without waiting begins to
    be brought, and on a busy machine it has come before it is looked at: then once more."""
    array, start = opened(path), 150 * MIB
    descriptor, last = array.file.opened().descriptor, start + MIB - 1

    def once_cold(what) -> bool:
        return any(evict(path) or what() for _ in range(50))

    def told_of(way: int) -> tuple[object, object]:
        found = told(array, start, way=way)  # a reading that follows none: no thread runs ahead
        return found["mapped"], found["no_trial"]

    assert once_cold(lambda: _C.is_missing(descriptor, last))
    for way, wanted in [(MAP_WHAT_IS_THERE, (False, True)), (READ, (False, False)), (MAP, (True, False))]:
        assert once_cold(lambda way=way, wanted=wanted: told_of(way) == wanted)
    path.read_bytes()
    assert not _C.is_missing(descriptor, last)
    assert told_of(MAP_WHAT_IS_THERE) == (True, False)


NO_THREADS = """
import os, resource, sys
from pathlib import Path
from test_ahead import opened, told
array = opened(Path(sys.argv[1]))
told(array, 0, 1 << 17)  # memory of its own
array.file._opened = None
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)  # less than a thread's stack
print(told(array, 0, 1 << 17)["no_trial"])
"""


def test_a_process_that_may_have_no_more_threads_is_left_alone(path):
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", NO_THREADS, path], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_small_readings_bring_in_nothing_more(path):
    array = opened(path)
    for start in range(0, 64 << 10, 4 << 10):
        read(array, start, 4 << 10)
    time.sleep(0.2)
    assert not in_memory(path, AHEAD)


def test_a_file_in_memory_is_left_alone(path):
    array = opened(path)
    path.read_bytes()
    for start in range(0, 4 * MIB, MIB):
        read(array, start)
    assert openings(path) == 1


def test_no_descriptor_outlives_its_file(path):
    array = opened(path)
    for start in range(0, 4 * MIB, MIB):
        read(array, start)
    assert soon(lambda: openings(path) == 3)  # the reader's, one held beside it, and the thread's own
    del array
    gc.collect()
    assert soon(lambda: openings(path) == 0)


def test_a_file_read_to_its_end_is_let_go(path):
    array = opened(path)
    for start in range(0, FILE, MIB):
        read(array, start)
    assert soon(lambda: openings(path) == 1)


def test_more_files_than_are_run_ahead_of(tmp_path):
    paths = [tmp_path / str(i) for i in range(12)]
    for path in paths:
        write_zeros(path, 8 * MIB)

    def reader(array: MappedArray) -> None:
        for start in range(0, 8 * MIB, MIB):
            read(array, start)

    arrays = [opened(path) for path in paths]
    for _ in range(3):
        for path in paths:
            evict(path)
        threads = [threading.Thread(target=reader, args=(array,)) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert soon(lambda: all(openings(path) == 1 for path in paths))


def test_a_file_cut_meanwhile_is_the_readers_to_tell(tmp_path):
    write_zeros(tmp_path / "x", 64 * MIB)
    evict(tmp_path / "x")
    array = opened(tmp_path / "x")
    for start in range(0, 4 * MIB, MIB):
        read(array, start)
    os.truncate(tmp_path / "x", 6 * MIB)
    with pytest.raises(DamagedFile, match="shrank from 67108864 to 6291456 bytes"):
        read(array, 4 * MIB)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_runs_ahead_with_a_thread_of_its_own(path):
    array = opened(path)
    for start in range(0, 4 * MIB, MIB):  # this process has its thread
        read(array, start)
    assert soon(lambda: in_memory(path, 4 * MIB + AHEAD))
    child = os.fork()
    if child == 0:
        told(array, BEYOND - 4096, 4096)  # nothing of torch's, whose threads are not in the child
        told(array, BEYOND)
        os._exit(0 if soon(lambda: in_memory(path, BEYOND + AHEAD)) else 1)
    assert os.waitpid(child, 0)[1] == 0
