"""Models with different vocabularies: which row of which model becomes which row of the result.

``vocabulary_of`` finds where every model has each token of the result; ``Vocabulary.alignment`` says it for one table,
embeddings or head. A model that lacks a token takes, in this order, what the recipe says, the row of the only model
that has it, the base's, the average of those that have it, or zero. The same rules as mergekit's, but for rows that
no token has: they stay as in the model whose tokenizer is taken, unless ``pad_to_multiple_of`` asks for another size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.errors import MismatchError
from mergekit_lr.graph.journal import fingerprint
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.merge.alignment import AVERAGE, EXACT, MEAN, ZERO, Alignment
from mergekit_lr.verbs.merge.sources import Input, Source
from mergekit_lr.verbs.merge.tokenizer import Chosen, choose_tokenizer, digest, read_words, tokenizer_folder, wanted
from mergekit_lr.verbs.merge.tokens import Rule, looked_up, rules_of


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of the result and where each model has them.

    chosen: the tokenizer. old: the template's tokens. held: model to int64 (rows,), its row for each row of the result
    or -1. token: bool (rows,), whether a row has a token. rules: of single tokens. left_out: model to how many of its
    tokens the result lacks. padded: whether the recipe chose the number of rows. digest: of all tokenizers read.
    """

    chosen: Chosen
    old: dict[str, int]
    held: dict[str, Tensor]
    token: Tensor
    rules: dict[str, Rule]
    left_out: dict[str, int]
    padded: bool
    digest: str
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of the tables of the result."""
        return len(self.token)

    def alignment(self, inputs: Sequence[Input], out: str, base: Source | None) -> Alignment | None:
        """How the tables ``inputs`` of several models come to the rows of the result; None where they have them.

        base: the model whose row the others take first, where it is one of them.

        Raises:
            MismatchError: the recipe takes a token from a model that does not go into tensor ``out``.
        """
        refs = [item.source.ref for item in inputs]
        held = torch.stack([self.held[ref] for ref in refs])
        for item, rows in zip(inputs, held, strict=True):
            if int(rows.max()) >= item.rows:
                raise MismatchError(
                    f"{item.source.ref}: {item.name} has {item.rows} rows, its tokens need {int(rows.max()) + 1}"
                )
        has, index = held >= 0, torch.arange(self.rows)
        count = has.sum(0)
        donor = torch.full((self.rows,), AVERAGE)
        if base is not None and base.ref in refs:
            first = refs.index(base.ref)
            donor[has[first]] = first
        donor[count == 1] = has.int().argmax(0)[count == 1]
        donor[(count == 0) & self.token] = ZERO
        row = held.gather(0, donor.clamp(min=0)[None])[0]
        padding = ~self.token & ~has.all(0)
        donor[padding] = MEAN
        if self.chosen.keeper in refs and not self.padded:
            keeper = refs.index(self.chosen.keeper)
            kept = padding & (index < inputs[keeper].rows)
            donor[kept], row[kept] = keeper, index[kept]
        own, told = held.clone(), torch.zeros(self.rows, dtype=torch.bool)
        for token, rule in self.rules.items():
            at = self.chosen.ids[token]
            if not rule.force and bool(has[:, at].all()):
                continue
            if rule.source is not None:
                donor[at], row[at], told[at] = *self._given(token, rule, inputs, out), True
            if rule.force:
                own[:, at] = -1
        exact = (own >= 0).all(0)
        donor[exact] = EXACT
        if bool(exact.all()) and bool((own == index).all()) and {item.rows for item in inputs} == {self.rows}:
            return None
        return Alignment(tuple(inputs), own, held, donor, row, self._kinds(donor, told, refs))

    def _given(self, token: str, rule: Rule, inputs: Sequence[Input], out: str) -> tuple[int, int]:
        """Place in ``inputs``, or ``ZERO``, and row of what ``rule`` names."""
        if rule.source == "zero":
            return ZERO, -1
        place = next((i for i, item in enumerate(inputs) if item.source.ref == rule.source), None)
        if place is None:
            raise MismatchError(f"{out}: token {token!r} is to come from {rule.source}, which is not merged there")
        if rule.row is None or rule.row >= inputs[place].rows:
            name, rows = inputs[place].name, inputs[place].rows
            raise MismatchError(f"{rule.source}: {name} has {rows} rows, token {token!r} is to come from {rule.row}")
        return place, rule.row

    def _kinds(self, donor: Tensor, told: Tensor, refs: Sequence[str]) -> dict[str, Tensor]:
        """Which rows are from where, in words; kinds without a row are left out."""
        kinds = {"each model's own": donor == EXACT, "as the recipe says": told}
        for i, ref in enumerate(refs):
            kinds[f"of {ref}"] = (donor == i) & self.token & ~told
            kinds[f"padding of {ref}"] = (donor == i) & ~self.token
        kinds |= {"average": donor == AVERAGE, "zero": (donor == ZERO) & ~told, "mean of all rows": donor == MEAN}
        return {kind: where for kind, where in kinds.items() if bool(where.any())}

    def to_json(self, alignments: Mapping[str, Alignment]) -> dict[str, Any]:
        """What was done to which rows of which tensor, ready for JSON."""
        return {
            "tokenizer": self.chosen.name,
            "tokens": len(self.chosen.ids),
            "rows": self.rows,
            "left_out": self.left_out,
            "tensors": {name: alignment.to_json() for name, alignment in alignments.items()},
        }

    def lines(self, alignments: Mapping[str, Alignment]) -> list[str]:
        """The same for people; tensors that were treated alike share a line."""
        alike: dict[str, list[str]] = {}
        for name, alignment in alignments.items():
            counts = ", ".join(f"{int(where.sum())} {kind}" for kind, where in alignment.kinds.items())
            alike.setdefault(counts, []).append(name)
        lines = [f"{self.rows} rows of {' and '.join(names)}: {counts}" for counts, names in alike.items()]
        lines += [f"{count} tokens of {ref} are not in the result" for ref, count in self.left_out.items() if count]
        if self.chosen.plain:
            lines.append(
                f"{self.chosen.plain} plain tokens go whole into the first model's tokenizer, as mergekit does it: "
                "they are found in a text before its own rules split the rest"
            )
        return [*self.notes, *lines]


def vocabulary_of(recipe: Recipe, sources: Mapping[str, Source], template: Source) -> Vocabulary | None:
    """The vocabulary that a recipe asks for; None where it says nothing of tokenizers.

    Raises:
        UsageError: a token's source that the recipe does not describe rightly, with its line; transformers is missing.
        MismatchError: a model that has no tokenizer and no table of the template's size.
    """
    if wanted(recipe) is None:
        return None
    rules = rules_of(recipe)
    folders = {ref: folder for ref, source in sources.items() if (folder := tokenizer_folder(source)) is not None}
    if template.ref not in folders:
        raise MismatchError(
            f"{template.ref}: has no tokenizer.json to take the vocabulary from; leave the tokenizer out of the recipe"
        )
    digests = {ref: digest(folder) for ref, folder in folders.items()}
    read = {digests[ref]: read_words(folder) for ref, folder in folders.items()}
    words = {ref: read[digests[ref]] for ref in folders}
    notes = []
    for ref, source in sources.items():
        if ref in words:
            continue
        if source.token_rows != template.token_rows:
            raise MismatchError(
                f"{ref}: has no tokenizer.json, and {source.token_rows} rows of tokens where {template.ref} has "
                f"{template.token_rows}; put its tokenizer beside it"
            )
        notes.append(f"{ref} has no tokenizer: its tokens are taken to be those of {template.ref}")
        words[ref] = words[template.ref]
    ids = {ref: held.ids for ref, held in words.items()}
    rules = looked_up(recipe, rules, ids)
    chosen = choose_tokenizer(recipe, sources, template, words, list(rules))
    rows, padded = _rows(recipe, chosen, sources[chosen.keeper])
    token = torch.zeros(rows, dtype=torch.bool)
    token[list(chosen.ids.values())] = True
    spare = rows - len(chosen.ids)
    if spare and not padded:
        notes.append(
            f"{spare} rows have no token, as in {chosen.keeper}; pad_to_multiple_of: 1 leaves out those at the end"
        )
    return Vocabulary(
        chosen=chosen,
        old=ids[template.ref],
        held={ref: _held(ids[ref], source.token_rows, chosen.ids, token, padded) for ref, source in sources.items()},
        token=token,
        rules=rules,
        left_out={ref: sum(name not in chosen.ids for name in found) for ref, found in ids.items()},
        padded=padded,
        digest=fingerprint(digests, chosen.ids),
        notes=tuple(notes),
    )


def _rows(recipe: Recipe, chosen: Chosen, keeper: Source) -> tuple[int, bool]:
    """How many rows the tables of the result have, and whether the recipe chose that."""
    tokens = max(chosen.ids.values(), default=-1) + 1
    multiple = recipe.document.tokenizer.pad_to_multiple_of if recipe.document.tokenizer is not None else None
    if multiple is None:
        return max(tokens, keeper.token_rows), False
    if multiple < 1:
        raise recipe.place.error(("tokenizer", "pad_to_multiple_of"), f"at least 1, got {multiple}")
    return -(-tokens // multiple) * multiple, True


def _held(ids: Mapping[str, int], rows: int, new: Mapping[str, int], token: Tensor, padded: bool) -> Tensor:
    """A model's row for every row of the result, int64; -1 where it has none. Rows without a token stay in place."""
    held = torch.full(token.shape, -1)
    known = [(at, row) for name, at in new.items() if 0 <= (row := ids.get(name, -1)) < rows]
    held[[at for at, _ in known]] = torch.tensor([row for _, row in known], dtype=torch.long)
    if not padded:
        index = torch.arange(len(token))
        unused = torch.ones(max(rows, len(token)), dtype=torch.bool)
        unused[[row for row in ids.values() if row < len(unused)]] = False
        spare = ~token & (index < rows) & unused[: len(token)]
        held[spare] = index[spare]
    return held
