"""What long work tells: a bar at a terminal, lines elsewhere when asked for, nothing otherwise."""

from __future__ import annotations

import re

import pytest

from finf_fast import progress
from finf_fast.progress import Progress


@pytest.fixture
def told(monkeypatch, capsys):
    """What is written of ten steps of one second each, by a clock that is set."""

    def work(show):
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        with Progress(1000, "scoring", show) as bar:
            for _ in range(10):
                now[0] += 10.0
                bar.advance(100)
        return capsys.readouterr().err

    return work


def test_lines_where_there_is_no_terminal(told):
    lines = told(True).splitlines()
    assert lines[0] == "scoring: 100 of 1,000, 10.0/s, 90 s left"
    assert [re.search(r"([\d,]+) of", line)[1] for line in lines] == ["100", "500", "900"]


def test_nothing_unless_it_is_asked_for(told):
    assert told(None) == told(False) == ""
