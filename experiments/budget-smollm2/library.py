"""CPU seconds that the options of one layer of SmolLM2-135M take to be fitted, and how far each then is from the layer.

    DATA=FOLDER; python experiments/budget-smollm2/library.py --data "$DATA" --layer 2

With the tokens and epochs of conf/budget/default.yaml, on windows of 256 tokens of WikiText-2. Seconds of the
processor, so that others at work on the machine do not count; a library takes as many for each of the 30 layers.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402
import yaml  # noqa: E402

from iskd.models import Stack  # noqa: E402
from iskd.refits.local import Local  # noqa: E402
from iskd.schedules.budget.fitting import Fit, fit_options  # noqa: E402
from iskd.schedules.budget.options import Option, layers_of, options_of  # noqa: E402
from iskd.schedules.budget.settings import Budget  # noqa: E402
from iskd.schedules.budget.text import Texts  # noqa: E402
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

CONF = Path(__file__).resolve().parents[2] / "conf" / "budget" / "default.yaml"
LENGTH = 256


def main() -> None:
    """Print a row for every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4, help="of local training")
    parser.add_argument("--only", nargs="+", help="names of options; all where it is left out")
    asked = parser.parse_args()
    values = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    budget = Budget(params=0.5, options=values["options"], lr=asked.lr)
    teacher = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2"))
    with gzip.open(asked.data / "wikitext2" / "train.txt.gz", "rt", encoding="utf-8") as file:
        ids = teacher.tokenizer(file.read(400_000))["input_ids"]
    fit, held = budget.fit_tokens // LENGTH, budget.held_tokens // LENGTH
    windows = torch.tensor(ids[: (fit + held) * LENGTH]).view(-1, LENGTH)
    texts = Texts(list(windows[:fit].split(Local.step_tokens // LENGTH)), list(windows[fit:].split(4)), [])
    stack = Stack(teacher.model)
    options = [each for each in options_of(budget.options, asked.only) if each.fitted]
    options = [each for each in options if asked.layer in layers_of(each, stack)]
    since = [time.process_time()]

    def told() -> None:
        since[0] = time.process_time()

    def keep(_layer: int, option: Option, found: Fit) -> None:
        spent.append(time.process_time() - since[0])
        print(f"| {option.name} | {spent[-1]:.1f} | {found.before:.4f} | {found.after:.4f} |", flush=True)

    spent: list[float] = []
    print("| option | CPU s | error before the fit | after |\n|---|---|---|---|")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        fit_options(teacher.model.eval(), texts, {asked.layer: options}, budget, 0, keep, told)
    print(f"| all | {sum(spent):.1f} | | |")


if __name__ == "__main__":
    main()
