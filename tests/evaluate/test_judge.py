"""The judge, against a real server process that answers by a rule."""

import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from dpo.config.compose import compose
from dpo.config.schema import JudgeConfig, RunConfig
from dpo.errors import ConfigError, EvaluationError
from dpo.evaluate import stage
from dpo.evaluate.judge import Match, judge
from dpo.evaluate.measure import Measured
from dpo.evaluate.win_rate import length_controlled
from dpo.evaluate.winner import read_winner
from dpo.modeling.generation import Answer

MATCHES = [
    Match("p1", sft="short", policy="a longer answer", extra_tokens=2),
    Match("p2", sft="the longer one here", policy="brief", extra_tokens=-3),
    Match("p3", sft="same", policy="size", extra_tokens=0),
    Match("p4", sft="no", policy="a much longer answer than that", extra_tokens=6),
]


def test_the_end_token_makes_no_answer_longer(monkeypatch):
    """Of two texts of three tokens one was cut off, the other ended: neither is longer."""
    seen = []
    monkeypatch.setattr(stage, "judge", lambda _, matches, **__: seen.extend(matches) or {})
    cut, ended = Answer([1], [5, 6, 7], False), Answer([1], [5, 6, 8, 0], True)
    measured = Measured(
        rows=[SimpleNamespace(prompt="p")],
        answers={"sft": ([cut], ["a b c"]), "policy": ([ended], ["a b d"])},
    )
    stage._judge(RunConfig(), measured)
    assert seen == [Match("p", "a b c", "a b d", 0)]


@contextmanager
def serving(rule):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evaluate.judge_server", rule],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def judged(url, matches=MATCHES, **settings):
    config = JudgeConfig(url=f"{url}/v1", model="m", **settings)
    return judge(config, matches, n_bootstrap=200, seed=0)


def requests_of(url):
    with urllib.request.urlopen(f"{url}/count") as reply:
        return int(reply.read())


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("DPO_JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DPO_JUDGE_HOSTS", "127.0.0.1")


@pytest.mark.parametrize("rule", ["longer", "words", "busy", "overloaded", "parts", "warm"])
def test_the_win_rate_by_hand(rule):
    """The longer answer wins: the policy's in p1 and p4, the other's in p2, a tie in p3."""
    with serving(rule) as url:
        found = judged(url)
    assert found["problem"] == ""
    assert found["n_judged"] == 4
    assert found["win_rate"]["value"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["win_rate"]["low"] < 0.625 < found["win_rate"]["high"]
    shares = [found[name]["value"] for name in ("wins", "ties", "losses")]
    assert shares == [0.5, 0.25, 0.25]
    assert found["position_changed"]["value"] == 0


def test_each_pair_is_judged_in_both_orders():
    with serving("longer") as url:
        judged(url)
        assert requests_of(url) == 8


def test_a_judge_that_prefers_the_first_answer_finds_no_winner():
    with serving("first") as url:
        found = judged(url)
    assert found["win_rate"]["value"] == 0.5
    # four ties of four: 0.05 ^ (1/4) = 0.4729 of all prompts, and the others lost or won
    interval = found["win_rate"]["low"], found["win_rate"]["high"]
    assert interval == pytest.approx((0.2364, 0.7636), abs=5e-5)
    assert found["ties"]["value"] == 1
    assert found["position_changed"]["value"] == 1


def test_a_judge_of_length_alone_finds_no_winner_at_equal_length():
    """Wins follow the sign of the difference in length, as often one way as the other."""
    matches = [
        Match(f"p{i}", sft="x" * 10, policy="x" * (10 + sign * size), extra_tokens=sign * size)
        for i, (sign, size) in enumerate([(1, 4), (-1, 4), (1, 8), (-1, 8), (1, 6), (1, 5), (1, 7)])
    ]
    with serving("longer") as url:
        found = judged(url, matches)
    assert found["win_rate"]["value"] == pytest.approx(5 / 7)
    assert found["win_rate_length_controlled"]["value"] == pytest.approx(0.5, abs=0.12)


def test_the_regression_finds_the_rate_at_equal_length():
    """Wins drawn from sigmoid(0.8 + 2 x): at x = 0 the rate is sigmoid(0.8) = 0.68997."""
    generator = np.random.default_rng(0)
    length = generator.uniform(-1, 1, 20_000)
    score = (generator.random(20_000) < 1 / (1 + np.exp(-(0.8 + 2 * length)))).astype(float)
    found = length_controlled(score, length, np.ones((1, len(score))))
    assert found[0] == pytest.approx(0.68997, abs=0.01)


def test_weights_are_copies():
    score, length = np.array([1.0, 0.0, 1.0]), np.array([0.3, -0.2, -0.5])
    weighted = length_controlled(score, length, np.array([[2.0, 1.0, 1.0]]))
    copied = length_controlled(
        np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.3, 0.3, -0.2, -0.5]), np.ones((1, 4))
    )
    assert weighted[0] == pytest.approx(copied[0])


def test_scores_all_alike_give_a_finite_rate():
    found = length_controlled(np.ones(5), np.zeros(5), np.ones((1, 5)))
    assert 0.9 < found[0] <= 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("nonsense", "not A, B or tie"),
        ("html", "no chat completion"),
        ("empty", "no chat completion"),
        ("always-busy", "HTTP 429"),
        ("unauthorized", "HTTP 401"),
        ("redirect", "HTTP 302"),
        ("drop", "no chat completion"),
    ],
)
def test_each_fault_ends_in_one_message_in_a_degraded_report(rule, text):
    with serving(rule) as url:
        found = judged(url, n_tries=2)
    assert found["n_judged"] == 0
    assert "win_rate" not in found
    assert text in found["problem"]


def test_a_service_that_is_down_is_said():
    found = judged("http://127.0.0.1:9", n_tries=2)
    assert "no answer" in found["problem"]


def test_or_fails_the_step_where_that_is_asked_for():
    with serving("always-busy") as url, pytest.raises(EvaluationError, match="429"):
        judged(url, n_tries=1, on_error="fail")


def test_what_was_judged_before_the_fault_counts():
    with serving("half") as url:
        found = judged(url, n_tries=1, concurrency=1)
    assert found["n_judged"] == 2
    assert found["win_rate"]["value"] == pytest.approx(0.5)
    assert found["problem"]


def test_after_a_fault_the_service_is_left_alone():
    with serving("unauthorized") as url:
        judged(url, MATCHES * 10, concurrency=1)
        assert requests_of(url) == 1


def prompts_with_bombs(n, bombs):
    return [
        Match(f"p{i} bomb" if i in bombs else f"p{i}", sft="short", policy="longer", extra_tokens=1)
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("rule", "reason"), [("filter", "HTTP 400"), ("refusal", "its verdict is not A, B or tie")]
)
def test_a_prompt_without_a_verdict_is_left_out_and_the_others_are_judged(rule, reason):
    with serving(rule) as url:
        found = judged(url, prompts_with_bombs(12, {3, 9}), n_tries=1)
    assert found["left_out"] == {reason: 2}
    assert (found["n_asked"], found["n_judged"], found["n_left_out"]) == (12, 10, 2)
    assert found["problem"] == ""
    assert found["win_rate"]["value"] == 1


@pytest.mark.parametrize(
    ("bombs", "n_asked", "n_left_out"),
    [
        (range(30), 5, 5),  # five in a row
        (range(0, 30, 3), 10, 4),  # 0, 3, 6 and 9: more than a fifth of ten
        ({0, 9, 19, 29}, 30, 4),
    ],
)
def test_a_judge_that_leaves_out_too_much_is_given_up(bombs, n_asked, n_left_out):
    with serving("filter") as url:
        found = judged(url, prompts_with_bombs(30, bombs), concurrency=1)
    assert found["n_judged"] == n_asked - n_left_out
    assert found["n_left_out"] == n_left_out
    given_up = f"no verdict on {n_left_out} of {n_asked} prompts: HTTP 400"
    assert found["problem"] == "" if n_asked == 30 else given_up in found["problem"]


def test_a_few_prompts_are_too_few_to_give_up_but_not_to_say_it():
    with serving("filter") as url:
        found = judged(url, prompts_with_bombs(4, {0}), concurrency=1)
        assert found["n_judged"] == 3
        assert "no verdict on 1 of 4 prompts" in found["problem"]
        with pytest.raises(EvaluationError, match="1 of 4"):
            judged(url, prompts_with_bombs(4, {0}), on_error="fail")


def test_a_service_that_wants_no_temperature_is_asked_with_one_only_once():
    with serving("warm") as url:
        assert judged(url, concurrency=1)["n_judged"] == 4
        assert requests_of(url) == 9


@pytest.mark.parametrize("rule", ["trickle", "headers"])
def test_a_reply_that_trickles_ends_at_the_timeout(rule):
    start = time.monotonic()
    with serving(rule) as url:
        found = judged(url, MATCHES[:1], n_tries=1, timeout_seconds=0.5)
    assert "no whole answer in 0.5 s" in found["problem"]
    assert time.monotonic() - start < 10


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("DPO_JUDGE_API_KEY", "sesame")
    with serving("key") as url:
        assert judged(url)["n_judged"] == 4
    with serving("unauthorized") as url:
        found = judged(url)
    assert "sesame" not in str(found)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ('{"winner": "A"}', "A"),
        ('{"winner":"b"}', "B"),
        ("tie", "tie"),
        ("**B**", "B"),
        ('x {"winner": "tie"} y', "tie"),
        ('{"winner": "Answer A"}', "A"),
        ("{'winner': 'answer_b'}", "B"),
        ("Answer B.", "B"),
        ("Both are short, but B is rude.\n\n**Winner: A**", "A"),
        ("winner: Answer B. It answers the question.", "B"),
        ("**Winner:** Tie", "tie"),
        ("A is right. Winner: A.", "A"),
        *(
            (text, "A")
            for text in ("Winner: [A]", "Winner: A!", "“Winner: A”", "- Final winner: A")
        ),
        *(("WINNER: B", "B"), ("Winner: TIE", "tie")),
        ('<think>{"winner": "A"} or {"winner": "B"}</think>{"winner": "B"}', "B"),
        ('{"winner": "A"} or B?\n</think>\n{"winner": "B"}', "B"),
        ('<Thinking>a</Thinking> {"winner": "A"}<think>{"winner": "B"}', "A"),
    ],
)
def test_verdicts_that_are_understood(text, winner):
    assert read_winner(text) == winner


@pytest.mark.parametrize(
    "text",
    [
        *("", "A or B", '{"winner": "A"} {"winner": "B"}', '{"winner": 1}'),
        *(
            "Winner: A tie",
            "Winner: a tie",
            "Winner: A or B",
            "Winner: A\nWinner: B",
            "Winner: Alice",
            "There is no clear winner: A) is rude; B) is short.",
            "I cannot pick a winner: A - too long, B - too short.",
            "Winner: A-B (a draw)",
            "Winner: A:B 2:1",
            "Winner: A. Winner: B.",
            "Winner: A?",
            "Which is the winner: A; B; or tie?",
            "That is not the winner: A. B is.",
            "Winner:\n- A: good\n- B: bad",
        ),
    ],
)
def test_verdicts_that_are_not(text):
    with pytest.raises(Exception, match="not A, B or tie"):
        read_winner(text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["evaluation.judge.url=http://localhost:1/v1"], "evaluation.judge.model"),
        (
            [
                "evaluation.judge.url=http://localhost:1/v1",
                "evaluation.judge.model=m",
                "evaluation.n_samples=0",
            ],
            "nothing to judge",
        ),
        (["evaluation.published=s3://bucket/policy"], "names no version"),
    ],
)
def test_settings_that_cannot_work(settings, text):
    with pytest.raises(ConfigError, match=text):
        compose(settings)
