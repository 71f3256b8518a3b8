"""What a disk does while a sweep reads from it: a named error, all that was scored kept, and the same bits after."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finf_fast as ff
from finf_fast.corpus import open_corpus
from finf_fast.records import BadSample, DamagedFile, ManifestMismatch
from nets import language_model

WINDOW, SAMPLES, BATCH = 8, 400, 8
ROOT = Path(__file__).parent.parent


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "train.bin"
    np.random.default_rng(0).integers(0, 19, SAMPLES * WINDOW).astype("<u2").tofile(path)
    return path


def cut(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0\0")


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\0")


def overwrite_and_put_back(path: Path) -> None:
    """As `rsync --inplace --times` does, or `cp --preserve`."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"\1\0" * 8)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_mode(path: Path) -> None:
    path.chmod(0o600 if os.stat(path).st_mode & 0o077 else 0o644)


def change_group(path: Path) -> None:
    others = [group for group in os.getgroups() if group != os.stat(path).st_gid]
    if not others and os.geteuid() != 0:
        pytest.skip("nobody but root may give a file to a group that is not theirs")
    os.chown(path, -1, others[0] if others else os.stat(path).st_gid + 1)


def link(path: Path) -> None:
    os.link(path, path.with_suffix(".backup"))


def link_and_unlink(path: Path) -> None:
    """One at a time, with readings between them."""
    backup = path.with_suffix(".backup")
    backup.unlink() if backup.exists() else link(path)


def overwrite_beside_attributes(path: Path) -> None:
    """The attributes that were changed before are known by then, and excuse nothing."""
    (overwrite_and_put_back if path.with_suffix(".backup").exists() else link)(path)


def unlisted(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))


FAULTS = {
    cut: "shrank from 6400 to 100 bytes|shrank: wanted bytes up to",
    grow: "grew from 6400 to 6402 bytes",
    delete: "was deleted",
    replace: "was replaced by another file",
    overwrite: "was written to",
    overwrite_and_put_back: r"changed \(content, with its time put back, or attributes\)",
    overwrite_beside_attributes: r"changed \(content, with its time put back, or attributes\)",
    unlisted: "was deleted",
}


@pytest.mark.parametrize("io", ["read", "map"])
@pytest.mark.parametrize(("fault", "words"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_a_file_that_changes_while_it_is_swept(tmp_path, tokens, fault, words, io):
    content, (model, _) = tokens.read_bytes(), language_model()
    update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
    settings = {"loss": "causal_lm", "batch_size": BATCH}
    ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), out=tmp_path / "whole", **settings)
    seen = []

    def strike(done, total):
        seen.append(done)
        if len(seen) in (5, 25):
            fault(tokens)

    corpus = open_corpus(tokens, window=WINDOW, io=io)
    with pytest.raises(DamagedFile, match=rf"train\.bin.*({words})"):
        ff.sweep(model, [update], corpus, out=tmp_path / "part", progress=strike, **settings)
    partial = ff.Scores.open(tmp_path / "part", partial=True)
    assert np.isfinite(partial.base).sum() == seen[-1] < SAMPLES
    tokens.write_bytes(content)
    ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), out=tmp_path / "part", **settings)
    for name in ("base.npy", "delta.npy"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def bad_token(folder: Path, wrong: bool) -> tuple[str, dict]:
    tokens = np.random.default_rng(0).integers(0, 19, 700 * WINDOW).astype("<u2")
    tokens[600 * WINDOW + 3] = 60_000 if wrong else 5
    tokens.tofile(folder / "part.bin")
    return rf"sample 600 \(.*part\.bin, byte {600 * WINDOW * 2}\): .*, got 60000", {"window": WINDOW}


def bad_label(folder: Path, wrong: bool) -> tuple[str, dict]:
    draw = np.random.default_rng(0)
    np.save(folder / "part.npy", draw.normal(size=(700, 4)).astype(np.float32))
    labels = draw.integers(0, 3, 700)
    labels[600] = 99 if wrong else 1
    np.save(folder / "y.npy", labels)
    return r"sample 600 \(.*part\.npy, byte 9728\): label wanted in \[0, 3\).*, got 99", {"labels": folder / "y.npy"}


def decreasing_ends(folder: Path, wrong: bool) -> tuple[str, dict]:
    draw = np.random.default_rng(0)
    ends = np.cumsum(draw.integers(2, 9, 700)).astype("<u8")
    draw.integers(0, 19, ends[-1]).astype("<u2").tofile(folder / "part.ds")
    if wrong:
        ends[600] = ends[500]
    ends.tofile(folder / "part.ds.index")
    return rf"part\.ds\.index, byte {600 * 8}: wanted an end from", {}


@pytest.mark.parametrize("wrong", [bad_token, bad_label, decreasing_ends])
def test_what_a_file_says_wrong_in_its_middle(tmp_path, wrong):
    """What came before it is kept, and has the bits of a sweep of the file as it should be."""
    words, options = wrong(tmp_path, True)
    path = next(path for path in tmp_path.glob("part.*") if path.suffix != ".index")
    if wrong is bad_label:
        model, query = torch.nn.Linear(4, 3), (torch.ones(1, 4), torch.tensor([1]))
    else:
        model, query = language_model()[0], torch.tensor([[1, 2, 3]])
    settings = {"loss": "cross_entropy" if wrong is bad_label else "causal_lm", "batch_size": 4}
    update = ff.mirror(model, query, loss=settings["loss"], lr=0.1)
    with pytest.raises((BadSample, DamagedFile), match=words):
        ff.sweep(model, [update], open_corpus(path, **options), out=tmp_path / "part", **settings)
    kept = np.isfinite(ff.Scores.open(tmp_path / "part", partial=True).base)
    wrong(tmp_path, False)
    whole = ff.sweep(model, [update], open_corpus(path, **options), out=tmp_path / "whole", **settings)
    partial = ff.Scores.open(tmp_path / "part", partial=True)
    assert 500 <= kept.sum() <= 600 and kept[: kept.sum()].all()
    assert np.array_equal(partial.base[kept], whole.base[kept])
    assert np.array_equal(partial.delta[:, kept], whole.delta[:, kept])
    with pytest.raises(ManifestMismatch, match="corpus"):
        ff.sweep(model, [update], open_corpus(path, **options), out=tmp_path / "part", **settings)


def test_a_result_that_is_cut_is_not_made_whole_again(tmp_path, tokens):
    """Rows written past the end of a file give it its size back, with zeros where others had been."""
    model, _ = language_model()
    update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
    settings, delta = {"loss": "causal_lm", "batch_size": BATCH}, tmp_path / "part" / "delta.npy"

    def strike(done, total):
        if done > SAMPLES // 2:
            os.truncate(delta, 1000)

    with pytest.raises(DamagedFile, match=r"delta\.npy: wanted \d+ bytes, got 1000"):
        ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), out=delta.parent, progress=strike, **settings)
    with pytest.raises(DamagedFile, match=r"delta\.npy: wanted \d+ bytes, got 1000"):
        ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), out=delta.parent, **settings)


def test_features_mapped_by_the_caller_that_shrink(tmp_path):
    """The process that looks at them is not killed."""
    x, y = np.random.default_rng(0).normal(size=(900, 600)).astype(np.float32), np.zeros(900, np.int64)
    np.save(tmp_path / "x.npy", x)
    model = torch.nn.Linear(600, 3)
    update = ff.mirror(model, (torch.ones(1, 600), torch.tensor([1])))
    data = np.load(tmp_path / "x.npy", mmap_mode="r"), y

    def strike(done, total):
        if done > 400:
            os.truncate(tmp_path / "x.npy", 4096)

    with pytest.raises(DamagedFile, match=r"x\.npy: (shrank|was written)"):
        ff.sweep(model, [update], data, out=tmp_path / "part", progress=strike, batch_size=4)
    assert 400 < np.isfinite(ff.Scores.open(tmp_path / "part", partial=True).base).sum() < 900


def test_a_child_forked_in_a_sweep_is_told(tmp_path, tokens):
    """It has no thread that reads for it; that waits for ever, or a result written by two, would be worse."""
    model, _ = language_model()
    update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
    settings, parent, child = {"loss": "causal_lm", "batch_size": BATCH}, os.getpid(), []
    whole = ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), **settings)

    def fork(done, total):
        if done > SAMPLES // 2 and not child:
            child.append(os.fork())
            if not child[0]:
                signal.alarm(60)

    try:
        corpus = open_corpus(tokens, window=WINDOW)
        scores = ff.sweep(model, [update], corpus, out=tmp_path / "out", progress=fork, **settings)
    except RuntimeError as error:
        os._exit(0 if os.getpid() != parent and "staging: a process was forked" in str(error) else 1)
    finally:
        if os.getpid() != parent:
            os._exit(2)
    assert os.waitpid(child[0], 0)[1] == 0
    assert np.array_equal(scores.delta, whole.delta) and scores.complete


@pytest.mark.parametrize("io", ["read", "map"])
@pytest.mark.parametrize("change", [change_mode, change_group, link_and_unlink])
def test_attributes_that_others_change_end_no_sweep(tmp_path, tokens, change, io):
    (model, _), seen = language_model(), []
    update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
    settings = {"loss": "causal_lm", "batch_size": BATCH}
    whole = ff.sweep(model, [update], open_corpus(tokens, window=WINDOW), **settings)

    def meddle(done, total):
        seen.append(os.stat(tokens).st_ctime_ns)
        if len(seen) in (5, 25):
            change(tokens)

    corpus = open_corpus(tokens, window=WINDOW, io=io)
    scores = ff.sweep(model, [update], corpus, progress=meddle, **settings)
    assert len(set(seen)) > 1 and np.array_equal(scores.delta, whole.delta)


@pytest.mark.parametrize("size", [6400, (64 << 20) + 2])
def test_a_corpus_that_was_copied_or_moved_is_the_same(tmp_path, size):
    """Of a file hashed in pieces the time of writing counts, which a copy keeps; other times do not."""
    path, copy = tmp_path / "train.bin", tmp_path / "copy.bin"
    with open(path, "wb") as file:
        file.truncate(size)
    wanted = open_corpus(path, window=WINDOW).fingerprint
    shutil.copy2(path, copy)
    change_mode(copy)
    assert open_corpus(copy, window=WINDOW).fingerprint == wanted
    copy.rename(tmp_path / "moved.bin")
    assert open_corpus(tmp_path / "moved.bin", window=WINDOW).fingerprint == wanted


def run_python(code: str, *arguments: str) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from finf_fast.corpus import open_corpus
folder, count = sys.argv[1], int(sys.argv[2])
corpus = open_corpus(f"{folder}/*.bin", window=4)
assert len(corpus) == 2 * count, len(corpus)
for start in range(0, 2 * count, 1000):
    found = corpus.read(start, min(start + 1000, 2 * count))
    assert [row[0] for row in found.tolist()] == [i // 2 % 65521 for i in range(start, start + len(found))]
assert corpus.locate(2 * count - 1).endswith(f"{count - 1:06d}.bin, byte 8")
assert len(corpus.describe()["paths"]) <= 21
"""


@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.prove)])
def test_more_files_than_a_process_may_open(tmp_path, count):
    for i in range(count):
        with open(tmp_path / f"{i:06d}.bin", "wb") as file:
            file.write(np.full(8, i % 65521, "<u2").tobytes())
    run_python(MANY, str(tmp_path), str(count))


BILLION = """
import resource, sys
import torch
from finf_fast.corpus import open_corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = open_corpus(sys.argv[1], window=4)
assert len(corpus) == 10**9
assert corpus[10**9 - 1].tolist() == [1, 2, 3, 4] and corpus[10**9 - 2].tolist() == [0] * 4
assert corpus.locate(10**9 - 1).endswith(", byte 7999999992")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 100, f"{grown} MiB"
"""


def test_a_billion_samples_are_arithmetic(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(8 * (10**9 - 1))
        file.seek(0, os.SEEK_END)
        file.write(np.arange(1, 5, dtype="<u2").tobytes())
    run_python(BILLION, str(path))


FLAT = """
import sys
from finf_fast.corpus import open_corpus
corpus = open_corpus(sys.argv[1], window=1024, io=sys.argv[2])
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
for start in range(0, 64 * 256, 256):
    corpus.read(start, start + 256)
before, most = resident(), 0
for start in range(64 * 256, len(corpus), 256):
    corpus.read(start, min(start + 256, len(corpus)))
    most = max(most, resident())
assert most - before < 64, f"{most - before} MiB more"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("gib", [0.5, pytest.param(10, marks=pytest.mark.prove)])
@pytest.mark.parametrize("io", ["read", "map"])
def test_resident_memory_does_not_follow_the_corpus(tmp_path, io, gib):
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as file:
        file.truncate(int(gib * 2**30))
    run_python(FLAT, str(path), io)


FULL = """
import resource, sys
import numpy as np, torch
import finf_fast as ff
from nets import mlp
model, data = mlp(4000)
update = ff.mirror(model, (data[0][:1], data[1][:1]), lr=1e-2)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # base.npy alone takes 32,128 bytes
try:
    ff.sweep(model, [update], data, out=sys.argv[1], batch_size=50)
except OSError as error:
    assert sys.argv[1] in str(error), error
else:
    raise SystemExit("wanted an error")
"""


def test_a_result_folder_that_cannot_hold_the_result_is_refused(tmp_path):
    run_python("import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + FULL, str(tmp_path / "run"))
