"""Some rollouts of a run, for people to read: sampled evenly over the batches that are still there.

Of each batch come the groups at its beginning, middle and end, and of each group its best and its worst rollout: what
the policy is pushed towards and away from.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from ratchet import batchlog, durable
from ratchet.paths import RunPaths
from ratchet.records import Sample

BATCHES = 16
GROUPS = 3
TOKENS = 1200
_TOKENIZER = "tokenizer.json"


def sample(paths: RunPaths, settings: dict[str, Any], *, limit_bytes: int) -> list[dict[str, Any]]:
    """At most `limit_bytes` of rollouts as JSON; the newest batch is always among them."""
    steps = _spread(durable.steps(paths.batches), BATCHES)
    pieces = Pieces(load_tokenizer(paths, settings)) if steps else Pieces(None)
    found: list[dict[str, Any]] = []
    left = limit_bytes
    for step in reversed(steps):
        for rollout in _of_batch(paths, step):
            entry = _entry(rollout, step, pieces)
            left -= len(msgspec.json.encode(entry))
            if left < 0:
                return found
            found.append(entry)
    return found


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values at equal distances, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _of_batch(paths: RunPaths, step: int) -> list[Sample]:
    """Best and worst of some groups; nothing of a batch that is damaged, or pruned just now."""
    path = paths.batch(step) / batchlog.SAMPLES
    try:
        samples = msgspec.msgpack.decode(path.read_bytes(), type=list[Sample])
    except (OSError, msgspec.MsgspecError):
        return []
    groups: dict[int, list[Sample]] = {}
    for rollout in samples:
        groups.setdefault(rollout.draw, []).append(rollout)
    found = []
    for group in _spread(list(groups.values()), GROUPS):
        best, worst = max(group, key=lambda s: s.reward), min(group, key=lambda s: s.reward)
        found += [best] if best is worst else [best, worst]
    return found


def _entry(rollout: Sample, step: int, pieces: "Pieces") -> dict[str, Any]:
    cut = rollout.token_ids[:TOKENS]
    return {
        "step": step,
        "env": rollout.env,
        "task": rollout.task,
        "draw": rollout.draw,
        "rollout": rollout.rollout,
        "reward": round(rollout.reward, 4),
        "advantage": round(rollout.advantage, 4),
        "finish": rollout.finish_reason,
        "metrics": {name: round(value, 4) for name, value in rollout.metrics.items()},
        "tokens": pieces.of(cut),
        "mask": "".join("1" if said else "0" for said in rollout.mask[:TOKENS]),
        "logprobs": [round(value, 2) for value in rollout.logprobs[:TOKENS]],
        "versions": [[span.step, span.start, span.end] for span in rollout.versions],
        "omitted": len(rollout.token_ids) - len(cut),
    }


def load_tokenizer(paths: RunPaths, settings: dict[str, Any]) -> Tokenizer | None:
    """That beside a published policy, or the model's own if it is a directory here: no hub is asked.

    None where neither is at hand.
    """
    model = settings.get("model", {})
    places = [paths.weight(step) for step in reversed(durable.steps(paths.weights))]
    places += [Path(model[name]) for name in ("tokenizer", "name") if model.get(name)]
    for place in places:
        try:
            return _load((place / _TOKENIZER).read_text())
        except (OSError, UnicodeDecodeError):
            continue
    return None


@functools.lru_cache(maxsize=2)
def _load(content: str) -> Tokenizer | None:
    """A large one takes most of a second: the launcher loads it while the run goes on, and needs it at the end."""
    try:
        return Tokenizer.from_str(content)
    except Exception:  # the library raises plain Exception; token ids are shown instead
        return None


class Pieces:
    """What each token adds to a text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:] if tokenizer else []
        self._anchor: list[int] = anchor
        self._offset = len(self._decode(anchor))

    def of(self, ids: Sequence[int]) -> list[str]:
        """One piece a token. Bytes of one character in several tokens stand with the last of them."""
        if self._tokenizer is None:
            return [f"[{token}]" for token in ids]
        found: list[str] = []
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            piece = (
                self._piece(token)
                if len(pending) == 1
                else self._decode([*self._anchor, *pending])[self._offset :]
            )
            if piece.endswith("\ufffd") and len(pending) < 4:
                found.append("")
                continue
            found.append(piece)
            pending = []
        return found

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([*self._anchor, token])[self._offset :]
        return self._known[token]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if self._tokenizer and ids else ""
