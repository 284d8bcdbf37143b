"""`python -m vistune`, and what `torchrun -m vistune` starts."""

from vistune.cli import main

main()
