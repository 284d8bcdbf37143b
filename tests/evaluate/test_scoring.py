"""How answers are compared: every golden case, properties that must hold for any text, and each rule's own numbers."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.evaluate.scored import GOLDEN, lines
from vistune.evaluate import scoring
from vistune.evaluate.contractions import CONTRACTIONS
from vistune.evaluate.scoring import anls, basic, chosen, exact, normalise, option, said_yes_no, vqa, yes_no

WORDS = st.sampled_from(
    [
        *(
            *scoring.NUMBERS,
            *sorted(scoring.ARTICLES),
            *CONTRACTIONS,
            *CONTRACTIONS.values(),
            *sorted(scoring.PUNCTUATION),
        ),
        *(".", "..", "1,000", "2.5", "'s", "'", "dog", "Übung", "\n", "\t", "\u00a0", " ", ":", "%"),
    ]
)
ANSWERS = st.one_of(st.text(), st.lists(WORDS).map("".join), st.lists(WORDS).map(" ".join))
"""Any text at all, and texts full of what the normaliser looks for, joined and apart."""


@pytest.mark.parametrize("file", ["cases.jsonl", "contractions.jsonl"])
def test_the_normaliser_gives_every_golden_output(file):
    cases = lines(GOLDEN / "normaliser" / file)
    assert {one["id"]: normalise(one["input"]) for one in cases} == {one["id"]: one["output"] for one in cases}


def test_every_contraction_of_the_golden_table_is_in_ours():
    assert {one["input"] for one in lines(GOLDEN / "normaliser" / "contractions.jsonl")} == set(CONTRACTIONS)


@given(ANSWERS)
@settings(deadline=None)
def test_a_normalised_answer_holds_nothing_that_is_cut(text):
    done = normalise(text)
    assert not set(done) & scoring.PUNCTUATION
    assert not set(done.split()) & scoring.ARTICLES and not set(done.split()) & set(scoring.NUMBERS)
    assert done == " ".join(done.split())


@given(ANSWERS)
@settings(deadline=None)
def test_case_and_spaces_around_are_no_difference(text):
    assert normalise(f" {text}\n") == normalise(text) == normalise(text.lower())


@given(ANSWERS)
@settings(deadline=None)
def test_full_stops_go_but_those_before_a_digit_and_those_after_the_32nd(text):
    kept = len(re.findall(r"\.(?!\d)", normalise(text)))
    assert kept <= max(0, text.count(".") - 32)


def test_full_stops_after_the_32nd_stay():
    assert normalise("." * 40) == "." * 8 and normalise("." * 32) == "" and normalise("3.14.") == "3.14"


@given(ANSWERS)
@settings(deadline=None)
@example("the whats")
def test_twice_is_once_where_no_apostrophe_and_few_full_stops_are_left(text):
    once = normalise(text)
    if "'s" not in once and not re.search(r"\.(?!\d)", once):
        assert normalise(once) == once


@pytest.mark.parametrize(
    ("text", "once", "twice"),
    [
        ("whats", "what's", "what 's"),  # the contraction puts back what the next round cuts off
        ("x'-s -", "x's", "x 's"),  # the mark between is deleted after 's was looked for
        ("." * 40, "." * 8, ""),
    ],
)
def test_twice_is_not_once_for_these(text, once, twice):
    assert (normalise(text), normalise(once)) == (once, twice)


@given(ANSWERS)
@settings(deadline=None)
def test_vqas_own_form_is_the_same_without_commas_questions_and_apostrophes(text):
    if not set(",?'’") & set(text):
        assert basic(text) == normalise(text)


@pytest.mark.parametrize(
    ("text", "own", "evalai"),
    [
        ("black,white", "black white", "blackwhite"),
        ("1,000-2", "10002", "1000 2"),  # a comma between digits has every mark deleted
        ("she's", "she's", "she 's"),
        ("ow's'at", "'ow's'at", "ow 's'at"),
    ],
)
def test_vqas_own_form_differs_for_these(text, own, evalai):
    assert (basic(text), normalise(text)) == (own, evalai)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12))
def test_agreement_is_leaving_one_out_as_it_is_written_down(people):
    for said in set(people):
        left = [sum(other == said for j, other in enumerate(people) if j != i) for i in range(len(people))]
        assert scoring.agreement(people)[said] == pytest.approx(sum(min(1, n / 3) for n in left) / len(people))


def test_one_to_four_of_ten():
    scores = [scoring.agreement(["x"] * n + [str(i) for i in range(10 - n)])["x"] for n in (1, 2, 3, 4, 10)]
    assert scores == pytest.approx([0.3, 0.6, 0.9, 1.0, 1.0])


def test_textvqa_wants_ten_people():
    assert scoring.textvqa(["The dog."] * 10) == {"dog": 1.0}
    with pytest.raises(ValueError, match="9 people's answers"):
        scoring.textvqa(["a"] * 9)


def test_vqav2_puts_answers_in_basic_form_only_where_people_disagree():
    assert scoring.vqav2("dog", ["the dog"] * 10) == 0
    assert scoring.vqav2("the dog\n", ["the dog "] * 10) == scoring.vqav2("the dog", [" the\tdog"] * 10) == 1
    assert scoring.vqav2("Two dogs.", ["the 2 dogs"] * 9 + ["cat"]) == 1
    assert scoring.vqav2("x", ["a"] * 10) == 0


def test_vizwiz_is_leave_one_out_of_ten():
    people = ["two"] * 2 + ["unanswerable"] * 8
    assert scoring.vizwiz("2", people) == pytest.approx(0.6) and scoring.vizwiz("Unanswerable", people) == 1


@given(ANSWERS, st.lists(ANSWERS, max_size=12))
@settings(deadline=None)
def test_vqa_accuracy_is_between_0_and_1_and_full_where_all_say_so(answer, truths):
    assert 0 <= vqa(answer, truths) <= 1
    assert vqa(answer, [*itertools.repeat(answer, 1 + len(truths))]) == 1
    assert vqa(answer, truths) == vqa(answer, truths[::-1])


def test_vqa_accuracy_of_fewer_people():
    assert vqa("Two.", ["2"]) == 1 and vqa("dog", ["dog", "cat"]) == 0.5 and vqa("x", []) == 0
    assert vqa("dog", ["dog"] * 2 + ["cat"] * 2) == pytest.approx((2 * 1 / 3 + 2 * 2 / 3) / 4)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [(" Dog. ", "dog", 1), ("DOG...", "dog.", 1), ("a dog", "dog", 0), ("", "", 1), ("3.5", "35", 0)],
)
def test_exact(answer, truth, score):
    assert exact(answer, truth) == score


OPTIONS = ("a cat", "A dog.", "none of them")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), (" B) ", "B"), ("B. a dog", "B"), ("(B) a dog", "B")),
        *(("The answer is B.", "B"), ("I think the option is (C), since", "C"), ("a dog", "B"), ("None of them.", "C")),
        *(("A dog", "B"), ("A bird", None), ("D", None), ("", None), ("The answer is A. The answer is B.", None)),
        *(("B: yes", "B"), ("Bananas", None), ("The answer is Boy.", None), ("The answer: is C", None)),
    ],
)
def test_an_option_is_chosen_by_its_letter_or_its_text(answer, letter):
    assert chosen(answer, OPTIONS) == letter
    assert option(answer, "B", OPTIONS) == option(answer, "a dog", OPTIONS) == (letter == "B")


def test_options_that_read_alike_are_chosen_by_letter_only():
    assert chosen("same", ("same", "Same.")) is None and chosen("B", ("same", "Same.")) == "B"
    assert chosen("F") == "F" and chosen("B", ("C", "B")) == "B"


def test_a_truth_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match="truth 'E': neither the letter nor the text of one of the 3 options"):
        option("A", "E", OPTIONS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *(
            ("Yes", "yes"),
            ("no.", "no"),
            ("Yes, there is no doubt", "yes"),
            ("There is not.", "no"),
            ("It isn’t", "no"),
        ),
        *(
            ("No, yes", "no"),
            ("nothing", None),
            ("eyes", None),
            ("", None),
            ("There aren't any", "no"),
            ("YES!", "yes"),
        ),
    ],
)
def test_yes_or_no_is_what_is_said_first(answer, said):
    assert said_yes_no(answer) == said
    assert yes_no(answer, "Yes") == (said == "yes") and yes_no(answer, "no") == (said == "no")


def test_a_truth_that_is_neither_yes_nor_no_is_an_error():
    with pytest.raises(ValueError, match="'maybe' is neither"):
        yes_no("yes", "maybe")


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("hello", ["helo", "bye"], 1 - 1 / 5),
        ("  HELLO   world ", ["hello world"], 1),
        ("ab", ["cb"], 0.5),  # at the threshold it counts
        ("abc", ["xyc"], 0),
        ("", [""], 1),
        ("", ["a"], 0),
        ("a", [], 0),
        ("hell ", ["hello"], 1 - 1 / 5),
        ("a      b", ["a c"], 1 - 1 / 8),  # of the length as given
    ],
)
def test_anls(answer, truths, score):
    assert anls(answer, truths) == pytest.approx(score)


def test_anls_with_another_threshold():
    assert anls("abc", ["xyc"], 0.3) == pytest.approx(1 / 3) and anls("hello", ["helo"], 0.9) == 0


def slow_distance(one: str, other: str) -> int:
    """The definition itself."""
    if not one or not other:
        return len(one or other)
    changed = slow_distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, slow_distance(one[1:], other) + 1, slow_distance(one, other[1:]) + 1)


@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
@settings(deadline=None, max_examples=50)
def test_distance_is_levenshteins(one, other):
    assert scoring.distance(one, other) == slow_distance(one, other)


@given(ANSWERS, st.lists(ANSWERS, max_size=3))
@settings(deadline=None)
def test_anls_is_0_or_between_the_threshold_and_1(answer, truths):
    found = anls(answer, truths)
    assert found == 0 or 0.5 <= found <= 1
    assert anls(answer, [*truths, answer]) == 1
