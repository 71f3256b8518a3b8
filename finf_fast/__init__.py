"""finf_fast: which training samples stand behind a model's answer, by forward passes only."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").exists():  # a checkout: kernels/ and bench/ lie beside this package
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

from finf_fast import loss, ops
from finf_fast.corpus import Corpus, open_corpus
from finf_fast.delta import NotCarried
from finf_fast.fitting import fit_factors
from finf_fast.lowrank import LowRank
from finf_fast.mirrors import Factors, mirror
from finf_fast.pipeline import forward_inf, sweep
from finf_fast.records import BadSample, DamagedFile, ManifestMismatch, NonFiniteLoss, TopK, UnsavedFactors
from finf_fast.scores import Scores
from finf_fast.update import Update

__all__ = [
    "BadSample",
    "Corpus",
    "DamagedFile",
    "Factors",
    "LowRank",
    "ManifestMismatch",
    "NonFiniteLoss",
    "NotCarried",
    "Scores",
    "TopK",
    "UnsavedFactors",
    "Update",
    "fit_factors",
    "forward_inf",
    "loss",
    "mirror",
    "open_corpus",
    "ops",
    "sweep",
]
