# Two commands do everything: `make demo` and `make test`. Both build the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SUPPORTED = 3.11 | 3.12 | 3.13
CONFIG = configs/vp/digits_st.py
WORKDIR = runs/vp/digits_st

.PHONY: demo test check

# Train on scikit-learn's digits, score the result, leave samples and a report.
demo: $(VENV)/.installed
	$(BIN)/python main.py --config $(CONFIG) --workdir $(WORKDIR) --mode train
	$(BIN)/python main.py --config $(CONFIG) --workdir $(WORKDIR) --mode eval
	@echo "samples: $(WORKDIR)/eval/samples.png   curve: $(WORKDIR)/training.png"
	@echo "report:  $(WORKDIR)/eval/report.md"

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

$(VENV)/.installed: requirements.txt
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	case "$${version:=not installed}" in $(SUPPORTED)) ;; *) \
	echo "Python 3.11, 3.12 or 3.13 is needed, but $(PYTHON) is $$version: install one of them," \
	"then type, for example, make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@
