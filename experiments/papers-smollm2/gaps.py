"""Gaps to fill in children's stories, in the form of the Children's Book Test (common nouns, arXiv 1511.02301).

    python gaps.py DATA OUT [--items 300]

The Children's Book Test is not among the data. Its construction is repeated on stories of TinyStories' validation
split: a noun of a late sentence is the gap, and the other nine options are nouns of the same story. As there is no
tagger here, a noun is a word that ends what begins with an article or possessive in three places at least. Writes
OUT/cbt_sentence/eval.jsonl, an item a line, and links what is in DATA beside it, so that OUT can stand for DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

NOUN = re.compile(r"\b(?:a|an|the|his|her|their) ([a-z]{3,})(?=[.,!?]| (?:was|is|had|and|in|on|to|with|that)\b)")
OFTEN = 3  # what stands there fewer times may be a slip
NO_NOUN = {"big", "little", "while", "same", "next", "other", "not", "how", "what"}
A_STORY = 2


def sentences(story: str) -> list[str]:
    """Of one story, without those that speak."""
    return [one for one in re.split(r"(?<=[.!?])\s+", story.strip()) if '"' not in one]


def items(text: str, count: int) -> list[dict[str, object]]:
    """At most two items of each story, of different sentences, in the order of the text."""
    nouns = {word for word, number in Counter(NOUN.findall(text)).items() if number >= OFTEN} - NO_NOUN
    drawn, made = random.Random(0), []
    # stories are joined without a mark: they begin alike
    for number, story in enumerate(re.split(r"\n\n(?=Once upon a time|One day)", text)):
        told = sentences(story)
        had = list(dict.fromkeys(word for word in re.findall(r"[a-z]+", story) if word in nouns))
        if len(had) < 10:
            continue
        late = [
            (at, [word for word in re.findall(r"[a-z]+", told[at])[2:] if word in nouns])
            for at in range(max(2, len(told) // 3), len(told))  # the test gives sentences before the gap, in the plural
            if 6 <= len(told[at].split()) <= 14
        ]
        late = [(at, words) for at, words in late if words]
        for at, words in sorted(drawn.sample(late, min(A_STORY, len(late)))):
            answer = drawn.choice(words)
            options = [answer, *drawn.sample([word for word in had if word != answer], 9)]
            drawn.shuffle(options)
            made.append(
                {
                    "id": f"story-{number}-{at}",
                    "sentences": told[:at],
                    "question": re.sub(rf"\b{answer}\b", "XXXXX", told[at], count=1),
                    "options": options,
                    "answer": answer,
                }
            )
    if len(made) < count:
        raise SystemExit(f"the stories give {len(made)} items of {count}")
    return made[:count]


def main() -> None:
    """Write the items and the links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=300)
    asked = parser.parse_args()
    with gzip.open(asked.data / "tinystories" / "valid.txt.gz", "rt", encoding="utf-8") as file:
        made = items(file.read(), asked.items)
    folder = asked.out / "cbt_sentence"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in made))
    for other in sorted(asked.data.iterdir()):
        link = asked.out / other.name
        if not link.exists():
            link.symlink_to(other.resolve())


if __name__ == "__main__":
    main()
