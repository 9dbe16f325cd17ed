"""The write-ahead log: batch k, published once, is a fact and is never generated again.

One writer, the orchestrator. Each batch carries the orchestrator's state just after emitting it, so the
state and the data that it produced become true by one rename.
"""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import durable, process
from ratchet.errors import Damaged
from ratchet.paths import RunPaths
from ratchet.records import Manifest, Sample
from ratchet.stage import Stage

SAMPLES = "samples.msgpack"
STATE = "orchestrator.json"
METRICS = "metrics.json"


def publish(
    stage: Stage,
    *,
    step: int,
    attempt: int,
    samples: list[Sample],
    state: bytes,
    metrics: dict[str, Any],
    oldest_served: int,
    temperature: float = 1.0,
) -> Manifest:
    """Append batch `step` to the log.

    `state` is the orchestrator's state after this batch (JSON); `metrics` its row; `oldest_served` the
    oldest policy that a live server may still hold, below which the trainer may delete weights;
    `temperature` that of the sampling distribution, under which the trainer compares.
    Raises: Fenced; RatchetError if another batch has this step.
    """
    directory = stage.begin(f"batch_{step}")
    (directory / SAMPLES).write_bytes(msgspec.msgpack.encode(samples))
    (directory / STATE).write_bytes(state)
    (directory / METRICS).write_bytes(msgspec.json.encode(metrics))
    manifest = Manifest(
        kind="batch",
        step=step,
        attempt=attempt,
        files=tuple(durable.seal(directory)),
        meta={"oldest_served": oldest_served, "samples": len(samples), "temperature": temperature},
    )
    return stage.commit(directory, stage.paths.batch(step), manifest)


def payload(manifest: Manifest) -> str:
    """The digest of what a batch is: its samples and the state after them, whoever published it and when.

    Its row is a file of its own, in metrics/, and has figures of a clock.
    """
    return durable.payload_digest(f for f in manifest.files if f.name in (SAMPLES, STATE))


def is_ready(paths: RunPaths, step: int) -> bool:
    """Whether batch `step` is published; looks at one path, so that waiting for it costs nothing."""
    return (paths.batch(step) / durable.MANIFEST).exists()


def read(paths: RunPaths, step: int) -> tuple[list[Sample], Manifest]:
    """Batch `step`, every byte verified. Raises: Damaged."""
    directory = paths.batch(step)
    manifest = durable.verify(directory)
    try:
        with process.without_collector():
            samples = msgspec.msgpack.decode((directory / SAMPLES).read_bytes(), type=list[Sample])
    except msgspec.MsgspecError as error:
        raise Damaged(f"{directory / SAMPLES} does not parse: {error}.") from None
    return samples, manifest


def read_state(directory: Path) -> bytes:
    """The orchestrator's state just after the batch in `directory`, verified. Raises: Damaged."""
    durable.verify(directory)
    return (directory / STATE).read_bytes()


def oldest_served(paths: RunPaths, step: int) -> int:
    """The oldest policy that a server may hold, as batch `step` knew it; 0 where that batch is gone."""
    manifest = durable.read_committed(paths.batch(step))
    return 0 if manifest is None else manifest.meta["oldest_served"]


def read_metrics(directory: Path) -> dict[str, Any]:
    return msgspec.json.decode((directory / METRICS).read_bytes())
