"""`completion bash|zsh|fish`."""

import click

from cli.completion import SHELLS, script
from cli.shared import Command, emit


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes this command in a shell.

    bash: eval "$(blyan-node completion bash)" in ~/.bashrc. zsh: the same in ~/.zshrc, behind
    compinit. fish: blyan-node completion fish > ~/.config/fish/completions/blyan-node.fish
    """
    text = script(shell, context.find_root().command)
    emit({"shell": shell, "script": text}, lambda made: click.echo(made["script"], nl=False))
