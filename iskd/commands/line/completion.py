"""`iskd completion SHELL`: what a shell evaluates, and the words that it then asks for. Nothing heavy is imported."""

from __future__ import annotations

from typing import Any

from iskd.commands.line.commands import COMMANDS
from iskd.commands.line.keys import choices, known, root_keys
from iskd.system.version import options

# the shell hands over the words of the line up to the cursor; = parts words in bash
_SCRIPTS = {
    "bash": """\
_iskd() {
  local line="${COMP_LINE:0:COMP_POINT}" word cut
  word="${line##* }"
  cut="${word%"${COMP_WORDS[COMP_CWORD]}"}"
  [ "${COMP_WORDS[COMP_CWORD]}" = "=" ] && cut="$word"
  COMPREPLY=()
  while IFS= read -r found; do COMPREPLY+=("${found#"$cut"}"); done < <(iskd completion bash --complete "$line")
  [[ "${COMPREPLY[0]-}" == *= ]] && compopt -o nospace
}
complete -o default -F _iskd iskd""",
    "zsh": """\
_iskd() {
  local -a found
  found=("${(@f)$(iskd completion zsh --complete "${(j: :)words[1,CURRENT]}")}")
  [[ -n "$found" ]] && compadd -S '' -- $found || _files
}
compdef _iskd iskd""",
    "fish": "complete -c iskd -a '(iskd completion fish --complete (commandline -cp))'",
}


def complete(asked: Any) -> None:
    """Print the script of a shell, or the words that may stand at the end of a line."""
    print(_SCRIPTS[asked.shell] if asked.complete is None else "\n".join(words_for(asked.complete)))


def words_for(line: str) -> list[str]:
    """What the last word of a line may become: a command, GROUP=, GROUP=CHOICE, KEY=. Empty where files are meant."""
    *before, word = line.split(" ")
    before = [each for each in before if each]
    if len(before) < 2:
        return _beginning(word, COMMANDS)
    command = COMMANDS.get(before[1])
    if command is None or not command.composes:
        return []
    group, equal, _ = word.partition("=")
    if equal:
        return _beginning(word, [f"{group}={name}" for name in options(group)] if group in choices() else [])
    roots = [f"{name}=" for name in {**choices(), **root_keys()}]
    keys = [f"{name}=" for name in known(group.split(".")[0])] if "." in group else []
    return _beginning(word, dict.fromkeys([*roots, *keys]))


def _beginning(word: str, known: Any) -> list[str]:
    return [each for each in known if each.startswith(word)]
