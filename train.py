"""Train a model: python train.py [config.py] [--key=value ...], the same as `lossmith train`."""

import sys

from lossmith.training.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
