"""The run loop of a service: heartbeat, leases, drain, signals. What goes wrong is caught here, once."""

from .run import Run
from .worker import Ended, Lease, Worker

__all__ = ["Ended", "Lease", "Run", "Worker"]
