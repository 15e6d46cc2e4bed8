# Every target sets up .venv by itself when it is missing or when its pins changed.
#
# PYTHON  the interpreter .venv is made from (3.11 or newer).
# TORCH   what pip is told to install as torch. The default pins the version in constraints-cpu.txt and
#         takes a CPU build wherever pip's package indexes offer one. `make demo TORCH=torch` takes the
#         newest build pip finds instead, which on Linux is usually the one for CUDA; any requirement or
#         pip option works (TORCH="torch --index-url <index of the CUDA builds>"). It is read while .venv is made:
#         remove .venv first to change it.
PYTHON ?= python3
TORCH ?= -r constraints-cpu.txt

BIN := .venv/bin
READY := .venv/.ready

# Large tensors come and go all the time here. jemalloc keeps their memory for ten seconds and in huge pages, which spares
# most page faults.
JEMALLOC := $(firstword $(wildcard /usr/lib/*/libjemalloc.so.2))
COMMA := ,
FAST := $(if $(JEMALLOC),LD_PRELOAD=$(JEMALLOC) MALLOC_CONF=dirty_decay_ms:10000$(COMMA)muzzy_decay_ms:10000$(COMMA)oversize_threshold:0$(COMMA)thp:always)

.DEFAULT_GOAL := help
.PHONY: help setup pull demo test lint type train weights bench rewrites notebooks

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 14

setup: $(READY) ## make .venv with everything this repository needs

pull: $(READY) ## fetch and verify the default model once; nothing is downloaded when it is there
	$(BIN)/mllm-protector pull

demo: pull ## guard a chain over the sample transcripts with the default model
	$(FAST) $(BIN)/python cookbook/demo.py

test: pull ## run all tests, those of the default model included
	$(BIN)/pytest

lint: $(READY) ## check style, import rules and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

type: $(READY) ## check types
	$(BIN)/mypy

train: pull ## train a model: make train ARGS="detector --train rows.jsonl --dev dev.jsonl --output my-detector"
	$(FAST) $(BIN)/mllm-protector train $(ARGS)

WRITTEN := mllm_protector_guard/training/written
HERE = $(foreach name,$(2),--$(1) $(DATA)/$(name).jsonl.gz)
DETECTOR_FILES = $(call HERE,train,detector_train_human detector_train_modeljudge detector_train_safe_answers \
	benign_instructions detector_hard_negatives_written) \
	$(foreach name,hard_negatives plain_answers image_answers chat_answers,--train $(WRITTEN)/$(name).jsonl) $(call HERE,dev,detector_dev)
LABEL_FILES = $(call HERE,pairs,detox_pairs_weak_hh detox_rewrites_written) \
	$(foreach name,hh hh_mild rewrites_harmless,--labels $(WRITTEN)/labels/$(name).jsonl) --dev-labels $(WRITTEN)/labels/hh_dev.jsonl
DETOXIFIER_FILES = $(call HERE,train,detox_rewrites_written detox_triples detox_pairs_weak_hh) \
	--targets $(WRITTEN)/rewrites.jsonl \
	$(call HERE,answers,detector_train_human detector_train_modeljudge detector_train_safe_answers)
WEIGHTS ?= weights
RECIPE = --resume --recipe $(1) --output $(WEIGHTS)/$(1) $(if $(2),--set start_from=$(WEIGHTS)/$(2))

weights: pull ## train the shipped models anew, in about four hours: make weights DATA=my-folder WEIGHTS=my-weights
	@test -n "$(DATA)" || { echo "name the folder of the training files: make weights DATA=my-folder"; exit 2; }
	$(FAST) $(BIN)/mllm-protector train detector $(DETECTOR_FILES) $(call RECIPE,smollm2-135m-open-detector-1)
	$(FAST) $(BIN)/mllm-protector train detector $(DETECTOR_FILES) $(LABEL_FILES) $(call RECIPE,smollm2-135m-open-detector,smollm2-135m-open-detector-1)
	$(FAST) $(BIN)/mllm-protector train detector $(DETECTOR_FILES) $(call RECIPE,smollm2-135m-detector-1)
	$(FAST) $(BIN)/mllm-protector train detector $(DETECTOR_FILES) $(LABEL_FILES) $(call RECIPE,smollm2-135m-detector,smollm2-135m-detector-1)
	$(FAST) $(BIN)/mllm-protector train detoxifier $(DETOXIFIER_FILES) $(call RECIPE,smollm2-135m-open-detoxifier)
	$(FAST) $(BIN)/mllm-protector train detoxifier $(DETOXIFIER_FILES) $(call RECIPE,smollm2-135m-detoxifier,smollm2-135m-open-detoxifier)

# SCORING= (nothing) times long answers and large batches too, for half an hour and more; PEERS=my-folder installs other
# guards there and times them too.
SCORING ?= --quick

bench: pull ## time scoring, rewriting, streams and the guard itself: make bench [SCORING=] [PEERS=my-folder]
	$(FAST) $(BIN)/python bench/guard.py
	$(FAST) $(BIN)/python bench/scoring.py $(SCORING)
	$(FAST) $(BIN)/python bench/plumbing.py $(if $(PEERS),--peers $(PEERS))
	$(FAST) $(BIN)/python bench/streaming.py
	$(FAST) $(BIN)/python bench/concurrency.py
	$(FAST) $(BIN)/python bench/rewriting.py

rewrites: pull ## measure the rewrites: make rewrites ARGS="--data rows.jsonl --judge my-judge --output measured"
	$(BIN)/python -m pip install --quiet --no-deps --group judge
	$(FAST) $(BIN)/python benchmarks/rewrites.py $(ARGS)

notebooks: pull ## run the cookbook notebooks in place
	$(FAST) $(BIN)/jupyter execute --inplace cookbook/*.ipynb

# The stamp is written last, so an interrupted setup starts again.
$(READY): pyproject.toml constraints.txt constraints-cpu.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[all]" --group dev
	@touch $@
