"""`model publish|list|show|fetch|verify|wait|export|update`."""

import click

from cli import show, show_publish
from cli.shared import Group, absolute, ask, describe, emit, files, folders, summary
from cli.values import models, subjects
from protocols.rpc.fields import HUB


@click.group(cls=Group)
def model() -> None:
    """Models: into the network, out of it, and their parts."""


@model.command(help=summary("model.publish"))
@click.argument("path", metavar="PATH|hf:ORG/NAME[@REVISION]", shell_complete=folders)
@click.option("--name", metavar="N", required=True, help=describe("model.publish", "name"))
@click.option(
    "--wait-replicas", metavar="R", type=int, help=describe("model.publish", "wait_replicas")
)
@click.option("--dry-run", is_flag=True, help=summary("model.dry_run"))
def publish(path: str, name: str, wait_replicas: int | None, dry_run: bool) -> None:
    """Turn a Hugging Face directory into blocks."""
    source = path if path.startswith(HUB) else absolute(path)
    if dry_run:
        if wait_replicas is not None:
            raise click.UsageError("a dry run has no replicas to wait for")
        emit(ask("model.dry_run", {"path": source, "name": name}), show_publish.dry_run)
        return
    params = {"path": source, "name": name, "wait_replicas": wait_replicas}
    emit(ask("model.publish", params), show_publish.published)


@model.command("list", help=summary("model.list"))
def list_models() -> None:
    """The models that the node knows."""
    emit(ask("model.list", {}), show.models)


@model.command("show", help=summary("model.show"))
@click.argument("name", metavar="N", shell_complete=models)
def show_model(name: str) -> None:
    """One model and the head of each of its parts."""
    emit(ask("model.show", {"model": name}), show.model)


@model.command(help=summary("model.fetch"))
@click.argument("name", metavar="N", shell_complete=models)
@click.option("--root", metavar="R", help=describe("model.fetch", "root"))
def fetch(name: str, root: str | None) -> None:
    """Store every block of a model here."""
    emit(
        ask("model.fetch", {"model": name, "root": root}),
        lambda got: show.say(f"{got['blocks']} blocks, {show.size(got['bytes'])} fetched"),
    )


@model.command(help=summary("model.verify"))
@click.argument("name", metavar="N", shell_complete=models)
def verify(name: str) -> None:
    """Read and check every stored byte of a model."""
    emit(ask("model.verify", {"model": name}), show.verified)


@model.command(help=summary("model.wait"))
@click.argument("name", metavar="N", shell_complete=models)
@click.option(
    "--replicas", metavar="R", type=int, required=True, help=describe("model.wait", "replicas")
)
def wait(name: str, replicas: int) -> None:
    """Wait until every expert has enough live holders."""
    emit(
        ask("model.wait", {"model": name, "replicas": replicas}),
        lambda got: show.say(f"every expert has at least {got['replicas']} live holders"),
    )


@model.command(help=summary("model.export"))
@click.argument("name", metavar="N", shell_complete=models)
@click.argument("out", shell_complete=folders)
@click.option("--root", metavar="R", help=describe("model.export", "root"))
def export(name: str, out: str, root: str | None) -> None:
    """Write a model as a Hugging Face directory."""
    emit(
        ask("model.export", {"model": name, "out": absolute(out), "root": root}),
        lambda got: show.say(f"{got['path']}: {got['files']} files, {show.size(got['bytes'])}"),
    )


@model.command(help=summary("model.update"))
@click.argument("name", metavar="N", shell_complete=models)
@click.option(
    "--subject",
    metavar="S",
    required=True,
    help=describe("model.update", "subject"),
    shell_complete=subjects,
)
@click.option(
    "--weights",
    metavar="FILE",
    required=True,
    help="A safetensors file with the new tensors.",
    shell_complete=files,
)
@click.option("--base", metavar="BLOCK", help="The head that it must replace.")
def update(name: str, subject: str, weights: str, base: str | None) -> None:
    """Publish a new version of one part."""
    params = {"model": name, "subject": subject, "weights": absolute(weights), "base": base}
    emit(ask("model.update", params), lambda got: show.pairs(got.items()))
