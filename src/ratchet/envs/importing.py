"""A user's own code by its name, `module:name`, found from the working directory on."""

import importlib
from pathlib import Path
from typing import Any

from ratchet.errors import Refusal
from ratchet.inputs import code


def import_object(path: str, key: str, what: str) -> Any:
    """Import `module:name`, which the configuration states under `key`.

    Raises: Refusal if the module or the name is not there; an error inside the module is its own traceback.
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
            raise
        raise Refusal(
            f"{key} = {path!r}: there is no module {error.name!r}; it is looked for in {Path.cwd()} and among the "
            "installed packages. Correct the name, or run the command where the module is."
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise Refusal(f"{key} = {path!r}: module {module_name} has no {part!r}; it must name {what}.")
        found = getattr(found, part)
    return found
