"""Tokens that are staged as stored and widened where they are read: the batch, the errors and the scores of the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import finf_fast as ff
from corpus_files import llmc_bytes, npy_bytes, write
from finf_fast import loss, pipeline, ragged, transfer
from finf_fast.corpus import open_corpus
from finf_fast.loss import check_stored, is_served
from finf_fast.ops.decode_tokens import STORED
from finf_fast.records import BadSample
from finf_fast.transfer import Crossing, to_device
from journey import needs_gpu
from late_lanes import LateLanes
from nets import language_model
from test_corpus_documents import datatrove, megatron, sequences
from test_corpus_olmo import olmo

DRAW = np.random.default_rng(0)
CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<u2": 8, "<u4": 7}
BITS = {"<u1": 7, "<i1": 7, "<i2": 15, "<i4": 20, "<u2": 16, "<u4": 32}


def stream(dtype, count=200):
    return DRAW.integers(0, 1 << BITS[dtype], count).astype(dtype)


def windows(folder):
    return open_corpus(write(folder / "train.bin", stream("<u2").tobytes()), window=10, stride=3)


def headed(folder):
    return open_corpus(write(folder / "shard.bin", llmc_bytes(stream("<u4"), 20240801, 7)), window=7)


def signed(folder):
    rows = stream("<i4")
    return open_corpus(write(folder / "x.npy", npy_bytes((200,), "<i4", rows.tobytes())), format="tokens", window=9)


def foreign(folder):
    rows = stream("<i2").astype(">i2")
    return open_corpus(write(folder / "x.npy", npy_bytes((200,), ">i2", rows.tobytes())), format="tokens", window=9)


def several(folder):
    for name in "abc":
        write(folder / f"{name}.bin", stream("<u2").tobytes())
    return open_corpus(folder / "?.bin", window=11)


def from_datatrove(folder):
    return open_corpus(datatrove(folder, sequences("<u4", most=1 << 32)), max_length=6)


def from_olmo(folder):
    return open_corpus(olmo(folder, sequences()))


def several_of_documents(folder):
    for name in "ab":
        (folder / name).mkdir()
        datatrove(folder / name, sequences(lengths=[3, 8] if name == "a" else [12, 0, 5])).rename(folder / f"{name}.ds")
        (folder / name / "text.ds.index").rename(folder / f"{name}.ds.index")
    return open_corpus(folder / "*.ds")


def every_megatron(dtype):
    def opened(folder):
        parts = [stream(dtype, n) for n in (3, 7, 1, 5, 0, 4, 9, 2)]
        return open_corpus(megatron(folder, parts, code=CODES[dtype]))

    return opened


FORMATS = [windows, headed, signed, foreign, several, from_datatrove, from_olmo, several_of_documents]
FORMATS += [every_megatron(dtype) for dtype in CODES]


def flat(batch):
    return batch if isinstance(batch, dict) else {"": batch}


def same(got, wanted):
    """The same bits under the same names, in the same order."""
    got, wanted = flat(got), flat(wanted)
    assert list(got) == list(wanted)
    for key, x in wanted.items():
        assert (got[key].dtype, got[key].stride()) == (x.dtype, x.stride()) and torch.equal(got[key].cpu(), x), key


def by_either_way(corpus, narrow):
    """Whether decoding gives what reading gives, of rows in a run and anywhere; `narrow` are stored so."""
    stored, decode, kind, _ = corpus.undecoded()
    assert kind == "tokens" and stored.fingerprint == corpus.fingerprint and len(stored) == len(corpus)
    places = DRAW.permutation(len(corpus))[:20]
    for raw, wanted in [
        (stored.read(1, len(corpus)), corpus.read(1, len(corpus))),
        (stored.take(places), corpus.take(places)),
    ]:
        same(decode(raw), wanted)
        assert {key for key, x in flat(raw).items() if x.dtype in STORED} == set(narrow)
        sizes = [sum(x.nbytes for x in flat(batch).values()) for batch in (raw, wanted)]
        assert sizes[0] < sizes[1]
        cut = [{key: x[:, :3] if x.dim() == 2 else x for key, x in flat(batch).items()} for batch in (raw, wanted)]
        same(*(loss.mapped(torch.Tensor.contiguous, batch) for batch in (decode(cut[0]), cut[1])))


@pytest.mark.parametrize("opened", FORMATS)
def test_the_same_batch_by_either_way(tmp_path, opened):
    corpus = opened(tmp_path)
    by_either_way(corpus, flat(corpus.read(0, 1)))


def arrow(folder, **columns):
    """A saved dataset of 17 rows of 0 to 8 items, in two files, shuffled."""
    pa = pytest.importorskip("pyarrow")
    from test_corpus_arrow import saved

    lengths = DRAW.integers(0, 9, 17)
    made = {}
    for name, (kind, most) in columns.items():
        lists = [DRAW.integers(0, most, n).tolist() for n in lengths]
        if name == "labels":
            lists = [[-100, *row[1:]] if row and kind.startswith("int") else row for row in lists]
        made[name] = pa.array(lists, pa.list_(getattr(pa, kind)()))
    return open_corpus(saved(folder / "set", made, files=2, indices=DRAW.permutation(17)))


def test_columns_of_a_dataset(tmp_path):
    short = {"input_ids": ("int32", 1 << 20), "attention_mask": ("int8", 2), "labels": ("int64", 99)}
    by_either_way(arrow(tmp_path, **short), ["input_ids", "attention_mask"])


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint16", "uint64"])
def test_labels_stay_stored_where_their_filling_fits(tmp_path, kind):
    corpus = arrow(tmp_path, input_ids=("uint32", 1 << 32), labels=(kind, 99))
    narrow = kind in ("int8", "int16", "int32")
    by_either_way(corpus, ["input_ids", "attention_mask"] + narrow * ["labels"])


def test_numbers_beside_lists_and_floats(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from test_corpus_arrow import stream as written

    ids = pa.array(DRAW.integers(0, 999, (9, 4)).tolist(), pa.list_(pa.uint16(), 4))
    columns = {"input_ids": ids, "y": pa.array(range(9), pa.uint8()), "w": pa.array(np.ones(9), pa.float32())}
    path = written(tmp_path / "rows.arrow", columns)
    by_either_way(open_corpus(path, columns=["w", "y", "input_ids"]), ["y", "input_ids", "attention_mask"])


def test_what_is_widened_as_it_is_read(tmp_path):
    for name, dtype in [("a.npy", "<i4"), ("b.npy", "<i2"), ("c.npy", "<i8"), ("d.npy", "<u8")]:
        write(tmp_path / name, npy_bytes((40,), dtype, np.arange(40).astype(dtype).tobytes()))
    how = {"format": "tokens", "window": 8}
    for corpus in [
        open_corpus(tmp_path / "a.npy", transform=lambda x: x, **how),
        open_corpus(tmp_path / "[ab].npy", **how),
        open_corpus(tmp_path / "c.npy", **how),
        open_corpus(tmp_path / "d.npy", **how),
        open_corpus(torch.zeros(4, 3, dtype=torch.int32)),
    ]:
        assert corpus.undecoded() is None, corpus


# The check


def batches(rng):
    """Of ids and labels mostly in range, of every width, each with what int64 makes of it."""
    B, L = 5, 4
    for dtype, ids, kind in itertools.product((np.uint8, np.int8, np.uint16, np.int32), "iot", range(6)):
        x = rng.integers(0, 50, (B, L)).astype(dtype)
        if ids == "o":
            x[rng.integers(B), rng.integers(L)] = 99 if rng.integers(2) else np.iinfo(dtype).max
        if ids == "t" and np.iinfo(dtype).min < 0:
            x[rng.integers(B), rng.integers(L)] = rng.choice([-100, -1])
        mask = (np.arange(L) < rng.integers(0, L + 1, B)[:, None]).astype(np.uint8)
        y = np.where(rng.integers(3, size=(B, L)) == 0, -100, rng.integers(0, 61 if kind > 3 else 40, (B, L)))
        raw = {"input_ids": x, "attention_mask": mask, "labels": y.astype(np.int8 if kind % 2 else np.int64)}
        keys = [("input_ids",), ("input_ids", "attention_mask"), tuple(raw), ("labels",), ("input_ids", "labels")]
        chosen = {key: torch.from_numpy(raw[key]) for key in keys[kind]} if kind < 5 else torch.from_numpy(x)
        yield chosen, loss.mapped(lambda x: x.long(), chosen)


def outcome(check):
    try:
        check()
    except BadSample as error:
        return str(error), error.row
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return None


LOSSES = [loss.CausalLM(), loss.CrossEntropy(), loss.MaskedLM(), loss.Seq2Seq(), loss.CausalLM(ignore_index=-1)]


@pytest.mark.parametrize("judge", LOSSES, ids=lambda judge: judge.name)
@pytest.mark.parametrize("limits", [(50, 50), (50, None), (None, 50), (None, None), (40, 60), (60, 50)])
def test_the_check_finds_in_what_is_stored_what_it_finds_in_int64(judge, limits):
    rng, found = np.random.default_rng(1), []
    assert is_served(judge)
    for _ in range(4):
        for raw, wide in batches(rng):
            found.append(outcome(lambda wide=wide: judge.check(wide, *limits)))
            assert outcome(lambda raw=raw: check_stored(judge, raw, *limits)) == found[-1], (raw, limits)
    assert limits == (None, None) or len(set(found)) > 5


def test_only_rows_in_doubt_are_made_wider():
    seen = []

    class Judge(loss.CausalLM):
        def check(self, batch, outputs, vocabulary):
            seen.append(batch["input_ids"].tolist())

    ids, labels = torch.tensor([[1, 2], [3, 9], [4, 5]], dtype=torch.uint16), torch.tensor([[1, 2], [-100, 1], [1, -5]])
    check_stored(Judge(), {"input_ids": ids, "labels": labels}, 9, None)
    check_stored(Judge(), {"input_ids": ids, "labels": labels}, 10, 10)
    assert seen == [[[1, 2], [3, 9], [4, 5]], [[1, 2], [4, 5]]]


def test_whose_check_is_served():
    class Own(loss.CausalLM):
        def target(self, batch):
            return super().target(batch) + 1

    assert not is_served(Own())
    assert is_served(loss.resolve(lambda model, batch: batch.float().sum(1)))  # it has none


@pytest.mark.parametrize("dtype, ignored, label", [("uint8", -100, 156), ("int8", 300, 44), ("uint16", -100, 65436)])
def test_a_label_is_not_taken_for_an_ignored_one_that_does_not_fit(dtype, ignored, label):
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.uint8), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    batch["targets"] = torch.tensor([[1, 1, label, label]]).to(getattr(torch, dtype))
    assert ragged.lengths(batch, loss.CausalLM(ignore_index=ignored)).tolist() == [4]


# The sweep


def texts(folder, most=19, dtype="<u2"):
    parts = [DRAW.integers(0, most, n).astype(dtype) for n in DRAW.integers(0, 14, 40)]
    return datatrove(folder, parts)


def abroad(monkeypatch):
    """Decoded where the batches are to be: what the lanes were given is told."""
    lanes, sent = LateLanes(), set()
    monkeypatch.setattr(lanes, "pinned", lambda tensor, real=lanes.pinned: sent.add(tensor.dtype) or real(tensor))
    monkeypatch.setattr(pipeline, "crossing_to", lambda device: Crossing(lanes))
    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: kind == "tokens")
    return sent


@pytest.fixture
def swept():
    """A sweep of one model over a corpus of tokens."""
    model, _ = language_model()
    updates = [ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)]

    def sweep(corpus, **more):
        return ff.sweep(model, updates, corpus, **{"loss": "causal_lm", "batch_size": 3, "progress": False, **more})

    return sweep


def equal(one, other):
    pairs = [(one.base, other.base), (one.delta, other.delta)]
    if one.token_base is not None:
        pairs += [(one.token_base, other.token_base), (one.token_delta, other.token_delta)]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_sweep_that_decodes_on_the_device_has_the_same_bits(monkeypatch, tmp_path, swept, ragged, per_token):
    path = texts(tmp_path)
    corpus = open_corpus(path) if ragged else open_corpus(path, format="tokens", dtype="uint16", window=5, stride=3)
    plain = swept(corpus, per_token=per_token)
    sent = abroad(monkeypatch)
    scores = swept(corpus, per_token=per_token)
    assert equal(scores, plain)
    assert sent == ({torch.uint16, torch.uint8} if ragged else {torch.uint16})
    assert scores.record["tokens_decoded"] == "on the device" and "tokens_decoded" not in plain.record
    counted = ("samples_without_target", "padding_percent", "samples_scored")
    assert [scores.record.get(key) for key in counted] == [plain.record.get(key) for key in counted]
    assert scores.record["corpus"] == plain.record["corpus"]


@pytest.mark.parametrize("dtype, wrong", [("<u2", 19), ("<u2", 65535), ("<u4", 1 << 31)])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_id_out_of_range_is_named_alike(monkeypatch, tmp_path, swept, ragged, dtype, wrong):
    parts = [DRAW.integers(0, 19, 7).astype(dtype) for _ in range(20)]
    parts[13][4] = wrong
    path = datatrove(tmp_path, parts)
    name = {"<u2": "uint16", "<u4": "uint32"}[dtype]
    corpus = open_corpus(path) if ragged else open_corpus(path, format="tokens", dtype=name, window=7)
    with pytest.raises(BadSample, match=rf"sample 13 \(.*: token id wanted in \[0, 19\), got {wrong}") as plain:
        swept(corpus)
    sent = abroad(monkeypatch)
    with pytest.raises(BadSample) as stored:
        swept(corpus)
    assert (str(stored.value), stored.value.row) == (str(plain.value), plain.value.row) and sent


def test_a_loss_with_a_check_of_its_own_sees_int64(monkeypatch, tmp_path, swept):
    seen = set()

    class Looks(loss.CausalLM):
        def check(self, batch, outputs, vocabulary):
            seen.add(batch["input_ids"].dtype)

    sent = abroad(monkeypatch)
    scores = swept(open_corpus(texts(tmp_path)), loss=Looks())
    assert seen == sent == {torch.int64} and "tokens_decoded" not in scores.record


@pytest.mark.parametrize("first", ["stored", "decoded"])
def test_a_sweep_goes_on_the_other_way(monkeypatch, tmp_path, swept, first):
    corpus = open_corpus(texts(tmp_path))
    whole, out = swept(corpus), tmp_path / "scores"

    def stop(done, total):
        if done >= 20:
            raise KeyboardInterrupt

    for way in (first, "stored" if first == "decoded" else "decoded"):
        with monkeypatch.context() as patch:
            sent = abroad(patch) if way == "stored" else None
            if way == first:
                with pytest.raises(KeyboardInterrupt):
                    swept(corpus, out=out, progress=stop)
            else:
                scores = swept(corpus, out=out)
            assert sent is None or torch.uint16 in sent
    assert equal(scores, whole) and scores.record["samples_scored"] == len(corpus)


def test_what_finds_no_room_ahead_crosses_as_stored_too(monkeypatch, tmp_path, swept):
    corpus = open_corpus(texts(tmp_path))
    plain, lanes = swept(corpus), LateLanes(fails=range(1, 1000))
    monkeypatch.setattr(pipeline, "crossing_to", lambda device: Crossing(lanes))
    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: kind == "tokens")
    scores = swept(corpus)
    assert equal(scores, plain) and "batches_not_sent_ahead" in scores.record


@needs_gpu
@pytest.mark.parametrize("opened", FORMATS)
def test_a_gpu_decodes_to_the_same_batch(tmp_path, opened):
    corpus = opened(tmp_path)
    stored, decode, _, _ = corpus.undecoded()
    same(decode(to_device(stored.read(0, len(corpus)), torch.device("cuda"))), corpus.read(0, len(corpus)))


@needs_gpu
@pytest.mark.parametrize("ragged", [False, True])
def test_a_sweep_on_a_gpu_has_the_same_bits_by_either_way(monkeypatch, tmp_path, swept, ragged):
    path = texts(tmp_path)
    corpus = open_corpus(path) if ragged else open_corpus(path, format="tokens", dtype="uint16", window=5, stride=3)
    scores = swept(corpus, device="cuda")
    assert ("tokens_decoded" in scores.record) == transfer.decodes(torch.device("cuda"), "tokens")
    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: False)
    assert equal(scores, swept(corpus, device="cuda"))
