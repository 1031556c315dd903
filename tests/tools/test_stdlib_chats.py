from __future__ import annotations

import json
import subprocess
import sys

import pytest

from automodel_trainer.tools.stdlib_chats import MAX_CHARACTERS, MODULES, build_chats, opening


@pytest.fixture(scope="module")
def chats():
    return build_chats()


def question(chat):
    return chat["messages"][0]["content"]


def answer(chat):
    """The explanation under the heading of an answer."""
    heading, _, explanation = chat["messages"][1]["content"].partition("\n\n")
    assert heading.startswith("**")
    return explanation


def test_there_are_thousands_of_chats_in_messages_format(chats):
    train, validation = chats
    assert len(train) > 2000
    assert 64 <= len(validation) <= 160
    for chat in train + validation:
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
        assert 25 <= len(answer(chat)) <= MAX_CHARACTERS


def test_validation_shares_no_package_and_no_answer_with_training(chats):
    train, validation = chats
    assert not {chat["source"] for chat in train} & {chat["source"] for chat in validation}
    answers = [answer(chat) for chat in train + validation]
    assert len(set(answers)) == len(answers)
    questions = [question(chat) for chat in train + validation]
    assert len(set(questions)) == len(questions)
    assert len({chat["source"] for chat in validation}) >= 5


def test_known_answers_come_out_as_written(chats):
    by_question = {question(chat): chat["messages"][1]["content"] for side in chats for chat in side}
    answers = [text for asked, text in by_question.items() if "`math.radians" in asked]
    assert answers == ["**math.radians** (function)\n\nConvert angle x from degrees to radians."]


def test_another_process_with_another_hash_seed_builds_the_same():
    code = "import json; from automodel_trainer.tools.stdlib_chats import build_chats; print(json.dumps(build_chats()))"
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert texts[0].stdout == texts[1].stdout
    assert len(json.loads(texts[0].stdout)) == 2
    assert not texts[0].stderr


def test_the_seed_moves_the_split(chats):
    assert {chat["source"] for chat in build_chats(seed=1)[1]} != {chat["source"] for chat in chats[1]}


def test_modules_with_side_effects_are_not_listed():
    assert not {"antigravity", "this", "turtle", "idlelib", "tkinter", "test", "__main__"} & set(MODULES)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all the parts.\n\nMore is said here.", "Return the sum of all the parts."),
        ("sum(a, b) -> total\n\n  Return the sum of\n  all the parts.", "Return the sum of all the parts."),
        ("range(stop) -> range\nrange(start, stop) -> range\n\nReturn what lies between.", "Return what lies between."),
        ("Return  the sum\nof all the parts.", "Return the sum of all the parts."),
        (">>> 1 + 1\n2", ""),
        ("Too short.", ""),
        ("", ""),
        ("No full stop at the end of this paragraph", ""),
        ("The first sentence ends here. " + "x" * 400 + ".", "The first sentence ends here."),
        ("x" * 500, ""),
    ],
)
def test_opening(docstring, expected):
    assert opening(docstring) == expected
