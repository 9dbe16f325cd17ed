"""The nouns that cross a process or a disk boundary. Plain data, no behaviour, no torch."""

from typing import Any

import msgspec


class FileEntry(msgspec.Struct, frozen=True, order=True):
    """One published file: its name below the published directory, size in bytes and xxh3-128."""

    name: str
    size: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a directory true. `hash` is the xxh3-128 of the manifest without `hash` itself."""

    format: int = 1
    kind: str
    step: int
    attempt: int
    world_size: int = 1
    files: tuple[FileEntry, ...]
    meta: dict[str, Any] = {}
    versions: dict[str, str] = {}
    hash: str = ""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a sample were sampled by the policy of `step`."""

    step: int
    start: int
    end: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout as the trainer sees it: every token that was in the context, in order.

    `mask[i]` says that token i was sampled by the policy and is trained on; `logprobs[i]` is then
    the log-probability under the *sampling* distribution, and 0.0 elsewhere. The index space of
    `versions` is that of `token_ids`.
    """

    env: str
    task: str
    draw: int
    rollout: int
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[VersionSpan]
    reward: float
    advantage: float
    finish_reason: str
    metrics: dict[str, float] = {}

    @property
    def oldest_policy(self) -> int:
        return min((span.step for span in self.versions), default=0)


class RolloutFailure(msgspec.Struct, frozen=True):
    """A rollout that yielded nothing to train on: a value with a reason, counted, never reward 0."""

    reason: str
    detail: str = ""


class Progress(msgspec.Struct, kw_only=True):
    """How far a program has come; totals are over the whole run, across attempts."""

    step: int = 0
    total_samples: int = 0
    """Rollouts, or rows of demonstrations that were consumed: the place in the data."""
    total_tokens: int = 0
    total_problems: int = 0
    total_skipped: int = 0
    """Of the rows that were consumed: they could not be trained."""
