"""Every metric on answers whose score is worked out by hand from its published definition."""

import pytest

from nemovl_train.evaluation import metrics
from nemovl_train.evaluation.metrics import METRICS, choice, levenshtein, scored_answer

CASES = {
    "exact_match": [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0),  # article, punctuation and case go
        ("an  apple", ["apple"], 1.0),
        ("theatre", ["atre"], 0.0),  # 'the' goes only as a word
        ("two", ["2", "two"], 1.0),
        ("twenty", ["two"], 0.0),
        ("x", [], 0.0),
    ],
    "strict_match": [(" 7 ", ["7"], 1.0), ("Seven", ["seven"], 0.0), ("7.", ["7"], 0.0)],
    # The worked example of the ST-VQA task: one character of ten differs, 1 - 1/10.
    "anls": [
        ("0123456789", ["0123456780"], 0.9),
        ("COCA cola", ["coca  COLA"], 1.0),
        ("ab", ["ac"], 0.0),  # exactly half differs, which is too much
        ("abc", ["abx"], 2 / 3),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("", ["x"], 0.0),
    ],
    "relaxed_accuracy": [
        ("105", ["100"], 1.0),  # exactly 5%
        ("105.1", ["100"], 0.0),
        ("-95", ["-100"], 1.0),
        ("95", ["-100"], 0.0),
        ("12%", ["0.12"], 1.0),
        ("12%", ["12"], 0.0),
        ("0", ["0"], 1.0),
        ("0.0001", ["0"], 0.0),
        ("Blue", ["blue"], 1.0),
        ("dark blue", ["blue"], 0.0),
        ("2019", ["2020"], 1.0),  # years are numbers to the published measure, too
    ],
    "token_f1": [
        ("the cat sat", ["cat sat down"], 0.8),  # two shared, two and three words: 2 * 2 / 5
        ("cat cat", ["cat"], 2 / 3),
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # both are empty once normalised, which SQuAD 2.0 counts as equal
    ],
    "edit_similarity": [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ABC", ["abc"], 0.0),
        ("", [""], 1.0),
        ("line one\nline two", ["line one\nline 2"], 1 - 3 / 17),
    ],
    "iou": [
        ("[0, 0, 10, 10]", ["[0, 0, 10, 10]"], 1.0),
        ("It is at (5, 0, 15, 10).", ["[0, 0, 10, 10]"], 50 / 150),
        ("[0,0,1,1]", ["[2,2,3,3]"], 0.0),
        ("[0, 0, 10, 10]", ["[20,20,30,30]", "[0, 5, 10, 15]"], 50 / 150),
        ("[10, 10, 0, 0]", ["[0, 0, 10, 10]"], 0.0),
        ("left", ["[0, 0, 10, 10]"], 0.0),
        ("<0.1, 0.1, 0.5, 0.5>", ["[0.1, 0.1, 0.5, 0.9]"], 0.5),
    ],
    "grounding": [
        ("[0, 0, 10, 10]", ["[0, 0, 10, 20]"], 1.0),  # 0.5 counts
        ("[0, 0, 10, 10]", ["[0, 0, 10, 21]"], 0.0),
    ],
    "multiple_choice": [
        ("B", ["B"], 1.0),
        ("b", ["B"], 1.0),
        ("(C)", ["C"], 1.0),
        ("C. the mouse", ["C"], 1.0),
        ("(A) because B is wrong", ["A"], 1.0),
        ("The answer is D.", ["D"], 1.0),
        ("The correct option: **B**", ["B"], 1.0),
        ("A mouse", ["A"], 0.0),  # an article is no choice
        ("B", ["C"], 0.0),
        ("", ["A"], 0.0),
    ],
    "contains": [
        ("The sign says STOP now", ["stop"], 1.0),
        ("two\nlines", ["TWO LINES"], 1.0),
        ("st op", ["stop"], 0.0),
    ],
}


def test_every_metric_has_cases():
    assert CASES.keys() == METRICS.keys()
    assert all({0.0} < {c[2] for c in cases} for cases in CASES.values())


@pytest.mark.parametrize(
    ("name", "answer", "references", "expected"), [(n, *case) for n, cases in CASES.items() for case in cases]
)
def test_by_hand(name, answer, references, expected):
    assert METRICS[name](answer, references) == pytest.approx(expected)


def test_levenshtein_is_the_recurrence():
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["", "a", "ab", "ba", "abc", "cab", "abab", "babba"]
    for one in words:
        for other in words:
            assert levenshtein(one, other) == slow(one, other), (one, other)


def test_a_trace_is_not_scored():
    assert scored_answer("<think>\nis it 7? or 8\n</think>8") == "8"
    assert scored_answer("plain ") == "plain"
    assert scored_answer("<think>\nnever ended 8") == ""
    assert scored_answer("<think>a</think>b</think> c") == "c"


def test_boxes_and_letters():
    assert metrics.box("at [1, 2.5, -3, 4] and [5,6,7,8]") == (1.0, 2.5, -3.0, 4.0)
    assert metrics.box("[1, 2, 3]") is None
    assert choice("Answer: (b)") == "B"
    assert choice("no idea") is None
