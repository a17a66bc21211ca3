# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv, installs what is needed, builds the
# library and runs; the next call only repeats what changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml cmake/find_torch.py $(shell find csrc -type f)
# What a sanitizer needs to watch one library inside a Python that is not instrumented. Leaks are Python's own; the
# addresses are fixed because ThreadSanitizer of g++ 12 does not know every randomised layout.
SANITIZED := OMP_NUM_THREADS=1 FASTUNLEARN_TEST_BACKENDS=emulated ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 setarch -R
# What is too large takes minutes here. Left out, too, is what runs shapes of the error tests again to compare bits, and
# the two slowest of the ten spectra: the kernels and their paths are the same.
EACH_KERNEL := emulated and not too_large and not repeat and not (repetition and bits) and \
	not (eigh_errs and (wide or indefinite))
# --capture=sys: pytest would swallow the report of a process that dies.
OPERATOR_OPTIONS := -q -k "$(EACH_KERNEL)" --durations=10 --capture=sys -p no:cacheprovider
FISHER_TESTS := tests/test_ops.py tests/test_wgmma.py
OTHER_TESTS := tests/test_reset.py tests/test_add_rounded.py tests/test_gram.py tests/test_lowrank.py \
	tests/test_codec_ops.py
# $(call sanitized,address,asan,$(TESTS))
define sanitized
	PATH="$(CURDIR)/$(BIN):$$PATH" FASTUNLEARN_SANITIZE=$(1) \
	LD_PRELOAD="$$(gcc -print-file-name=lib$(2).so) $$(gcc -print-file-name=libstdc++.so)" \
	env $(SANITIZED) $(BIN)/python -m pytest $(OPERATOR_OPTIONS) $(3)
endef

SANITIZERS := sanitize-address-fisher sanitize-thread-fisher sanitize-thread-others sanitize-address-others

.PHONY: all demo test lint format sanitize $(SANITIZERS) bench gpu-check clean
all: $(VENV)/built

$(VENV)/requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/built
	$(BIN)/fastunlearn demo

# One process per core, each on one thread: threads of several processes on one core wait for one another. Files in the
# order of their names: by the number of their tests, those with few long ones would come last and keep one core alone.
test: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

lint: $(VENV)/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/requirements
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .
	git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format -i

# Two side by side, each on one thread; in halves, so that no core waits for the slower sanitizer.
sanitize: $(VENV)/built
	$(MAKE) --jobs=2 $(SANITIZERS)

sanitize-address-fisher: $(VENV)/built
	$(call sanitized,address,asan,$(FISHER_TESTS))
sanitize-address-others: $(VENV)/built
	$(call sanitized,address,asan,$(OTHER_TESTS))
sanitize-thread-fisher: $(VENV)/built
	$(call sanitized,thread,tsan,$(FISHER_TESTS))
sanitize-thread-others: $(VENV)/built
	$(call sanitized,thread,tsan,$(OTHER_TESTS))

bench: $(VENV)/built
	mkdir -p out
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-json=out/bench.json

# Uses the Python it finds, not .venv: a GPU machine brings its own torch. Results go to OUT. STAGE=test, bench or
# sanitize does one part.
gpu-check:
	PYTHON=$(PYTHON) bash benchmarks/gpu_check.sh $(STAGE)

clean:
	rm -rf build out $(VENV)/built fastunlearn/_C*.so
