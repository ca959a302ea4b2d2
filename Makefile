# make forecast   set everything up, then forecast rain and El Nino with the shipped models (INPUT=file for your own)
# make test       set everything up, then run the tests
# make docs       set everything up, then build the documentation into site/
# make demo-space set everything up, with the extra `demo`, then show the demo of examples/space at localhost:7860
# JOBS=8 runs the tests in as many processes; two if omitted.
# make demo-train two minutes of training that survive a kill, scored, with a card
# TORCH_INDEX_URL=https://... chooses another index for torch, such as one with CPU builds; PYTHON=... another Python.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
# pysteps is built on the spot: its baselines only where there is a C compiler.
OPTICAL_FLOW := $(if $(shell command -v cc 2>/dev/null),$(comma)optical-flow)
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
DEMO_STAMP := .venv/.installed-demo
JOBS ?= 2

.PHONY: forecast demo-train demo-space test test-slow quality style bench docs

# INPUT reaches the script through the environment, so that a path may hold spaces and parentheses.
forecast: export INPUT := $(INPUT)
forecast: $(STAMP)
	@$(BIN)/python examples/forecast.py $${INPUT:+--input "$$INPUT"}

demo-train: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo_train.py

demo-space: $(DEMO_STAMP)
	$(BIN)/python examples/space/app.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the table of models in README.md first; a warning of the build is an error
docs: $(DOCS_STAMP)
	$(BIN)/python docs/hooks/zoo.py README.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site: written; with the search: python3 -m http.server -d site"

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/prediff.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/archive.py

# Installed once; again only when the requirements change. torch goes first: see constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		-e '.[dev$(OPTICAL_FLOW)]'
	$(if $(OPTICAL_FLOW),,@echo "no C compiler: pysteps, and the baselines that need it, are left out")
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $(DEMO_STAMP)
