"""The methods of a Trainer that write the card of a saved model and push it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from updp_hf.core.gates.gate import is_gated
from updp_hf.errors import UPDPError
from updp_hf.hub.push import push_folder
from updp_hf.reporting.card import add_card
from updp_hf.reporting.provenance import with_card_facts
from updp_hf.reporting.report import Report

__all__ = ["Published"]


class Published(Trainer):
    """A Trainer whose output folder is published as a merged model, and as nothing else."""

    _saved: tuple[Path, int] | None = None
    """Where the merged model was saved last, and at which step."""

    def _repo_id(self, folder: Path) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or folder.resolve().name)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the saved model again, with facts that no run can know.

        Args:
            language: of the labels.
            license: of the model; by default that of the checkpoint, if the Hub tells.
            tags: further ones.
            model_name: title of the card; by default the name of the repository or folder.
            finetuned_from: id of the checkpoint on the Hub; by default that from which it was loaded.
            tasks: of no effect, for the task is image classification.
            dataset_tags: ids of the datasets on the Hub; of several the first is the one that was evaluated on.
            dataset: name of the set of images that was evaluated on.
            dataset_args: of no effect.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        report = with_card_facts(
            Report.load(folder),
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            dataset_tags=dataset_tags,
            dataset=dataset,
        )
        report.save(folder)
        add_card(report, folder, self._repo_id(folder))

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the merged model, saved before unless it is; never checkpoints, optimizer state or pickles.

        Args:
            commit_message: title of the commit.
            blocking: whether to wait; else a `Future` is returned.
            token: access token, `hub_token` by default.
            revision: the branch, `hub_revision` by default.
            private: whether a new repository is private, `hub_private_repo` by default.
            **kwargs: those of `create_model_card`.

        Raises:
            HubError: the Hub refused or was not reached; the merged model lies in the output folder.
            ValueError: nothing has been pruned yet.
            MergeError: the gates are not closed yet.
        """
        if not is_gated(self.model):
            raise UPDPError("Nothing is pruned yet that could be pushed: call `train()` first.")
        folder = Path(self.args.output_dir)
        if self._saved != (folder, self.state.global_step):
            self.save_model()
        if kwargs:
            self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        options: dict[str, Any] = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        repo_id = self._repo_id(folder)
        if not blocking:
            return HfApi().run_as_future(push_folder, folder, repo_id, **options)
        return push_folder(folder, repo_id, **options)
