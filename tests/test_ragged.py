"""Texts of different lengths: sorted, cut and trimmed; each score at its own sample's place, with the same value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finf_fast as ff
from finf_fast import pipeline, ragged, staging
from finf_fast.corpus.collate import collate
from finf_fast.delta import DeltaEngine
from finf_fast.loss import resolve
from finf_fast.records import Part, Plan
from nets import language_model

LOSS = resolve("causal_lm")


def texts(found, columns=None, **more):
    """A padded batch of texts of these lengths."""
    columns = max(found) if columns is None else columns
    mask = (torch.arange(columns) < torch.tensor(found)[:, None]).long()
    ids = torch.arange(1, 1 + mask.numel()).view(mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, **more}


def parts(batch, size=100, tokens=None):
    samples = len(batch["attention_mask"])
    return list(ragged.parts(Part(torch.arange(samples), batch), LOSS, size, tokens))


def test_each_sample_is_in_one_part_with_its_own_tokens():
    batch = texts([5, 2, 9, 2, 7, 9, 1], labels=torch.randint(0, 5, (7, 9)))
    batch["labels"][batch["attention_mask"] == 0] = -100
    found = parts(batch, size=3)
    assert sorted(torch.cat([part.rows for part in found]).tolist()) == list(range(7))
    assert max(len(part) for part in found) <= 3 and len({part.batch["input_ids"].shape[1] for part in found}) > 2
    for part in found:
        columns = part.batch["input_ids"].shape[1]
        for key, rows in part.batch.items():
            assert torch.equal(rows, batch[key][part.rows, :columns])
            assert (batch[key][part.rows, columns:] == (-100 if key == "labels" else 0)).all()


def test_samples_of_one_length_keep_their_order():
    assert [part.rows.tolist() for part in parts(texts([4] * 5), size=2)] == [[0, 1], [2, 3], [4]]


def test_a_forward_holds_so_many_tokens_and_a_longer_sample_goes_alone():
    found = parts(texts([3, 3, 3, 3, 6, 6, 40]), tokens=12)
    assert [tuple(part.batch["input_ids"].shape) for part in found] == [(4, 3), (2, 6), (1, 40)]


def test_a_forward_ends_early_where_the_next_length_would_be_mostly_padding():
    found = parts(texts([10] * 30 + [40] * 2), tokens=1300)
    assert [len(part) for part in found] == [30, 2]
    few = parts(texts([10] * 3 + [40] * 2), tokens=1300)  # but not while it is too small to be fast
    assert [len(part) for part in few] == [5]
    assert [len(part) for part in parts(texts([10] * 6 + [40] * 2), size=24)] == [6, 2]


def test_labels_beyond_the_mask_are_not_cut():
    labels = torch.full((2, 6), -100)
    labels[1, 4] = 3
    assert ragged.lengths(texts([2, 3], 6, labels=labels), LOSS).tolist() == [2, 5]


def test_an_empty_text_has_a_column():
    (part,) = parts(texts([0, 0], 4))
    assert part.batch["input_ids"].shape == (2, 1)


def test_padding_on_the_left_stays():
    batch = {key: rows.flip(1) for key, rows in texts([2, 5]).items()}
    assert ragged.lengths(batch, LOSS).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), "causal_lm"),
        ({"input_ids": torch.zeros(3, 4, dtype=torch.int64)}, "causal_lm"),
        (texts([2, 4]), lambda model, batch: batch["input_ids"].sum(1)),
        (texts([2, 4], bias=torch.zeros(2, 1, 4, 4)), "causal_lm"),
        (texts([2, 4], weights=torch.zeros(2, 4)), "causal_lm"),
        ({"x": torch.zeros(2, 4), "attention_mask": torch.ones(2, 4, 4, dtype=torch.int64)}, "causal_lm"),
    ],
    ids=["tensor", "no mask", "a loss of the user's", "a bias a pair of tokens", "numbers a token", "masks of pairs"],
)
def test_what_is_left_alone(batch, loss):
    assert ragged.width(batch, resolve(loss)) == 0


def test_what_is_sorted():
    assert ragged.width(texts([2, 4]), LOSS) == 4
    assert ragged.width(texts([2, 4], labels=torch.tensor([0, 1])), resolve("cross_entropy")) == 4


def test_padding_of_a_window_is_under_three_percent():
    lengths = torch.randn(64 * 16, generator=torch.Generator().manual_seed(0)).mul(0.8).add(5).exp().clamp(1, 2000)
    batch = texts(lengths.int().tolist())
    there = int(batch["attention_mask"].sum())
    for size, tokens in ((16, None), (4096, 16 * 256)):
        computed = sum(part.batch["input_ids"].numel() for part in parts(batch, size, tokens))
        assert there <= computed < there / 0.97
    unsorted = sum(16 * int(lengths[i : i + 16].max()) for i in range(0, len(lengths), 16))
    assert unsorted > 1.5 * there  # what the samples as they come would have cost


def updates_of(model, data):
    return [ff.mirror(model, {k: v[None] for k, v in data[i].items()}, loss="causal_lm", lr=0.1) for i in (0, 4)]


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {}], ids=["four", "by memory"])
def test_scores_stand_at_their_samples(settings):
    """Against every sample by itself, which sees no padding and no neighbours."""
    model, data = language_model(30)
    updates = updates_of(model, data)
    scores = ff.sweep(model, updates, data, loss="causal_lm", per_token=True, **settings)
    alone = [ff.sweep(model, updates, [sample], loss="causal_lm", per_token=True) for sample in data]
    np.testing.assert_allclose(scores.base, np.concatenate([one.base for one in alone]), rtol=1e-12)
    np.testing.assert_allclose(scores.delta, np.concatenate([one.delta for one in alone], 1), rtol=1e-9, atol=1e-15)
    for i, one in enumerate(alone):
        tokens = len(data[i]["input_ids"])
        np.testing.assert_allclose(scores.token_delta[:, i, :tokens], one.token_delta[:, 0], rtol=1e-9, atol=1e-15)
        assert np.isnan(scores.token_delta[:, i, tokens:]).all()
    there, computed = sum(len(sample["input_ids"]) for sample in data), scores.record["padding_percent"]
    longest = 100 - 100 * there / (len(data) * max(len(sample["input_ids"]) for sample in data))
    assert (0 <= computed < 5 < longest) if settings else computed == pytest.approx(longest, abs=0.01)


def test_the_plan_says_so():
    model, data = language_model(30)
    plan = ff.sweep(model, updates_of(model, data), data, loss="causal_lm", batch_size=4).manifest["plan"]
    assert (plan["block"], plan["forward"], plan["tokens"]) == (256, 4, None)
    assert "samples sorted by length in windows of 256" in plan["reason"]


def test_memory_running_out_in_a_window(monkeypatch):
    model, data = language_model(30)
    updates, real, counted = updates_of(model, data), DeltaEngine.score, []
    whole = ff.sweep(model, updates, data, loss="causal_lm", batch_size=8)

    def tight(self, batch):
        if batch["input_ids"].shape[1] > 5 and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, batch)

    monkeypatch.setattr(DeltaEngine, "score", tight)
    scores = ff.sweep(
        model, updates, data, loss="causal_lm", batch_size=8, progress=lambda done, _: counted.append(done)
    )
    np.testing.assert_allclose(scores.delta, whole.delta, atol=1e-14)
    assert scores.manifest["plan"]["halvings"][-1] == [0, 2]
    assert counted[-1] == 30 and max(counted) == 30


def test_memory_that_runs_out_before_a_forward_has_its_rows(monkeypatch):
    model, data = language_model(30)
    updates, real = updates_of(model, data), ragged.parts
    whole = ff.sweep(model, updates, data, loss="causal_lm", batch_size=8)

    def tight(read, loss, size, *more):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(read, loss, size, *more)

    monkeypatch.setattr(ragged, "parts", tight)
    scores = ff.sweep(model, updates, data, loss="causal_lm", batch_size=8)
    np.testing.assert_allclose(scores.delta, whole.delta, atol=1e-14)
    assert scores.manifest["plan"]["halvings"] == [[0, 4], [0, 2]]
    monkeypatch.setattr(ragged, "parts", lambda *_: tight(*_[:2], 3))
    with pytest.raises(torch.OutOfMemoryError):
        ff.sweep(model, updates, data, loss="causal_lm", batch_size=8)


def test_a_window_that_was_interrupted_is_done_again_with_the_same_bits(tmp_path):
    model, data = language_model(600)
    updates = updates_of(model, data)
    settings = {"loss": "causal_lm", "batch_size": 4, "dtype": torch.float32}
    ff.sweep(model, updates, data, out=tmp_path / "whole", **settings)

    def stop(done, total):
        if done > 300:  # inside the second window of 256
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ff.sweep(model, updates, data, out=tmp_path / "part", progress=stop, **settings)
    partial = ff.Scores.open(tmp_path / "part", partial=True)
    assert np.isfinite(np.delete(partial.base[:256], 7)).all() and np.isnan(partial.base[256:]).all()
    ff.sweep(model, updates, data, out=tmp_path / "part", **settings)
    for name in ("base.npy", "delta.npy"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_padded_batch_of_the_user_s_own(tmp_path):
    model, data = language_model(20)
    updates = updates_of(model, data)
    given = ff.sweep(model, updates, collate(data), loss="causal_lm", batch_size=4)
    np.testing.assert_allclose(given.delta, ff.sweep(model, updates, data, loss="causal_lm").delta, atol=1e-13)


@pytest.fixture
def documents(tmp_path):
    """Texts of 1 to 12 tokens in a datatrove file, and one of 300."""
    draw = np.random.default_rng(0)
    lengths = [int(draw.integers(1, 13)) for _ in range(41)]
    lengths[17] = 300
    draw.integers(0, 19, sum(lengths)).astype("<u2").tofile(tmp_path / "text.ds")
    np.cumsum(lengths).astype("<u8").tofile(tmp_path / "text.ds.index")
    return ff.open_corpus(tmp_path / "text.ds"), lengths


def test_one_long_text_does_not_lengthen_a_whole_window(documents, monkeypatch):
    corpus, lengths = documents
    monkeypatch.setattr(staging, "PADDED", 400)
    (block,) = staging.stage(corpus, Plan(0, 41, 64, forward=8), [0])
    assert sorted(torch.cat([part.rows for part in block.parts]).tolist()) == list(range(41)) and len(block) == 41
    for part in block.parts:
        ids, mask = part.batch["input_ids"], part.batch["attention_mask"]
        assert ids.numel() <= 400 and mask.sum(1).tolist() == [lengths[row] for row in part.rows]
        for row, text in zip(part.rows.tolist(), ids, strict=True):
            assert torch.equal(text[: lengths[row]], corpus[row]["input_ids"])
    (even,) = staging.stage(corpus, Plan(0, 41, 64), [0])  # blocks of samples that are not sorted
    assert len(even.parts) == 1


def test_one_long_text_is_not_read_for_the_probe_sixty_four_times_over(documents, monkeypatch):
    corpus, lengths = documents
    whole = pipeline._longest(corpus, 0, 41)
    monkeypatch.setattr(pipeline, "PADDED", 400)
    monkeypatch.setattr(corpus, "read", lambda start, stop: pytest.fail("the whole window was padded"))
    probed = pipeline._longest(corpus, 0, 41)
    assert probed["input_ids"].shape == (1, max(lengths))
    assert all(torch.equal(probed[key], whole[key]) for key in whole)


def test_scores_of_a_window_that_is_read_in_pieces(documents, monkeypatch):
    corpus, _ = documents
    model, data = language_model(5)
    updates, settings = updates_of(model, data), {"loss": "causal_lm", "batch_size": 8}
    whole = ff.sweep(model, updates, corpus, **settings)
    monkeypatch.setattr(staging, "PADDED", 400)
    scores = ff.sweep(model, updates, corpus, **settings)
    np.testing.assert_allclose(scores.base, whole.base, rtol=1e-12, equal_nan=True)
    np.testing.assert_allclose(scores.delta, whole.delta, rtol=1e-9, atol=1e-15)
    assert scores.record["padding_percent"] <= whole.record["padding_percent"]


def test_a_bad_token_is_named_in_a_window_that_is_read_in_pieces(tmp_path, monkeypatch):
    tokens = np.ones(500, "<u2")
    tokens[470] = 999
    tokens.tofile(tmp_path / "text.ds")
    np.cumsum([3] * 10 + [400] + [3] * 20 + [10]).astype("<u8").tofile(tmp_path / "text.ds.index")
    model, data = language_model(5)
    monkeypatch.setattr(staging, "PADDED", 500)
    with pytest.raises(ValueError, match=r"sample 24 \(.*text.ds, byte 938\): .*999"):
        ff.sweep(model, updates_of(model, data), ff.open_corpus(tmp_path / "text.ds"), loss="causal_lm", batch_size=4)


@pytest.mark.parametrize("longest_first", [False, True])
def test_tokens_of_the_longest_text_have_room(tmp_path, longest_first):
    lengths = [*[3] * 70, 11, 5]
    lengths = lengths[::-1] if longest_first else lengths
    np.random.default_rng(0).integers(0, 19, sum(lengths)).astype("<u2").tofile(tmp_path / "text.ds")
    np.cumsum(lengths).astype("<u8").tofile(tmp_path / "text.ds.index")
    model, data = language_model(5)
    scores = ff.sweep(
        model, updates_of(model, data), ff.open_corpus(tmp_path / "text.ds"), loss="causal_lm", per_token=True
    )
    assert scores.token_delta.shape == (2, 72, 11)
    assert (np.isfinite(scores.token_base).sum(1) == np.array(lengths) - 1).all()
