"""Real file systems, each mounted for one process alone: a corpus on one that cannot be written, results on a full one.

A permission is none to root; that a file system is read-only, or full, holds for everybody.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpus_files import idx_bytes, megatron_bytes, npy_bytes, write

HERE = Path(__file__).parent
MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
ALONE = ("unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh")


@pytest.fixture
def place(tmp_path):
    """A folder that a file system can be mounted on."""
    (tmp_path / "mounted").mkdir()
    try:
        done = subprocess.run([*ALONE, "size=64k", tmp_path / "mounted", "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no unshare here: {error}")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    return tmp_path / "mounted"


def mounted(options: str, place: Path, code: str, *arguments: object) -> None:
    """Runs Python with a tmpfs at ``place`` that no other process sees and that ends with it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE), str(HERE.parent)])}
    command = [*ALONE, options, place, sys.executable, "-c", code, place, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


READ_ONLY = """
import errno, json, os, shutil, subprocess, sys
import numpy as np, torch
import finf_fast as ff
from finf_fast.corpus.base import tree_map
from nets import language_model
place, source, cache, kinds = sys.argv[1:]
shutil.copytree(source, place, dirs_exist_ok=True)
subprocess.run(["mount", "-o", "remount,ro", place], check=True)

def refused(step, *words):
    try:
        step()
    except OSError as error:
        assert error.errno == errno.EROFS and all(word in str(error) for word in words), error
    else:
        raise SystemExit("wanted an error of a read-only file system")

def tensors(corpus):
    found = []
    for batch in (corpus.read(0, len(corpus)), corpus.take([1, 0]), corpus[-1]):
        tree_map(found.append, batch)
    return found

refused(lambda: open(f"{place}/new", "w"))
for name, options in json.loads(kinds).items():
    for io in ("read", "map"):
        one, other = (ff.open_corpus(f"{root}/{name}", io=io, **options) for root in (source, place))
        assert one.fingerprint == other.fingerprint and len(one) == len(other), name
        assert all(map(torch.equal, tensors(one), tensors(other))), name
packed = f"{place}/images.gz"
assert ff.open_corpus(packed, format="idx", cache=cache).read(0, 3).shape == (3, 1, 2, 2)
refused(lambda: ff.open_corpus(packed, format="idx", cache=f"{place}/cache"), "cannot unpack", packed, "cache")

model, _ = language_model()
update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
settings = {"loss": "causal_lm", "batch_size": 8, "progress": False}
one, other = (ff.open_corpus(f"{root}/t.bin", window=8) for root in (source, place))
whole = ff.sweep(model, [update], one, **settings)
found = ff.sweep(model, [update], other, **settings, out=f"{cache}/run")
assert np.array_equal(whole.delta, found.delta) and np.array_equal(whole.base, found.base)
refused(lambda: ff.sweep(model, [update], other, **settings, out=f"{place}/run"), "result folder", f"{place}/run")
refused(lambda: ff.fit_factors(model, other, loss="causal_lm", out=f"{place}/f.pt"), "out: cannot write there", "f.pt")
"""


def test_a_corpus_on_a_read_only_file_system(tmp_path, place):
    ramp, source = np.arange(19, dtype="<u2"), tmp_path / "source"
    source.mkdir()
    write(source / "t.bin", np.resize(ramp, 800).tobytes())
    write(source / "x.npy", npy_bytes((4, 3), "<f4", bytes(range(48))))
    write(source / "images", idx_bytes((3, 2, 2), bytes(range(12))))
    write(source / "images.gz", idx_bytes((3, 2, 2), bytes(range(12))))
    index, data = megatron_bytes([ramp[:5], ramp[5:9]], [0, 1, 2], 8)
    write(source / "m.idx", index), write(source / "m.bin", data), write(source / "d.ds", data)
    write(source / "d.ds.index", struct.pack("<2Q", 5, 9))
    kinds = {"t.bin": {"window": 8}, "x.npy": {}, "images": {"format": "idx"}, "m.idx": {}, "d.ds": {}}
    (tmp_path / "cache").mkdir()
    mounted("size=1m", place, READ_ONLY, source, tmp_path / "cache", json.dumps(kinds))


FULL = """
import errno, os, sys
import numpy as np
import finf_fast as ff
from finf_fast.scores import store
from nets import mlp
store.SYNC_EVERY = 0.0
place, reserves = sys.argv[1], sys.argv[2] == "reserves"
if not reserves:  # as FAT and older NFS
    def fallocate(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    os.posix_fallocate = fallocate
model, data = mlp(4000)
update = ff.mirror(model, (data[0][:1], data[1][:1]), lr=1e-2)
settings = {"batch_size": 50, "out": f"{place}/run"}
whole = ff.sweep(model, [update], data, batch_size=50, progress=False)

def fill(done, total):
    if done < total // 2 or os.path.exists(f"{place}/filler"):
        return
    with open(f"{place}/filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError as error:
            assert error.errno == errno.ENOSPC

try:
    ff.sweep(model, [update], data, progress=fill, **settings)
except OSError as error:
    assert error.errno == errno.ENOSPC and f"{place}/run/" in error.filename, error
    assert error.filename.endswith("manifest.json" if reserves else ("base.npy", "delta.npy", "done")), error
else:
    raise SystemExit("wanted an error of a full disk")
os.unlink(f"{place}/filler")  # on a full tmpfs not even a hole can be looked at through a mapping
partial = ff.Scores.open(f"{place}/run", partial=True)
there = np.isfinite(partial.base)
assert there.all() if reserves else 0 < there.sum() < 4000, there.sum()
assert np.array_equal(partial.base[there], whole.base[there])
again = ff.sweep(model, [update], data, progress=False, **settings)
assert np.array_equal(again.base, whole.base) and np.array_equal(again.delta, whole.delta) and again.complete
"""


@pytest.mark.parametrize("reserve", ["reserves", "cannot reserve"])
def test_a_disk_that_is_full_in_the_middle_of_a_sweep(place, reserve):
    """Where room can be reserved only the record at the end finds none; where not, a row in the middle."""
    mounted("size=256k", place, FULL, reserve)


SMALL = """
import errno, os, sys
import torch
import finf_fast as ff
place, packed = sys.argv[1:]

def refused(step, *words):
    before = sorted(os.listdir(place))
    try:
        step()
    except OSError as error:
        assert error.errno == errno.ENOSPC and all(word in str(error) for word in words), error
        assert sorted(os.listdir(place)) == before, os.listdir(place)
        return error
    raise SystemExit("wanted an error of a full disk")

refused(lambda: ff.open_corpus(packed, format="idx", cache=place), "cannot unpack", packed)
model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
data = torch.randn(64, 300), torch.randint(0, 3, (64,))
path = f"{place}/f.pt"
kept = refused(lambda: ff.fit_factors(model, data, out=path, progress=False), "the fit is not lost", path)
kept.factors.check(model)
ff.fit_factors(model, data, out=path, progress=False, params="1.*", kind="fisher_diag")
refused(lambda: kept.factors.save(path), path)
assert ff.Factors.load(path).kind == "fisher_diag"
"""


def test_what_a_small_disk_has_no_room_for_leaves_nothing(tmp_path, place):
    packed = write(tmp_path / "images.gz", idx_bytes((1000, 20, 20), bytes(400_000)))
    mounted("size=64k", place, SMALL, packed)


SERVED = """
import os, sys
import numpy as np, torch
import finf_fast as ff
from finf_fast.records import DamagedFile
from nets import language_model
place, source, out, io = sys.argv[1:]
number = lambda: os.stat(f"{place}/t.bin").st_ino
assert number() != number()
one, other = ff.open_corpus(f"{source}/t.bin", window=8), ff.open_corpus(f"{place}/t.bin", window=8, io=io)
assert one.fingerprint == other.fingerprint and torch.equal(one.read(0, len(one)), other.read(0, len(other)))
if io == "auto":
    assert "a file lies on a network file system" in str(other.describe()), other.describe()

model, _ = language_model()
update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
settings = {"loss": "causal_lm", "batch_size": 8}
whole = ff.sweep(model, [update], one, **settings)

def strike(done, total):
    if done > total // 2:
        open(f"{source}/fails", "w").close()

try:
    ff.sweep(model, [update], other, out=out, progress=strike, **settings)
except DamagedFile as error:
    assert f"{place}/t.bin, byte " in str(error) and "cannot be read" in str(error), error
else:
    raise SystemExit("wanted an error of a disk out of reach")
partial = ff.Scores.open(out, partial=True)
there = np.isfinite(partial.base)
assert len(one) // 2 < there.sum() < len(one) and np.array_equal(partial.delta[:, there], whole.delta[:, there])
os.unlink(f"{source}/fails")
again = ff.sweep(model, [update], ff.open_corpus(f"{place}/t.bin", window=8, io=io), out=out, **settings)
assert np.array_equal(again.base, whole.base) and np.array_equal(again.delta, whole.delta) and again.complete
"""


@pytest.mark.parametrize("io", ["auto", "read", "map"])
def test_a_network_file_system_that_goes_away_and_comes_back(tmp_path, io):
    """A real one, as far as the kernel can tell: a process serves it, numbers its files anew, and fails."""
    source, place = tmp_path / "source", tmp_path / "mounted"
    source.mkdir(), place.mkdir()
    write(source / "t.bin", np.resize(np.arange(19, dtype="<u2"), 8 * 2000).tobytes())
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE), str(HERE.parent)])}
    command = ["unshare", "--map-root-user", "--mount", sys.executable, HERE / "served_disk.py", source, place]
    work = [sys.executable, "-c", SERVED, place, source, tmp_path / "out", io]
    try:
        done = subprocess.run([*command, *work], env=env, capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        pytest.skip(f"no unshare here: {error}")
    if done.returncode != 0 and (
        "not mounted" in done.stderr or "unshare" in done.stderr or "/dev/fuse" in done.stderr
    ):
        pytest.skip(f"no file system may be served here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
