"""A run in every mode and with every loss: several_runs.py folder flags... (started by torchrun)"""

import os
import sys

from every_mode import LOSSES, MODES
from rich.console import Console

from lossmith.training.config.reading import load_config
from lossmith.training.run.runner import run

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    for kind, runs in {"mode": MODES, "loss": LOSSES}.items():
        for name, own in runs.items():
            run(load_config([*flags, *own, f"--out_dir={folder}/{kind} {name}"]), Console(quiet=True))
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at a usual exit
