"""One exception tree. A person sees the message as one paragraph; `--debug` shows the trace."""

from __future__ import annotations


class StreamopdError(Exception):
    """Anything this project raises on purpose."""


class UserError(StreamopdError, ValueError):
    """The user's to mend: what happened, the two values that disagree, what to do next."""


class ConfigError(UserError):
    """A run file, an override, or a combination of settings that cannot work."""


class TeacherError(UserError):
    """A teacher that is missing, unsuitable, or returned what cannot be true."""


class TeacherAway(StreamopdError):
    """A teacher outside the run does not answer now. No item is at fault: they wait."""


class TeacherRefuses(TeacherAway):
    """Its server says no to whoever asks like this: a key, an address, a redirect. Asking again does not help."""


class StreamError(StreamopdError):
    """The broker is unreachable, or is not what this run needs."""


class SwapRefused(StreamopdError):
    """New weights were not taken: digest, drill or shape disagree. The old version is still served."""


class TornWeights(StreamopdError):
    """What is served is neither the old version nor the new one: the model must be opened anew, by a new process."""


class Fenced(StreamopdError):
    """A newer learner holds the lineage: this one must leave."""


class GarbageRecord(StreamopdError, ValueError):
    """A record that cannot be trusted; it is quarantined with this reason."""
