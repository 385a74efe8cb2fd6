"""``python -m unicfg``, which ``accelerate launch -m unicfg train ...`` uses too."""

from unicfg.cli import main

main()
