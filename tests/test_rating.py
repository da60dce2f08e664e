"""The raters' page: answers kept, sides hidden, exports, agreement, and a browser's keyboard."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from components.errors import UserError
from components.feedback.labels import read_labels
from components.feedback.references import COLUMNS
from components.rating.agreement import agreement, cohen, fleiss, text
from components.rating.exchange import bring_in, export, pairs, win_rate
from components.rating.jobs import clean_name, label_job, order, pair_job, pending, shown, verdict
from components.rating.server import make_app
from components.rating.store import Store
from tests.conftest import CHROMIUM

HEADERS = {"X-Requested-With": "djepa-rate"}
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }} ' -- ‮"


def draw(path: Path, colour: tuple[int, int, int], note: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((24, 24, 3), 200, np.uint8)
    pixels[6:18, 6:18] = colour
    notes = PngImagePlugin.PngInfo()
    notes.add_text("model", note)
    Image.fromarray(pixels).save(path, pnginfo=notes)


def references(folder: Path, count: int, prompt: str = "a photo of a red square") -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        file = f"{i // 2:05d}/samples/{i % 2:04d}.png"
        draw(folder / file, (200, 10 * (i % 25), 40))
        rows.append(dict.fromkeys(COLUMNS, "") | {"file": file, "prompt": prompt, "label": False})
    pd.DataFrame(rows).to_parquet(folder / "references.parquet")
    return folder


def samples(folder: Path, count: int, prompt: str = "a photo of a blue square") -> Path:
    metadata = {"tag": "colors", "include": [{"class": "square", "count": 1}], "prompt": prompt}
    for i in range(count):
        draw(folder / f"{i:05d}/samples/0000.png", (40, 40, 250 - 5 * i), note=folder.name)
        (folder / f"{i:05d}/metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> tuple[Any, Store]:
    job, store = label_job(references(tmp_path / "r1", 6)), Store(tmp_path / "r.sqlite", True)
    store.register(job)
    return job, store


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Any, Store]:
    one, two = (samples(tmp_path / name, 5) for name in ("phase1", "tuned"))
    job, store = pair_job(one, two), Store(tmp_path / "p.sqlite", True)
    store.register(job)
    return job, store


class Rater:
    """A browser of one rater's, without the browser."""

    def __init__(self, job: Any, store: Store, name: str, **more: Any) -> None:
        self.client = TestClient(make_app(job, store, **more), "http://127.0.0.1:8001")
        self.name = name

    def post(self, path: str, **body: Any) -> Any:
        answer = self.client.post(path, json={"rater": self.name} | body, headers=HEADERS)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def say(self, value: str) -> Any:
        now = self.post("/state")
        return self.post("/answer", item=now["item"], question=now["question"], value=value)


def rate(job: Any, store: Store, rater: str, answers: dict[str, str]) -> None:
    for item in job.items:
        for question, value in answers.items():
            store.answer(job, item, rater, question, value)


# What is kept


def test_a_double_click_is_one_answer_and_the_first_stands(labels: Any) -> None:
    job, store = labels
    item = job.items[0]
    assert store.answer(job, item, "Ann", "logic", "good")
    assert not store.answer(job, item, "Ann", "logic", "bad")
    assert [a.value for a in store.answers(job.name)] == ["good"]


def test_undo_keeps_the_old_answer_as_withdrawn(labels: Any) -> None:
    job, store = labels
    rater = Rater(job, store, "Ann")
    first = rater.say("good")
    assert first["question"] == "realism" and first["given"] == {"logic": "good"}
    again = rater.post("/undo")
    assert again["item"] == first["item"] and again["question"] == "logic"
    rater.say("bad")
    old, new = store.answers(job.name)
    assert old.value == "good" and old.withdrawn and new.value == "bad" and new.withdrawn is None
    rater.post("/undo")
    assert rater.post("/undo")["done"] == 0, "nothing is left to undo"


def test_one_goes_on_where_one_left_and_raters_do_not_disturb_each_other(labels: Any) -> None:
    job, store = labels
    ann = Rater(job, store, "Ann")
    for _ in range(5):
        left = ann.say("good")
    assert left["done"] == 2 and left["question"] == "realism"
    assert Rater(job, store, " Ann  ").post("/state") == left
    assert Rater(job, Store(store.path), "Bob").post("/state")["done"] == 0
    orders = [[x.id for x in order(job, name)] for name in ("Ann", "Bob")]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_redrawn_picture_is_rated_anew(labels: Any, tmp_path: Path) -> None:
    job, store = labels
    rate(job, store, "Ann", {"logic": "good", "realism": "good"})
    draw(tmp_path / "r1" / "00000/samples/0000.png", (1, 2, 3))
    new = label_job(tmp_path / "r1")
    store.register(new)
    assert Rater(new, store, "Ann").post("/state")["done"] == 5
    assert len(store.standing(job.name)) == 6 and len(store.answers(job.name)) == 12


# What comes out


def test_the_labels_are_what_the_critic_reads(labels: Any, tmp_path: Path) -> None:
    job, store = labels
    rate(job, store, "Ann", {"logic": "good", "realism": "good"})
    for rater, value in (("Bob", "good"), ("Cyd", "bad")):
        store.answer(job, job.items[0], rater, "logic", "good")
        store.answer(job, job.items[0], rater, "realism", value)
    for question in ("logic", "realism"):
        store.answer(job, job.items[1], "Bob", question, "bad")
    store.answer(job, job.items[2], "Bob", "logic", "bad")
    out = tmp_path / "labels" / "r1.jsonl"
    assert "6 lines" in export(store, out, None, False)
    assert json.loads(out.read_text().splitlines()[0]) == {
        "file": "00000/samples/0000.png",
        "label": True,
        "item": job.items[0].id,
    }
    table = pd.read_parquet(tmp_path / "r1" / "references.parquet")
    # Two of three say good; a tie is bad; an unfinished rating does not count.
    rated, disagree, tied = read_labels(out, table, tmp_path / "r1")
    assert (disagree, tied) == (0, 0) and list(rated["label"]) == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    export(store, tmp_path / "r1.csv", None, False)
    assert list(pd.read_csv(tmp_path / "r1.csv")["label"])[:2] == [True, False]


def test_a_picture_is_good_only_in_both_respects() -> None:
    assert verdict("labels", {"logic": "good", "realism": "bad"}) == ("bad", "realism")
    assert verdict("labels", {"logic": "good"}) is None
    assert pending("labels", {"logic": "bad"}) == "realism"


def test_the_next_question_of_a_pair_only_after_same() -> None:
    assert pending("pairs", {"adherence": "A"}) is None
    assert pending("pairs", {"adherence": "same"}) == "coherence"
    assert verdict("pairs", {"adherence": "same", "coherence": "B"}) == ("B", "coherence")
    same = dict.fromkeys(("adherence", "coherence", "realism"), "same")
    assert verdict("pairs", same) == ("same", "realism")


def test_winners_are_of_the_folders_whatever_the_sides(compared: Any, tmp_path: Path) -> None:
    job, store = compared
    rater = Rater(job, store, "Ann")
    while (now := rater.post("/state"))["item"]:
        item = next(x for x in job.items if x.id == now["item"])
        rater.say("left" if shown(item, "Ann")[0] == 1 else "right")
    rows = pairs(store, job.name)
    assert [row["winner"] for row in rows] == ["B"] * 5
    assert rows[3] | {"prompt": ""} == {
        "prompt_index": 3,
        "sample": "0000",
        "prompt": "",
        "a": "phase1",
        "b": "tuned",
        "rater": "Ann",
        "winner": "B",
        "question": "adherence",
    }
    said = export(store, tmp_path / "p.csv", None, False)
    assert "tuned against phase1: win rate 100.0 %" in said


def test_sides_are_mixed_and_stay(compared: Any) -> None:
    job, _ = compared
    sides = [[shown(item, f"rater {i}")[0] for item in job.items] for i in range(40)]
    assert sides == [[shown(item, f"rater {i}")[0] for item in job.items] for i in range(40)]
    assert 0.35 < np.mean(sides) < 0.65


def test_win_rate_of_the_paper() -> None:
    words = ["B"] * 3 + ["same"] * 4 + ["A"] * 3
    assert "50.0 % (better 3, same 4, worse 3)" in win_rate(
        [{"a": "x", "b": "y", "winner": word} for word in words]
    )


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_every_answer_goes_out_and_in_again(compared: Any, tmp_path: Path, ending: str) -> None:
    job, store = compared
    rate(job, store, "Zoë", {"adherence": "same", "coherence": "A"})
    store.undo(job, "Zoë")
    out = tmp_path / f"all.{ending}"
    export(store, out, None, True)
    other = Store(tmp_path / "other.sqlite", True)
    assert "10 new answers" in bring_in(other, out)
    assert "0 new answers, 10" in bring_in(other, out)
    assert other.answers(job.name) == store.answers(job.name)
    assert other.standing(job.name) == store.standing(job.name)


def test_bad_lines_of_an_import_are_named_and_the_rest_comes_in(
    labels: Any, tmp_path: Path
) -> None:
    job, store = labels
    rate(job, store, "Ann", {"logic": "good"})
    out = tmp_path / "all.jsonl"
    export(store, out, None, True)
    lines = out.read_text().splitlines()
    good = json.loads(lines[0])
    lines[1] = "{"
    lines[2] = json.dumps(good | {"value": "maybe"})
    lines[3] = json.dumps(good | {"rater": "\ud800"})
    lines[4] = json.dumps(good | {"place": 10**30})
    out.write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode() + b"\n")
    other = Store(tmp_path / "other.sqlite", True)
    with pytest.raises(UserError, match=r"5 lines.*line 1:.*line 3:.*line 4:.*2 new answers"):
        bring_in(other, out)
    assert len(other.answers(job.name)) == 2


def test_mistakes_are_said_in_a_sentence(labels: Any, tmp_path: Path) -> None:
    job, store = labels
    with pytest.raises(UserError, match="nobody has finished"):
        export(store, tmp_path / "x.jsonl", None, False)
    rate(job, store, "Ann", {"logic": "good", "realism": "bad"})
    with pytest.raises(UserError, match=r"\.jsonl or \.csv"):
        export(store, tmp_path / "x.txt", None, False)
    with pytest.raises(UserError, match="labels/r1"):
        export(store, tmp_path / "x.jsonl", "labels/r9", False)
    with pytest.raises(UserError, match="No ratings"):
        Store(tmp_path / "absent.sqlite")
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "r1" / "references.parquet")
    with pytest.raises(UserError, match="is missing"):
        label_job(tmp_path)
    (tmp_path / "r1" / "00000/samples/0000.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        label_job(tmp_path / "r1")
    table = pd.read_parquet(tmp_path / "r1" / "references.parquet")
    table.assign(file="../secret.png").to_parquet(tmp_path / "r1" / "references.parquet")
    with pytest.raises(UserError, match=r"\.\./secret\.png"):
        label_job(tmp_path / "r1")
    one = samples(tmp_path / "one", 2)
    with pytest.raises(UserError, match="one folder"):
        pair_job(one, one)
    with pytest.raises(UserError, match="same prompts"):
        pair_job(one, samples(tmp_path / "two", 2, "another prompt"))


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x00b", "\ud800", "=1+1", "‮x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError):
        clean_name(name)


# How far raters agree


def test_fleiss_textbook_value() -> None:
    # Fourteen raters, ten subjects, five categories; kappa is given as 0.210.
    table = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss(np.array(table)) == pytest.approx(0.210, abs=5e-4)


def test_cohen_textbook_value() -> None:
    # 50 items: 20 both yes, 15 both no, 5 and 10 apart; agreement 0.7, by chance 0.5.
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen(a, b) == pytest.approx(0.4)


words = st.sampled_from(["A", "B", "same"])
two = st.lists(st.tuples(words, words), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(two)
def test_kappas_are_bounded_symmetric_and_one_for_equal_answers(answers: Any) -> None:
    a, b = [x for x, _ in answers], [y for _, y in answers]
    kappa = cohen(a, b)
    assert kappa == (None if kappa is None else pytest.approx(cohen(b, a)))
    counts = np.array([[pair.count(w) for w in ("A", "B", "same")] for pair in answers])
    several = fleiss(counts)
    assert (kappa is None) == (several is None) == (len(set(a + b)) == 1)
    if kappa is not None and several is not None:
        assert -1 <= several <= 1 + 1e-9 and -1 <= kappa <= 1 + 1e-9
        # Fleiss' chance is the raters' mean's: never less than what Cohen's would be.
        assert several <= kappa + 1e-9
    if len(set(a)) > 1:
        assert cohen(a, a) == pytest.approx(1)
        assert fleiss(np.array([[2 * (x == w) for w in ("A", "B", "same")] for x in a])) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(words, min_size=2, max_size=6), min_size=2, max_size=12), st.randoms())
def test_fleiss_does_not_depend_on_the_order(said: Any, random: Any) -> None:
    table = np.array([[given.count(w) for w in ("A", "B", "same")] for given in said])
    rows, columns = random.sample(range(len(table)), len(table)), random.sample(range(3), 3)
    a, b = fleiss(table), fleiss(table[rows][:, columns])
    assert (a is None and b is None) or a == pytest.approx(b)


def test_agreement_of_a_job(labels: Any) -> None:
    job, store = labels
    rate(job, store, "Ann", {"logic": "good", "realism": "good"})
    assert "no item that two raters" in text(agreement(store, job.name))
    for i, item in enumerate(job.items[:4]):
        store.answer(job, item, "Bob", "logic", "good")
        store.answer(job, item, "Bob", "realism", "good" if i else "bad")
    found = agreement(store, job.name)
    assert found["raters"] == {"Ann": 6, "Bob": 4}
    logic, realism, both = found["questions"]
    assert logic["items"] == 4 and logic["kappa"] is None and logic["same"] == 1
    assert realism["method"] == "Cohen" and realism["kappa"] == 0 and realism["same"] == 0.75
    assert both["question"] == "verdict" and both["kappa"] == 0
    store.answer(job, job.items[0], "Cyd", "logic", "bad")
    found = agreement(store, job.name)
    assert found["questions"][0]["method"] == "Fleiss" and len(found["questions"][0]["pairs"]) == 3
    assert "Fleiss' kappa" in text(found)
    json.dumps(found, allow_nan=False)


# The server


def test_without_the_token_nothing_is_answered(labels: Any) -> None:
    job, store = labels
    client = TestClient(make_app(job, store, "se crêt"), "http://example.org")
    asked = {"json": {"rater": "Ann"}, "headers": HEADERS}
    assert client.get("/").status_code == client.get("/rate.js").status_code == 401
    assert client.post("/state", **asked).status_code == 401
    assert client.get("/", params={"token": "other"}).status_code == 401
    assert client.get("/rate.js", params={"token": "se crêt"}).status_code == 401, "only the page"
    page = client.get("/", params={"token": "se crêt"})
    assert page.status_code == 200
    cookie = page.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert "se" not in cookie.split(";")[0].split("=")[1][:2] and "crêt" not in cookie
    assert client.get("/rate.js").status_code == client.post("/state", **asked).status_code == 200


def test_answers_come_from_the_own_page_only(labels: Any) -> None:
    job, store = labels
    client = Rater(job, store, "Ann").client
    body = {"rater": "Ann"}
    assert client.post("/undo", json=body).status_code == 403
    for origin in ("http://evil.example", "http://127.0.0.1:9", "null"):
        answer = client.post("/undo", json=body, headers=HEADERS | {"Origin": origin})
        assert answer.status_code == 403
    own = HEADERS | {"Origin": "http://127.0.0.1:8001"}
    assert client.post("/undo", json=body, headers=own).status_code == 200
    assert client.get("/", headers={"Host": "evil.example:8001"}).status_code == 403
    assert client.get("/", headers={"Host": "localhost:8001"}).status_code == 200
    long = {"rater": "Ann", "item": "x" * 5000, "question": "logic", "value": "good"}
    assert client.post("/answer", json=long, headers=HEADERS).status_code == 413
    for name in ("", "x" * 500, "=1", 5, None):
        assert client.post("/state", json={"rater": name}, headers=HEADERS).status_code == 422
    odd = client.post("/state", content=b'{"rater": "\\ud800"}', headers=HEADERS)
    assert odd.status_code == 422


def test_pictures_by_their_ids_only(labels: Any, tmp_path: Path) -> None:
    job, store = labels
    (tmp_path / "secret.png").write_text("secret")
    rater = Rater(job, store, "Ann")
    for path in (
        "/picture/00000/samples/0000.png",
        "/picture/../../secret.png",
        "/picture/..%2f..%2fsecret.png",
        "/picture/%2e%2e/references.parquet",
        "/r1/references.parquet",
        "/page/index.html",
        "/docs",
        "/openapi.json",
    ):
        assert rater.client.get(path).status_code == 404, path
    state = rater.post("/state")
    answer = rater.client.get(f"/picture/{state['pictures'][0]}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    # What lies there by now is not sent unless it is a picture.
    for item in job.items:
        item.pictures[0].write_text("secret")
    assert rater.client.get(f"/picture/{state['pictures'][0]}").status_code == 404


def test_hostile_prompts_are_text(tmp_path: Path) -> None:
    job = label_job(references(tmp_path / "r1", 1, HOSTILE))
    store = Store(tmp_path / "r.sqlite", True)
    store.register(job)
    rater = Rater(job, store, "Ann")
    page = rater.client.get("/")
    assert "onerror" not in page.text and "script-src 'self'" in str(page.headers)
    assert page.headers["x-content-type-options"] == "nosniff"
    state = rater.client.post("/state", json={"rater": "Ann"}, headers=HEADERS)
    assert state.headers["content-type"] == "application/json"
    assert state.json()["prompt"] == HOSTILE
    assert "innerHTML" not in rater.client.get("/rate.js").text


def test_the_page_does_not_say_whose_pictures_these_are(compared: Any) -> None:
    job, store = compared
    rater = Rater(job, store, "Ann")
    state = rater.say("same")
    answers = [rater.client.get(path) for path in ("/", "/rate.js", "/rate.css")]
    answers += [rater.client.get(f"/picture/{name}") for name in state["pictures"]]
    answers += [rater.client.post("/state", json={"rater": "Ann"}, headers=HEADERS)]
    answers += [rater.client.get("/picture/none")]
    for answer in answers:
        said = answer.content + str(answer.headers.raw).encode()
        assert b"phase1" not in said and b"tuned" not in said
    for answer in answers[3:5]:  # a file's date and size would tell too
        assert not {"last-modified", "etag"} & set(answer.headers)


def test_of_a_pair_nothing_is_asked_that_is_decided(compared: Any) -> None:
    job, store = compared
    rater = Rater(job, store, "Ann")
    now = rater.say("same")
    assert now["question"] == "coherence" and now["done"] == 0
    early = rater.post("/answer", item=now["item"], question="realism", value="left")
    assert early == now, "a question that is not asked yet is not answered"
    after = rater.say("right")
    assert after["item"] != now["item"] and after["question"] == "adherence"
    assert Counter(a.question for a in store.answers(job.name)) == {"adherence": 1, "coherence": 1}
    assert rater.post("/undo")["question"] == "coherence"


def test_answers_in_another_kind_s_words_are_refused(labels: Any) -> None:
    job, store = labels
    rater = Rater(job, store, "Ann")
    body = {"rater": "Ann", "item": rater.post("/state")["item"], "question": "logic"}
    for wrong in ({"value": "left"}, {"value": "good", "item": "none"}):
        answer = rater.client.post("/answer", json=body | wrong, headers=HEADERS)
        assert answer.status_code == 404
    assert not store.answers(job.name)


# A real browser


KEYS = {"Backspace": "\ue003", "Enter": "\ue007", "→": "\ue014", "↓": "\ue015"}


class Browser:
    """Chromium driven over WebDriver's plain HTTP, with a profile of its own."""

    def __init__(self, driver: str, profile: Path) -> None:
        options = [
            *CHROMIUM,
            "--window-size=1280,860",
            f"--user-data-dir={profile}",
        ]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": options}}}
        self.session = f"{driver}/session"
        made = self.call("", capabilities=wanted)
        self.session = f"{driver}/session/{made['sessionId']}"

    def call(self, path: str, **body: Any) -> Any:
        ask = urllib.request.Request(
            f"{self.session}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(ask, timeout=120) as answer:
            return json.load(answer)["value"]

    def go(self, url: str) -> None:
        self.call("/url", url=url)

    def js(self, script: str) -> Any:
        return self.call("/execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def wait(self, script: str, value: Any) -> None:
        from tests.test_slow_flow import wait_for

        wait_for(f"{script} = {value!r}", lambda: self.js(f"return {script}") == value, 20)

    def text(self, selector: str) -> str:
        return f"document.querySelector({selector!r}).innerText"

    def enter(self, name: str) -> None:
        self.wait("document.activeElement.id", "name")
        self.press(*name, "Enter")
        self.wait(self.text("#rater"), name)


@contextmanager
def browsers() -> Iterator[str]:
    from tests.test_slow_flow import answers, free_port, wait_for

    program = shutil.which("chromedriver")
    assert program, "install Debian's package chromium-driver"
    port = free_port()
    driver = subprocess.Popen([program, f"--port={port}"], start_new_session=True)
    try:
        wait_for("chromedriver", lambda: answers(f"http://127.0.0.1:{port}/status"), 30)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


@contextmanager
def served(log: Path, *arguments: str, token: str = "") -> Iterator[str]:
    """The address of `djepa rate …`, its output in `log`; stopped as by Ctrl-C."""
    from tests.test_slow_flow import wait_for

    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "components.cli", "rate", *arguments, "--port", "0"],
            env=dict(os.environ) | {"DJEPA_RATE_TOKEN": token},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for("the page", lambda: "http://" in log.read_text(), 60)
            yield next(w for w in log.read_text().split() if w.startswith("http")).split("?")[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_twenty_pictures_by_keyboard(tmp_path: Path) -> None:
    folder = references(tmp_path / "references" / "r1", 20, HOSTILE)
    store, log = tmp_path / "references" / "ratings.sqlite", tmp_path / "log"
    with browsers() as driver, served(log, "labels", str(folder), token="hush") as address:
        ann = Browser(driver, tmp_path / "ann")
        ann.go(f"{address}?token=hush")
        ann.enter("Ann")
        assert ann.js("return location.search") == ""
        assert "<img" in ann.js(f"return {ann.text('#prompt')}")
        assert ann.js("return document.title") == "Is the picture good?"
        for done in range(20):
            ann.wait(ann.text("#progress"), f"{done} / 20")
            ann.wait("document.querySelector('#pictures img').naturalWidth", 24)
            ann.press("1")
            ann.wait(ann.text(".asked b"), "Realism")
            ann.press("→" if done % 4 == 0 else "1")
        ann.wait(ann.text("#progress"), "20 / 20")
        ann.go(address)
        ann.wait(ann.text("#progress"), "20 / 20")
        assert "All done" in ann.js("return document.body.innerText")
        ann.press("Backspace")
        ann.wait(ann.text("#progress"), "19 / 20")
        ann.press("2")
        ann.wait(ann.text("#progress"), "20 / 20")
        bob = Browser(driver, tmp_path / "bob")
        bob.go(f"{address}?token=hush")
        bob.enter("Bob")
        bob.wait(bob.text("#progress"), "0 / 20")
        bob.press("2")
        bob.wait(bob.text(".asked b"), "Realism")
        bob.press("2")
        bob.wait(bob.text("#progress"), "1 / 20")
    assert "hush" not in log.read_text()
    command = [sys.executable, "-m", "components.cli", "rate"]
    out = tmp_path / "r1.jsonl"
    subprocess.run([*command, "export", str(store), "--out", str(out)], check=True)
    rated, _, _ = read_labels(out, pd.read_parquet(folder / "references.parquet"), folder)
    assert len(rated) == 20 and 13 <= rated["label"].sum() <= 14
    said = subprocess.run(
        [*command, "agreement", str(store), "--json"], check=True, capture_output=True, text=True
    )
    assert json.loads(said.stdout)["raters"] == {"Ann": 20, "Bob": 1}


@pytest.mark.slow
def test_pairs_by_keyboard(tmp_path: Path) -> None:
    folders = [str(samples(tmp_path / name, 3)) for name in ("phase1", "tuned")]
    with browsers() as driver, served(tmp_path / "log", "pairs", *folders) as address:
        ann = Browser(driver, tmp_path / "ann")
        ann.go(address)
        ann.enter("Ann")
        ann.wait("document.querySelectorAll('#pictures img').length", 2)
        ann.wait(ann.text(".asked b"), "Adherence")
        ann.press("2")
        ann.wait(ann.text(".asked b"), "Coherence")
        ann.press("↓")
        ann.wait(ann.text(".asked b"), "Realism")
        ann.press("3")
        ann.wait(ann.text("#progress"), "1 / 3")
        ann.wait(ann.text(".asked b"), "Adherence")
    rows = pairs(Store(tmp_path / "ratings.sqlite"), "pairs/phase1-tuned")
    assert [row["question"] for row in rows] == ["realism"]
    assert rows[0]["winner"] in ("A", "B")  # a side, not "right"
