"""A sweep for another process to kill: `python interrupted_sweep.py FOLDER` writes its scores there, slowly."""

from __future__ import annotations

import sys
import time

import finf_fast as ff
from nets import mlp


def main(folder: str, pause: float) -> None:
    model, (x, y) = mlp(480)
    updates = [ff.mirror(model, (x[i : i + 1], y[i : i + 1]), lr=1e-2) for i in range(3)]

    def slowly(batch):
        time.sleep(pause)
        return batch

    corpus = ff.open_corpus((x, y), transform=slowly)
    print("ready", flush=True)
    ff.sweep(model, updates, corpus, out=folder, batch_size=8)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
