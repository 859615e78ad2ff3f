"""The way of a folder to the Hugging Face Hub, through its own client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mipo_ray.errors import UserError, cut

MESSAGE = "A model of mipo-ray, with its card"


def check_target(name: str, *, public: bool) -> None:
    """Asks the Hub whether a model may go there: a repository that is there already is private, or may be public.

    Raises UserError where not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(name):
        try:
            found = HfApi().repo_info(name, repo_type="model")
        except RepositoryNotFoundError:
            return
    if not found.private and not public:
        raise UserError(
            f"{name}: this repository is there already, and everybody can see it; give --public, or another name"
        )


def upload(folder: Path, name: str, *, public: bool) -> str:
    """Makes the repository where it is not there, private unless `public`, and commits the files of the folder.

    Returns its address. Raises UserError for whatever the Hub refuses.
    """
    from huggingface_hub import HfApi

    with _explained(name):
        api = HfApi()
        address = api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, repo_type="model", commit_message=MESSAGE)
    return str(address)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the client raises into a line for the user."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{name}: not published: {type(cause).__name__}: {cut(str(cause), 500)}") from error
