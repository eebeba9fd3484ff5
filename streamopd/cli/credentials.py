"""Credentials for a broker of several users: one file a service, and the ACL file for the server."""

from __future__ import annotations

import secrets
from pathlib import Path

from streamopd.stream.acl import USERS, acl_file
from streamopd.worker.run import write_whole

ACL = "redis.acl"


def write_secrets(folder: Path) -> list[Path]:
    """Make what is missing in `folder`: `<service>` holds "user:password", redis.acl the digests. Nothing is made twice."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = [folder / user for user in USERS if not (folder / user).exists()]
    for file in made:
        write_whole(file, f"{file.name}:{secrets.token_urlsafe(32)}".encode(), mode=0o400)
    rules, acl = acl_file({user: (folder / user).read_text().partition(":")[2] for user in USERS}).encode(), folder / ACL
    if not acl.exists() or acl.read_bytes() != rules:  # new users, or rules of a newer version
        write_whole(acl, rules, mode=0o400)
        made.append(acl)
    return made
