# On a fresh machine with Python and pip: `make demo` and `make test` do all their own set-up, once, in .venv.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUN = $(VENV)/bin/python -m
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo   train a small network on real digits and walk through the flow chart"
	@echo "make test   run every test"
	@echo "make lint   ruff, mypy --strict, import-linter"
	@echo "make clean  remove .venv and every cache"

# Where Python comes without ensurepip, the machine's own pip fills the environment.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install pip; }
	$(RUN) pip install -q -c constraints.txt -e ".[dev,examples]"
	touch $@

demo: $(STAMP)
	$(VENV)/bin/python examples/quickstart.py $(ARGS)

# One thread per worker: the networks of the tests are too small to share.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) $(ARGS)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy --strict
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
