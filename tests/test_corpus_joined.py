"""CIFAR's binary files, and many files of one format as one corpus."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from corpus_files import flip_byte, write
from finf_fast.corpus import joined, open_corpus
from finf_fast.corpus.joined import JoinedCorpus
from finf_fast.records import DamagedFile
from test_corpus_documents import datatrove, megatron, sequences, texts

DRAW = np.random.default_rng(1)


def records(count, labels=1):
    return DRAW.integers(0, 256, (count, labels + 3072), np.uint8)


def test_a_folder_of_cifar_10(tmp_path):
    batches = [records(4) for _ in range(5)]
    for k, batch in enumerate(batches):
        write(tmp_path / f"data_batch_{k + 1}.bin", batch.tobytes())
    write(tmp_path / "test_batch.bin", records(3).tobytes())
    corpus, whole = open_corpus(tmp_path, mean=[0.5, 0.4, 0.3], std=0.25), np.concatenate(batches)
    assert len(corpus) == 20 and corpus.describe()["of"] == "cifar"
    x, y = corpus.read(2, 11)  # three files
    assert y.dtype == torch.int64 and y.tolist() == whole[2:11, 0].tolist()
    pixels = torch.from_numpy(whole[2:11, 1:].reshape(-1, 3, 32, 32)).float() / 255
    assert torch.equal(x, (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.25)
    assert corpus.locate(9) == f"{tmp_path / 'data_batch_3.bin'}, byte 3073"
    assert len(open_corpus(tmp_path / "test_batch.bin")) == 3


def test_cifar_100_has_the_fine_label(tmp_path):
    batch = records(6, labels=2)
    write(tmp_path / "train.bin", batch.tobytes())
    write(tmp_path / "fine_label_names.txt", b"apple\n")
    for source in (tmp_path, tmp_path / "train.bin"):
        x, y = open_corpus(source).read(0, 6)
        assert y.tolist() == batch[:, 1].tolist()
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(batch[:, 2:].reshape(-1, 3, 32, 32)))


def test_a_cifar_file_that_ends_early(tmp_path):
    path = write(tmp_path / "data_batch_1.bin", records(2).tobytes()[:-1])
    with pytest.raises(DamagedFile, match="whole records of 3073 bytes, got 6145 bytes: .* byte 3073"):
        open_corpus(path)


def test_token_files_by_a_pattern_in_the_order_of_their_names(tmp_path):
    streams = {name: DRAW.integers(0, 99, 10 + k).astype("<u2") for k, name in enumerate("bca")}
    for name, stream in streams.items():
        write(tmp_path / f"part-{name}.bin", stream.tobytes())
    corpus = open_corpus(tmp_path / "part-*.bin", window=4)
    windows = [streams[name][i : i + 4].tolist() for name in "abc" for i in range(0, len(streams[name]) - 3, 4)]
    assert (corpus.format, len(corpus)) == ("files", len(windows))
    assert corpus.read(0, len(windows)).tolist() == windows
    assert [corpus[i].tolist() for i in range(len(windows))] == windows
    words = corpus.describe()
    assert (words["tokens"], words["files"], len(words["paths"])) == (33, 3, 3)
    listed = open_corpus([tmp_path / f"part-{name}.bin" for name in "abc"], window=4)
    assert listed.fingerprint == corpus.fingerprint
    turned = open_corpus([tmp_path / f"part-{name}.bin" for name in "cba"], window=4)
    assert turned.fingerprint != corpus.fingerprint


def test_a_shard_without_a_window_adds_no_sample_and_is_told_of(tmp_path, caplog):
    lengths = {"a": 3, "b": 10, "c": 0, "d": 8, "e": 2}
    for name, length in lengths.items():
        write(tmp_path / f"{name}.bin", np.arange(length, dtype="<u2").tobytes())
    whole = open_corpus([tmp_path / "b.bin", tmp_path / "d.bin"], window=4)
    corpus = open_corpus(tmp_path / "*.bin", window=4)
    assert "3 of 5 files hold no window" in caplog.text and str(tmp_path / "a.bin") in caplog.text
    assert torch.equal(corpus.read(0, 4), whole.read(0, 4)) and (len(corpus), len(whole)) == (4, 4)
    assert corpus.fingerprint == whole.fingerprint  # the same samples
    words, plain = corpus.describe(), whole.describe()
    assert words["files_without_window"] == [str(tmp_path / f"{name}.bin") for name in "ace"]
    assert (words["tokens"], words["tokens_dropped_at_tail"]) == (23, 7) and "files_without_window" not in plain
    assert (plain["tokens"], plain["tokens_dropped_at_tail"], words["files"]) == (18, 2, 2)
    both = JoinedCorpus([corpus, open_corpus(tmp_path / "d.bin", window=4)])
    assert both.describe()["files_without_window"] == words["files_without_window"] and len(both) == 6


def test_shards_that_are_all_too_short(tmp_path):
    for name, length in (("a", 3), ("b", 10), ("c", 0)):
        write(tmp_path / f"{name}.bin", np.arange(length, dtype="<u2").tobytes())
    with pytest.raises(ValueError, match=r"at most 10 \(the tokens in .*b.bin, the longest of 3 files\), got 11"):
        open_corpus(tmp_path, window=11)
    with pytest.raises(DamagedFile, match="whole uint16 tokens"):  # a file that is broken is not a short one
        write(tmp_path / "d.bin", b"abc")
        open_corpus(tmp_path, window=4)


def test_documents_of_several_files_are_padded_together(tmp_path):
    parts = [sequences(lengths=lengths) for lengths in ([2, 5], [9], [1, 1, 3])]
    for k, part in enumerate(parts):
        (tmp_path / str(k)).mkdir()
        datatrove(tmp_path / str(k), part)
    corpus = open_corpus(tmp_path / "*" / "text.ds", max_length=8)
    assert texts(corpus) == [document[:8].tolist() for part in parts for document in part]
    assert texts(corpus, 1, 4) == [parts[0][1].tolist(), parts[1][0][:8].tolist(), parts[2][0].tolist()]
    assert corpus.lengths(1, 4).tolist() == [5, 8, 1]


def test_a_transform_is_applied_once_to_the_whole(tmp_path):
    for k in range(2):
        write(tmp_path / f"{k}.bin", np.arange(8, dtype="<u2").tobytes())
    corpus = open_corpus(tmp_path / "*.bin", window=4, transform=lambda ids: ids + len(ids))
    assert corpus.read(0, 4)[:, 0].tolist() == [4, 8, 4, 8]


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file fits the pattern"):
        open_corpus(tmp_path / "*.bin", window=4)
    tokens = write(tmp_path / "train.bin", np.arange(8, dtype="<u2").tobytes())
    (tmp_path / "x").mkdir()
    mixed = [open_corpus(tokens, window=4), open_corpus(datatrove(tmp_path / "x", sequences()))]
    with pytest.raises(ValueError, match="files of one format, got datatrove, tokens"):
        JoinedCorpus(mixed)


def token_files(folder, names, count=8):
    for name in names:
        write(folder / name, np.arange(count, dtype="<u2").tobytes())


def test_a_folder_of_files_of_one_kind(tmp_path):
    token_files(tmp_path, ["b.bin", "a.bin", "a.txt", "._a.bin"])
    corpus = open_corpus(tmp_path, window=4)
    assert corpus.describe()["paths"] == [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    token_files(tmp_path, ["c.npy"])
    with pytest.raises(ValueError, match=r"wanted a folder with data files of one kind, got 2 \*.bin, 1 \*.npy in"):
        open_corpus(tmp_path, window=4)


def test_a_list_of_folders(tmp_path):
    for name in "ba":
        (tmp_path / name).mkdir()
        token_files(tmp_path / name, ["x.bin"])
        write(tmp_path / name / "data_batch_1.bin", records(2).tobytes())
    folders = [tmp_path / "b", tmp_path / "a"]
    corpus = open_corpus(folders)
    assert corpus.describe()["paths"] == [str(folder / "data_batch_1.bin") for folder in folders]
    for folder in folders:
        (folder / "data_batch_1.bin").unlink()
    assert open_corpus(folders, window=4).describe()["paths"] == [str(folder / "x.bin") for folder in folders]


@pytest.mark.parametrize("write_pair", [datatrove, megatron])
def test_a_tuple_of_paths_is_no_list_of_files(tmp_path, write_pair):
    path = write_pair(tmp_path, sequences())
    with pytest.raises(TypeError, match="got tuple; files of one format go in a list"):
        open_corpus((path, path))


def test_a_folder_of_pairs(tmp_path):
    for kind, write_pair in (("ds", datatrove), ("idx", megatron)):
        folder = tmp_path / kind
        folder.mkdir()
        parts = [sequences(lengths=[3, 5]), sequences(lengths=[1])]
        for name, part in zip("xy", parts, strict=True):
            documents = {"documents": list(range(len(part) + 1))} if write_pair is megatron else {}
            path = write_pair(folder, part, **documents)
            for file in list(folder.glob(f"{path.stem}.*")):
                file.rename(folder / file.name.replace("text", name))
        assert texts(open_corpus(folder)) == [document.tolist() for part in parts for document in part]


@pytest.mark.parametrize("write_pair", [datatrove, megatron])
def test_a_pattern_that_fits_both_files_of_a_pair(tmp_path, write_pair):
    """Opened by either file, a pair would be in the corpus twice."""
    path = write_pair(tmp_path, sequences())
    alone = texts(open_corpus(path))
    assert texts(open_corpus(tmp_path / "text*")) == alone
    assert texts(open_corpus(sorted(tmp_path.iterdir()))) == alone


def test_a_worker_of_datatrove_that_had_no_document(tmp_path):
    alone = texts(open_corpus(datatrove(tmp_path, sequences())))
    for name in ("00001.ds", "00001.ds.index"):
        (tmp_path / name).touch()
    assert texts(open_corpus(tmp_path)) == alone and texts(open_corpus(tmp_path / "*.ds")) == alone
    with pytest.raises(ValueError, match="empty corpus, wanted a document's end in .*00001.ds.index"):
        open_corpus(tmp_path / "0*.ds")


def test_a_pattern_that_fits_olmo_s_tables(tmp_path):
    write(tmp_path / "part.npy", np.arange(8, dtype="<u2").tobytes())
    write(tmp_path / "part.csv.gz", b"0,3,a,b,0\n3,8,c,d,1\n")
    assert texts(open_corpus(tmp_path / "part*")) == [[0, 1, 2], [3, 4, 5, 6, 7]]


def test_a_folder_of_arrays_is_not_guessed_at(tmp_path):
    """Of two arrays in a folder, one is usually the other's labels."""
    for name in "xy":
        np.save(tmp_path / f"{name}.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(FileNotFoundError, match="wanted a folder with data files"):
        open_corpus(tmp_path)
    assert len(open_corpus(tmp_path / "[xy].npy")) == 6


def test_samples_of_several_kinds(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "y.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"samples of one kind, got \(\(2,\), 'float32', True\) in .*x\.npy and"):
        open_corpus(tmp_path / "*.npy")


def test_a_large_corpus_is_known_by_every_file(tmp_path, monkeypatch):
    """Past the bytes that are hashed in full: by times and sizes, and the content of some."""
    monkeypatch.setattr(joined, "WHOLE", 100)
    token_files(tmp_path, [f"{k:03}.bin" for k in range(70)])
    found = [open_corpus(tmp_path, window=4).fingerprint]
    assert open_corpus(tmp_path, window=4).fingerprint == found[0]
    changed = tmp_path / "033.bin"
    then = changed.stat().st_mtime_ns
    os.utime(changed, ns=(then, then + 1))
    found.append(open_corpus(tmp_path, window=4).fingerprint)
    os.utime(changed, ns=(then, then))
    assert open_corpus(tmp_path, window=4).fingerprint == found[0]
    first = tmp_path / "000.bin"
    then = first.stat().st_mtime_ns
    flip_byte(first, 1)
    os.utime(first, ns=(then, then))
    found += [open_corpus(tmp_path, window=4).fingerprint, open_corpus(tmp_path, window=3).fingerprint]
    assert len(set(found)) == 4


@pytest.mark.parametrize("size", [8, 5000])
def test_no_shard_of_the_same_size_and_time_takes_another_s_place(tmp_path, monkeypatch, size):
    """As an archive leaves them; here none is looked into but the first and the last."""
    monkeypatch.setattr(joined, "WHOLE", 100)
    monkeypatch.setattr(joined, "LOOKED_INTO", 2)
    for k in range(5):
        os.utime(write(tmp_path / f"{k}.bin", np.full(size, k, "<u2").tobytes()), (1, 1))
    found = [open_corpus(tmp_path, window=4).fingerprint]
    (tmp_path / "2.bin").rename(tmp_path / "held")
    (tmp_path / "3.bin").rename(tmp_path / "2.bin")
    (tmp_path / "held").rename(tmp_path / "3.bin")
    found.append(open_corpus(tmp_path, window=4).fingerprint)
    (tmp_path / "1.bin").write_bytes(np.full(size, 9, "<u2").tobytes())
    os.utime(tmp_path / "1.bin", (1, 1))
    found.append(open_corpus(tmp_path, window=4).fingerprint)
    assert len(set(found)) == 3


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("whole", [1 << 20, 10])
def test_labels_count_through_all_files(tmp_path, monkeypatch, place, whole):
    monkeypatch.setattr(joined, "WHOLE", whole)
    counts, y = (3, 1, 4), DRAW.integers(0, 9, 8)
    x = [DRAW.normal(size=(count, 2)).astype(np.float32) for count in counts]
    for k, rows in enumerate(x):
        np.save(tmp_path / f"x{k}.npy", rows)

    def opened(labels):
        if place == "file":
            path = tmp_path / f"labels-{labels.sum()}.npy"
            np.save(path, labels)
            os.utime(path, (1, 1))
            labels = path
        return open_corpus(str(tmp_path / "x*.npy"), labels=labels)

    corpus = opened(y)
    features, labels = corpus.read(0, 8)
    assert torch.equal(features, torch.from_numpy(np.concatenate(x))) and labels.tolist() == y.tolist()
    assert corpus.take([7, 0, 3])[1].tolist() == y[[7, 0, 3]].tolist() and corpus[5][1] == y[5]
    other = opened(y + 1)
    assert other.fingerprint != corpus.fingerprint
    for wrong in (y[:3], np.concatenate([y, y])):
        with pytest.raises(
            ValueError, match=f"labels: wanted 8 labels, one a row of 3 files together, got {len(wrong)}"
        ):
            opened(wrong)


def test_labels_beside_two_files(tmp_path):
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.full((3, 2), k, np.float32))
    x, y = open_corpus([tmp_path / "0.npy", tmp_path / "1.npy"], labels=np.arange(6)).read(0, 6)
    assert x[:, 0].tolist() == [0, 0, 0, 1, 1, 1] and y.tolist() == list(range(6))


def test_a_half_that_nobody_reads_may_be_lost(tmp_path):
    """Of a shard to validate on, and of what is read as one stream of tokens."""
    for name in ("train_0", "val_0"):
        write(tmp_path / f"{name}.ds", np.arange(8, dtype="<u2").tobytes())
    write(tmp_path / "train_0.ds.index", np.array([3, 8], "<u8").tobytes())
    assert len(open_corpus(tmp_path)) == 2
    (tmp_path / "train_0.ds.index").unlink()
    assert len(open_corpus(tmp_path, window=4, dtype="uint16")) == 2


def test_labels_beside_files_that_take_none(tmp_path):
    token_files(tmp_path, ["a.bin", "b.bin"])
    with pytest.raises(ValueError, match="labels: wanted None, for the format 'tokens' takes"):
        open_corpus(tmp_path, window=4, labels=np.zeros(4, np.int64))
    for name in "xy":
        np.save(tmp_path / f"{name}.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(TypeError, match="labels: wanted a path or an array of integers, got list"):
        open_corpus(tmp_path / "*.npy", labels=[0] * 6)


@pytest.mark.parametrize("gone", [".npy", ".csv.gz", ".ds", ".ds.index"])
def test_half_of_a_pair_is_not_passed_over(tmp_path, gone):
    for k in range(3):
        if ".ds" in gone:
            folder = tmp_path / "aside"
            folder.mkdir(exist_ok=True)
            for file in (path := datatrove(folder, sequences(lengths=[2, 1]))), path.with_name(path.name + ".index"):
                file.rename(tmp_path / file.name.replace("text", str(k)))
            folder.rmdir()
        else:
            write(tmp_path / f"{k}.npy", np.arange(8, dtype="<u2").tobytes())
            write(tmp_path / f"{k}.csv.gz", b"0,3,a,b,0\n3,8,c,d,1\n")
    assert len(open_corpus(tmp_path)) == 6
    (tmp_path / f"1{gone}").unlink()
    with pytest.raises(FileNotFoundError, match=f"1{gone}"):
        open_corpus(tmp_path)


def test_a_folder_s_link_that_leads_nowhere_and_its_pipe_are_not_passed_over(tmp_path):
    token_files(tmp_path, ["a.bin", "c.bin"])
    (tmp_path / "b.bin").symlink_to(tmp_path / "gone.bin")
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        open_corpus(tmp_path, window=4)
    (tmp_path / "b.bin").unlink()
    os.mkfifo(tmp_path / "b.bin")
    with pytest.raises((OSError, ValueError), match=r"b\.bin"):
        open_corpus(tmp_path, window=4)


def test_a_pipe_that_takes_a_file_s_name(tmp_path):
    """After more files were open than may be at a time: opening it again must not wait for someone to write."""
    token_files(tmp_path, [f"{k:03}.bin" for k in range(140)])
    corpus = open_corpus(tmp_path, window=4)
    corpus.read(0, len(corpus))
    (tmp_path / "000.bin").unlink()
    os.mkfifo(tmp_path / "000.bin")
    with pytest.raises(DamagedFile, match=r"000\.bin: was replaced by another file|000\.bin: .* while it was read"):
        corpus.read(0, 1)


def test_more_files_than_may_be_open(tmp_path):
    """Read to and fro, with the process's limit far below the number of files."""
    token_files(tmp_path, [f"{k:03}.bin" for k in range(400)])
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)\n"
        "from finf_fast.corpus import open_corpus\n"
        "corpus = open_corpus(sys.argv[1], window=4, io=sys.argv[2])\n"
        "for step in (1, -1):\n"
        "    for i in range(800)[::step]:\n"
        "        assert corpus[i].tolist() == [4 * (i % 2) + k for k in range(4)]\n"
        "assert corpus.take(list(range(0, 800, 3))).shape == (267, 4) and corpus.fingerprint\n"
    )
    for io, limit in (("read", "300"), ("map", "300"), ("auto", "60")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), io, limit], check=True)


def test_a_folder_s_held_out_files_are_left_away(tmp_path, caplog):
    token_files(tmp_path, ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"])
    names = [os.path.basename(path) for path in open_corpus(tmp_path, window=2).describe()["paths"]]
    assert names == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert "left away as held out, by name: 1 of 3 files: fineweb_val_000000.bin" in caplog.text
    assert len(open_corpus(str(tmp_path / "*.bin"), window=2)) == 12  # a pattern means what it says
    other = tmp_path / "other"
    other.mkdir()
    token_files(other, ["val.bin", "test.bin", "interval_7.bin"])  # nothing says what else would be trained on
    assert len(open_corpus(other, window=2)) == 12
    (other / "val.bin").rename(other / "train.bin")
    names = [os.path.basename(path) for path in open_corpus(other, window=2).describe()["paths"]]
    assert names == ["interval_7.bin", "train.bin"]
