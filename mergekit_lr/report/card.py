"""Model cards: a README with the metadata that the Hub reads, and a text that says what the result is.

Each kind of result says what is its own in a file beside this one; what all of them have is put together here. The
text stands between two comments and is made anew by every run. What a user writes outside of them stays, and so does
their metadata (``combined``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mergekit_lr.report import licence
from mergekit_lr.report.citations import bibtex
from mergekit_lr.report.inputs import CARD, FRONT, Input, scrubbed, stated
from mergekit_lr.report.manifest import FILE
from mergekit_lr.report.markdown import bullets, code, fenced, listed, plain, table

Relation = Literal["adapter", "merge", "finetune", "quantized"]
HOME = "https://pypi.org/project/lrmerge/"

_BEGIN = "<!-- lrmerge:begin; made anew by every run, write outside of it; "
_END = "<!-- lrmerge:end -->"
_REGION = re.compile(r"<!-- lrmerge:begin(?:[^>]*?(\{[^>]*\}))?[^>]*-->.*?<!-- lrmerge:end -->", re.DOTALL)
_LISTS = ("tags", "datasets", "language")  # of which a user may have more than we know
_OF_LICENCE = ("license_name", "license_link")


class Content(NamedTuple):
    """What one kind of result says.

    what: the first paragraph, in Markdown. sections: heading to text, in Markdown. notes: of its report, as text.
    again: how to make it again, in Markdown. papers: keys of ``citations.PAPERS``. base_model: Hub ids. The others are
    the metadata of those names.
    """

    what: str
    sections: Mapping[str, str]
    notes: Sequence[str]
    again: str
    papers: Sequence[str]
    base_model: Sequence[str]
    relation: Relation
    tags: Sequence[str]
    library_name: str | None = None
    pipeline_tag: str | None = None


def notes_of(inputs: Sequence[Input]) -> tuple[str, ...]:
    """What a report should note of the inputs' cards: licences that do not go together, metadata that is broken."""
    warnings = licence.combine([(one.name, one.card) for one in inputs]).warnings
    return tuple(f"licence: {text}" for text in warnings) + tuple(
        f"{one.name}: {one.note}" for one in inputs if one.note
    )


def write_card(folder: Path, out: str | None, content: Content, inputs: Sequence[Input]) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        out: where the result will stand. If one of ours stands there now, what a user wrote into its card is kept.
        content: what the result says of itself. inputs: what it was made of.
    """
    generated = made(Path(out).resolve().name if out else "Result", content, inputs)
    earlier = Path(out) / CARD if out else None
    if earlier is not None and earlier.is_file() and (earlier.parent / FILE).is_file():
        generated = combined(generated, earlier.read_bytes().decode("utf-8-sig", errors="surrogateescape"))
    (folder / CARD).write_bytes(generated.encode("utf-8", errors="surrogateescape"))


def made(title: str, content: Content, inputs: Sequence[Input]) -> str:
    """The card: its metadata, and its text between the comments that mark it."""
    terms = licence.combine([(one.name, one.card) for one in inputs])
    metadata = _metadata(content, inputs, terms.licence)
    sections = dict(content.sections)
    own = notes_of(inputs)
    if notes := [scrubbed(note, inputs) for note in content.notes if note not in own]:
        sections["Good to know"] = bullets(plain(note) for note in notes)
    sections["Made from"] = _made_from(inputs)
    sections["Licence"] = _terms(terms)
    sections["Make it again"] = content.again
    if content.papers:
        sections["Cite"] = fenced(bibtex(content.papers), "bibtex")
    parts = [f"# {plain(title)}", content.what, *(f"## {head}\n\n{text}" for head, text in sections.items())]
    # Nothing that came from a name may look like one of the comments.
    text = "\n\n".join(parts).replace("<!-- lrmerge:", "<!- lrmerge:")
    # In a comment neither ``--`` nor ``>`` may stand.
    known = json.dumps(metadata).replace("--", "-\\u002d").replace(">", "\\u003e")
    return f"---\n{_yaml(metadata)}\n---\n\n{_BEGIN}{known} -->\n{text}\n{_END}\n"


def combined(generated: str, existing: str) -> str:
    """The card ``generated`` with what a user has written into ``existing``.

    The text between our comments is renewed where it stands; without such comments it comes after the user's text.
    Of the metadata, ours is renewed, lists keep what the user added, and what is not ours stays. What an earlier run
    had stated and this one does not goes. Metadata that is no YAML is kept as text.
    """
    if not existing.strip():
        return generated
    ours, front = _split(generated)
    theirs, body = _split(existing)
    region = _REGION.search(front)
    assert region is not None, "a generated card has a marked region"
    marked = _REGION.search(body)
    try:
        metadata = _merged(yaml.compose(ours), yaml.compose(theirs), _known(marked))
    except (yaml.YAMLError, RecursionError, ValueError):
        metadata = ours
        body = f"\nThe metadata that stood here could not be read:\n\n{fenced(theirs, 'yaml')}\n\n{body.lstrip()}"
        marked = _REGION.search(body)
    if marked is not None:
        body = body[: marked.start()] + region[0] + _REGION.sub("", body[marked.end() :])
    else:
        body = f"\n{body.strip()}\n\n{region[0]}\n" if body.strip() else f"\n{region[0]}\n"
    return f"---\n{metadata.strip()}\n---\n{body}"


def _metadata(content: Content, inputs: Sequence[Input], terms: licence.Licence | None) -> dict[str, Any]:
    bases = list(dict.fromkeys(content.base_model))
    pipeline = next((found[0] for one in reversed(inputs) if (found := stated([one], "pipeline_tag"))), None)
    link = terms.link if terms and terms.link and terms.link.startswith("https://") else None
    found = {
        "license": terms.id if terms else None,
        "license_name": terms.name if terms else None,
        "license_link": link,
        "language": stated(inputs, "language"),
        "library_name": content.library_name,
        "pipeline_tag": pipeline or content.pipeline_tag,
        "base_model": bases,
        "base_model_relation": content.relation if bases else None,
        "datasets": stated(inputs, "datasets"),
        "tags": list(dict.fromkeys(content.tags)),
    }
    return {key: value for key, value in found.items() if value}


def _yaml(metadata: Mapping[str, Any]) -> str:
    # Of the Hub's library only what is needed, and only now: the whole costs a third of a second.
    from huggingface_hub.repocard_data import ModelCardData

    return ModelCardData(**metadata).to_yaml().strip()


def _made_from(inputs: Sequence[Input]) -> str:
    rows = []
    for one in inputs:
        name = code(one.name)
        if one.hub:
            name = f"[{name}](https://huggingface.co/{one.hub})"
        where = f"revision {code(one.revision[:12])}" if one.hub and one.revision else "a local copy"
        rows.append([name, one.role, where + (", gated: accept its terms first" if one.gated else "")])
    return table(["", "as", "from"], rows)


def _terms(terms: licence.Combined) -> str:
    lines = [f"{code(name)} states {plain(text)}." for name, text in terms.stated.items()]
    lines += [f"{code(name)} states no licence." for name in terms.unstated]
    if terms.licence is None:
        head = "Unknown: nothing that this was made from states a licence."
    else:
        names = [plain(name) for name in terms.licence.label.split(licence.JOIN)]
        head = f"{names[0]}, the strictest that the inputs state."
        if len(names) > 1:
            head = f"{listed(names)}, each of which sets terms for the whole."
        head += " What an input that states none allows is not known." if terms.unstated else ""
    warnings = [f"**Look at this:** {plain(text)}." for text in terms.warnings]
    return "\n\n".join([head, *warnings, bullets(lines)])


def _split(card: str) -> tuple[str, str]:
    """Metadata and body."""
    match = FRONT.match(card)
    return (match[1], card[match.end() :]) if match else ("", card)


def _known(region: re.Match[str] | None) -> dict[str, Any]:
    """The metadata that the run stated which wrote this region."""
    try:
        found = json.loads(region[1]) if region and region[1] else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _merged(ours: yaml.Node | None, theirs: yaml.Node | None, known: Mapping[str, Any]) -> str:
    """Both mappings as one, in YAML; scalars stay as their writer wrote them."""
    new = _pairs(ours)
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for name, (key, value) in _pairs(theirs).items():
        stale = name in known and _items(value) == _listed(known[name])
        if name in new:
            pairs[name] = (
                key,
                _with_additions(new[name][1], value, known.get(name)) if name in _LISTS else new[name][1],
            )
        elif not stale and not ("license" in new and name in _OF_LICENCE):
            pairs[name] = (key, value)
    pairs |= {name: pair for name, pair in new.items() if name not in pairs}
    node = yaml.MappingNode("tag:yaml.org,2002:map", list(pairs.values()), flow_style=False)
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=1 << 16)


def _pairs(node: yaml.Node | None) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("metadata is a mapping")
    return {str(key.value): (key, value) for key, value in node.value}


def _with_additions(ours: yaml.Node, theirs: yaml.Node, known: Any) -> yaml.Node:
    """Our list, and what a user added to the one that stands there."""
    held = {*_items(ours), *_listed(known)}
    scalars = theirs.value if isinstance(theirs, yaml.SequenceNode) else [theirs]
    added = [one for one in scalars if isinstance(one, yaml.ScalarNode) and one.value not in held]
    own = ours.value if isinstance(ours, yaml.SequenceNode) else [ours]
    return yaml.SequenceNode("tag:yaml.org,2002:seq", [*own, *added], flow_style=False)


def _items(node: yaml.Node) -> list[str]:
    scalars: Iterable[Any] = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [one.value for one in scalars if isinstance(one, yaml.ScalarNode)]


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]
