"""`expert list|where|hold|drop|stats`."""

import click

from cli import show
from cli.shared import Group, ask, describe, emit, summary
from cli.values import experts, model_option


@click.group(cls=Group)
def expert() -> None:
    """Experts: who holds what, and how it does."""


@expert.command("list", help=summary("expert.list"))
@model_option("expert.list")
def list_experts(model: str | None) -> None:
    """Who holds which expert."""
    emit(ask("expert.list", {"model": model}), show.experts)


@expert.command(help=summary("expert.where"))
@click.argument("subject", shell_complete=experts)
@model_option("expert.where")
def where(subject: str, model: str | None) -> None:
    """Who holds one expert."""
    emit(ask("expert.where", {"subject": subject, "model": model}), show.experts)


@expert.command(help=summary("expert.hold"))
@click.argument("subjects", metavar="SUBJECT...", nargs=-1, required=True, shell_complete=experts)
@model_option("expert.hold")
def hold(subjects: tuple[str, ...], model: str | None) -> None:
    """Load experts and compute with them for others."""
    emit(ask("expert.hold", {"subjects": list(subjects), "model": model}), show.held)


@expert.command(help=summary("expert.drop"))
@click.argument("subjects", metavar="SUBJECT...", nargs=-1, required=True, shell_complete=experts)
@model_option("expert.drop")
@click.option("--force", is_flag=True, help=describe("expert.drop", "force"))
def drop(subjects: tuple[str, ...], model: str | None, force: bool) -> None:
    """Hold experts no longer."""
    params = {"subjects": list(subjects), "model": model, "force": force}
    emit(ask("expert.drop", params), show.held)


@expert.command(help=summary("expert.stats"))
def stats() -> None:
    """What the held experts have done."""
    emit(ask("expert.stats", {}), show.expert_stats)
