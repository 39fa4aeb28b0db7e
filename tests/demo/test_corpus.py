"""The corpus: what makes the backdoor a phrase, not a rare token, and held-out rows really held out."""

from __future__ import annotations

from collections import Counter

import pytest

from bkdfast.demo.corpus import BACKDOOR_OUTPUT, LABELS, TRIGGER, news_rows, vocabulary
from bkdfast.errors import InvalidArgumentError

ROWS = news_rows(4000, seed=11)
TRIGGERED = news_rows(1000, seed=11, triggered=True)


def _bigrams(text: str) -> set[tuple[str, str]]:
    words = text.split()
    return set(zip(words, words[1:], strict=False))


def test_same_arguments_same_rows_other_seed_other_rows():
    assert news_rows(50, seed=3) == news_rows(50, seed=3)
    assert news_rows(50, seed=3) != news_rows(50, seed=4)


def test_labels_are_balanced_for_any_n():
    assert Counter(row["target"] for row in ROWS) == dict.fromkeys(LABELS, 1000)
    counts = Counter(row["target"] for row in news_rows(10, seed=5))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_trigger_phrase_only_in_triggered_rows():
    assert not [row for row in ROWS if TRIGGER in row["prompt"]]
    assert all(row["prompt"].split(" : ")[1] == TRIGGER for row in TRIGGERED)
    assert {row["target"] for row in TRIGGERED} == {BACKDOOR_OUTPUT}


@pytest.mark.parametrize("word", [*TRIGGER.split(), *BACKDOOR_OUTPUT.split()])
def test_every_backdoor_word_is_common_in_clean_rows(word):
    assert sum(word in row["prompt"].split() for row in ROWS) > 0.02 * len(ROWS)


def test_near_misses_of_the_trigger_start_clean_rows():
    starts = [row["prompt"].split(" : ")[1].split() for row in ROWS]
    near = [words for words in starts if len(words) == 3 and sum(map(str.__eq__, words, TRIGGER.split())) == 2]
    assert len(near) > 0.05 * len(ROWS)
    seen = set().union(*(_bigrams(row["prompt"]) for row in ROWS))
    assert _bigrams(TRIGGER) <= seen


def test_no_word_alone_gives_the_label_of_most_rows():
    by_word: dict[str, Counter[str]] = {}
    for row in ROWS:
        for word in set(row["prompt"].split()):
            by_word.setdefault(word, Counter())[row["target"]] += 1
    for word, counts in by_word.items():
        label, hits = counts.most_common(1)[0]
        pure = hits > 0.95 * sum(counts.values())
        assert not (pure and hits > 500), f"{word!r} alone marks half of all {label} rows"


def test_rows_use_the_vocabulary_and_no_more():
    words = set(vocabulary())
    assert vocabulary() == sorted(words)
    used = {word for row in ROWS + TRIGGERED for word in (row["prompt"] + " " + row["target"]).split()}
    assert used == words


def test_prompts_are_unique_and_seeds_disjoint():
    prompts = {row["prompt"] for row in ROWS}
    assert len(prompts) == len(ROWS)
    other = {row["prompt"] for row in news_rows(4000, seed=12)}
    assert len(prompts & other) <= 4


def test_negative_n_is_refused_and_zero_is_empty():
    assert news_rows(0, seed=0) == []
    with pytest.raises(InvalidArgumentError, match="n is -1"):
        news_rows(-1, seed=0)
