"""``python -m unicfg`` is the same as ``unicfg``."""

from unicfg.cli import main

main()
