"""`python -m iskd.teacher smollm2` prepares a bundled teacher (SmolLM2: arXiv 2502.02737) and prints its directory."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from iskd.teacher import bundled

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a bundled teacher and print its directory; the exit status is 0 on success, else 1."""
    parser = argparse.ArgumentParser(prog="python -m iskd.teacher", description="prepare a bundled teacher")
    parser.add_argument("name", choices=sorted(bundled.BUNDLES))
    source = bundled.bundle(parser.parse_args(argv).name)
    logging.basicConfig(level=logging.INFO, format="teacher: %(message)s")
    try:
        directory = bundled.prepare(source)
        if directory is None:
            raise ValueError(f"{source.distribution} is not installed: {source.how_to_install}")
    except ValueError as error:
        log.error("%s", error)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
