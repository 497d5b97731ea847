"""Push a result to the Hugging Face Hub: checked first, in one commit, and only what is not there yet.

Files of weights go up one by one before the commit that names them. The Hub keeps each that arrived whole, so a push
that was cut off sends the others when it is started again, and the repository never shows half a result.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.errors import HubError, UsageError
from mergekit_lr.graph.run import Progress
from mergekit_lr.verbs.push.cards import metadata_of, with_notice, with_text_of
from mergekit_lr.verbs.push.contents import Contents, Part, read_folder
from mergekit_lr.verbs.push.publishing import CARD, Published, loading, prepared, refuse_leaks
from mergekit_lr.verbs.push.refusals import SETTINGS, told
from mergekit_lr.verbs.push.remote import HARMLESS, Remote, look, notes_on_bases
from mergekit_lr.verbs.push.report import PushedFile, PushReport

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    collection: str | None = None,
    base_model: str | Iterable[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PushReport:
    """Publish a result on the Hugging Face Hub.

    The folder must load, its card must be valid and name a base; no secret and no path of this machine goes up. The
    token comes from where huggingface_hub finds it: ``HF_TOKEN``, or ``hf auth login``.

    Args:
        folder: what a verb wrote, or any folder of a model or a PEFT adapter in safetensors.
        repo: ``org/name``, or a name of your own account.
        private: of a new repository; None leaves it to the account's default.
        revision: branch, made where it is not there. create_pr: offer the commit as a pull request.
        commit_message: its title. collection: add the model to one, by its slug ``org/title-id`` or by a title of the
            repository's owner.
        base_model: Hub ids of bases that the result knows as folders: ``org/name``, or ``REF=org/name`` for several.
        overwrite: replace what lrmerge did not write. What a repository held stays in its history.
        dry_run: check everything and say what would change, and send nothing.
        progress: called with (bytes done, bytes in all, name) after each file of weights.

    Returns:
        What went up, where it is, and how to load it.

    Raises:
        UsageError: an option that does not fit, or a repository that may not be overwritten.
        FormatError: the folder does not load, or holds what must not be published.
        HubError: the Hub refuses it or cannot be reached; what was sent is kept there.
    """
    from huggingface_hub import HfApi

    started = time.perf_counter()
    api = HfApi(library_name="lrmerge")
    contents = read_folder(folder)
    token = _token(needed=not dry_run)
    repo = _full_name(api, repo)
    published = prepared(contents, repo, [base_model] if isinstance(base_model, str) else base_model)
    notes = [*published.notes, *refuse_leaks(published.contents, token)]
    remote = look(api, repo, revision)
    if private and remote.private is False:
        raise UsageError(f"{repo}: is public already, --private holds for new repositories; change it on its settings")
    if private is False and remote.private:
        notes.append(f"{repo}: stays private, --public holds for new repositories; change it in its settings")
    contents, more = _with_final_card(api, published, remote, private=bool(remote.private or private))
    files, stale = _compared(contents, remote)
    _refuse_overwrite(remote, files, stale, allowed=overwrite or create_pr)

    commit = pull_request = place = None
    if not dry_run:
        _create(api, remote, private, revision)
        sending = [part for part, file in zip(contents.parts, files, strict=True) if file.state in ("new", "changed")]
        if sending or stale:
            message = commit_message or f"Upload {contents.kind} with lrmerge"
            options = {"revision": revision, "create_pr": create_pr}
            sent = _send(api, remote, sending, stale, message, options, progress)
            commit, pull_request = sent.oid, sent.pr_url
        place = _collected(api, repo, collection) if collection else None
    return PushReport(
        folder=str(contents.folder),
        kind=contents.kind,
        repo=repo,
        url=f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision and not create_pr else ""),
        revision=revision or "main",
        private=remote.private if remote.exists else private,
        created=not remote.exists,
        files=(*files, *(PushedFile(name, remote.files[name].size, "removed") for name in stale)),
        left=contents.left,
        notes=(*notes, *more),
        commit=commit,
        pull_request=pull_request,
        collection=place,
        dry_run=dry_run,
        seconds=time.perf_counter() - started,
        load=loading(contents, repo),
    )


def check_login(repo: str) -> None:
    """Whether a push to ``repo`` can begin, before the work whose result it is to send.

    Raises:
        UsageError: no name of a repository. HubError: no token, or one that the Hub does not take.
    """
    from huggingface_hub import HfApi

    _token(needed=True)
    _check_name(repo)
    with told(repo, "checking the token"):
        HfApi(library_name="lrmerge").whoami()


def _token(*, needed: bool) -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    if token is None and needed:
        raise HubError(f"no token to push with: log in with `hf auth login`, or set HF_TOKEN (from {SETTINGS})")
    return token


def _full_name(api: HfApi, repo: str) -> str:
    """``repo`` with its owner: the account of the token where it names none."""
    _check_name(repo)
    if "/" in repo:
        return repo
    _token(needed=True)
    with told(repo, "asking whose token it is"):
        return f"{api.whoami()['name']}/{repo}"


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = REPO.fullmatch(repo) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"{repo}: no name of a repository; write org/name, of letters, digits, '-', '_' and '.'")


def _with_final_card(
    api: HfApi, published: Published, remote: Remote, *, private: bool
) -> tuple[Contents, tuple[str, ...]]:
    """The contents with the card that goes up: notices of the bases, the user's own text from the Hub, valid there."""
    from huggingface_hub import ModelCard

    contents = published.contents
    readers, owner = notes_on_bases(api, published.bases, kind=contents.kind, private=private)
    if (card := contents.text_of(CARD)) is None:
        return contents, (*readers, *owner)
    card = with_notice(card, readers)
    if remote.card is not None and remote.card != card:
        card, both = with_text_of(card, remote.card)
        owner += [f"{CARD}: here and on the Hub stood different text of yours; both are in it now"] if both else []
        metadata_of(card, contents.folder / CARD)
    with told(remote.repo, f"checking the metadata of {CARD}"):
        ModelCard(card).validate()
    return contents.with_texts({CARD: card}), (*readers, *owner)


def _compared(contents: Contents, remote: Remote) -> tuple[tuple[PushedFile, ...], list[str]]:
    files = tuple(PushedFile(part.name, part.nbytes, remote.state_of(part)) for part in contents.parts)
    return files, remote.stale(contents.parts)


def _refuse_overwrite(remote: Remote, files: Iterable[PushedFile], stale: list[str], *, allowed: bool) -> None:
    if allowed or remote.is_ours:
        return
    lost = [file.name for file in files if file.state == "changed" and file.name not in HARMLESS] + stale
    if lost:
        named = ", ".join(lost[:4]) + (" ..." if len(lost) > 4 else "")
        raise UsageError(
            f"{remote.repo}: holds what lrmerge did not write ({named}); add --overwrite to replace it (its history "
            "keeps it), --create-pr to offer yours, or choose another name"
        )


def _create(api: HfApi, remote: Remote, private: bool | None, revision: str | None) -> None:
    if not remote.exists:
        with told(remote.repo, "making the repository"):
            api.create_repo(remote.repo, private=private, exist_ok=True)
    if revision and (not remote.exists or not remote.branch):
        with told(remote.repo, f"making the branch {revision}"):
            api.create_branch(remote.repo, branch=revision, exist_ok=True)


def _send(
    api: HfApi,
    remote: Remote,
    parts: list[Part],
    stale: list[str],
    message: str,
    options: dict,
    progress: Callable[[Progress], None] | None,
) -> CommitInfo:
    """Weights first, one file after another, then everything in one commit onto what was looked at."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    total, done = sum(part.nbytes for part in parts), 0
    additions = []
    for part in parts:
        if progress:
            progress(Progress(done, total, part.name))
        source = part.path if part.text is None else part.text.encode()
        additions.append(CommitOperationAdd(part.name, source))
        if part.text is None:  # texts travel with the commit
            with told(remote.repo, f"sending {part.name}"):
                api.preupload_lfs_files(remote.repo, additions[-1:], **options)
        done += part.nbytes
    with told(remote.repo, "committing"):
        sent = api.create_commit(
            remote.repo,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            parent_commit=remote.head,
            **options,
        )
    if progress:
        progress(Progress(done, total, ""))
    return sent


def _collected(api: HfApi, repo: str, collection: str) -> str:
    """Add ``repo`` to the collection; its address."""
    with told(collection, "adding to the collection"):
        if "/" in collection:
            return api.add_collection_item(collection, repo, "model", exists_ok=True).url
        made = api.create_collection(collection, namespace=repo.partition("/")[0], exists_ok=True)
        return api.add_collection_item(made.slug, repo, "model", exists_ok=True).url
