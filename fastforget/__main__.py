"""`python -m fastforget`: the command line."""

from fastforget.cli import main

main()
