"""`ckpt export` and `ckpt fork`: what is taken out of a run."""

import argparse
from pathlib import Path

from ratchet import attempts, durable, fork
from ratchet.cli.ckpt.output import check_step, say
from ratchet.config import RunConfig
from ratchet.errors import EXIT_OK, Refusal
from ratchet.paths import RunPaths


def export(arguments: argparse.Namespace) -> int:
    """Write the model of a checkpoint, every byte of it verified, as a directory that `from_pretrained` loads.

    Of a run that trains adapters: these, as peft loads them; with `--merge` the whole model.
    """
    paths, step, target = RunPaths(arguments.run), arguments.step, arguments.target
    check_step(paths, step)
    durable.verify(paths.checkpoint(step))
    record = attempts.newest(paths)
    if record is None:
        raise Refusal(f"{paths.root} holds no run.")
    config = attempts.read_config(paths, record)
    if arguments.merge and config.model.lora is None:
        raise Refusal(f"{paths.root} trains no adapters, so there is nothing to merge: leave out --merge.")
    with durable.new_directory(target) as staged:
        what, written = _write(paths, config, step, staged, arguments)
    value = {
        "directory": str(target),
        "step": step,
        "dtype": arguments.dtype,
        "tensors": written,
        "what": what,
    }
    say(
        value,
        [f"{target}: {what} of step {step}, {written} tensors in {arguments.dtype}"],
        as_json=arguments.json,
    )
    return EXIT_OK


def _write(
    paths: RunPaths, config: RunConfig, step: int, staged: Path, arguments: argparse.Namespace
) -> tuple[str, int]:
    """What was written, and the number of its tensors."""
    from ratchet.models import tensors

    source, model, dtype = paths.checkpoint(step), config.model, arguments.dtype
    if model.lora is None:
        policies = list(durable.committed(paths.weights))
        if (
            policies
        ):  # has the config and the tokenizer beside it, also where the model's source is not at hand
            update = {"name": str(paths.weight(policies[-1])), "tokenizer": None, "random_init": False}
            model = model.model_copy(update=update)
        return "policy", tensors.export(source, staged, model, seed=config.seed, dtype=dtype)
    if arguments.merge:
        written = tensors.export_merged(source, staged, model, model.lora, seed=config.seed, dtype=dtype)
        return "policy, adapters merged", written
    return "adapters", tensors.export_adapter(source, staged, model, model.lora, dtype=dtype)


def forks(arguments: argparse.Namespace) -> int:
    made = fork.fork(RunPaths(arguments.run), arguments.step, arguments.target)
    lines = [
        f"{made.run}: run {made.run_id}, forked from {made.forked_from.run} at step {made.step}",
        f"continue it with the run's command and `--output-dir {made.run} --ckpt.resume-step -1`",
    ]
    say(made, lines, as_json=arguments.json)
    return EXIT_OK
