"""So that `python -m memformer` is the command line."""

from memformer.cli import main

main()
