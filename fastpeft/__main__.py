"""``python -m fastpeft`` is the command ``fastpeft``."""

from fastpeft.cli import main

main()
