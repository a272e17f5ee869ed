"""An autoencoder's files out of a repository of the Hugging Face hub."""

import glob
import re
from pathlib import Path

from mechinterp.errors import UserError, one_line
from mechinterp.sae.formats.dictionary_learning import CONFIG, WEIGHTS
from mechinterp.sae.formats.writing import CFG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS, SPARSITY

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:[:/]([^:]+))?")
FILES = (CFG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS, SPARSITY, CONFIG, WEIGHTS)


def parse(name: str) -> tuple[str, str] | None:
    """Repository and folder in it out of `owner/name`, `owner/name:folder` or `owner/name/folder`; None for neither."""
    found = NAME.fullmatch(name)
    if found is None or name.startswith((".", "~")):
        return None
    folder = (found.group(2) or "").strip("/")
    return None if ".." in folder.split("/") else (found.group(1), folder)


def fetch(repository: str, folder: str) -> Path:
    """The folder of an autoencoder, out of the hub's cache on this machine or from the hub. Nothing else is fetched.

    Raises:
        UserError: no such repository, no such folder in it, or no network.
    """
    from huggingface_hub import snapshot_download

    inside = f"{glob.escape(folder)}/" if folder else ""
    patterns = [f"{inside}{run}{name}" for run in ("", "sae/") for name in FILES]
    try:
        found = Path(snapshot_download(repository, allow_patterns=patterns)) / folder
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no folder {repository}{'/' if folder else ''}{folder} here, and the hub does not give it: "
            f"{one_line(error)}"
        ) from error
    if not found.is_dir():
        raise UserError(f"{repository} on the hub has no autoencoder in {folder or 'its root'}; name OWNER/NAME:FOLDER")
    return found
