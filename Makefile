# make demo    sets up and finds leaked training data in real data sets
# make test    sets up and runs the tests
# make prove   the long proofs: the other instruction sets, sanitizers, Triton's kernels, packaging, interrupted runs,
#              files by the formats' own writers
# make sanitize  the tests of the operations, of damaged files and of failing disks, on an extension built with ASan and
#              UBSan
# make bench   the measurements behind README, into bench/results/
# make fidelity      what the scores are worth, against retraining and on planted leaks
# make bench-peers   the same with other libraries in the table, from an environment of their own
# make lint    style of Python and C++
#
# TORCH=torch==2.11.0 chooses another torch; one that is installed already is reused. PYTHON=python3.12 another Python.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# A process a core, each on one thread: beside one another, torch's threads wait for one another by spinning, and the
# same tests take twice as long. Tests of several threads ask for them. At most eight, each of them a gigabyte.
BESIDE := --numprocesses auto --maxprocesses 8 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE)

.PHONY: demo test prove sanitize bench fidelity bench-peers lint format clean

# With a torch in the Python at hand the environment looks through to it instead of downloading another.
$(BIN)/python:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"

$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	@touch $@

$(VENV)/.prove: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[prove]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/finf-fast demo all --out $(OUT)

test: $(VENV)/.installed
	$(PYTEST)

# Of the instruction sets the best, which comes first, is the one that `make test` runs on; those of AVX-512 and AMX
# are the same code but for products and for how activations and norms round to bfloat16. The suite for GPUs builds the
# extension in place: nothing beside it.
prove: $(VENV)/.prove
	sets=$$($(BIN)/python -c "from finf_fast import _C; print(*_C.isas()[1:])") && for isa in $$sets; do \
	  case $$isa in avx512*) tests="$(BF16_TESTS)";; *) tests="$(OP_TESTS)";; esac; \
	  echo "instruction set $$isa" && FINF_FORCE_ISA=$$isa $(PYTEST) -q $$tests || exit 1; done
	$(MAKE) sanitize
	TRITON_INTERPRET=1 $(PYTEST) -q -k $(TRITON_CHOICE) $(TRITON_TESTS)
	$(PYTEST) -m prove --ignore tests/test_gpu_suite.py
	$(BIN)/python -m pytest -m prove tests/test_gpu_suite.py

# A copy of the package with an extension that ends the program at the first bad address or undefined step. Python itself
# is built without, so the sanitizer's library goes first; leaks are the interpreter's own. pytest by its own name: as a
# module it would put the checkout before the copy, as the processes of the tests of instruction sets do. The signal of
# a disk that fails under a mapping is left to the extension's own handler, and to the tests that wait for it.
SANITIZED := $(CURDIR)/build/sanitize
SANITIZE := -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

sanitize: $(VENV)/.installed
	FINF_CUDA=0 CFLAGS="$(SANITIZE)" $(BIN)/python -W ignore setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	export OMP_NUM_THREADS=1 LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 PYTHONPATH=$(SANITIZED)/lib && cd build/sanitize && \
	$(CURDIR)/$(BIN)/python -c "from finf_fast import _C; assert _C.__file__.startswith('$(SANITIZED)'), _C.__file__" && \
	$(CURDIR)/$(BIN)/pytest -q $(BESIDE) --rootdir=$(CURDIR) -p no:cacheprovider -k 'not instruction_set' $(addprefix $(CURDIR)/,$(OP_TESTS) $(DISK_TESTS))

OP_TESTS := $(addprefix tests/test_,$(addsuffix .py,activation_delta attention_delta cross_entropy_delta group_norm_delta io \
  layer_norm_delta linear_cross_entropy_delta linear_delta noise rms_norm_delta segment_sum squared_error_delta tolerance \
  topk_merge))

BF16_TESTS := $(addprefix tests/test_,$(addsuffix .py,activation_delta attention_delta group_norm_delta layer_norm_delta \
  linear_cross_entropy_delta linear_delta rms_norm_delta))

DISK_TESTS := $(addprefix tests/test_,$(addsuffix .py,ahead corpus_arrow corpus_documents corpus_headers io_faults))

# Operations with a Triton face: the same tests, its kernels interpreted on the CPU, a second a test. Left out are edges
# of other faces' tiles (test_columns, half of test_panels, of attention all but one size), gains but one, a third of
# the texts, 127 rows and more of 15 queries (nine minutes in all), and a test of how the reference goes on other devices.
TRITON_CHOICE := "triton and not test_columns and not must_not_be_waited and not (test_panels and 4096) and not \
  (test_edges_of_blocks and not 65) and not (test_one_key_takes_all and not 50) and not 127-15 and not 128-15 and not \
  129-15 and not 300-15 and not (test_texts_behind_each and options1) and not (test_texts_at_every and not Q2) and not \
  (test_gains_on_leaders and not 45)"
TRITON_TESTS := $(addprefix tests/test_,$(addsuffix .py,activation_delta attention_delta group_norm_delta layer_norm_delta \
  linear_cross_entropy_delta linear_delta rms_norm_delta))

bench: $(VENV)/.installed
	for script in bench/bench_*.py; do $(BIN)/python $$script --save || exit 1; done

fidelity: $(VENV)/.installed
	$(BIN)/python bench/bench_fidelity.py --save

PEERS := $(VENV)-peers
$(PEERS)/.installed: bench/fidelity/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)" -r $< pytest --editable .
	@touch $@

# First the tests that need peers: factors are kronfluence's. Then these judge the models that the bench has written down,
# and the bench reads what they say.
bench-peers: $(VENV)/.installed $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -q -m prove tests/test_curvature_peers.py
	$(BIN)/python bench/bench_fidelity.py --tasks retraining --problems
	for peer in bench/fidelity/peers/*.py; do $(PEERS)/bin/python $$peer runs/fidelity || exit 1; done
	$(BIN)/python bench/bench_fidelity.py --tasks retraining --save

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

clean:
	rm -rf $(VENV) build dist runs *.egg-info finf_fast/*.so
