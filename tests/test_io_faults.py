"""Disks that fail in the middle of a reading: no signal ends the process, no wrong bit is handed out, a run resumes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from corpus_files import idx_bytes, megatron_bytes, npy_bytes, write

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library that fails on purpose is for Linux")
WAYS = pytest.mark.parametrize("io", ["read", "map"])


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc")) or pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    source = str(HERE / "faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", source, "-o", str(library), "-ldl"], check=True)
    return library


def run_python(code: str, *arguments: object, library: Path | None = None, **faults: object):
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": paths, **{f"FAULT_{name.upper()}": str(v) for name, v in faults.items()}}
    if library:
        env["LD_PRELOAD"] = os.pathsep.join(filter(None, [env.get("LD_PRELOAD"), str(library)]))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def tokens(path: Path, count: int = 1 << 20) -> np.ndarray:
    stream = np.random.default_rng(0).integers(0, 19, count).astype("<u2")
    stream.tofile(path)
    return stream


READ = """
import sys
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
corpus = open_corpus(sys.argv[1], window=64, dtype="uint16", io=sys.argv[2])  # without a look at its end
corpus.reading.threads = 3
try:
    print(corpus.read(0, len(corpus)).sum().item())
except DamagedFile as error:
    print("DamagedFile", error)
"""


def test_an_input_output_error_names_file_and_byte(tmp_path, faulty_disk):
    tokens(tmp_path / "x.bin")
    done = run_python(
        READ, tmp_path / "x.bin", "read", library=faulty_disk, kind="eio", at=tmp_path, **{"from": 777_777}
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith(f"DamagedFile {tmp_path / 'x.bin'}, byte 777777: ")
        and "Input/output error" in done.stdout
    )


# What is opened, of files beside each other; options; the file that fails, and from which byte.
OPENED = {
    "tokens": ("t.bin", {"window": 8}, "t.bin", 0),
    "npy": ("x.npy", {}, "x.npy", 0),
    "labels": ("x.npy", {"labels": "images.gz"}, "images.gz", 0),
    "idx": ("images.gz", {}, "images.gz", 0),
    "idx, in its archive": ("images.gz", {"cache": "cache"}, "images.gz", 40_000),
    "megatron": ("m.bin", {}, "m.idx", 0),
    "tokens with an index": ("m.bin", {"window": 8}, "m.idx", 0),
    "olmo": ("part.npy", {}, "part.csv.gz", 0),
    "olmo, in its table": ("part.npy", {}, "part.csv.gz", 50_000),
    "olmo's tokens": ("part.npy", {}, "part.npy", 0),
    "arrow": ("x.arrow", {}, "x.arrow", 0),
    "saved": (".", {"format": "arrow"}, "state.json", 20),
}
OPEN = """
import os
from finf_fast.corpus import open_corpus
from test_io_faults import OPENED
for source, options, bad, byte in OPENED.values():
    os.environ |= {"FAULT_AT": os.path.join(os.getcwd(), bad), "FAULT_FROM": str(byte)}
    try:
        open_corpus(source, **options)
    except Exception as error:
        print(type(error).__name__, error)
"""


def one_of_each(folder: Path) -> None:
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, 60_000, np.uint8).tobytes()
    index, data = megatron_bytes([np.frombuffer(noise, "<u2")], [0, 1], 8)
    edges = np.sort(draw.integers(0, 30_001, 30_000)).tolist()
    files = {"t.bin": data, "m.bin": data, "m.idx": index, "part.npy": noise, "x.arrow": b"\xff" * 4}
    files |= {"x.npy": npy_bytes((6,), "<u2", bytes(12)), "images.gz": idx_bytes((60_000,), noise)}
    files["part.csv.gz"] = "".join(f"{start},{stop}\n" for start, stop in pairwise([*edges, 30_000])).encode()
    files["state.json"] = b'{"_data_files": [{"filename": "x.arrow"}]}'
    for name, content in files.items():
        write(folder / name, content)


def test_an_input_output_error_at_opening_names_file_and_byte(tmp_path, faulty_disk, monkeypatch):
    one_of_each(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = run_python(OPEN, library=faulty_disk, kind="eio", at="nothing")
    for name, said in zip(OPENED, done.stdout.splitlines(), strict=True):
        *_, bad, byte = OPENED[name]
        assert re.fullmatch(f"DamagedFile (\\./)?{bad}, byte {byte}: .*Input/output error", said), (name, said)
    assert not any(Path("cache").glob("*"))


@pytest.mark.parametrize("window", [64, 1 << 19])
def test_short_readings_and_signals_change_nothing(tmp_path, faulty_disk, window):
    stream = tokens(tmp_path / "x.bin", 1 << 19)
    code = READ.replace("64", str(window))
    done = run_python(code, tmp_path / "x.bin", "read", library=faulty_disk, kind="shreds", at=tmp_path)
    assert done.stdout.strip() == str(stream.sum(dtype=np.int64)), done.stderr


@pytest.mark.parametrize("left", [0, 5000])
def test_a_file_cut_under_a_mapping_is_an_error_and_no_signal(tmp_path, faulty_disk, left):
    tokens(tmp_path / "x.bin")
    done = run_python(
        READ, tmp_path / "x.bin", "map", library=faulty_disk, kind="cut", at=tmp_path / "x.bin", **{"from": left}
    )
    assert done.returncode == 0, done.stderr
    assert f"x.bin: shrank from 2097152 to {left} bytes while it was read" in done.stdout


@pytest.mark.parametrize("io", ["map", "auto"])
def test_a_system_that_cannot_bring_in_pages_is_read(tmp_path, faulty_disk, io):
    """Linux before 5.14: pieces of a mapping are larger than those that are read, and must fit in a thread's room."""
    stream = tokens(tmp_path / "x.bin", 4 << 20)
    code = READ + "print(corpus.describe()['io'])"
    done = run_python(code, tmp_path / "x.bin", io, library=faulty_disk, kind="old", at=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(stream.sum(dtype=np.int64)), "map" if io == "map" else "read"]


TORN = """
import errno, sys
import numpy as np
from finf_fast import _C
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
corpus = open_corpus(sys.argv[1], window=1024, io="map")
(file,), out = corpus._files(), np.empty(corpus.window * len(corpus), np.int64)
second = file.opened().reader
try:
    corpus.read(0, 100)
except DamagedFile as error:
    print(error)
rows = {"starts": 0, "first": 0, "step": 2048, "lengths": 0, "R": 100, "length": 1024}
error, *_ = second.deliver_integers(
    way=1, known=file.known[0], begin=0, end=204800, **rows, threads=1, stored=2, fill=0, out=out.ctypes.data
)
print(errno.errorcode[error])
print(corpus.read(0, len(corpus)).sum().item())
"""


def test_a_page_that_one_reader_lost_is_lost_to_all(tmp_path, faulty_disk):
    """Two threads in one mapping: where the first is rescued the second finds zeros, and no signal."""
    stream = tokens(tmp_path / "x.bin")
    done = run_python(TORN, tmp_path / "x.bin", library=faulty_disk, kind="torn", **{"from": 1000})
    said, second, whole = done.stdout.splitlines()
    assert "byte 0: 204800 bytes cannot be read: it shrank or the disk failed" in said, done.stderr
    assert (second, whole) == ("EFAULT", str(stream.sum(dtype=np.int64)))


CROWD = """
import sys, threading
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
corpus, truth, found = open_corpus(sys.argv[1], window=1024, io="map"), int(sys.argv[2]), []
corpus.reading.threads = 1

def look():
    for _ in range(200):
        try:
            found.append(corpus.read(0, len(corpus)).sum().item() == truth)
        except DamagedFile:
            found.append(None)

threads = [threading.Thread(target=look) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found.count(True), found.count(False), found.count(None))
"""


def test_a_failing_disk_under_a_crowd_gives_no_wrong_bit(tmp_path, faulty_disk):
    stream = tokens(tmp_path / "x.bin", 1 << 16)
    truth = stream.sum(dtype=np.int64)
    done = run_python(CROWD, tmp_path / "x.bin", truth, library=faulty_disk, kind="torn", **{"from": 7})
    assert done.returncode == 0, done.stderr
    right, wrong, refused = map(int, done.stdout.split())
    assert wrong == 0 and right > 100 and refused > 100


LATER = """
import faulthandler, sys
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
for _ in range(2):
    try:
        open_corpus(sys.argv[1], window=1024, io="map").read(0, 10)
    except DamagedFile:
        print("DamagedFile")
    faulthandler.enable()
"""


def test_a_handler_that_came_later_does_not_take_the_rescue_away(tmp_path, faulty_disk):
    tokens(tmp_path / "x.bin")
    done = run_python(LATER, tmp_path / "x.bin", library=faulty_disk, kind="torn", **{"from": 1})
    assert (done.returncode, done.stdout.split()) == (0, ["DamagedFile"] * 2), done.stderr


RACE = """
import os, random, sys, threading, time
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
path, io, caught = sys.argv[1], sys.argv[2], 0
for _ in range(100):
    open(path, "wb").write(bytes(4 << 20))
    corpus = open_corpus(path, window=1024, io=io)
    corpus.reading.threads = 2
    cutter = threading.Timer(random.uniform(0, 0.005), os.truncate, (path, 100))
    cutter.start()
    try:
        while True:
            assert int(corpus.read(0, len(corpus)).amax()) == 0
    except DamagedFile:
        caught += 1
    cutter.join()
print(caught)
"""


@WAYS
def test_files_cut_at_any_moment_end_no_process(tmp_path, io):
    done = run_python(RACE, tmp_path / "x.bin", io)
    assert (done.returncode, done.stdout.strip()) == (0, "100"), done.stderr


FOREIGN = """
import faulthandler, mmap, os, sys
from finf_fast.corpus import open_corpus
path = sys.argv[1]
open_corpus(path, window=1024, io="map").read(0, 100)
with open(path, "r+b") as file:
    other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(path, 0)
print("still here", flush=True)
other[100_000]
print("wanted the signal that ends a process")
"""


def test_a_bus_error_of_somebody_else_still_ends_the_process(tmp_path):
    tokens(tmp_path / "x.bin")
    done = run_python(FOREIGN, tmp_path / "x.bin")
    assert (done.returncode, done.stdout) == (-7, "still here\n")  # SIGBUS
    handled = run_python("import faulthandler; faulthandler.enable()\n" + FOREIGN, *[tokens_again(tmp_path)])
    assert handled.returncode == -7 and "Fatal Python error: Bus error" in handled.stderr


@pytest.mark.parametrize("again", ["", "open_corpus(path, window=1024, io='map').read(0, 100)"])
def test_a_handler_that_came_later_still_has_its_say(tmp_path, again):
    """Python's faulthandler raises the signal again when it has spoken, which must find its end."""
    tokens(tmp_path / "x.bin")
    code = FOREIGN.replace("with open", f"faulthandler.enable()\n{again}\nwith open")
    done = run_python(code, tmp_path / "x.bin")
    assert done.returncode == -7 and done.stderr.count("Fatal Python error: Bus error") == 1


@pytest.mark.parametrize("before", ["", "faulthandler.enable()"])
@pytest.mark.parametrize("after", ["", "faulthandler.enable(); read()"])
def test_the_signal_sent_by_somebody_ends_the_process(tmp_path, before, after):
    code = "import faulthandler, os, signal, sys\nfrom finf_fast.corpus import open_corpus\n"
    code += "def read():\n    open_corpus(sys.argv[1], window=1024, io='map').read(0, 100)\n"
    code += f"{before}\nread()\n{after}\nos.kill(os.getpid(), signal.SIGBUS)\nprint('wanted an end')"
    tokens(tmp_path / "x.bin")
    done = run_python(code, tmp_path / "x.bin")
    assert (done.returncode, done.stdout) == (-7, "")
    assert done.stderr.count("Fatal Python error: Bus error") == bool(before or after)


def tokens_again(folder: Path) -> Path:
    tokens(folder / "y.bin")
    return folder / "y.bin"


SWEEP = """
import os, sys
import torch
import finf_fast as ff
from finf_fast.corpus import open_corpus
from nets import language_model
model, _ = language_model()
update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
kind = os.environ.pop("FAULT_KIND", "")
corpus = open_corpus(sys.argv[1], window=8)
corpus.fingerprint  # the whole of so small a file
os.environ["FAULT_KIND"] = kind
from finf_fast.scores import store
store.SYNC_EVERY = 0.0
try:
    ff.sweep(model, [update], corpus, loss="causal_lm", batch_size=8, out=sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)
"""


# Where the disk ends it: bytes of the corpus that can be read; or writes that find room, of which the two arrays'
# headers and the flags, all of them 0, are the first three, and every block takes three: base, delta and its flag.
ENDS = {
    "eio": (3000, "DamagedFile", "x.bin, byte 3000", "Input/output"),
    "full at a base": (60, "OSError", "cannot write row 152 and on: No space left", "base.npy"),
    "full at a delta": (61, "OSError", "cannot write row 152 and on: No space left", "delta.npy"),
    "full at a flag": (62, "OSError", "cannot flag blocks 19 to 19: No space left", "done"),
    "full at the first flag but one": (8, "OSError", "cannot flag blocks 1 to 1: No space left", "done"),
    "full at the last flag": (152, "OSError", "cannot flag blocks 49 to 49: No space left", "done"),
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A corpus, and the folder of a sweep over it that nothing stopped."""
    folder = tmp_path_factory.mktemp("swept")
    tokens(folder / "x.bin", 3200)
    run_python(SWEEP, folder / "x.bin", folder / "whole")
    return folder / "x.bin", folder / "whole"


@pytest.mark.parametrize(("limit", "words"), [(end[0], end[1:]) for end in ENDS.values()], ids=ENDS)
def test_a_sweep_over_a_failing_disk_keeps_what_it_has_and_resumes(tmp_path, swept, faulty_disk, limit, words):
    (corpus, whole), part = swept, tmp_path / "part"
    kind, at = ("eio", corpus) if words[0] == "DamagedFile" else ("full", part)
    done = run_python(SWEEP, corpus, part, library=faulty_disk, kind=kind, at=at, **{"from": limit})
    assert all(word in done.stdout for word in words), done.stdout + done.stderr
    flags = sum((part / "done").read_bytes())
    assert 0 < flags < 50
    done = run_python(SWEEP, corpus, part)
    assert done.stdout == "", done.stdout
    for name in ("base.npy", "delta.npy", "done"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_flags_without_room_are_seen_before_any_work(tmp_path, swept, faulty_disk):
    part = tmp_path / "part"
    done = run_python(SWEEP, swept[0], part, library=faulty_disk, kind="full", at=part, **{"from": 2})
    assert "No space left on device: the result needs" in done.stdout, done.stdout + done.stderr
    assert [entry.name for entry in part.iterdir()] == ["lock"]
