"""What the demo finds, as rows: how often each way of scoring put the planted source first or among the first five.

    python bench/bench_demo.py [--demos digits text] [--save]

There is nothing to time here; the demo's own training and sweeps take about two minutes on two cores.
"""

from __future__ import annotations

import tempfile

import table
from finf_fast import demo


def rows(name: str) -> list[dict[str, object]]:
    """One row a way; where near duplicates were planted, the demo's own way also counts those in the first five."""
    with tempfile.TemporaryDirectory() as folder:
        (result,) = demo.run(name, folder)
    count = len(result.found)
    near = [found.near for found in result.found if found.near is not None]
    found = []
    for way in result.ways:
        shares = (*way.raw, *way.over_spread)
        top1, top5, spread_top1, spread_top5 = (round(share * count) for share in shares)
        row = {"case": name, "way": way.name, "queries": count, "top1": top1, "top5": top5}
        found.append({**row, "top1_over_spread": spread_top1, "top5_over_spread": spread_top5})
    found[0]["shown_top1"] = sum(one.rank == 1 for one in result.found)
    if near:
        found[0]["near_top5"] = sum(rank <= 5 for rank in near)
    return found


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--demos", nargs="+", default=list(demo.DEMOS), choices=list(demo.DEMOS))
    options = options.parse_args(argv)
    found = [row for name in options.demos for row in rows(name)]
    for row in found:
        print(" | ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        print(f"saved to {table.append('demo', found, table.machine.describe())}")


if __name__ == "__main__":
    main()
