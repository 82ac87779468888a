"""python train.py [group=option] [key=value] [-m]: `iskd train`."""

import sys

try:
    from iskd.__main__ import main
except KeyboardInterrupt:  # seconds of imports; from there on iskd says itself what was saved
    sys.exit(130)

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
