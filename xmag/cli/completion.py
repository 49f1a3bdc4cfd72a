"""The command completion: a script by which a shell completes commands, options and choices."""

import sys

from xmag.cli.commands import COMMANDS, VERBOSE
from xmag.cli.console import ALL_DONE, write

_SCRIPT = """\
_xmag() {{
  local words="" current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  case "${{COMP_WORDS[1]}} $before" in
{choices}
    *) case "$COMP_CWORD ${{COMP_WORDS[1]}} $current" in
      "1 "*) words="{commands}" ;;
{options}
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _xmag xmag"""
"""For bash. Where it finds no words, bash completes names of files."""

_OF_ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit"


def completion(shell: str) -> int:
    """Print the script for a shell."""
    choices, options = [], []
    for command, (_, _, flags, _) in COMMANDS.items():
        names: list[str] = []
        for given, about in (*flags, VERBOSE):
            if given[0].startswith("-"):
                names += (name for name in given if name.startswith("--"))
            words = " ".join(map(str, about.get("choices", ())))
            for name in given if words else ():
                before = name if name.startswith("-") else command
                choices.append(f'    "{command} {before}") words="{words}" ;;')
        options.append(f'      *" {command} -"*) words="{" ".join(names)} --help" ;;')
    if shell == "zsh":
        write(sys.stdout, _OF_ZSH)
    commands = " ".join(COMMANDS)
    write(
        sys.stdout,
        _SCRIPT.format(choices="\n".join(choices), commands=commands, options="\n".join(options)),
    )
    return ALL_DONE
