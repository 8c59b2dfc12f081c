"""The times of a run's phases, as Ray and Prometheus show them."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.metrics import Metric


class StepGauges:
    """Numbers of a run's last step for Ray's dashboard, and for a Prometheus that scrapes what Ray exports.

    Ray puts `ray_` before the names.

    Args:
        run: its name, the tag `run` of each number.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._step = Gauge("posttrain_step", "steps that are done", tag_keys=("run",))
        self._seconds = Gauge("posttrain_phase_seconds", "seconds of the last step's phases", tag_keys=("run", "phase"))
        self._throughput = Gauge(
            "posttrain_throughput", "what the last step generated per second", tag_keys=("run", "unit")
        )

    def show(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Show a finished step: the metrics `time/<phase>` and `throughput/<unit>_per_second`."""
        self._step.set(step, {"run": self._run})
        for name, metric in metrics.items():
            family, _, rest = name.partition("/")
            if family == "time":
                self._seconds.set(metric.value, {"run": self._run, "phase": rest})
            elif family == "throughput":
                self._throughput.set(metric.value, {"run": self._run, "unit": rest.removesuffix("_per_second")})
