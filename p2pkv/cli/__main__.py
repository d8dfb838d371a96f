"""``python -m p2pkv.cli``: the ``p2pkv`` command where the script is not on the path."""

from p2pkv.cli import main

main()
