"""The interface through which the agent reads an instance and may ask it to drain. The supervisor implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.engines import Progress
    from pascaline.engines.base import Parsers
    from pascaline.gpu.devices import GpuIdentity
    from pascaline.models.resolve import ResolvedModel
    from pascaline.serving.engine_api import EngineApi, Probe
    from pascaline.serving.health import Health
    from pascaline.serving.history import History
    from pascaline.serving.metrics import Metrics
    from pascaline.settings import Settings


class InstanceView(Protocol):
    """The state of an instance, to be read at any time, and `stop`."""

    @property
    def settings(self) -> Settings:
        """The settings of the next start; on_oom may have made them smaller."""

    @property
    def health(self) -> Health:
        """State, since when, and why."""

    @property
    def changes(self) -> Sequence[Health]:
        """The last changes of the state, oldest first, except between ready and busy."""

    @property
    def metrics(self) -> Metrics:
        """What GET /metrics shows."""

    @property
    def history(self) -> History:
        """Rates of the last minutes."""

    @property
    def model(self) -> ResolvedModel | None:
        """None until the model is resolved."""

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan as GET /plan returns it; None until the model is planned."""

    @property
    def parsers(self) -> Parsers | None:
        """The parsers of tool calls and reasoning; None until the model is resolved, and with llama.cpp."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Version of pascaline, and of the engine once it is ready."""

    @property
    def restarts(self) -> int:
        """Restarts of the engine since the instance was started."""

    @property
    def last_probe(self) -> Probe | None:
        """The last test generation."""

    @property
    def requests(self) -> Progress | None:
        """The engine's last report on its requests; None if its last answer had none."""

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while it does not run."""

    @property
    def api(self) -> EngineApi | None:
        """The API of the running engine; None while none runs."""

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs that the engine uses; empty on the CPU, and before the placement is decided."""

    @property
    def stages(self) -> Mapping[str, float]:
        """Seconds of each stage of the last start, in order."""

    @property
    def running_stage(self) -> tuple[str, float, str] | None:
        """Name, seconds so far and progress of the stage of a start that runs now; None: none does."""

    def stop(self, reason: str) -> None:
        """Request an orderly end."""

    def read_api_key(self) -> str | None:
        """Return the key that requests must carry; None if none is set. Raises OSError, ValueError."""
