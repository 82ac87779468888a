"""python train.py [group=option] [key=value] [-m]: `iskd train`."""

import sys

from iskd.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
