"""Where a model, tokenizer or data set that a configuration names lies on this machine."""

from pathlib import Path

from ratchet.errors import Refusal


def is_local(name: str) -> bool:
    """Whether a name can only be a path: it exists, or no hub name (`owner/name`) looks like it."""
    is_file = name.endswith((".json", ".jsonl", ".parquet", ".toml"))
    return Path(name).exists() or is_file or name.startswith((".", "/", "~")) or name.count("/") != 1


def snapshot(name: str, patterns: list[str]) -> Path:
    """The directory that holds the files of `name` which match `patterns`.

    A directory is returned as it is; a hub name is downloaded, or taken from the hub's local cache.
    Raises: Refusal if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if is_local(name):
        raise Refusal(f"The directory {name} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(
            f"{name} is neither a directory here nor a hub name that can be loaded ({reason}): "
            "check the name, the network, or give a directory."
        ) from None
