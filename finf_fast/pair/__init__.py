"""Stage 4, the model, the plain way: a forward as it is and a forward of each updated model, subtracted at the output.

``engine="pair"`` is kept for good as the check on all others.
"""

from finf_fast.pair.engine import PairEngine

__all__ = ["PairEngine"]
