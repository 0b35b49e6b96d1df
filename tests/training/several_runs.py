"""A run in every mode, one after another: several_runs.py folder flags... (started by torchrun)"""

import os
import sys

from every_mode import MODES
from rich.console import Console

from lossmith.training.config import load_config
from lossmith.training.runner import run

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    for mode, of_mode in MODES.items():
        run(load_config([*flags, *of_mode, f"--out_dir={folder}/{mode}"]), Console(quiet=True))
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at a usual exit
