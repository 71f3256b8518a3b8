"""The GPU suite without a GPU: all of it in a dry run, and that it hides neither a failure nor what did not fit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from finf_fast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu_cases
import gpu_suite
import gpu_tests
from gpu_suite import Part, Run, Suite

SCRIPT = Path(gpu_suite.__file__)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """What the dry run wrote; it has three times as long as on a device, for two busy cores compile as slowly."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("suite")
    budget = 3 * gpu_suite.BUDGET
    command = [sys.executable, SCRIPT, "--dry-run", "--budget", str(budget), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=budget + 80)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    assert path.name.startswith("dry-run-") and str(path) in done.stdout.splitlines()[-1]
    return json.loads(path.read_text())


@pytest.mark.prove
def test_every_part_was_gone_through(dry_run):
    states = {part["name"]: part["state"] for part in dry_run["parts"]}
    assert states.pop("sanitizer") == "not run"
    assert dry_run["parts"][-1]["note"] == "a dry run has no device; its tests are there"
    assert list(states) == ["build", "few tests", "operations", "sweep", "all tests"]
    assert set(states.values()) == {"passed"}, dry_run["parts"]


@pytest.mark.prove
def test_every_operation_was_timed_on_the_face_meant(dry_run):
    faces = {}
    for row in dry_run["rows"]:
        assert row["ms"] > 0 and not row["notes"].get("ours"), row
        if row["op"] != "sweep":
            faces.setdefault(row["op"], set()).add(row["face"])
            assert row["times"] and ("percent_of_gemm" in row) != ("percent_of_copy" in row), row
    assert faces == {
        op: {next(face for face in ("triton", "cpp", "reference") if face in row)} for op, row in dispatch.TABLE.items()
    }
    swept = [row["case"].partition(" bf16") for row in dry_run["rows"] if row["op"] == "sweep"]
    assert [net.split()[0] for net, _, _ in swept] == ["gpt2", "resnet18", "gpt2", "gpt2"]
    assert [how for _, _, how in swept] == ["", "", " to first order", " with graphs"]


@pytest.mark.prove
def test_the_file_says_where_it_was_measured(dry_run):
    assert {"device", "torch", "triton", "commit", "finf_fast", "cuda"} <= set(dry_run["about"]) and dry_run["date"]
    assert dry_run["peaks"]["gemm_tflops"] > 0 and dry_run["peaks"]["copy_gb_per_s"] > 0


def test_a_part_that_raises_leaves_the_others_their_turn():
    def broken(suite, limit, part):
        raise OSError("no such tool")

    suite = Suite(60, True, ["build", "sweep"])
    suite.part("build", broken)
    suite.part("sweep", gpu_suite.sweep)
    assert [part.state for part in suite.parts] == ["failed", "not run"]
    assert suite.parts[0].note == "OSError: no such tool"


VERBOSE = """tests/test_a.py::test_x[triton-float32-1] PASSED                 [ 33%]
tests/test_a.py::test_x[triton-a value with spaces] FAILED       [ 66%]
tests/test_a.py::test_y[cuda] SKIPPED (no CUDA device)           [100%]
"""


def judged(*runs):
    part = Part("tests")
    given = {f"test_{n}.py": run for n, run in enumerate(runs)}
    part.found = {name: gpu_tests.counted(run) for name, run in given.items()}
    gpu_tests.judge(part, given)
    return part


def test_failures_are_counted_and_named():
    part = judged(Run(1, VERBOSE, ""))
    assert part.state == "failed" and part.note == "1 passed; 1 failed; 1 skipped; all skipped: tests/test_a.py cuda"
    assert part.found["test_0.py"]["broken"] == ["tests/test_a.py::test_x[triton-a value with spaces]"]


@pytest.mark.parametrize(
    "code, out, state",
    [
        (0, "a.py::t[triton] PASSED", "passed"),
        (0, "a.py::t[triton] SKIPPED (no CUDA device)", "failed"),
        (gpu_tests.NO_TESTS, "", "failed"),
        (None, "a.py::t[triton] PASSED", "out of time"),
        (134, "a.py::t[triton] PASSED", "failed"),  # the process died
        (99, "a.py::t[triton] PASSED", "failed"),  # the sanitizer's exit code
    ],
)
def test_only_what_ran_to_its_end_has_passed(code, out, state):
    assert judged(Run(code, out, "")).state == state


def test_a_face_of_which_every_test_was_skipped_has_failed():
    """Whatever else passed, of its file or of others: a face that is not there must not look like one that ran."""
    ran = Run(0, "tests/test_a.py::t[triton-1] PASSED\ntests/test_a.py::t[hybrid-1] SKIPPED (_cuda not built)", "")
    whole = Run(0, "tests/test_b.py::u SKIPPED (no CUDA device)", "")
    part = judged(ran, whole)
    assert part.state == "failed"
    assert "all skipped: tests/test_a.py hybrid, tests/test_b.py" in part.note
    some = Run(0, "tests/test_a.py::t[triton-1] PASSED\ntests/test_a.py::t[triton-2] SKIPPED (no such case)", "")
    assert judged(some).state == "passed"


@pytest.mark.parametrize(
    "note, state",
    [
        ("", "passed"),
        ("not run: no time left", "out of time"),
        ("failed: RuntimeError", "failed"),
        ("not there: cuda: _cuda not built", "failed"),
    ],
)
def test_an_operation_that_could_not_be_timed_is_told_of(note, state):
    assert gpu_suite.state_of([{"notes": {}}, {"notes": {"ours": note}}], broken=False) == state


@pytest.mark.parametrize("dry, state", [(False, "failed"), (True, "passed")])
def test_a_build_without_the_cuda_kernels_has_failed(monkeypatch, dry, state):
    """As where nvcc is missing: setup.py leaves them out, and ends well."""

    def python(*words, limit, **more):
        return Run(1, "", "No module named finf_fast._cuda") if "_cuda" in words[-1] else Run(0, "", "")

    suite, part = Suite(60, dry), Part("build")
    monkeypatch.setattr(suite, "python", python)
    gpu_suite.build(suite, 60, part)
    assert part.state == state


# What each test asks of an operation's face is in its name, which a rename would quietly take out of the choice.
@pytest.mark.parametrize("table", ["FIRST", "SANITIZED"])
def test_every_operation_has_tests_that_are_there(table):
    chosen, part = getattr(gpu_tests, table), Part("few tests")
    assert gpu_suite.found_all(Suite(60, dry=True), chosen, 120, part), part.note
    on_gpu = {op: {"triton", "cuda"} & row.keys() for op, row in dispatch.TABLE.items()}
    assert chosen.keys() == {op for op, faces in on_gpu.items() if faces}
    for op, tests in chosen.items():
        assert all(any(f"[{face}-" in test for test in tests) for face in on_gpu[op]), op
    in_triton = [tests for op, tests in chosen.items() if "triton" in on_gpu[op]]
    assert all("[triton-bfloat16" in tests[0] for tests in in_triton)


def test_a_test_that_is_not_there_fails_the_dry_run(monkeypatch):
    wrong = {"noise": ("test_no_such_thing[cuda-int64]",)}
    monkeypatch.setattr(gpu_suite, "SANITIZED", wrong)
    suite, part = Suite(60, dry=True), Part("sanitizer")
    gpu_suite.sanitizer(suite, 60, part)
    assert part.state == "failed" and "no such tests: tests/test_noise.py::test_no_such_thing[cuda-int64]" in part.note


def sanitized_by(monkeypatch, process):
    """The sanitizer's part where compute-sanitizer is what `process` plays."""
    suite, part = Suite(60, dry=False), Part("sanitizer")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: name)
    monkeypatch.setattr(suite, "process", process)
    gpu_suite.sanitizer(suite, 60, part)
    return part


def passing(command):
    return Run(0, "\n".join(f"{word} PASSED [1%]" for word in command if "::" in word), "ERROR SUMMARY: 0 errors")


def test_the_sanitizer_goes_through_every_operation_and_looks_for_races(monkeypatch):
    commands = []
    part = sanitized_by(monkeypatch, lambda command, limit, **more: (commands.append(command), passing(command))[1])
    assert part.state == "passed", part.note
    told = {
        command[command.index("--tool") + 1]: " ".join(command) for command in commands if "test_noise" in str(command)
    }
    assert told.keys() == {"memcheck", "racecheck", "synccheck"}
    assert all(f"test_{op}.py" in told["racecheck"] for op, row in dispatch.TABLE.items() if "cuda" in row)
    assert all(f"test_{op}.py::" in str(commands) for op in gpu_tests.SANITIZED)


def test_an_operation_that_the_sanitizer_saw_nothing_of_has_failed(monkeypatch):
    def process(command, limit, **more):
        return passing([word for word in command if "test_topk_merge" not in word])

    part = sanitized_by(monkeypatch, process)
    assert part.state == "failed" and "nothing passed of memcheck cuda topk_merge" in part.note


def test_one_file_that_did_not_fit_is_told_of():
    part = judged(Run(0, "a.py::t[triton] PASSED", ""), None)
    assert part.state == "out of time" and "not finished: test_1.py" in part.note


def test_a_process_past_its_limit_is_ended_and_its_words_kept():
    suite, since = Suite(60, dry=True), time.monotonic()
    done = suite.python("-c", "import time; print('begun', flush=True); time.sleep(60)", limit=1)
    assert done.code is None and done.out == "begun\n" and time.monotonic() - since < 20


def test_a_process_that_cannot_be_ended_is_left_behind(monkeypatch):
    """As one whose device does not answer any more."""
    left, since = [], time.monotonic()
    monkeypatch.setattr(gpu_suite, "GRACE", 0.2)
    monkeypatch.setattr(gpu_suite.os, "killpg", lambda group, signal: left.append(group))
    done = Suite(60, dry=True).python("-c", "import time; print('begun', flush=True); time.sleep(30)", limit=1)
    os.kill(left[0], signal.SIGKILL)
    assert done.code is None and done.out == "begun\n" and time.monotonic() - since < 20


def test_half_a_letter_hides_no_other_words():
    done = Suite(60, dry=True).python("-c", r"import os; os.write(1, b'{\"row\": 1}\n\xce')", limit=60)
    assert gpu_suite.lines(done) == [{"row": 1}]


def test_what_was_found_is_written_before_the_next_part_begins(tmp_path, monkeypatch):
    def named(suite, limit, part):
        suite.about["device"], part.state = "NVIDIA H200", "passed"

    def stopped(suite, limit, part):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite, "PARTS", {"build": lambda *_: None, "operations": named, "sweep": stopped})
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(["--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("nvidia-h200-")
    assert [part["state"] for part in json.loads(path.read_text())["parts"]] == ["not run", "passed"]


def test_a_part_leaves_the_later_ones_their_shares(capsys):
    limits = []
    suite = Suite(gpu_suite.BUDGET, dry=True)
    suite.part("build", lambda suite, limit, part: limits.append(limit))
    assert limits[0] == pytest.approx(gpu_suite.SHARES["build"], abs=1)
    late = Suite(0.5, True, ["sanitizer"])
    late.part("sanitizer", lambda *_: pytest.fail("begun without time"))
    assert late.parts[0].state == "not run" and late.parts[0].note == "no time left"
    assert "sanitizer: not run" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [False, True])
def test_rivals_are_measured_in_every_type_that_both_take(dry):
    """Without a row of its own a type would be chosen for by the order of the table alone."""
    for op, rivals in dispatch.RIVALS.items():
        taken = set.intersection(*[set(dispatch.TABLE[op][face].dtypes) for face in rivals])
        measured = {work.case["dtype"] for work in gpu_cases.CASES[op](dry)}
        assert measured == {str(dtype).removeprefix("torch.") for dtype in taken}


CHILD = """import json, sys
ops = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else ["a", "b", "c"]
ops = [op for op in ops if op != "--dry-run"]
print(json.dumps({"about": {"device": "x"}, "order": ops}), flush=True)
for op in ops:
    print(json.dumps({"begin": op}), flush=True)
    if op == "b":
        sys.exit("the device is lost")
    print(json.dumps({"row": {"op": op, "case": "", "ms": 1.0, "notes": {}}}), flush=True)
"""


def test_operations_after_one_that_ends_the_process_still_run(tmp_path, monkeypatch):
    (tmp_path / "gpu_ops.py").write_text(CHILD)
    monkeypatch.setattr(gpu_suite, "BENCH", tmp_path)
    suite, part = Suite(60, dry=True), Part("operations")
    gpu_suite.operations(suite, 60, part)
    assert [row["op"] for row in suite.rows] == ["a", "c"]
    assert part.state == "failed" and part.note == "ended in b: the device is lost"


def test_wheels_are_found_by_every_part_and_change_nothing_here(tmp_path):
    with zipfile.ZipFile(tmp_path / "brought-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought/__init__.py", "WORD = 'here'")
    suite, room = Suite(10, dry=True), tmp_path / "room"
    assert suite.python("-c", "import brought", limit=60).code == 1
    suite.unpack(None, str(room))
    assert suite.python("-c", "import brought", limit=60).code == 1
    suite.unpack(tmp_path, str(room))
    assert suite.python("-c", "import brought; print(brought.WORD)", limit=60).out == "here\n"
    assert importlib.util.find_spec("brought") is None
