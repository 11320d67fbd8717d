# Two commands are enough on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: campaigns dynamic gate never-worse bench-receive bench-send bench-registration demo test lint install clean

demo: $(VENV)/.installed
	$(BIN)/dicomnode demo --out demo-out

test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist worksteal

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# Hours; goes on where it stopped. Peers are installed once, each into an environment of its own.
bench-registration: $(VENV)/.installed
	$(BIN)/python -m benchmarks.registration install
	$(BIN)/python -m benchmarks.registration run
	$(BIN)/python -m benchmarks.registration series

# Full sizes: 20,000 mutants, 4 senders x 1,000 instances, 10,000 associations. About an hour.
campaigns: $(VENV)/.tested
	CAMPAIGNS=1 $(BIN)/pytest -p no:randomly tests/system/test_reception_campaigns.py
	HOSTILE_MUTANTS=2000 $(BIN)/pytest --timeout 7200 tests/node/test_hostile_headers.py

bench-receive: $(VENV)/.tested
	$(BIN)/python benchmarks/receive.py

# 1,000 CT instances to each receiver, by storescu and by us: about a quarter of an hour, most of it storescu's stalls.
bench-send: $(VENV)/.tested
	$(BIN)/python -m benchmarks.send

# A dynamic series of 30 phases as one job, delivered both ways: a quarter of an hour.
dynamic: $(VENV)/.tested
	PHASES=30 $(BIN)/pytest --timeout 2400 tests/system/test_dynamic.py

# Every kind of object in all 192 cases, read by everything that reads them: a quarter of an hour.
gate: $(VENV)/.tested
	GATE=full $(BIN)/pytest -p no:randomly tests/gate

# 500 random pairs and 20 hopeless ones: about an hour.
never-worse: $(VENV)/.tested
	PAIRS=500 $(BIN)/pytest tests/engine/test_never_worse.py

clean:
	rm -rf $(VENV) demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
