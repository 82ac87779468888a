"""What a package says of itself: the README without links into a repository that its reader does not have.

The builder names the project's home by `ISKD_URL`, an address below which `blob/REF/FILE` shows a file and
`raw/REF/FILE` is one; `ISKD_REF` is the branch, tag or commit (default: v and the version). Links then lead there, and
the home stands in the metadata. Without `ISKD_URL` links become their own text, and pictures what they show.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(([^)\s]+)\)")
_HIDDEN = re.compile(r"^<!-- test:.*-->\n+", re.M)


class Metadata(MetadataHookInterface):
    """The hook that hatchling calls for what is dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set readme and urls."""
        home, version = os.environ.get("ISKD_URL", "").rstrip("/"), str(metadata["version"])
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        said = described(text, home, os.environ.get("ISKD_REF") or f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": said}
        metadata["urls"] = {"Repository": home, "Changelog": f"{home}/blob/HEAD/CHANGELOG.md"} if home else {}


def described(text: str, home: str, ref: str) -> str:
    """A README as the long description of a package whose files are not beside it."""

    def elsewhere(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        words = _LINK.sub(elsewhere, words)
        if "://" in target or target.startswith(("#", "mailto:")):
            return f"{picture}[{words}]({target})"
        if not home:
            return words
        return f"{picture}[{words}]({home}/{'raw' if picture else 'blob'}/{ref}/{target})"

    return _LINK.sub(elsewhere, _HIDDEN.sub("", text))
