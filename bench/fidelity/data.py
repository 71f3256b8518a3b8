"""Images that every run of the bench sees alike: scikit-learn's digits, and Fashion-MNIST from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import finf_fast as ff

__all__ = ["DEBIAN", "Images", "digits", "fashion"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels over 255


@dataclass(frozen=True)
class Images:
    """x (N, 1, H, W) float32 and y (N,) int64, to train on; the same for images that were held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def drawn(self, train: int, held: int, seed: int) -> Images:
        """So many of each, by a seed."""
        generator = torch.Generator().manual_seed(seed)
        a = torch.randperm(len(self.x), generator=generator)[:train]
        b = torch.randperm(len(self.held_x), generator=generator)[:held]
        return Images(self.x[a], self.y[a], self.held_x[b], self.held_y[b])

    def as_stored(self) -> Images:
        """Fashion-MNIST's pixels over 255."""
        return Images(self.x * STD + MEAN, self.y, self.held_x * STD + MEAN, self.held_y)


def digits(train: int = 1000) -> Images:
    """1,797 images of 8 x 8 pixels in [0, 1], shuffled; the first ``train`` are to train on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(found.target)[order]
    return Images(x[:train], y[:train], x[train:], y[train:])


def fashion(folder: Path) -> Images | None:
    """60,000 and 10,000 images of 28 x 28 pixels, normalised; None where the folder has not the four files."""
    pairs = []
    for part in ("train", "t10k"):
        found = [sorted(folder.glob(f"{part}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")]
        if not all(found):
            return None
        corpus = ff.open_corpus(found[0][0], labels=found[1][0], mean=[MEAN], std=[STD], cache="runs/fidelity/unpacked")
        pairs.append(corpus.read(0, len(corpus)))
    (x, y), (held_x, held_y) = pairs
    return Images(x.reshape(-1, 1, 28, 28), y, held_x.reshape(-1, 1, 28, 28), held_y)
