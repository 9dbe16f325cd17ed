"""`ckpt export` and `ckpt fork`: what is taken out of a run."""

import argparse

from ratchet import attempts, durable, fork
from ratchet.cli.ckpt.output import check_step, say
from ratchet.errors import EXIT_OK, Refusal
from ratchet.paths import RunPaths


def export(arguments: argparse.Namespace) -> int:
    """Write the model of a checkpoint, every byte of it verified, as a directory that `from_pretrained` loads."""
    paths, step, target = RunPaths(arguments.run), arguments.step, arguments.target
    check_step(paths, step)
    durable.verify(paths.checkpoint(step))
    record = attempts.newest(paths)
    if record is None:
        raise Refusal(f"{paths.root} holds no run.")
    model = attempts.read_config(paths, record).model
    policies = list(durable.committed(paths.weights))
    if policies:  # has the config and the tokenizer beside it, also where the model's source is not at hand
        update = {"name": str(paths.weight(policies[-1])), "tokenizer": None}
        model = model.model_copy(update=update)
    with durable.new_directory(target) as staged:
        from ratchet.models import tensors

        written = tensors.export(paths.checkpoint(step), staged, model, dtype=arguments.dtype)
    value = {"directory": str(target), "step": step, "dtype": arguments.dtype, "tensors": written}
    say(value, [f"{target}: policy {step}, {written} tensors in {arguments.dtype}"], as_json=arguments.json)
    return EXIT_OK


def forks(arguments: argparse.Namespace) -> int:
    made = fork.fork(RunPaths(arguments.run), arguments.step, arguments.target)
    lines = [
        f"{made.run}: run {made.run_id}, forked from {made.forked_from.run} at step {made.step}",
        f"continue it with the run's command and `--output-dir {made.run} --ckpt.resume-step -1`",
    ]
    say(made, lines, as_json=arguments.json)
    return EXIT_OK
