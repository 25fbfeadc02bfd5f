"""--push_to_hub: the finished model in a repository on the Hugging Face Hub.

Trainer's own pushes are off. They overwrite the card, upload checkpoints that are still being trained over the result,
and ask for the repository only once the model is loaded. Here the repository is made before any work, so that a wrong
token or name costs no training, and the sealed result is uploaded once, at the end.
"""

from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from alpaca.common.errors import UserError, first_line

# Left out of the repository: checkpoints and half-written files, and run.json, which names this machine's folders.
NOT_PUSHED = ("checkpoint-*", "_*", ".*", "*.partial", "run.json")


class HubRepository:
    """The repository that --push_to_hub names. `args`: TrainingArguments, whose own pushes are switched off.

    Its name is --hub_model_id, or that of the output folder under the account of the token. Only the first process
    talks to the Hub. Raises UserError where the repository cannot be made.
    """

    def __init__(self, args, say: Callable[[str], None] = print):
        self.wanted = args.push_to_hub and args.process_index == 0
        args.push_to_hub = False
        self.folder, self.say = Path(args.output_dir), say
        self.api, self.revision = HfApi(token=args.hub_token), args.hub_revision
        if not self.wanted:
            return
        name = args.hub_model_id or self.folder.absolute().name
        try:
            self.repo_id = self.api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"--push_to_hub: no repository {name} at {self.api.endpoint}: {reason}. Log in with `hf auth login`, "
                "name a repository that you may write to (--hub_model_id you/name), or leave the flag out and push "
                "afterwards"
            ) from error
        say(f"--push_to_hub: the result goes to {self.api.endpoint}/{self.repo_id}; checkpoints stay here")

    def push(self) -> None:
        """Uploads the result. Raises UserError that says how to go on; the result itself is whole and stays."""
        if not self.wanted:
            return
        try:
            commit = self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=self.folder,
                commit_message="Fine-tuned model",
                ignore_patterns=list(NOT_PUSHED),
                revision=self.revision,
            )
        except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
            reason = first_line(error.__cause__ or error).rstrip(".")  # an upload's thread has its own cause
            excluded = " ".join(f"--exclude '{pattern}'" for pattern in NOT_PUSHED)
            raise UserError(
                f"the model is whole in {self.folder}, but could not be pushed to {self.repo_id}: {reason}. "
                f"Push it with: hf upload {self.repo_id} {self.folder} . {excluded}"
            ) from error
        self.say(f"pushed: {commit.commit_url}")
