"""Credentials for a broker of several users: one file a service, and the ACL file for the server."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from streamopd.stream.acl import USERS, acl_file

ACL = "redis.acl"


def write_secrets(folder: Path) -> list[Path]:
    """Make what is missing in `folder`: `<service>` holds "user:password", redis.acl the digests. Nothing is made twice."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = [folder / user for user in USERS if not (folder / user).exists()]
    for file in made:
        _write(file, f"{file.name}:{secrets.token_urlsafe(32)}")
    if made or not (folder / ACL).exists():
        (folder / ACL).unlink(missing_ok=True)
        _write(folder / ACL, acl_file({user: (folder / user).read_text().partition(":")[2] for user in USERS}))
        made.append(folder / ACL)
    return made


def _write(file: Path, text: str) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with open(handle, "w") as out:
        out.write(text)
