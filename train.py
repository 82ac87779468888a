"""python train.py [group=option] [key=value] [-m]: compose conf/, build, run."""

import sys

from iskd.cli import arguments, train

if __name__ == "__main__":
    sys.argv[1:] = arguments(sys.argv[1:])
    train()
