"""Scores on disk or in memory: written block by block, resumed after any interruption, read without copying.

A result folder holds

    manifest.json                 what was scored, with what, cut how (see ``manifest.py``)
    base.npy         (S,)         loss of each sample before the step
    delta.npy        (S,Q)        loss after minus loss before; sample-major, because a block is then one run of bytes
    token_base.npy   (S,T)        the same per token, on request; NaN where there is no token
    token_delta.npy  (S,T,Q)
    done                          one byte a block of the plan: 1 when its bytes are in the arrays for good
    lock                          held by the one process that writes

All arrays are plain ``.npy`` files: ``numpy.load(..., mmap_mode="r")`` reads them without this library.
"""

from finf_fast.scores.result import Scores
from finf_fast.scores.store import Store, earlier, open_store

__all__ = ["Scores", "Store", "earlier", "open_store"]
