"""How far each module of an adapter is compressed: from options to one rank rule per module."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lrgpu.rank import RankRule

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.errors import UsageError


def rule_of(rank, energy, error, size, max_params, max_rank, multiple_of, pattern, target) -> RankRule | None:
    """The rule for all modules that the options of ``compress`` mean; None where only a pattern or a target was given.

    Raises:
        UsageError: no option chooses a rank, or more than one does, or a value is out of range.
    """
    if rank == "auto":
        raise UsageError(
            "--rank auto: an adapter holds no rounding noise of weights to stop at, so there is nothing to choose by; "
            "give --rank N, --energy F or --error F (0: the ranks that are really there)"
        )
    given = {"--rank": rank, "--energy": energy, "--error": error, "--size": size, "--max-params": max_params}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{named[0]} and {named[1]} both choose the rank; give one")
    for option, count in (("--rank", rank), ("--max-rank", max_rank), ("--max-params", max_params)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UsageError(f"{option} {count}: a number from 1")
    if any(count < 1 for count in pattern.values()):
        raise UsageError("--rank-pattern: ranks start at 1; use --exclude to leave a module as it is")
    if not named and max_rank is None:
        if not pattern and target is None:
            raise UsageError("how far to compress? give --rank N, --energy F, --error F, --size SIZE or --max-params N")
        return None
    try:
        limits = {"multiple_of": multiple_of, "max_rank": max_rank}
        if rank is not None:
            return RankRule(count=rank, **limits)
        # A budget buys from all the directions that are there.
        lossless = energy is None and error is None
        return RankRule(energy=energy, error=0.0 if lossless else error, **limits)
    except ValueError as problem:
        raise UsageError(str(problem)) from None


def treatment(
    name: str, weight: AdaptedWeight, rule: RankRule | None, include: Sequence[str], exclude: Sequence[str]
) -> tuple[RankRule | None, str]:
    """The rule of a module, or None and why it stays as it is."""
    for excluded in exclude:
        if re.search(excluded, name):
            return None, f"--exclude {excluded}"
    if include and not any(re.search(wanted, name) for wanted in include):
        return None, "not in --include"
    if rule is None:
        return None, "no rank was asked for"
    have = weight.delta.rank
    if rule.count is not None and (wanted := rule.choose([], 1.0, have)) is not None and wanted >= have:
        return None, f"has rank {have} already"
    return rule, ""


def check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Stop at a pattern that is no regular expression or matches no module.

    Raises:
        UsageError: naming ``option`` and the pattern.
    """
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError(f"{option} {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise UsageError(f"{option} {pattern!r} matches no module; their names look like {names[0]}")
