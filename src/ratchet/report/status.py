"""The state of a run for programs: `ratchet status RUN --json`, and a few lines for people."""

from typing import Any

import msgspec

from ratchet.report import waits
from ratchet.report.screen import figure, seconds, size
from ratchet.report.view import View

_QUANTITIES = (
    "loss",
    "lr",
    "grad_norm",
    "reward/mean",
    "policy/mismatch_kl",
    "policy/entropy",
    "policy/off_policy_steps",
)


def status(view: View) -> dict[str, Any]:
    """Everything on the screen, as plain data. Names are stable."""
    outcome = view.record.outcome
    return {
        "run": str(view.root),
        "kind": view.kind,
        "run_id": view.record.run_id,
        "attempt": view.record.attempt,
        "state": view.state,
        "exit_code": outcome.code if outcome else None,
        "step": view.step,
        "max_steps": view.max_steps,
        "step_s": round(view.step_s, 3),
        "eta_s": None if view.eta_s is None else round(view.eta_s, 1),
        "quiet_s": round(view.facts.quiet_s, 1),
        "policies": view.policies,
        "latest": {name: view.last(name) for name in _QUANTITIES if view.last(name) is not None},
        "evals": view.evals[-1] if view.evals else {},
        "tokens_per_s": {
            name: rows[-1].get("perf/tokens_per_s")
            for name, rows in (("training", view.trainer), ("generation", view.orchestrator))
            if rows
        },
        "rollouts": msgspec.to_builtins(view.now) if view.now else None,
        "dropped": view.dropped,
        "checkpoints": [
            {"step": c.step, "size_bytes": c.size_bytes, "age_s": round(c.age_s, 1), "sound": c.is_sound}
            for c in view.checkpoints
        ],
        "restarts": view.restarts,
        "waits": msgspec.to_builtins(waits.waits(view.facts)) if view.is_open else [],
        "stall": view.stall,
        "warnings": msgspec.to_builtins(view.warnings),
    }


def lines(view: View) -> list[str]:
    """The same in a few lines."""
    found = [f"{view.root}: {view.kind}, attempt {view.record.attempt}, {view.state}"]
    pace = f", {seconds(view.step_s)} a step" if view.step_s else ""
    left = f", {seconds(view.eta_s)} left" if view.eta_s else ""
    found.append(f"step {view.step} of {view.max_steps}{pace}{left}")
    if view.is_gone:
        saved = max((c.step for c in view.checkpoints if c.is_sound), default=0)
        found.append(f"the same command continues at step {saved}, and with what the log holds behind it")
    latest = [f"{name} {figure(view.last(name))}" for name in _QUANTITIES if view.last(name) is not None]
    found.append(", ".join(latest) or "no step was recorded yet")
    if view.checkpoints:
        newest = view.checkpoints[-1]
        what = f"{size(newest.size_bytes)}, {seconds(newest.age_s)} ago" if newest.is_sound else "DAMAGED"
        found.append(f"newest checkpoint: step {newest.step} ({what})")
    if view.is_open:
        found += [f"the {w.who} waits for the {w.on}: {w.why}" for w in waits.waits(view.facts)]
    found += [view.stall] if view.stall else []
    return found + [f"warning: {warning}" for warning in view.warnings]
