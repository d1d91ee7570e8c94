# Two commands do everything: `make demo` and `make test`. All build the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SUPPORTED = 3.11 | 3.12 | 3.13
CONFIG = configs/vp/digits_st.py
WORKDIR = runs/vp/digits_st

.PHONY: demo test test-all check tensorflow hub docs

# Train on scikit-learn's digits, score the result, leave samples and a report.
demo: $(VENV)/.installed
	$(BIN)/python main.py --config $(CONFIG) --workdir $(WORKDIR) --mode train
	$(BIN)/python main.py --config $(CONFIG) --workdir $(WORKDIR) --mode eval
	@echo "samples: $(WORKDIR)/eval/samples.png   curve: $(WORKDIR)/training.png"
	@echo "report:  $(WORKDIR)/eval/report.md"

# Lint, types, layers and the fast tests.
test: check
	$(BIN)/python -m pytest -m "not slow and not release"

# All tests, with those that are run before a release alone, and of what needs more packages.
test-all: check tensorflow hub
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m tests.check_layers

# TensorFlow, which nothing needs but TFDS when it prepares a data set.
tensorflow: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q tensorflow==2.21.0

# The client of the Hugging Face hub, which nothing needs but hf:// and --mode push.
hub: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q huggingface_hub==2.4.0

# The documentation, into site/; warnings are errors.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict -q
	@echo "open site/index.html"

$(VENV)-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --disable-pip-version-check -q -r docs/requirements.txt
	touch $@

# Python compiles what is imported; to compile all files would take a third of the installation.
$(VENV)/.installed: requirements.txt
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	case "$${version:=not installed}" in $(SUPPORTED)) ;; *) \
	echo "Python 3.11, 3.12 or 3.13 is needed, but $(PYTHON) is $$version: install one of them," \
	"then type, for example, make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q --no-compile -r requirements.txt
	touch $@
