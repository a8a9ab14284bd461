"""`python -m qcore` is the `qcore` command."""

from qcore.cli.main import main

main()
