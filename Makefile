# make book   environment, chapters run, HTML rendered: prints where it is
# make test   environment, then everything that must hold
# make help   the rest
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

export PYTHONDONTWRITEBYTECODE := 1

.PHONY: book test check export chapters address measure release-check clean help

book: $(STAMP)
	$(BIN)/jupyter-book build . -W --keep-going -q
	@echo "The book is at $(CURDIR)/_build/html/index.html"

test: check
	$(BIN)/pytest

check: $(STAMP)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy memformer

export: $(STAMP)  ## write memformer/ from the chapters
	$(BIN)/nbdev-export

chapters: $(STAMP)  ## run chapters in place, with stable diffs: make chapters [ONLY=book/06_writing.ipynb]
	$(BIN)/python tools/chapters.py run $(ONLY)

address: $(STAMP)  ## copy the repository's address from _config.yml into the chapters
	$(BIN)/python tools/chapters.py address

measure: $(STAMP)  ## count what every chapter is made of, for the status page
	$(BIN)/python tools/chapters.py measure

release-check: $(STAMP)  ## refuse the placeholder address
	$(BIN)/python tools/chapters.py release

clean:  ## forget everything that was built
	rm -rf _build $(VENV) *.egg-info

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $(STAMP)
