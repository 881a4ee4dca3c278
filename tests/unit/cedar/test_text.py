"""Text is split where Cedar would, and whatever could hurt Cedar's parser is refused before it sees it."""

from __future__ import annotations

import pytest

from cgpu_agent.cedar.text import MAX_BYTES, MAX_DEPTH, MAX_TOKENS, Malformed, check_ids, split


def refusal(text: str) -> str:
    with pytest.raises(Malformed) as caught:
        split(text)
    return str(caught.value.problem)


def condition(text: str) -> str:
    return f'@id("a")\npermit(principal, action, resource) when {{ {text} }};'


def test_policies_are_found_with_their_lines_and_ids() -> None:
    first, second = split('// one;\n\n@id("a")\npermit(principal, action, resource);\n@id("b") forbid(x;y) ;\n')
    assert (first.number, first.id, first.line, first.effect) == (0, "a", 3, "permit")
    assert (second.number, second.id, second.line, second.effect) == (1, "b", 5, "forbid")
    assert first.text == '@id("a")\npermit(principal, action, resource);'


def test_nothing_is_no_policy() -> None:
    assert split("") == split(" \n// only a comment ( [ {") == ()


def test_brackets_and_semicolons_in_texts_and_comments_do_not_count() -> None:
    (source,) = split(condition(r'principal.unit == "(((;\"[" // {{{ ;' + "\n"))
    assert source.words[-2:] == ("}", ";")


def test_annotations_are_kept_as_written() -> None:
    (source,) = split('@risk("because")@id("a")@bare permit(principal,action,resource);')
    assert source.annotations == {"risk": "because", "id": "a", "bare": ""}


@pytest.mark.parametrize("brackets", ["()", "[]", "{}"])
def test_depth_is_bounded(brackets: str) -> None:
    deep = MAX_DEPTH - 1  # the condition has a bracket of its own
    split(condition(brackets[0] * deep + brackets[1] * deep))
    assert "nested deeper" in refusal(condition(brackets[0] * (deep + 1) + brackets[1] * (deep + 1)))


@pytest.mark.parametrize("chain", ["if true then {} else true", "if true then true else {}"])
def test_depth_without_brackets_is_bounded(chain: str) -> None:
    text = "true"
    for _ in range(MAX_DEPTH):
        text = chain.format(text)
    assert "nested deeper" in refusal(condition(text))


def test_ifs_beside_each_other_are_not_deep() -> None:
    many = ", ".join(["if true then 1 else 2"] * 100)
    assert len(split(condition(f"[{many}].contains(1)"))) == 1


def test_length_of_one_policy_is_bounded_and_that_of_many_is_not() -> None:
    assert f"longer than {MAX_TOKENS}" in refusal(condition("principal" + ".a" * MAX_TOKENS))
    assert len(split(condition("true") * 1000)) == 1000


def test_size_is_bounded_in_bytes() -> None:
    assert split("//" + " " * (MAX_BYTES - 2)) == ()
    assert "larger" in refusal("//" + " " * (MAX_BYTES - 1))
    assert "larger" in refusal("//" + "\u00e9" * (MAX_BYTES // 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("permit(principal, action, resource)", "line 1, policy #1: does not end"),
        ("\n\n@id('a')", "line 3: the character"),
        ('\n"open', "line 2: a quoted text does not end"),
        ('"open\\"', "a quoted text does not end"),
        ("\ufeffpermit(principal,action,resource);", "line 1: the character '\\ufeff'"),
        ("permit(principal,action,resource)\0;", "the character '\\x00'"),
        ("\ud800", "UTF-8"),
        ("// \ud800", "UTF-8"),
        (condition("true)"), "line 2"),
        ('@id("a") };', "line 1, policy a: } closes nothing"),
        ('@id("a")\npermit(principal == ?principal, action, resource);', "line 2: ?principal: templates"),
        ("permit(principal, action, resource;", "does not end"),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    "text", [";", "@;", "@id;", "@id();", '@id("a");', "@@;", "@id(a) permit(x);", "@id permit;"]
)
def test_broken_policies_are_split_all_the_same(text: str) -> None:
    assert [source.text for source in split(text * 2)] == [text, text]


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ("", 'has no @id("name")'),
        ("@id", 'has no @id("name")'),
        ('@id("")', 'has no @id("name")'),
        ('@id("a b")', "its @id may hold"),
        ('@id("a\\n")', "its @id may hold"),
        (f'@id("{"a" * 65}")', "its @id may hold"),
        ('@id("\u00e9")', "its @id may hold"),
        ('@id("-a")', "its @id may hold"),
        ('@id("taken")', "its @id is taken by the policy of line 1"),
    ],
)
def test_every_policy_needs_a_plain_id_of_its_own(annotation: str, said: str) -> None:
    text = f'@id("taken") permit(principal, action, resource);\n{annotation} permit(principal, action, resource);'
    (problem,) = check_ids(split(text))
    assert said in problem.message
    assert problem.line == 2
