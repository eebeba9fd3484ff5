"""Weights on their way into an engine: read and verified while answers go on, taken when it stands still."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, dtype, nn

from streamopd.schemas import Weights


class Loader(Protocol):
    """How published weights get into a model."""

    def verified(self, manifest: Weights, weights_dir: Path, kind: dtype) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Whole tensors by HF name, in `kind`; the folder stays inside the block. SwapRefused when they cannot be had."""
        ...

    def load(self, model: nn.Module, manifest: Weights, fresh: Mapping[str, Tensor]) -> object:
        """Copy them into the live parameters. SwapRefused before anything is touched; TornWeights when they are not served."""
        ...


class _Held(NamedTuple):
    manifest: Weights
    fresh: Mapping[str, Tensor]
    folder: ExitStack


class Coming:
    """At most one version, held until it is taken or another one comes."""

    def __init__(self, loader: Loader, kind: dtype) -> None:
        self.loader, self._kind = loader, kind
        self._held: _Held | None = None

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        """Read and verify; it touches no model, so any thread may call it."""
        self.drop()
        with ExitStack() as folder:
            fresh = folder.enter_context(self.loader.verified(manifest, weights_dir, self._kind))
            self._held = _Held(manifest, fresh, folder.pop_all())

    @contextmanager
    def take(self, manifest: Weights, weights_dir: Path) -> Iterator[Mapping[str, Tensor]]:
        """What was prepared, or else what is prepared now; inside the block its folder stays."""
        if self._held is None or self._held.manifest != manifest:
            self.prepare(manifest, weights_dir)
        assert self._held is not None
        try:
            yield self._held.fresh
        finally:
            self.drop()

    def drop(self) -> None:
        """Let go of what was prepared."""
        held, self._held = self._held, None
        if held is not None:
            held.folder.close()
