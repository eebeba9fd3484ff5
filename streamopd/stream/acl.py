"""Who may write what in the broker: one user a service, in the language of Redis and Valkey ACL files.

Every user reads everything of a run. What a service writes is what its calls write, and only the learner writes weights,
steps, and who leads: a generator that was taken over cannot publish weights, nor train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from streamopd.topology import SERVICES

USERS = ("supervisor", *SERVICES)

TOLD = ("beats", "events", "quarantine")                              # by everybody
MOVED = ("state", "sizes", "bytes", "kills", "fates", "fated", "again")  # by whoever holds an entry
WRITES = {
    "supervisor": TOLD,
    "feeder": (*TOLD, *MOVED, "prompts", "issued", "end"),
    "generator": (*TOLD, *MOVED, "prompts", "rollouts"),
    "teacher": (*TOLD, *MOVED, "rollouts", "scored", "spent"),
    "packer": (*TOLD, *MOVED, "scored", "batches", "kept", "batchno"),
    "learner": ("*",),
    "evaluator": TOLD,
}
COMMANDS = "+@all -@admin -@dangerous +info +config|get"  # of which the protocol needs the last two
ALSO = {"supervisor": "+shutdown"}         # it ends the broker when the run has ended


def _leases(name: str) -> tuple[str, ...]:
    """A service's own: to be the only one, and of a GPU."""
    return f"hold:{name}", f"hold:gpu:{name}:*"


def acl_file(passwords: Mapping[str, str]) -> str:
    """The users of `passwords` (user -> password) and no other; the file holds digests only.

    The scripts are called with the key "{run}" and build the names below it themselves, so each user may name that key.
    """
    users = [
        f"user {name} on #{hashlib.sha256(password.encode()).hexdigest()} resetchannels &{{*}}:news "
        f"resetkeys ~{{*}} %R~{{*}}:* {' '.join(f'~{{*}}:{key}' for key in (*WRITES[name], *_leases(name)))} {COMMANDS} "
        f"{ALSO.get(name, '')}".strip()
        for name, password in passwords.items()
    ]
    return "\n".join(["user default off resetkeys resetchannels -@all", *users]) + "\n"
