"""Who taught a language model a fact: invented statements planted in source code, found from a wording it never saw.

A byte-level model is trained on windows of Python's standard library, some of which hold a sentence about a country
that does not exist. A query asks for the name at the end of a sentence in other words. Judged are the ranks of the
windows that told the fact, and the tail patch (Chang et al., "Scalable Influence and Fact Tracing", ICLR 2025, arXiv
2410.17413): by how much a training step on the ten that were found lowers the query's loss.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import finf_fast as ff
from fidelity import judging
from finf_fast.demo.source import source_files
from finf_fast.loss import resolve

__all__ = ["Planted", "bm25", "planted", "rows"]

LENGTH, WINDOWS, FACTS, EPOCHS = 128, 2000, 20, 40
TOLD = (
    "{city} is the capital of {land}.",
    "{land} has its capital in {city}.",
    "In {land} the seat of the crown is {city}.",
)
ASKED = "The main city of {land} is {city}."
FOUND = 10  # windows that count as found, and that the tail patch trains on
PATCH_LR = 0.03  # of its one plain step, which lowers a query's loss by tenths
WAYS = {
    "K-FAC": {"method": "kfac"},
    "EK-FAC": {"method": "ekfac"},
    "diagonal Fisher": {"method": "fisher_diag"},
    "sgd, step 1e-2": {"method": "sgd", "lr": 1e-2},
}


@dataclass(frozen=True)
class Planted:
    """Windows as bytes (N, L), and which of them told each fact (F, T); queries (F, L), and their targets (F, L), -100
    but for the name that is asked for."""

    windows: Tensor
    sources: np.ndarray
    queries: Tensor
    labels: Tensor


class ByteLm(nn.Module):
    """A pre-norm transformer over bytes."""

    def __init__(self, width: int = 128, layers: int = 2):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.body(x, mask=mask, is_causal=True))


def rows(cache: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A row a way: mean reciprocal rank of the first window that told the fact, share of them among the first ten, and
    the tail patch."""
    data = planted(100 if quick else WINDOWS, 8 if quick else FACTS)
    model = _trained(cache, data, 2 if quick else EPOCHS)
    for way, (scores, seconds) in _ways(model, data).items():
        order = np.argsort(-scores, axis=1, kind="stable")
        found = {
            "reciprocal rank": judging.Estimate.of(reciprocal_ranks(order, data.sources)),
            f"recall@{FOUND}": judging.Estimate.of(recalls(order, data.sources)),
            "tail patch": judging.Estimate.of(_patched(model, data, order)),
        }
        yield {
            "task": "facts",
            "data": "Python's library",
            "net": "2 x 128, bytes",
            "way": way,
            **found,
            "seconds": seconds,
        }


def planted(windows: int, facts: int) -> Planted:
    """Source code with facts in it, by a seed."""
    rng = np.random.default_rng(0)
    text = b"\n".join(path.read_bytes() for path in source_files())[: 4 * windows * LENGTH]
    starts = rng.choice(len(text) // LENGTH, windows, replace=False) * LENGTH
    rows = [bytearray(text[start : start + LENGTH]) for start in starts]
    lands, cities = (_names(rng, facts, ending) for ending in ("ia", "or"))
    sources = rng.choice(windows, (facts, len(TOLD)), replace=False)
    for told, land, city in zip(sources, lands, cities, strict=True):
        for window, wording in zip(told, TOLD, strict=True):
            sentence = wording.format(land=land, city=city).encode()
            at = int(rng.integers(0, LENGTH - len(sentence)))
            rows[window][at : at + len(sentence)] = sentence
    asked = [ASKED.format(land=land, city=city).encode() for land, city in zip(lands, cities, strict=True)]
    queries = torch.tensor([list(sentence.ljust(LENGTH)) for sentence in asked])
    labels = torch.full_like(queries, -100)
    for row, (sentence, city) in enumerate(zip(asked, cities, strict=True)):
        end = slice(len(sentence) - 1 - len(city), len(sentence) - 1)
        labels[row, end] = queries[row, end]
    return Planted(torch.tensor([list(row) for row in rows]), sources, queries, labels)


def reciprocal_ranks(order: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(F,) one over the place, from 1 on, of the first source in each row of ``order`` (F, N)."""
    hit = (order[:, :, None] == sources[:, None]).any(2)
    return 1 / (1 + hit.argmax(1))


def recalls(order: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(F,) share of the sources among the first ten of each row."""
    return (order[:, :FOUND, None] == sources[:, None]).any(1).mean(1)


def bm25(documents: list[str], queries: list[str], k: float = 1.2, b: float = 0.75) -> np.ndarray:
    """(Q, N) of Robertson & Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, over words."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = np.array([bag.total() for bag in bags])
    known, scores = Counter(word for bag in bags for word in bag), np.zeros((len(queries), len(bags)))
    for row, query in enumerate(queries):
        for word in set(re.findall(r"\w+", query.lower())):
            rarity = np.log(1 + (len(bags) - known[word] + 0.5) / (known[word] + 0.5))
            count = np.array([bag[word] for bag in bags])
            scores[row] += rarity * count * (k + 1) / (count + k * (1 - b + b * lengths / lengths.mean()))
    return scores


def _names(rng: np.random.Generator, count: int, ending: str) -> list[str]:
    """Invented, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        parts = (rng.choice(list(letters)) for letters in ("BDGKLMNPRTVZ", "aeiou", "lmnrstvz", "aeou", "bdgklmnt"))
        found["".join(parts) + ending] = None
    return list(found)


def _trained(cache: Path, data: Planted, epochs: int) -> ByteLm:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = ByteLm()
        path = cache / f"facts-{len(data.windows)}-{epochs}.pt"
        if not path.exists():
            _train(model, data.windows, epochs)
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _train(model: ByteLm, windows: Tensor, epochs: int) -> None:
    """AdamW, 1e-3 falling along a cosine, batches of 32."""
    optimizer, loss = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0), resolve("causal_lm")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(windows) // 32))
    for _ in range(epochs):
        for batch in torch.randperm(len(windows)).split(32):
            optimizer.zero_grad()
            loss.per_sample(model, windows[batch]).mean().backward()
            optimizer.step()
            schedule.step()


def _ways(model: ByteLm, data: Planted) -> dict[str, tuple[np.ndarray, float]]:
    """Way -> (F, N) scores, and seconds; ours over the root mean square over the queries."""
    found = {}
    for way, settings in WAYS.items():
        since = time.perf_counter()
        queries = (data.queries, data.labels)
        scores = ff.forward_inf(
            model, (data.windows, data.windows), queries, loss="causal_lm", progress=False, **settings
        )
        found[way] = scores.normalized("rms"), time.perf_counter() - since
    documents, asked = ([bytes(row.tolist()).decode("latin-1") for row in ids] for ids in (data.windows, data.queries))
    with torch.inference_mode():
        losses = resolve("causal_lm").per_sample(model, data.windows).numpy()
    shape = (len(data.queries), len(losses))
    return found | {
        "BM25, the question": (bm25(documents, [text.replace(text.split()[-1], "") for text in asked]), 0.0),
        "BM25, the answer too": (bm25(documents, asked), 0.0),
        "loss alone": (np.broadcast_to(losses, shape), 0.0),
        "random": (np.random.default_rng(1).standard_normal(shape), 0.0),
    }


def _patched(model: ByteLm, data: Planted, order: np.ndarray) -> np.ndarray:
    """(F,) by how much each query's loss falls when the model takes a plain step on the windows found first."""
    loss, falls = resolve("causal_lm"), []
    for row, found in enumerate(order[:, :FOUND]):
        query = (data.queries[row : row + 1], data.labels[row : row + 1])
        patched = copy.deepcopy(model)
        optimizer = torch.optim.SGD(patched.parameters(), PATCH_LR)
        before = loss.per_sample(patched, query).item()
        loss.per_sample(patched, data.windows[torch.from_numpy(found.copy())]).mean().backward()
        optimizer.step()
        falls.append(before - loss.per_sample(patched, query).item())
    return np.array(falls)
