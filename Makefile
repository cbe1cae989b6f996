# make demo   sets everything up and makes a picture
# make test   sets everything up and runs the whole test suite
# make lint   formatting, types, import rules
PROMPT = a large red circle in the center on a blue background
BIN = .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/lowmem-flux2 generate -p "$(PROMPT)"

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile  # a process a core; a file stays in one

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.installed: pyproject.toml tools/setup-venv.sh
	bash tools/setup-venv.sh .venv .
	touch $@

.venv/.installed-dev: pyproject.toml tools/setup-venv.sh
	bash tools/setup-venv.sh .venv '.[dev]'
	touch .venv/.installed $@

clean:
	rm -rf .venv
