"""Made-up scores for the tests of the result folder: a small shard of a corpus, three queries, a ragged last block."""

from __future__ import annotations

import numpy as np

from finf_fast.records import Plan
from finf_fast.scores import open_store

IDENTITY = {
    "versions": {"finf_fast": "0.1", "torch": "2.13"},
    "fingerprints": {"model": "ab12", "updates": ["cd", "ef", "01"]},
    "settings": {"engine": "pair", "loss": "cross_entropy"},
}
DIRECTIONS = ("ascent", "descent", "ascent")
START, STOP, BLOCK, CORPUS = 7, 60, 8, 100  # the last block is ragged
PLAN = Plan(START, STOP, BLOCK, reason="8 samples fill the cache")
SAMPLES, QUERIES, TOKENS = STOP - START, 3, 5


def numbers(dtype=np.float32, samples=CORPUS):
    """base (S,) and delta (S,Q) of a whole corpus; a shard takes its rows, so merged shards must give these back."""
    rng = np.random.default_rng(5)
    return rng.normal(size=samples).astype(dtype), rng.normal(size=(samples, QUERIES)).astype(dtype)


def start(out, plan=PLAN, identity=IDENTITY, dtype=np.float32, **options):
    options = {"directions": DIRECTIONS, "corpus_samples": CORPUS, **options}
    return open_store(out, identity, plan, QUERIES, dtype, **options)


def put(writer, blocks=None, dtype=np.float32):
    base, delta = numbers(dtype)
    for number in writer.missing() if blocks is None else blocks:
        rows = slice(*writer.plan.rows(number))
        writer.write(number, base[rows], delta[rows])


def finished(out, plan=PLAN, dtype=np.float32, record=None, **options):
    with start(out, plan, dtype=dtype, **options) as writer:
        put(writer, dtype=dtype)
        return writer.finish(record)
