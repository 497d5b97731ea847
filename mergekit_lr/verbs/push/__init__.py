"""Push a result to the Hugging Face Hub."""

from mergekit_lr.verbs.push.report import PushedFile, PushReport
from mergekit_lr.verbs.push.verb import check_login, push

__all__ = ["PushReport", "PushedFile", "check_login", "push"]
