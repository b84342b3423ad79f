"""A finished model folder to the Hugging Face hub, where a run file says so: the one place that sends anything away."""

from pathlib import Path

from tokenkit.config import Config, UserError
from tokenkit.export.private import found_private

CHECKED = ("README.md", "config.json", "generation_config.json", "tokenizer_config.json")


class HubConfig(Config):
    """Where a finished model is uploaded to."""

    repo_id: str
    """`OWNER/NAME`; it is made where it does not exist."""
    private: bool = True
    """Only for its owner to see; a repository that is public is refused then."""
    revision: str | None = None
    """A branch; null: the main one."""


def check_push(push_to_hub: bool, hub: HubConfig | None) -> None:
    """UserError where something is to be uploaded to nowhere."""
    if push_to_hub and hub is None:
        raise UserError("push_to_hub: true, and no place to push to; write hub.repo_id=OWNER/NAME")


def check_folder(folder: Path) -> None:
    """UserError where a file of the folder that people read holds what is private."""
    for path in sorted(path for name in CHECKED for path in folder.rglob(name)):
        found = found_private(path.read_text("utf-8"))
        if found:
            name = path.relative_to(folder)
            raise UserError(f"{folder / name}: holds {' and '.join(found)}, so nothing was uploaded; take it out")


def push(folder: Path, hub: HubConfig) -> str:
    """Uploads the folder, its card included; the address. UserError where it is not to be, or cannot be."""
    check_folder(folder)
    from huggingface_hub import HfApi  # imported where something is sent, and nowhere else
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
        if hub.private and not api.model_info(hub.repo_id).private:
            raise UserError(f"hub.repo_id: {hub.repo_id} is public; write hub.private=false, or another name")
        if hub.revision is not None:
            api.create_branch(hub.repo_id, branch=hub.revision, exist_ok=True)
        api.upload_folder(
            repo_id=hub.repo_id,
            folder_path=folder,
            revision=hub.revision,
            commit_message="Model and card, uploaded by tokenkit",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub.repo_id: {hub.repo_id}: not uploaded: {why}") from None
    return str(address)
