# Everything a fresh machine needs happens in .venv; the second call starts in seconds.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export WANDB_MODE ?= offline
export MPLBACKEND ?= agg

.PHONY: install study figures demo test lab export readme lint bench clean

install: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Rea2Seg needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# the paper's tables and figures by the embedded stack, offline; a second call goes on where the first was stopped
PROFILE ?= tiny
STUDY ?= 01_data 04_benchmark 05_ablations 06_figures
study: install
	@mkdir -p runs/study
	@start=$$(date +%s); for n in $(STUDY); do $(BIN)/papermill nbs/$$n.ipynb runs/study/$$n.ipynb -p profile $(PROFILE) $(ARGS) || exit 1; done; \
	$(BIN)/python -m rea2seg.study.report && echo "make study took $$(( $$(date +%s) - start )) s after the install; notebooks with their output are in runs/study, tables and figures in figures"

# figures/ again from the saved results in figures/results, without a model
figures: install
	@mkdir -p runs/study
	$(BIN)/papermill nbs/06_figures.ipynb runs/study/06_figures.ipynb -p profile $(PROFILE)

# one rendered picture, one question, the whole way through
demo: install
	$(BIN)/python -m rea2seg.demo --out out/demo

# the package is what the notebooks say, the tests pass, the notebooks run and are clean
test: install
	$(BIN)/nbdev-export
	$(BIN)/ruff check rea2seg tests benchmarks
	$(BIN)/python -m pytest
	$(BIN)/nbdev-test nbs --n-workers 2
	$(BIN)/nbdev-clean
	$(MAKE) --no-print-directory readme
	git diff --exit-code

export: install
	$(BIN)/nbdev-export

readme: install
	$(BIN)/python -m nbconvert --to markdown --log-level WARN --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags hide \
	  --output-dir . --output README nbs/index.ipynb
	$(BIN)/python -c 'import re; from pathlib import Path; p = Path("README.md"); p.write_text(re.sub(r"\n```\n(?=from |import )", "\n```python\n", p.read_text().replace("](../", "](")).strip() + "\n")'

lint: install
	$(BIN)/ruff check rea2seg tests benchmarks

bench: install
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

# on 127.0.0.1 alone; the address that it prints carries a fresh token. Figures belong into the notebook: no MPLBACKEND
lab: install
	env -u MPLBACKEND $(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.allow_remote_access=False --notebook-dir=nbs

clean:
	rm -rf out runs _proc _docs .pytest_cache .ruff_cache
