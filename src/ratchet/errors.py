"""The error tree: three kinds, three fates.

Bad input is a sentence and exit 2. A bad rollout is a value (`records.RolloutFailure`), never
an exception here. Everything else is a crash that stops the run.
"""

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_REFUSED = 2
EXIT_POISON = 65
EXIT_SAVE_FAILED = 74
EXIT_STOPPED = 75
EXIT_FENCED = 76


class RatchetError(Exception):
    """The root: every error that this package raises on purpose carries its exit code."""

    exit_code = EXIT_CRASH


class Refusal(RatchetError):
    """Bad input: one clear sentence with the value, the rule and the remedy. Nothing was touched."""

    exit_code = EXIT_REFUSED


class Damaged(Refusal):
    """A published file is not what its manifest says: which file, expected and found."""


class Fenced(RatchetError):
    """This process was replaced: its staging directory was revoked, so it may publish nothing."""

    exit_code = EXIT_FENCED


class PoisonBatch(RatchetError):
    """A non-finite loss: restarting would read the same batch and fail again."""

    exit_code = EXIT_POISON


class SaveFailed(RatchetError):
    """A checkpoint could not be written; older ones are untouched."""

    exit_code = EXIT_SAVE_FAILED


class Unwritable(RatchetError):
    """The run directory is gone, or cannot be written any more: nothing can be saved until it is back."""

    exit_code = EXIT_SAVE_FAILED


class Stopped(RatchetError):
    """The run was asked to stop and did so at a step boundary; the same command continues it."""

    exit_code = EXIT_STOPPED
