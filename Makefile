# `make help` lists the targets. Everything is installed into .venv; PYTHON names the interpreter it is made from.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory --no-builtin-rules

# The caller's environment must not decide what is imported or where packages go.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

PYTHON ?= python3
JOBS ?= 2
DEMO ?= demo
RUN_DIR := runs/$(DEMO)
SCENES := data/scenes
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
IN_VENV := PATH="$(BIN):$$PATH"
PIP := $(IN_VENV) python -m pip install -q --disable-pip-version-check -c constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null | sort)
READY := $(VENV)/.extension

.PHONY: help env pretrain ablation test bench gpu-report gpu-budgets gpu-matrix sanitize docs lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(READY)  ## the environment: .venv with everything installed, C++ kernels built
	@echo "env: ready in $(VENV)"

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, %s is %s" % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 10) else 0)'
	@test -x "$(BIN)/pip" || $(PYTHON) -m venv --clear $(VENV)
	@echo "env: installing torch (the largest part, once)"
	@$(PIP) torch torchvision numpy setuptools wheel ninja
	@touch $@

$(VENV)/.package: setup.py pyproject.toml constraints.txt $(VENV)/.torch
	@echo "env: installing softmask and what it needs"
	@SOFTMASK_SKIP_EXT=1 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# No stamp without a built library: the next call tries again.
$(READY): $(CPP) $(VENV)/.package
	@rm -f softmask/_C*.so
	@mkdir -p build
	@echo "env: building the C++ kernels"
	@$(IN_VENV) python setup.py -q build_ext --inplace > build/extension.log 2>&1 \
	  || { cat build/extension.log >&2; exit 1; }
	@if compgen -G 'softmask/_C*.so' > /dev/null; then touch $@; \
	  else grep '^softmask: ' build/extension.log; echo "env: details in build/extension.log"; fi

pretrain: $(RUN_DIR)/report.html  ## data, training, evaluation, report of SoftMask++'s demo (resumes); DEMO=sycoca_demo: SyCoCa's
	@echo "report: $(CURDIR)/$(RUN_DIR)/report.html"
	@echo "metrics: $(CURDIR)/$(RUN_DIR)/metrics.json"

$(SCENES)/scenes.json: | $(READY)
	@$(IN_VENV) python -m softmask.data.scenes --out $(SCENES)

$(RUN_DIR)/done.json: train/configs/$(DEMO).yaml | $(READY) $(SCENES)/scenes.json
	@$(IN_VENV) deepspeed train/pretrain.py --config $< --resume auto
	@test -f $@ || { echo "pretrain: stopped before the end; make pretrain goes on from the last checkpoint" >&2; exit 1; }
	@touch $@

$(RUN_DIR)/metrics.json: $(RUN_DIR)/done.json
	@$(IN_VENV) python train/evaluate.py $(RUN_DIR) --data '$(SCENES)/test-*.tar' --training '$(SCENES)/train-*.tar' \
	  --output $@

$(RUN_DIR)/report.html: $(RUN_DIR)/metrics.json
	@$(IN_VENV) python train/report.py $(RUN_DIR) --data '$(SCENES)/test-*.tar'

ablation: $(READY) $(SCENES)/scenes.json  ## hours: both methods with and without their parts, benchmarks/ablation/README.md; ARGS="--rows coca --steps 20"
	@$(IN_VENV) python -m benchmarks.ablation.run $(ARGS)

test: $(READY)  ## all tests, JOBS at a time
	@OMP_NUM_THREADS=1 $(IN_VENV) python -m pytest tests -q -n $(JOBS) --dist worksteal

bench: $(VENV)/.peers  ## speed of every op beside its baselines; ARGS="--compare main~1", "--csv FILE" or pytest's own
	@$(IN_VENV) python -m pytest benchmarks -q -p no:xdist -p no:cacheprovider --benchmark-quiet $(ARGS)

$(VENV)/.peers: setup.py constraints.txt | $(READY)
	@echo "bench: installing the packages that ops are compared with"
	@SOFTMASK_SKIP_EXT=1 $(PIP) --no-build-isolation -e '.[$(if $(shell command -v nvidia-smi),bench-gpu,bench)]'
	@touch $@

gpu-report: $(READY)  ## what is known of the Triton kernels without a GPU: registers, tensor cores, bytes moved
	@$(IN_VENV) python -m benchmarks.gpu.report

gpu-budgets: $(READY)  ## every variant of the Triton kernels against the limits of six processors; ARGS="attention"
	@$(IN_VENV) python -m benchmarks.gpu.budgets $(ARGS)

gpu-matrix: $(READY)  ## which Triton, 3.2 to 3.8, compiles which kernels; installs each into build/; ARGS="3.3.1"
	@$(IN_VENV) python -m benchmarks.gpu.matrix $(ARGS)

# The interpreter is not instrumented, so its leaks are not ours, and the sanitizers' libraries come first.
sanitize: $(READY)  ## tests of the C++ kernels under the address and undefined-behaviour sanitizers
	@rm -rf build/sanitize/softmask
	@mkdir -p build/sanitize/objects
	@SOFTMASK_SANITIZE=1 SOFTMASK_FORCE_BUILD=1 $(IN_VENV) python setup.py -q build_ext \
	  --build-temp build/sanitize/objects --build-lib build/sanitize > build/sanitize/build.log 2>&1 \
	  || { cat build/sanitize/build.log >&2; exit 1; }
	@cp -rL $(filter-out $(wildcard softmask/_C*),$(wildcard softmask/*)) build/sanitize/softmask
	@OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  PYTHONPATH=build/sanitize:. $(BIN)/pytest -q -o pythonpath= -p no:cacheprovider -p no:xdist \
	  tests/ops/test_cpp_kernels.py tests/ops/test_soft_mask.py -k "not compile and not opcheck"

docs: $(VENV)/.docs  ## the documentation site, build/site/index.html; warnings are errors
	@$(IN_VENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs build -q --strict
	@echo "docs: build/site/index.html"

$(VENV)/.docs: setup.py constraints.txt | $(READY)
	@echo "docs: installing mkdocs"
	@SOFTMASK_SKIP_EXT=1 $(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

lint: $(READY)  ## style of Python and C++
	@$(IN_VENV) ruff check -q .
	@$(IN_VENV) ruff format -q --check . || { echo "lint: make format rewrites the files"; exit 1; }
	@if [ -n "$(CPP)" ]; then $(IN_VENV) clang-format --dry-run -Werror $(CPP); fi

format: $(READY)  ## rewrite Python and C++ in the project's style
	@$(IN_VENV) ruff check -q --fix .
	@$(IN_VENV) ruff format -q .
	@if [ -n "$(CPP)" ]; then $(IN_VENV) clang-format -i $(CPP); fi

clean:  ## remove what was built (.venv, data and runs stay)
	@rm -rf build dist *.egg-info softmask/_C*.so $(READY) .pytest_cache .ruff_cache
