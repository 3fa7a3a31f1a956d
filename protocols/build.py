"""Which commit a program was made from, as its files tell: nothing is run to find out.

Three places know it, the first that does wins: a file that the build of a package left beside the
code, the metadata of an installation from a repository (PEP 610), and the repository itself where
the code lies in a checkout. Of a checkout it is the commit that is checked out; whether files were
changed since, its files do not tell.
"""

import json
import re
from collections.abc import Callable

PACKAGE = "blyan-node"
COMMIT_FILE = "protocols/commit.txt"
SHOWN_DIGITS = 12
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")

Read = Callable[[str], str | None]
"""The text of the file at a path below some folder; None if there is none."""


def commit(read: Read, direct_url: str | None) -> str | None:
    """The commit, None where nothing tells it.

    `read` reads files below the folder that has our packages; `direct_url` is the metadata of the
    installation.
    """
    return _commit(read(COMMIT_FILE)) or commit_of_metadata(direct_url) or commit_of_checkout(read)


def commit_of_metadata(direct_url: str | None) -> str | None:
    """The commit in `direct_url.json`, where the package was installed from a repository."""
    try:
        document = json.loads(direct_url or "")
        return _commit(document["vcs_info"]["commit_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def commit_of_checkout(read: Read) -> str | None:
    """The commit that is checked out in a folder: `read` reads files below it."""
    git, common = ".git", ".git"
    link = read(".git")
    if link is not None:  # a work tree beside the repository
        git = link.removeprefix("gitdir:").strip()
        common = f"{git}/{(read(f'{git}/commondir') or '.').strip()}"
    head = (read(f"{git}/HEAD") or "").strip()
    if not head.startswith("ref: "):
        return _commit(head)
    name = head.removeprefix("ref: ")
    loose = _commit(read(f"{git}/{name}")) or _commit(read(f"{common}/{name}"))
    return loose or _packed(read(f"{common}/packed-refs") or "", name)


def shown(version: str, commit: str | None) -> str:
    """Version and commit as people read them."""
    return version if commit is None else f"{version} (commit {commit[:SHOWN_DIGITS]})"


def _packed(refs: str, name: str) -> str | None:
    for line in refs.splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return _commit(commit)
    return None


def _commit(text: object) -> str | None:
    match = _COMMIT.fullmatch(text.strip()) if isinstance(text, str) else None
    return match[0] if match else None
