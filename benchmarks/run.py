"""`make bench`: the yardstick, results beside this file whatever the current folder is."""

import datetime
import sys
from pathlib import Path

from dilated.bench import main

arguments = sys.argv[1:]
if "--output" not in arguments:
    name = f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}.json"
    arguments += ["--output", str(Path(__file__).parent / "results" / name)]
sys.exit(main(arguments))
