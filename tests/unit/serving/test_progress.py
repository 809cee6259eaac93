"""How far a request is: told while it is answered, to nobody but who asked."""

import asyncio
import threading

import httpx
import pytest
import torch
from serving_fixtures import form, geotiff, make_generator, make_layer, make_source, serve_config

from mm_model.generative.sampler import SCENE_STEPS, step_count
from mm_model.serving.access import KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app
from mm_model.serving.generator import Request


@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (3, 1), (2, 5)])
def test_the_share_grows_step_by_step_from_nothing_to_all_but_the_last(steps, samples):
    generator, told = make_generator(max_batch=2), []
    prepared = generator.prepare(
        Request({"sar": make_layer("sar")}, ("dem", "map"), samples=samples, steps=steps)
    )
    generator.sample([prepared], told.append)
    mask = torch.tensor([[False, True, False, False]])[:, :, None, None]  # as NAMES go
    work = step_count(generator.model, mask, ("dem", "map"), steps)
    assert work == steps * (1 if steps == 1 else 1 + SCENE_STEPS)  # one pass makes both
    batches = len(told) // work
    assert len(told) == batches * work
    assert told == pytest.approx([k / len(told) for k in range(len(told))])
    assert batches >= samples // 2


def test_a_request_tells_how_far_it_is_while_it_is_answered(monkeypatch):
    """Both of a patch and of what is written window by window; and to its own key alone."""
    source, (mine, line), (theirs, other) = (
        make_source(),
        *(new_key(name, frozenset({KeyScope.GENERATE})) for name in ("me", "them")),
    )
    keys = parse_keys(f"{line}\n{other}", "here")
    app = build_app(source, serve_config(), keys)
    at, seen = threading.Semaphore(0), threading.Semaphore(0)
    real = type(source.served.generator.model).decode

    def slowly(*arguments):
        seen.release()
        assert at.acquire(timeout=60)
        return real(*arguments)

    monkeypatch.setattr(type(source.served.generator.model), "decode", slowly)

    async def run(**fields):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def share(request_id="a/b", key=mine):
                headers = {"Authorization": f"Bearer {key}"}
                return await http.get(f"/v1/progress/{request_id}", headers=headers)

            method, path, more = form(
                {"sar": geotiff("sar")},
                {"X-Request-ID": "a/b", "Authorization": f"Bearer {mine}"},
                target="dem",
                **fields,
            )
            asked = asyncio.create_task(http.request(method, path, timeout=120, **more))
            shares = []
            while not asked.done():
                if seen.acquire(blocking=False):
                    answer = await share()
                    assert answer.status_code == 200
                    shares.append(answer.json()["share"])
                    assert (await share(key=theirs)).status_code == 404
                    assert (await share("other")).status_code == 404
                    at.release()
                await asyncio.sleep(0.01)
            assert (await asked).status_code == 200
            assert (await share()).status_code == 404
            return shares

    for fields in ({"steps": 3}, {"steps": 2, "samples": 2, "uncertainty": "true"}):
        shares = asyncio.run(run(**fields))
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] < 1
