"""Between rivals measurements choose, and without them the order of the table; the way from the suite's file to it."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from finf_fast.bench import measured_faces
from finf_fast.ops import dispatch, measured
from finf_fast.ops.measured_rows import ROWS

OP = "linear_cross_entropy_delta"
SIZES = {"T": 8192, "D": 768, "V": 50257, "Q": 1}


def row(triton, hybrid, form="input", architecture=90, **sizes):
    place = {"op": OP, "architecture": architecture, "device": "X", "form": form, "dtype": "bfloat16"}
    return {**place, **SIZES, **sizes, "ms": {"triton": triton, "hybrid": hybrid}}


def fastest(rows, form="input", architecture=90, dtype="bfloat16", **sizes):
    return measured.fastest(OP, architecture, measured.case_of(form, dtype, **(SIZES | sizes)), rows)


def test_the_faster_one_of_what_was_measured():
    assert fastest([row(2.0, 1.0)]) == "hybrid" and fastest([row(1.0, 2.0)]) == "triton"


def test_nothing_measured_says_nothing():
    assert fastest([]) is None


@pytest.mark.parametrize(
    "other",
    [{"form": "dense"}, {"architecture": 80}, {"dtype": "float32"}, {"T": 1024}, {"D": 4096}, {"V": 1000}, {"Q": 8}],
    ids=str,
)
def test_a_case_far_off_says_nothing(other):
    assert fastest([row(2.0, 1.0)], **other) is None


@pytest.mark.parametrize(
    "other", [{"T": 4096}, {"T": 16384}, {"D": 1024}, {"D": 1500}, {"V": 128256}, {"Q": 2}], ids=str
)
def test_a_neighbour_speaks_for_a_case(other):
    assert fastest([row(2.0, 1.0)], **other) == "hybrid"


def test_of_two_the_nearer_one_speaks():
    rows = [row(1.0, 2.0, T=4096), row(2.0, 1.0)]
    assert fastest(rows) == "hybrid" and fastest(rows, T=4000) == "triton"


def test_what_is_said_of_measurements():
    assert measured.summary(None, []) == "not measured on any device yet"
    assert measured.summary(90, [row(1.0, 2.0, architecture=80)]) == "not measured on this device yet"
    assert measured.summary(90, [row(1.0, 2.0), row(1.0, 2.0, form="dense")]) == "measured on X (sm_90): 2 cases"


def test_the_faces_say_whether_they_were_measured(monkeypatch):
    monkeypatch.setenv("FINF_BACKEND", "hybrid")
    verdicts = {v.face: v for v in dispatch.faces(OP)}
    assert verdicts["hybrid"].available and verdicts["hybrid"].reason.endswith(measured.summary())
    assert "measured" not in verdicts["reference"].reason


@pytest.fixture
def gpu(monkeypatch):
    """Both rivals available, as on a GPU of architecture 90."""
    there = [dispatch.Verdict(face, True, "") for face in ("triton", "hybrid", "reference")]
    monkeypatch.delenv("FINF_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "faces", lambda *inputs, width: there)
    monkeypatch.setattr(dispatch, "_architecture", lambda device: 90)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    return monkeypatch


def chosen(case=None):
    return dispatch.choose(OP, torch.zeros(1), case=case or measured.case_of("input", "bfloat16", **SIZES))


def test_without_measurements_the_order_of_the_table(gpu, caplog):
    gpu.setattr(measured, "fastest", lambda *given: None)
    gpu.setattr(measured, "summary", lambda architecture: f"nothing on {architecture}")
    with caplog.at_level(logging.INFO, "finf_fast"):
        assert chosen() == "triton"
    assert "its triton face (triton and hybrid: nothing on 90)" in caplog.text


def test_the_faster_one_runs_case_by_case(gpu, caplog):
    gpu.setattr(measured, "fastest", lambda op, architecture, case: "hybrid" if case.Q else "triton")
    with caplog.at_level(logging.INFO, "finf_fast"):
        assert chosen(measured.case_of("input", "bfloat16", **SIZES | {"Q": 4})) == "hybrid"
    assert "its hybrid face (the faster one, as measured)" in caplog.text
    assert chosen() == "triton"
    assert dispatch.chosen() == {OP: "hybrid,triton"}


def test_what_is_asked_for_by_name_is_not_overruled(gpu):
    gpu.setattr(measured, "fastest", lambda *given: "hybrid")
    gpu.setenv("FINF_BACKEND", "triton")
    assert chosen() == "triton"


def test_the_only_one_that_is_there_needs_no_measurement(gpu):
    only = [dispatch.Verdict("triton", False, "no triton"), dispatch.Verdict("hybrid", True, "")]
    gpu.setattr(dispatch, "faces", lambda *inputs, width: only)
    gpu.setattr(measured, "fastest", lambda *given: pytest.fail("looked up"))
    assert chosen() == "hybrid"


def test_the_table_names_rivals_of_the_operation_alone():
    for entry in ROWS:
        assert set(entry["ms"]) == set(dispatch.RIVALS[entry["op"]]) and min(entry["ms"].values()) > 0
        measured.case_of(entry["form"], entry["dtype"], **{letter: entry[letter] for letter in "TDVQ"})
    for op, rivals in dispatch.RIVALS.items():
        assert set(rivals) <= set(dispatch.TABLE[op])


# From the suite's file to the table.
def record(*rows, **other):
    return {"dry_run": False, "about": {"device": "NVIDIA X", "capability": "9.0"}, "rows": list(rows)} | other


def timed(**other):
    of = {"form": "input", "dtype": "bfloat16", **SIZES}
    return {
        "op": OP,
        "face": "triton",
        "ms": 2.0,
        "times": {"eager": 3.0, "hybrid": 0.5},
        "notes": {},
        "of": of,
    } | other


def test_a_record_becomes_rows():
    (found,) = measured_faces.found(record(timed(), {"op": "noise", "of": {}, "notes": {}}))
    assert found == {**row(2.0, 1.0), "device": "NVIDIA X"}


@pytest.mark.parametrize("other", [{"times": {"eager": 3.0}}, {"face": "reference"}], ids=str)
def test_a_case_without_one_of_the_rivals_is_no_comparison(other):
    assert measured_faces.found(record(timed(**other))) == []
    lost = {"op": OP, "notes": {"ours": "failed"}, "of": timed()["of"]}
    assert measured_faces.found(record(lost)) == []


@pytest.mark.parametrize("other", [{"dry_run": True}, {"about": {"device": "a processor"}}], ids=str)
def test_what_no_gpu_measured_is_refused(other):
    with pytest.raises(ValueError, match=r"record: wanted one of a"):
        measured_faces.found(record(timed(), **other))


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    path, table = tmp_path / "x.json", tmp_path / "rows.py"
    path.write_text(json.dumps(record(timed(), timed(of=timed()["of"] | {"form": "dense"}))))
    monkeypatch.setattr(measured_faces, "TABLE", table)
    monkeypatch.setattr(measured_faces, "ROWS", [{**row(9.0, 8.0), "device": "NVIDIA X"}, row(7.0, 6.0)])
    monkeypatch.setattr("sys.argv", ["measured_faces.py", str(path)])
    measured_faces.main()
    read = {}
    exec(table.read_text(), read)
    assert [(entry["device"], entry["form"], entry["ms"]["hybrid"]) for entry in read["ROWS"]] == [
        ("NVIDIA X", "dense", 1.0),
        ("NVIDIA X", "input", 1.0),  # the new one
        ("X", "input", 6.0),
    ]
    assert max(map(len, table.read_text().splitlines())) <= 120
    assert fastest(read["ROWS"], form="dense") == "hybrid"


def test_an_empty_table_is_the_one_that_is_there():
    if not ROWS:
        assert measured_faces.written(ROWS) == measured_faces.TABLE.read_text()
