# make fly   fly one orbit with the real model        make test   run all tests
# make check format, lint, types, layers, docs        make setup  stop after the set-up
# Needs Python 3.11+ and make, nothing else: everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SCENARIO ?= default
SPEED ?=
FLY_OPTIONS ?=
SEEDS ?=
FIRST_SEED ?=
MINUTES ?=
WALKS ?=

.PHONY: setup setup-dev model fly check test test-fast test-aarch64 walks explore docs format smoke clean

setup: $(VENV)/.bench
setup-dev: $(VENV)/.dev

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "penumbra needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.bench: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "installing penumbra and its bench into $(VENV)"
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.bench
	$(PIP) -e '.[dev]'
	@touch $@

model: $(VENV)/.bench
	$(BIN)/penumbra model build

fly: model
	$(BIN)/penumbra fly $(SCENARIO) $(if $(SPEED),--speed $(SPEED)) $(FLY_OPTIONS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m telemetry.icd --check
	$(BIN)/python -m fdir.table_docs --check

# Unit tests and what waits most of its time share the cores, the longest first; what keeps them busy has them alone.
WAITING := $(addprefix tests/integration/,test_fdir_traceability.py test_transfers.py test_broker_durability.py \
	test_fdir_rows.py test_fdir_commands.py test_spool_kill.py test_telecommands.py test_ground_cli.py \
	test_deaf_link.py test_mosquitto.py test_field_campaign.py test_node_full_disk.py test_ended_flights.py)

test: $(VENV)/.dev model
	$(BIN)/pytest -n 2 --durations 10 $(WAITING) tests/unit tests/property
	$(BIN)/pytest --durations 10 tests/integration $(addprefix --ignore=,$(WAITING))

test-fast: $(VENV)/.dev
	$(BIN)/pytest -n 2 tests/unit tests/property

# What rests on the arithmetic of the CPU, and a tiny flight, as aarch64 code: emulated, so some 25 times slower.
# Needs a Debian host: the emulator and an arm64 root come from its packages, into build/aarch64, without root.
test-aarch64: $(VENV)/.dev
	$(BIN)/python tests/aarch64.py --cpu cortex-a76
	$(BIN)/python tests/aarch64.py --cpu max

# Every state machine over 100,000 random steps, with three seeds: a quarter of an hour.
walks: $(VENV)/.dev
	$(BIN)/python tests/explore.py --first-seed 11 --seeds 3 --steps 100000 $(notdir $(basename $(wildcard tests/property/walk_*.py)))

# Walks and properties with new seeds: make explore SEEDS=200 MINUTES=60 WALKS="test_spool_walk walk_boot"
explore: $(VENV)/.dev
	$(BIN)/python tests/explore.py $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST_SEED),--first-seed $(FIRST_SEED)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(WALKS)

docs: $(VENV)/.dev
	$(BIN)/python -m telemetry.icd
	$(BIN)/python -m fdir.table_docs

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An editable install hides missing packages: build the wheel, install it alone, use it away from here.
smoke: $(VENV)/.dev
	$(BIN)/python tests/smoke_wheel.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
