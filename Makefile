# Two commands do everything: `make demo` and `make test`. Both build the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
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
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
	"Python %d.%d is not supported: use 3.11 or 3.12, for example make PYTHON=python3.12 …" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@
