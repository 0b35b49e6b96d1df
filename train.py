"""Train a language model: python train.py [config.py] [--key=value ...], the same as `lossmith train`."""

import importlib.util
import os
import sys

# On a busy machine OpenMP's threads burn the cores while they wait for one another, and a step takes ten
# times as long. The library reads this once, when PyTorch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    if importlib.util.find_spec("lossmith") is None:
        sys.exit("error: lossmith is not installed; `pip install -e '.[train]'`, or `make demo` does it all.")
    from lossmith.training.cli import main

    main(["train", *sys.argv[1:]])
