"""`python -m dilated`: the command-line program."""

from dilated.cli import main

raise SystemExit(main())
