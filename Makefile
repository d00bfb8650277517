# Everything is set up in .venv at the root; a target installs what it needs, once.
#   make study [SCALE=cpu]   the whole path, ending with runs/<scale>/report.html
#   make test                all tests, the pages among them
#   make docs, make serve    the rendered book, from a study's runs
SCALE ?= cpu
CORES ?= 0
# tests at the same time, one thread each; JOBS=0 runs them one after the other
JOBS ?= 2
PYTHON ?= python3
BIN := .venv/bin
RECAP := $(BIN)/recap

.PHONY: docs serve help study smoke foundation publish publish-study test test-all bench lab pages readme export clean-runs
.DEFAULT_GOAL := help

help:
	@echo "make study [SCALE=cpu|smoke]  run what is missing of a study and write its report"
	@echo "make test                     the tests (pages with their default parameters among them)"
	@echo "make test-all                 the long ones too: many kills, big corpora"
	@echo "make foundation               train the small foundation weights again"
	@echo "make publish                  copy what make foundation trained to data/foundation"
	@echo "make publish-study            copy a finished study's numbers and picture to data/results"
	@echo "make bench                    the benchmarks, as a table"
	@echo "make docs [SCALE=cpu]         the rendered book in _docs, with the results of that scale's study"
	@echo "make serve                    open it at http://127.0.0.1:8800"
	@echo "make lab                      open the pages in JupyterLab"
	@echo "make pages [PAGES=17_train]   run the pages with their defaults and keep their outputs"
	@echo "make export                   pages -> recap/, cleaned (what a commit needs)"
	@echo "make readme                   README.md from nbs/index.ipynb"

# one stamp for each set of packages; a change of pyproject.toml installs again
$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "recap needs Python 3.11 or newer: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv

.venv/installed-core: pyproject.toml | $(BIN)/python
	@echo "installing the packages into .venv (once, some minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/installed-%: pyproject.toml | $(BIN)/python
	@echo "installing the packages for '$*' into .venv (once, some minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[$*]"
	@touch $@ .venv/installed-core

study: .venv/installed-core
	@$(RECAP) study --scale $(SCALE) --cores $(CORES)

smoke:
	@$(MAKE) --no-print-directory study SCALE=smoke

foundation: .venv/installed-core
	@$(RECAP) study --scale foundation --cores $(CORES)

publish: .venv/installed-core
	@$(BIN)/python workflow/publish.py

test: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-all: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "slow or not slow"

bench: .venv/installed-dev
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

lab: .venv/installed-lab
	@cd nbs && ../$(BIN)/jupyter lab

docs: .venv/installed-docs
	@$(BIN)/python docs/build.py --run runs/$(SCALE)

serve:
	@test -f _docs/index.html || $(MAKE) --no-print-directory docs
	@echo "http://127.0.0.1:8800 (ctrl-c ends it)"
	@$(BIN)/python -m http.server 8800 --bind 127.0.0.1 --directory _docs

pages: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python workflow/execute.py $(PAGES)

export: .venv/installed-dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

publish-study: .venv/installed-core
	@$(BIN)/python -c 'from recap.results import publish_study; publish_study("runs/$(SCALE)", "data/results")'

readme: .venv/installed-dev
	$(BIN)/python docs/readme.py

clean-runs:
	rm -rf runs
