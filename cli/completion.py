"""The scripts with which bash, zsh and fish complete this command, and what they ask it.

A script runs the command with `_BLYAN_NODE_COMPLETE` set; the answer is a line for each candidate.
`cli.values` has the candidates that only a node can tell.
"""

import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

PROGRAM = "blyan-node"
VARIABLE = "_BLYAN_NODE_COMPLETE"
_QUOTES = "\"'\\ \t\n"

_BASH = """\
%(complete_func)s() {
    local kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case "$kind" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(%(complete_var)s=bash_complete COMP_LINE="${COMP_LINE:0:COMP_POINT}" \\
             COMP_WORDBREAKS="$COMP_WORDBREAKS" "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class WholeWords(BashComplete):
    """bash, which breaks words at `@`, `:` and `=`: here they are whole."""

    source_template = _BASH

    def source(self) -> str:
        """The script."""
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the last one, and what is there of the last one."""
        line = os.environ.get("COMP_LINE", "")
        words = split_arg_string(line)[1:]
        if not words or line[-1:].isspace():
            return words, ""
        return words[:-1], words[-1]

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """The candidates, as bash puts them in: only what follows the last break in the word."""
        found = super().get_completions(args, incomplete)
        name, _, value = incomplete.partition("=")
        word = value if name.startswith("--") else incomplete
        breaks = set(os.environ.get("COMP_WORDBREAKS", "")) - set(_QUOTES)
        cut = 1 + max((word.rfind(sign) for sign in breaks), default=-1)
        if cut:
            return [
                CompletionItem(item.value[cut:], item.type, item.help)
                for item in found
                if item.value.startswith(word)
            ]
        return found


SHELLS: dict[str, type[ShellComplete]] = {
    "bash": WholeWords,
    "zsh": ZshComplete,
    "fish": FishComplete,
}


def script(shell: str, root: click.Command) -> str:
    """The script that a shell is to run at its start."""
    return SHELLS[shell](root, {}, PROGRAM, VARIABLE).source()
