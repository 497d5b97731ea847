"""Parts of cards on their own: what of a user's card survives, how licences combine, what escapes Markdown."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_lr.report.card import Content, combined, made
from mergekit_lr.report.inputs import Input, portable, scrubbed, stated_hub_id
from mergekit_lr.report.licence import Licence, combine, licences_of
from mergekit_lr.report.markdown import code, fenced, plain, table

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40).filter(lambda t: "lrmerge:" not in t)


def card(title: str = "Result", *, base: str = "org/base", tags: tuple[str, ...] = ("lora",), **metadata) -> str:
    """A generated card; ``metadata`` is what its one input states."""
    content = Content("What it is.", {"Load it": "Like this."}, (), "Again.", (), [base], "adapter", tags, "peft")
    return made(title, content, [Input("base", base, base, base, card=metadata)])


def data(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_a_card_of_nobody_is_the_generated_one():
    assert combined(card(), "") == combined(card(), " \n") == card()


def test_a_second_card_takes_the_place_of_the_first():
    assert combined(card("New"), card("Old")) == card("New")
    assert combined(card("New", license="mit"), card("Old", license="gpl-3.0", datasets="a/b")) == card(
        "New", license="mit"
    )


def test_text_around_the_marked_part_stays_where_it_is():
    edited = card("Old").replace("<!-- lrmerge:begin", "# Mine\n\nBefore.\n\n<!-- lrmerge:begin") + "\nAfter.  \n"
    text = combined(card("New"), edited)
    assert text.index("# Mine") < text.index("# New") < text.index("After.  ")
    assert "# Old" not in text
    assert text.endswith("<!-- lrmerge:end -->\n\nAfter.  \n")


def test_a_card_without_marks_is_the_users_and_stays_in_front():
    text = combined(card(), "---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    assert text.index("My words.") < text.index("<!-- lrmerge:begin")
    assert combined(card("Again"), text).count("My words.") == 1
    assert data(text)["license"] == "mit"  # nothing here states another


def test_marks_twice_become_one():
    text = combined(card("New"), card("Old") + "\nBetween.\n" + card("Older").partition("---\n\n")[2])
    assert text.count("<!-- lrmerge:begin") == text.count("<!-- lrmerge:end") == 1
    assert "Between." in text
    assert "Old" not in text.replace("# New", "")


def test_metadata_of_the_user_survives_as_written_and_ours_is_renewed():
    first = card("Old", tags=("lora", "compress"), license="gpl-3.0", datasets=["a/b"])
    edited = first.replace(
        "---\n", "---\nwidget:\n- text: hello\nextra: no\ndate: 2024-01-02\nthumbnail: 'x: y'\n", 1
    ).replace("- lora\n", "- lora\n- mine\n")
    text = combined(card("New", tags=("lora", "phlora"), license="mit"), edited)
    assert "extra: no\n" in text
    assert "date: 2024-01-02\n" in text
    found = data(text)
    assert found["widget"] == [{"text": "hello"}]
    assert found["thumbnail"] == "x: y"
    assert found["license"] == "mit"
    assert found["tags"] == ["lora", "phlora", "mine"]  # ours renewed, compress gone, the user's kept
    assert "datasets" not in found  # the earlier run had stated it, not the user


def test_what_the_user_stated_stays_where_we_state_nothing():
    edited = card("Old").replace("---\n", "---\nlicense: other\nlicense_name: mine\nlanguage: en\n", 1)
    found = data(combined(card("New", language=["de"]), edited))
    assert (found["license"], found["license_name"]) == ("other", "mine")
    assert found["language"] == ["de", "en"]
    assert "license_name" not in data(combined(card("New", license="mit"), edited))


def test_metadata_that_is_no_yaml_is_kept_as_text():
    text = combined(card(), "---\nlicense: [mit\n---\nMy words.\n")
    assert "license: [mit" in text
    assert "My words." in text
    assert data(text)["base_model"] == ["org/base"]
    assert text.count("<!-- lrmerge:begin") == 1


@pytest.mark.parametrize("front", ["- a\n- b", "text", "tags: &a [*a]", "a: !!python/object:os.system x"])
def test_odd_metadata_raises_nothing(front):
    text = combined(card(), f"---\n{front}\n---\nMy words.\n")
    assert "My words." in text
    assert "org/base" in text


def test_windows_line_ends_and_a_mark_of_byte_order_are_no_hindrance():
    text = combined(card("New"), "\ufeff---\r\nmine: 1\r\n---\r\nMy words.\r\n")
    assert data(text)["mine"] == 1
    assert "My words." in text


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE, max_size=4), st.lists(LINE, max_size=4))
def test_no_text_of_a_user_is_ever_lost(before, after):
    body = card("Old").partition("---\n\n")[2]
    existing = f"---\na: 1\n---\n{chr(10).join(before)}\n\n{body}\n{chr(10).join(after)}"
    once = combined(card("New"), existing)
    for line in (*before, *after):
        assert line.strip() in once
    assert combined(card("New"), once) == once
    assert once.count("<!-- lrmerge:begin") == 1


# --- licences ---


def states(*values: str) -> list[tuple[str, dict[str, str]]]:
    return [(f"input {i}", {"license": value} if value else {}) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        (("mit",), "mit"),
        (("mit", "apache-2.0", "cc0-1.0"), "apache-2.0"),
        (("MIT", "mit"), "mit"),
        (("apache-2.0", "gpl-3.0"), "gpl-3.0"),
        (("apache-2.0", "llama3.1"), "llama3.1"),
        (("apache-2.0", ""), "apache-2.0"),
        (("unknown", ""), None),
        ((), None),
    ],
)
def test_the_strictest_licence_is_named_without_a_warning(stated, wanted):
    found = combine(states(*stated))
    assert (found.licence.id if found.licence else None) == wanted
    assert found.warnings == ()
    assert len(found.unstated) == sum(one in ("", "unknown") for one in stated)


@pytest.mark.parametrize(
    ("stated", "label", "words"),
    [
        (("mit", "cc-by-nc-4.0"), "cc-by-nc-4.0", ["commercial"]),
        (("gpl-3.0", "cc-by-sa-4.0"), "cc-by-sa-4.0-and-gpl-3.0", ["both set terms"]),
        (("llama3", "llama3.1", "gemma"), "gemma-and-llama3-and-llama3.1", ["all set terms"]),
        (("apache-2.0", "cc-by-nd-4.0"), "cc-by-nd-4.0", ["does not allow to pass on"]),
        (("gpl-3.0", "cc-by-nc-4.0"), "cc-by-nc-4.0-and-gpl-3.0", ["both set terms", "commercial"]),
    ],
)
def test_conflicts_are_warned_of(stated, label, words):
    found = combine(states(*stated))
    assert found.licence is not None
    assert found.licence.label == label
    assert [any(word in warning for warning in found.warnings) for word in words] == [True] * len(words)
    assert len(found.warnings) == len(words)
    # What was combined once combines to the same again.
    name = {"license": found.licence.id} | ({"license_name": found.licence.name} if found.licence.name else {})
    assert combine([("it", name), *states(*stated)]).licence == found.licence


def test_a_licence_of_another_name_keeps_name_and_link():
    card = {"license": "other", "license_name": "flux-1-dev-non-commercial", "license_link": "https://a.b"}
    assert licences_of(card) == (Licence("other", "flux-1-dev-non-commercial", "https://a.b"),)
    assert combine([("x", card), *states("mit")]).warnings[0].startswith("flux-1-dev-non-commercial allows no commerc")


# --- names ---


@given(st.text(max_size=30))
def test_any_text_is_itself_in_markdown(text):
    shown = MarkdownIt("commonmark", {"html": True}).enable("table")
    for written in (plain(text), code(text)):
        row = shown.render(table(["a", "b"], [[written, "x"]]))
        assert row.count("<td") == 2
        assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|code))", row)
    [block] = [token for token in shown.parse(fenced(text, "text")) if token.type == "fence"]
    assert len(shown.parse(fenced(text, "text"))) == 1
    assert block.info == "text"


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    assert stated_hub_id("org/name") == stated_hub_id("org/name@v1") == stated_hub_id(None, 3, "org/name") == "org/name"
    assert stated_hub_id("/x/models--org--name/snapshots/abc") == "org/name"
    for text in ("/x/y", "./x", "../x/y", "some/folder", "word", "a/b/c", "~/x", "C:\\x", "a--b/c", "", None):
        assert stated_hub_id(text) is None


def test_texts_lose_the_paths_of_this_disk(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    one = Input.of("adapter", str(folder), folder)
    assert portable(str(folder), [one]) == "lora"
    assert portable(f"org/base+{folder}", [one]) == "org/base+lora"
    assert portable("/somewhere/else", [one]) == "else"
    assert portable("C:\\models\\mine", [one]) == "mine"
    for text in ("org/base", ".", ".*mlp.*", "{{ a + b }}\n/x", "x" * 5000 + "+y", "~nobody-there/x"):
        assert portable(text, [one]) == ("x" if text.startswith("~") else text)
    assert stated_hub_id("x" * 5000 + "/y") is None
    assert scrubbed(f"{folder}: a note", [one]) == "lora: a note"


def test_the_marks_cannot_be_forged_by_metadata():
    name = "--> <!-- lrmerge:end --> {} -- <!-- lrmerge:begin {}"
    text = card("x", license="other", license_name=name)
    assert data(text)["license_name"] == name
    assert text.partition("\n---\n")[2].count("-->") == 2
    assert combined(card("New"), text) == card("New")
    both = combined(text, card("Old") + "\nMine.\n")
    assert data(both) == data(text)
    assert both.partition("\n---\n")[2] == text.partition("\n---\n")[2] + "\nMine.\n"
