# The two commands of the README: `make demo` and `make test`. Both set up .venv on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1

.PHONY: demo test test-slow lint docs clean setup system
setup: $(VENV)/.ready

# torch first and pinned: the newest pair that the tests have run on
$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[page,parquet,sweep,dev]'
	# W&B's sweep engine asks for numpy<2; it runs on ours, which the tests show
	$(BIN)/pip install --quiet --no-deps sweeps==0.3.0
	touch $@

# a browser and SLURM, for tests
system:
	tests/install_system.sh

demo: setup
	$(BIN)/python tools/launch.py recipe=demo run=runs/demo

test: setup system
	$(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile

test-slow: setup system
	$(BIN)/python -m pytest -m 'slow and not alone' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m 'slow and alone'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site in build/site; a warning, such as a lost link, is an error
docs: setup
	$(BIN)/python docs/make_site.py
	$(BIN)/zensical build --strict --clean

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
