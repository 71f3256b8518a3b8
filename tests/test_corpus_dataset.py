"""Corpora of map-style datasets: joined as DataLoader joins, dicts padded, what cannot be joined refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

import finf_fast as ff
from finf_fast.corpus import open_corpus


class Samples(Dataset):
    """A dataset that counts what is asked of it."""

    def __init__(self, samples):
        self.samples, self.asked = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.samples[index]


def pictures(count=6):
    return [(torch.full((1, 2, 2), float(i)), i % 3) for i in range(count)]


def texts(*lengths, **more):
    return [{"input_ids": torch.arange(1, n + 1), **{key: value[:n] for key, value in more.items()}} for n in lengths]


def test_tuples_are_joined_as_dataloader_joins_them():
    dataset = Samples(pictures())
    corpus = open_corpus(dataset)
    assert (corpus.format, len(corpus)) == ("dataset", 6)
    x, y = corpus.read(2, 5)
    wanted = default_collate(pictures()[2:5])
    assert torch.equal(x, wanted[0]) and torch.equal(y, wanted[1]) and dataset.asked == [2, 3, 4]
    assert corpus[-1][1].item() == 2 and corpus[-1][0].shape == (1, 2, 2)


def test_single_tensors_numbers_and_numpy_arrays():
    assert open_corpus([1, 2, 3]).read(0, 3).tolist() == [1, 2, 3]
    assert open_corpus(Samples([torch.ones(2)] * 3)).read(0, 2).shape == (2, 2)
    x, y = open_corpus(Samples([(np.ones(3, np.float32), np.int32(4))] * 3)).read(0, 2)
    assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_lists_of_tokens_are_padded_on_the_right():
    samples = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_type_ids": [1, 1, 1]},
        {"input_ids": [8], "labels": [8], "token_type_ids": [1]},
        {"input_ids": [], "labels": [], "token_type_ids": []},
    ]
    batch = open_corpus(samples).read(0, 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100], [-100, -100, -100]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("mask", [False, True])
def test_empty_texts_alone_are_padded_too(mask):
    """A model makes no logits of rows of no tokens."""
    sample = {"input_ids": [], "labels": []} | ({"attention_mask": []} if mask else {})
    batch = open_corpus([sample] * 3).read(0, 3)
    assert batch["input_ids"].tolist() == [[0]] * 3 and batch["labels"].tolist() == [[-100]] * 3
    assert batch["attention_mask"].tolist() == [[0]] * 3


def test_an_empty_text_at_the_front_stays_an_integer():
    batch = open_corpus([{"input_ids": []}, {"input_ids": [4]}]).read(0, 2)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].tolist() == [[0], [4]]


def test_a_mask_that_is_given_is_padded_and_labels_stay_absent():
    samples = [
        {"input_ids": torch.tensor([1, 2]), "attention_mask": torch.tensor([1, 1])},
        {"input_ids": torch.tensor([3, 4, 5]), "attention_mask": torch.tensor([0, 1, 1])},
    ]
    batch = open_corpus(samples).read(0, 2)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [0, 1, 1]]


def test_keys_do_not_depend_on_the_batch():
    corpus = open_corpus(Samples(texts(3, 3, 5, 3)))
    assert set(corpus.read(0, 2)) == set(corpus.read(2, 3)) == set(corpus.read(0, 4)) == {"input_ids", "attention_mask"}
    assert corpus.read(0, 2)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert set(open_corpus(Samples(texts(4, 4, 4))).read(0, 2)) == {"input_ids"}


def test_a_longer_text_among_many_is_masked_when_it_comes():
    lengths = [4] * 1000
    lengths[500] = 6
    corpus = open_corpus(Samples(texts(*lengths)))
    assert corpus.read(498, 502)["attention_mask"].sum(1).tolist() == [4, 4, 6, 4]


def test_labels_of_another_length_than_the_input_are_padded_on_their_own():
    samples = [
        {"input_ids": [1, 2], "labels": [3]},
        {"input_ids": [4, 5], "labels": [6, 7, 8]},
    ]
    batch = open_corpus(samples).read(0, 2)
    assert batch["labels"].tolist() == [[3, -100, -100], [6, 7, 8]] and batch["input_ids"].shape == (2, 2)
    assert "attention_mask" not in batch


def test_dicts_of_pictures_are_stacked():
    samples = [{"pixel_values": torch.ones(3, 4, 4), "labels": i} for i in range(4)]
    batch = open_corpus(samples).read(1, 3)
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["labels"].tolist() == [1, 2]


def test_a_collate_fn_is_used_instead():
    corpus = open_corpus(Samples(pictures()), collate_fn=lambda samples: {"y": torch.tensor([y for _, y in samples])})
    assert corpus.read(0, 4)["y"].tolist() == [0, 1, 2, 0]
    array = open_corpus(torch.arange(6), collate_fn=torch.stack)
    assert array.format == "dataset" and array.read(2, 4).tolist() == [2, 3]


def test_a_transform_comes_last():
    corpus = open_corpus(Samples(pictures()), transform=lambda batch: (batch[0] + 1, batch[1]))
    assert corpus.read(0, 1)[0].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    "samples, error, words",
    [
        ([], ValueError, "empty corpus"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], ValueError, "source: wanted samples of one shape"),
        ([{"a": 1}, {"b": 1}], ValueError, r"source: wanted the keys \['a'\] in every sample, got \['b'\]"),
        (
            [{"a": torch.zeros(2, 2)}, {"a": torch.zeros(3, 2)}],
            ValueError,
            r"\['a'\]: wanted one shape, or one dimension",
        ),
        (
            [{"text": "hello"}, {"text": "you"}],
            TypeError,
            r"\['text'\]: wanted a tensor, .*, got str; leave the column",
        ),
        ([{"x": None}, {"x": None}], TypeError, r"\['x'\]: wanted a tensor, .*, got NoneType"),
        (["hello", "you"], TypeError, "source: wanted a batch of tensors back"),
        ([object(), object()], TypeError, "object"),
    ],
)
def test_samples_that_cannot_be_joined_are_refused(samples, error, words):
    with pytest.raises(error, match=words):
        open_corpus(Samples(samples)).read(0, 2)


@pytest.mark.parametrize(
    "collate_fn, error, words",
    [
        (lambda samples: torch.zeros(1), ValueError, r"collate_fn: wanted 3 samples back, got shape \(1,\)"),
        (lambda samples: "done", TypeError, "collate_fn: wanted a batch of tensors back"),
        (5, TypeError, "collate_fn: wanted a callable"),
    ],
)
def test_a_collate_fn_that_does_not_join_is_refused(collate_fn, error, words):
    with pytest.raises(error, match=words):
        open_corpus(Samples(pictures()), collate_fn=collate_fn).read(0, 3)


def test_an_error_inside_the_dataset_passes_through_and_names_the_sample():
    class Broken(Samples):
        def __getitem__(self, index):
            if index == 4:
                raise KeyError("no such picture")
            return super().__getitem__(index)

    with pytest.raises(KeyError, match="no such picture") as caught:
        open_corpus(Broken(pictures())).read(0, 6)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["while the dataset made sample 4"]


def test_a_fingerprint_looks_at_a_few_samples_only():
    dataset = Samples(pictures(1000))
    first = open_corpus(dataset).fingerprint
    assert len(dataset.asked) == 64 and {0, 999} <= set(dataset.asked)
    assert open_corpus(Samples(pictures(1000))).fingerprint == first
    others = [Samples(pictures(999)), Samples(pictures(1000)), Samples([(x, y + 1) for x, y in pictures(1000)])]
    others[1].samples[999] = (torch.zeros(1, 2, 2), 0)
    marks = {open_corpus(other).fingerprint for other in others}
    assert len(marks) == 3 and first not in marks


def test_the_description_says_how_samples_are_joined():
    words = open_corpus(Samples(texts(3, 4)), collate_fn=None).describe()
    assert words["dataset"].endswith("Samples") and words["collate_fn"] is None
    assert words["shapes"] == {"input_ids": [3], "attention_mask": [3]}
    assert open_corpus(Samples(texts(3, 4))).locate(1) == "sample 1"


def packed(rows, length):
    """Rows of two texts each, told apart by where their positions begin again."""
    draw = np.random.default_rng(0)
    cuts = [1 + i % (length - 2) for i in range(rows)]
    return [{"input_ids": draw.integers(0, 19, length), "position_ids": np.r_[:cut, : length - cut]} for cut in cuts]


@pytest.mark.parametrize("engine", ["delta", "pair", "dot"])
def test_packed_rows_are_scored_as_their_texts_are(engine):
    transformers = pytest.importorskip("transformers", "4.53")  # from where on positions are looked at
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=19, pad_token_id=0, **small)).eval()
    samples, truth = packed(6, 12), []
    for sample in samples:
        ids, cut = torch.from_numpy(sample["input_ids"]), int((sample["position_ids"][1:] == 0).argmax()) + 1
        with torch.no_grad():
            z = torch.cat([model(text[None]).logits[0] for text in ids.tensor_split([cut])])
        truth.append(float(torch.nn.functional.cross_entropy(z[:-1], ids[1:])))
    updates = [ff.mirror(model, torch.from_numpy(samples[0]["input_ids"])[None], loss="causal_lm")]
    scores = ff.sweep(model, updates, samples, loss="causal_lm", engine=engine)
    assert np.abs(scores.base - truth).max() < 1e-5


def test_no_mask_is_made_over_several_texts_in_a_row():
    """Neither where this batch would be padded nor where another one is."""
    rows = packed(4, 6)
    ragged = [{key: row[: 4 + i % 2] for key, row in sample.items()} for i, sample in enumerate(rows)]
    for samples in (ragged, [*ragged[:2], *rows[2:]]):
        with pytest.raises(ValueError, match="source: wanted rows of one length where position_ids restart"):
            open_corpus(samples).read(len(samples) - 2, len(samples))
    plain = [{"input_ids": np.arange(n), "position_ids": np.arange(n)} for n in (3, 5)]
    assert open_corpus(plain).read(0, 2)["attention_mask"].sum(1).tolist() == [3, 5]
