"""Each choice is scored once, and scores survive an interruption."""

import json
import math

import pytest

from updp_hf.selection.score_history import ScoreHistory


class Counted:
    """A fitness that counts how often it is asked."""

    def __init__(self, interrupted_after=math.inf):
        self.asked, self.interrupted_after = [], interrupted_after

    def __call__(self, choices):
        for choice in choices:
            if len(self.asked) >= self.interrupted_after:
                raise KeyboardInterrupt
            self.asked.append(choice)
        return [score_of(choice) for choice in choices]


def score_of(choice):
    return sum(0.1 * index for index in choice) / 3


CHOICES = [(0,), (1, 4), (), (0,), (2, 3)]
SUBJECT = {"sites": "abc", "images": 16}


def test_each_choice_is_scored_once():
    counted = Counted()
    history = ScoreHistory(counted)
    assert history(CHOICES) == [score_of(choice) for choice in CHOICES]
    assert history([(5,), (0,)]) == [score_of((5,)), score_of((0,))]
    assert history([]) == []
    assert counted.asked == [(0,), (1, 4), (), (2, 3), (5,)]
    assert history.scores == {choice: score_of(choice) for choice in counted.asked}


@pytest.mark.parametrize("is_silent", [True, False])
def test_how_far_the_search_is_is_shown_unless_it_is_not_to_be(capsys, is_silent):
    history = ScoreHistory(Counted(), disable_tqdm=is_silent)
    history(CHOICES)
    assert ("Search" in capsys.readouterr().err) != is_silent
    history(CHOICES)  # nothing is new
    assert capsys.readouterr().err == ""


def test_a_file_is_a_line_of_json_for_the_subject_and_one_for_each_score(tmp_path):
    file = tmp_path / "new" / "folder" / "scores.jsonl"
    history = ScoreHistory(Counted(), SUBJECT, file=str(file))
    assert file.read_text() == '{"images": 16, "sites": "abc"}\n'
    history(CHOICES)
    head, *lines = file.read_text().splitlines()
    assert json.loads(head) == SUBJECT
    assert [json.loads(line) for line in lines] == [[list(c), score_of(c)] for c in dict.fromkeys(CHOICES)]
    assert lines[1] == f"[[1, 4], {score_of((1, 4))!r}]"


def test_a_score_is_in_the_file_as_soon_as_it_is_known(tmp_path):
    file = tmp_path / "scores.jsonl"
    seen = []

    def fitness(choices):
        seen.append(len(file.read_text().splitlines()))
        return [0.0 for _ in choices]

    ScoreHistory(fitness, SUBJECT, file=file)(CHOICES)
    assert seen == [1, 2, 3, 4]


def test_another_history_goes_on_from_the_file(tmp_path):
    file = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ScoreHistory(Counted(interrupted_after=2), SUBJECT, file=file)(CHOICES)
    counted = Counted()
    history = ScoreHistory(counted, dict(reversed(SUBJECT.items())), file=file)
    assert history.scores == {(0,): score_of((0,)), (1, 4): score_of((1, 4))}
    assert history(CHOICES) == [score_of(choice) for choice in CHOICES]
    assert counted.asked == [(), (2, 3)]
    third = Counted()
    assert ScoreHistory(third, SUBJECT, file=file)(CHOICES) == [score_of(choice) for choice in CHOICES]
    assert third.asked == []


@pytest.mark.parametrize("value", [0.1 + 0.2, -1e-300, 1e300, -math.inf, math.nan])
def test_a_score_is_read_as_it_was(tmp_path, value):
    file = tmp_path / "scores.jsonl"
    ScoreHistory(lambda choices: [value], file=file)([(3,)])
    (found,) = ScoreHistory(Counted(), file=file)([(3,)])
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_the_scores_of_something_else_are_refused_and_left_as_they_are(tmp_path):
    file = tmp_path / "scores.jsonl"
    ScoreHistory(Counted(), SUBJECT, file=file)(CHOICES)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="holds the scores of another search") as refusal:
        ScoreHistory(Counted(), {"sites": "xyz", "images": 16}, file=file)
    for told in (str(file), '"sites": "abc"', '"sites": "xyz"', "start without resuming, or in another folder"):
        assert told in str(refusal.value)
    assert file.read_bytes() == before


def test_a_half_written_line_is_dropped(tmp_path):
    file = tmp_path / "scores.jsonl"
    ScoreHistory(Counted(), SUBJECT, file=file)(CHOICES)
    whole = file.read_text()
    for length in range(len(whole.rpartition("[[")[0]), len(whole)):
        file.write_text(whole[:length])
        counted = Counted()
        assert ScoreHistory(counted, SUBJECT, file=file)(CHOICES) == [score_of(choice) for choice in CHOICES]
        assert counted.asked == [(2, 3)]
        assert file.read_text() == whole


def test_a_fitness_that_forgets_a_score_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        ScoreHistory(lambda choices: [])([(0,)])
