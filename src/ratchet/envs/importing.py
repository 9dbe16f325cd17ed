"""A user's own code by its name, `module:name`, found from the working directory on; and how its errors are told."""

import importlib
import os
import traceback
from pathlib import Path
from typing import Any

from ratchet.errors import Refusal
from ratchet.inputs import code


def import_object(path: str, key: str, what: str) -> Any:
    """Import `module:name`, which the configuration states under `key`.

    Raises: Refusal if the module or the name is not there, or the module fails
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise Refusal(f"{key} = {path!r} must have the form module:name and name {what}.")
    code.look_here()
    code.watch()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise failed(f"{key} = {path!r}: module {module_name}", error) from None
        raise Refusal(
            f"{key} = {path!r}: there is no module {error.name!r}; it is looked for in {Path.cwd()} and among the "
            "installed packages. Correct the name, or run the command where the module is."
        ) from None
    except Refusal:
        raise
    except Exception as error:
        raise failed(f"{key} = {path!r}: module {module_name}", error) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise Refusal(f"{key} = {path!r}: module {module_name} has no {part!r}; it must name {what}.")
        found = getattr(found, part)
    return found


def failed(what: str, error: BaseException) -> Refusal:
    """What a user's code failed of before anything starts: one sentence, then the user's own frames."""
    return Refusal(f"{what} fails: {told(error)}. Mend it, then run the same command again.{frames(error)}")


def told(error: BaseException) -> str:
    """An error in the words of the last line of its traceback."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1].rstrip(".")


def frames(error: BaseException) -> str:
    """The lines of the user's code through which an error came, one each; none of ours, nor of a library."""
    found = [(f.filename, f.lineno, f.name, f.line) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        found.append((error.filename, error.lineno, "", error.text))
    own = [entry for entry in found if Path(entry[0]).is_file() and code.is_own(Path(entry[0]))]
    return "".join(
        f"\n  {os.path.relpath(file)}, line {line}{f', in {name}' if name else ''}: {(text or '').strip()}"
        for file, line, name, text in own
    )
