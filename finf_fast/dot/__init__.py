"""``engine="dot"``: the change of every loss to first order, by one backward pass over activations.

For many queries it costs a fraction of carrying each of them through the model, and gives a derivative where
:mod:`finf_fast.delta` gives the change itself: asked for, never chosen.
"""

from finf_fast.dot.engine import DotEngine

__all__ = ["DotEngine"]
