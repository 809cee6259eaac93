"""A version beside the champion: whatever becomes of it, the champion's answers do not."""

import asyncio
import threading
import time

import numpy as np
import pytest
from serving_fixtures import (
    GRID,
    NAMES,
    ask,
    form,
    geotiff,
    make_bundle,
    make_layer,
    refused,
    serve_config,
)
from test_seen import counted, value

from mm_model.api import ModelIdentity
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel, Served
from mm_model.serving.challenge import differences, is_chosen
from mm_model.serving.generator import Generator, Request, Result

IDS = [f"asked-{k}" for k in range(24)]
SAR = geotiff("sar")


def served(version: str, seed: int = 0, names: tuple[str, ...] = NAMES) -> Served:
    generator = Generator(make_bundle(names, seed), max_side_px=64)
    return Served(generator, ModelIdentity(name="mm-test", version=version))


@pytest.fixture
def pair() -> FixedModel:
    return FixedModel(served("1"), challenger=served("2", seed=1))


def app_of(source, mode: str, share: float = 1.0, **changes):
    return build_app(source, serve_config(challenger={"mode": mode, "share": share}, **changes))


def request(request_id: str = "mine", path="/v1/generate", **fields):
    fields = {
        "steps": 1,
        **({"target": ["dem", "map"]} if path == "/v1/generate" else {}),
        **fields,
    }
    return form({"sar": SAR}, {"X-Request-ID": request_id}, path, **fields)


def outcomes(found, version="2") -> dict[str, float]:
    return {
        dict(labels)["outcome"]: number
        for (name, labels), number in found.items()
        if name == "mm_challenger_requests_total" and dict(labels)["version"] == version
    }


def wait_for(app, outcome: str, number: int = 1):
    give_up = time.monotonic() + 120
    while outcomes(found := counted(app)).get(outcome, 0) < number:
        assert time.monotonic() < give_up, outcomes(found)
        time.sleep(0.02)
    return found


def test_the_choice_is_of_the_id_and_of_about_that_share():
    ids = [f"{k:x}" for k in range(4000)]
    chosen = [i for i in ids if is_chosen(i, 0.25)]
    assert 0.22 < len(chosen) / len(ids) < 0.28
    assert chosen == [i for i in ids if is_chosen(i, 0.25)]
    assert set(chosen) < {i for i in ids if is_chosen(i, 0.5)}  # who is in stays in
    assert all(is_chosen(i, 1.0) for i in ids)


def test_a_share_is_answered_by_the_challenger_and_says_so(pair):
    app = app_of(pair, "share", 0.5)
    answers = ask(app, *map(request, IDS))
    by = [answer.headers["x-model-version"] for answer in answers]
    assert by == ["2" if is_chosen(i, 0.5) else "1" for i in IDS]
    assert set(by) == {"1", "2"}
    # What each gives is what it gives alone.
    alone = ask(build_app(FixedModel(pair.challenger), serve_config()), *map(request, IDS))
    for answer, its in zip(answers, alone, strict=True):
        assert (answer.content == its.content) == (answer.headers["x-model-version"] == "2")
    found = counted(app)
    assert outcomes(found) == {"answered": by.count("2")}
    for version in ("1", "2"):
        labels = {"operation": "generate", "version": version}
        assert value(found, "mm_requests_total", status="200", **labels) == by.count(version)
        assert value(found, "mm_request_seconds_count", **labels) == by.count(version)
    assert value(found, "mm_challenger_info", model="mm-test", run_id="", version="2") == 1
    (model,) = ask(app, ("GET", "/v1/model", {}))
    assert model.json()["serving"]["version"] == "1"
    assert model.json()["challenger"]["version"] == "2"


def test_scenes_are_shared_and_embeddings_are_not(pair):
    """Embeddings of two versions cannot be compared."""
    app = app_of(pair, "share")
    holed = geotiff("dem")
    fill = form({"sar": SAR, "dem": holed}, path="/v1/fill", fill="dem", steps=1)
    uncertain = request(uncertainty="true", samples=2)
    embed = form({"sar": SAR}, path="/v1/embed")
    align = form({"sar": SAR}, path="/v1/align")
    answers = ask(app, fill, uncertain, embed, align)
    assert [a.status_code for a in answers] == [200] * 4
    assert [a.headers["x-model-version"] for a in answers] == ["2", "2", "1", "1"]


@pytest.mark.parametrize("why", ["breaks", "knows less"])
def test_a_challenger_that_cannot_answer_leaves_it_to_the_champion(pair, why, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error")

    if why == "breaks":
        monkeypatch.setattr(pair.challenger.generator, "sample", broken)
    else:
        pair = FixedModel(pair.served, challenger=served("2", names=("rgb", "sar", "map")))
    app = app_of(pair, "share")
    answers = ask(app, *map(request, IDS[:6]))
    assert {(a.status_code, a.headers["x-model-version"]) for a in answers} == {(200, "1")}
    found = counted(app)
    assert outcomes(found) == {"failed" if why == "breaks" else "refused": 6}
    assert value(found, "mm_requests_total", operation="generate", status="200", version="1") == 6
    # What is wrong with a request is said as the champion says it.
    problem = refused(ask(app, request(samples=0))[0], 422, "request")
    assert problem.detail == "samples"


def test_a_challenger_that_hangs_takes_its_share_of_the_queue_alone(pair, monkeypatch):
    over = threading.Event()

    def hang(*_):
        over.wait(60)
        raise RuntimeError("at last")

    monkeypatch.setattr(pair.challenger.generator, "sample", hang)
    app = app_of(pair, "share", 0.5, max_queued=8, deadline_s=5)
    ids = [i for i in IDS if is_chosen(i, 0.5)][:8]
    answers = ask(app, *map(request, ids))
    over.set()
    # Four wait in vain; all others are answered, and nobody is refused.
    statuses = [a.status_code for a in answers]
    assert (statuses.count(504), statuses.count(200)) == (4, 4)
    assert outcomes(counted(app)) == {"left": 4, "dropped": 4}


def test_a_shadow_is_not_seen_and_is_compared(pair):
    app = app_of(pair, "shadow")
    (answer,) = ask(app, request(samples=2))
    (alone,) = ask(build_app(FixedModel(pair.served), serve_config()), request(samples=2))
    assert answer.headers["x-model-version"] == "1"
    assert answer.content == alone.content
    found = wait_for(app, "answered")
    assert value(found, "mm_shadow_seconds_count", version="2") == 1
    assert value(found, "mm_requests_total", operation="generate", status="200", version="2") == 0
    asked = Request({"sar": make_layer("sar")}, ("dem", "map"), samples=2, steps=1)
    ((one,), (other,)) = (s.generator.generate([asked]) for s in (pair.served, pair.challenger))
    apart = differences(one, other, MODALITIES)
    assert apart["dem"] > 0.1
    assert 0 < apart["map"] <= 1
    for name, distance in apart.items():
        labels = {"version": "2", "modality": name}
        assert value(found, "mm_shadow_difference_count", **labels) == 1
        assert value(found, "mm_shadow_difference_sum", **labels) == pytest.approx(distance, 1e-5)


def test_the_same_weights_do_not_differ():
    source = FixedModel(served("1"), challenger=served("2"))
    app = app_of(source, "shadow")
    ask(app, form({}, width=24, height=40, steps=1))  # of nothing observed, too
    found = wait_for(app, "answered")
    for name in NAMES:
        labels = {"version": "2", "modality": name}
        assert value(found, "mm_shadow_difference_count", **labels) == 1
        assert value(found, "mm_shadow_difference_sum", **labels) == 0


def test_differences_are_of_valid_pixels_alone_and_in_the_unit():
    height, width = GRID.shape
    valid = np.zeros((height, width), np.bool_)
    valid[:3] = True
    dem = np.zeros((2, 1, height, width), np.float32)
    other = dem + 5.0
    other[:, :, 3:] = np.nan
    codes = np.full((2, 1, height, width), 10, np.uint8)
    moved = codes.copy()
    moved[0, :, :3] = 30
    one = Result(GRID, {"dem": dem, "map": codes}, valid)
    found = differences(one, Result(GRID, {"dem": other, "map": moved}, valid), MODALITIES)
    assert found == {"dem": 5.0, "map": 0.5}


def test_a_shadow_gives_way_and_is_dropped_first(pair, monkeypatch):
    """While the champion is at work the shadow stands still, and only so much waits for it."""
    real, sampled = pair.challenger.generator.sample, []

    def seen(prepared, check):
        sampled.append(time.monotonic())
        return real(prepared, check)

    monkeypatch.setattr(pair.challenger.generator, "sample", seen)
    slow, finished = pair.served.generator.sample, []

    def slowly(*arguments):
        time.sleep(0.15)
        result = slow(*arguments)
        finished.append(time.monotonic())
        return result

    monkeypatch.setattr(pair.served.generator, "sample", slowly)
    app = app_of(pair, "shadow", max_batch=1)
    answers = ask(app, *map(request, IDS[:8]))
    assert {a.status_code for a in answers} == {200}
    found = wait_for(app, "dropped", 5)
    give_up = time.monotonic() + 120
    while sum(outcomes(found).values()) < 8:
        assert time.monotonic() < give_up, outcomes(found)
        found = counted(app)
    # One was in hand and two waited; the others found no room. None began before the last answer.
    assert outcomes(found) == {"dropped": 5, "answered": 3}
    assert len(sampled) == 3
    assert sampled[0] > max(finished)


@pytest.mark.parametrize("why", ["breaks", "knows less"])
def test_a_shadow_that_cannot_answer_harms_nobody(pair, why, monkeypatch):
    def broken(*_):
        raise MemoryError

    if why == "breaks":
        monkeypatch.setattr(pair.challenger.generator, "sample", broken)
    else:
        pair = FixedModel(pair.served, challenger=served("2", names=("rgb", "sar", "map")))
    app = app_of(pair, "shadow")
    for number in (1, 2):  # its thread outlives it
        (answer,) = ask(app, request())
        assert answer.status_code == 200
        wait_for(app, "failed" if why == "breaks" else "refused", number)


def test_nothing_is_repeated_once_the_endpoint_has_ended(pair):
    """A process that ends while a thread of it computes is aborted."""
    others = set(threading.enumerate())
    app = app_of(pair, "shadow")
    ask(app, *[request(f"slow-{k}", steps=64) for k in range(3)])
    (thread,) = (t for t in set(threading.enumerate()) - others if t.name == "challenger")

    async def end() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(end())
    assert not thread.is_alive()


def test_without_the_parameter_the_alias_is_nothing(pair):
    app = build_app(pair, serve_config())
    answers = ask(app, *map(request, IDS[:6]))
    assert {a.headers["x-model-version"] for a in answers} == {"1"}
    assert outcomes(counted(app)) == {}
