"""What the page draws with: the same images as a plain call, frame by frame, whoever else is drawing."""

import ast
import asyncio
import html
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, FAMILIES, pipeline

from unicfg import Guidance
from unicfg.demo import cards
from unicfg.demo.drawing import (
    MITIGATIONS_LENGTH,
    MOST_IMAGES,
    MOST_SEED,
    PREVIEWS,
    PROMPT_LENGTH,
    Frame,
    Request,
    code,
    draw,
)
from unicfg.guidance import mitigations
from unicfg.guidance.schedules import interval
from unicfg.guidance.spelling import read_guidance

PIPES = {family: pipeline(family=family) for family in FAMILIES}
EVERY = Request(CAPTIONS[0], tuple(FAMILIES), seed=3, count=2)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def finished(request, pipes=PIPES):
    """The images of each family, by their last frames."""
    return {frame.family: pixels(frame.images) for frame in draw(pipes, request) if frame.finished}


def test_frames_lead_to_what_a_plain_call_draws():
    frames = list(draw(PIPES, EVERY))
    assert list(dict.fromkeys(frame.family for frame in frames)) == FAMILIES
    for family, pipe in PIPES.items():
        own = [frame for frame in frames if frame.family == family]
        shares = [frame.progress for frame in own]
        assert shares == sorted(set(shares)) and shares[-1] == 1.0 and 4 <= len(own) <= PREVIEWS
        assert [frame.finished for frame in own] == [False] * (len(own) - 1) + [True]
        assert all(len(frame.images) == 2 and frame.failure is None for frame in own)
        alone = pipe([CAPTIONS[0]] * 2, seeds=[3, 4], guidance=Guidance(3.0))
        assert np.array_equal(pixels(own[-1].images), pixels(alone))
        # what is on its way is another picture, and no two are alike at its start and its end
        assert not np.array_equal(pixels(own[0].images), pixels(own[-1].images))


def test_a_preview_is_what_the_sampler_has_at_that_step():
    seen = []
    pipe = PIPES["masked"]
    pipe(
        [CAPTIONS[0]],
        seeds=[0],
        guidance=Guidance(3.0),
        callback=lambda step: seen.append(pipe.preview(step)),
    )
    first = next(draw(PIPES, Request(CAPTIONS[0], ("masked",))))
    expected = ((seen[1][0] + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    assert first.progress == 2 / 16
    assert np.array_equal(pixels(first.images)[0], expected.permute(1, 2, 0).numpy())
    grey = (pixels(first.images)[0] == 128).all(-1)
    assert grey.mean() > 0.5  # 14 of 16 tokens are not drawn yet


def test_s_interval_and_mitigations_reach_the_sampler():
    request = Request(
        CAPTIONS[0],
        ("ar", "flow"),
        s=9.0,
        start=0.25,
        end=0.75,
        logits="kl_trust_region(0.3)",
        denoisers="tcfg + rescale(0.7)",
        seed=2,
    )
    within = interval(9.0, 0.25, 0.75)
    guidances = {
        "ar": Guidance(within, (mitigations.kl_trust_region(0.3),)),
        "flow": Guidance(within, (mitigations.tcfg(), mitigations.rescale(0.7))),
    }
    drawn = finished(request)
    for family, guidance in guidances.items():
        read = request.guidance(PIPES[family].space)
        assert (read.scale, read.mitigations) == (guidance.scale, guidance.mitigations)
        alone = PIPES[family]([CAPTIONS[0]], seeds=[2], guidance=guidance)
        assert np.array_equal(drawn[family], pixels(alone))
    for changes in ({"start": 0.0, "end": 1.0}, {"logits": "", "denoisers": ""}):
        other = finished(replace(request, **changes))
        assert all(not np.array_equal(drawn[family], other[family]) for family in drawn)


def test_requests_at_once_do_not_disturb_each_other():
    requests = [EVERY, replace(EVERY, prompt=CAPTIONS[2], s=6.0, seed=40, start=0.3)]
    alone = [finished(request) for request in requests]
    together = [draw(PIPES, request) for request in requests]
    drawn = [{}, {}]
    running = {0, 1}
    while running:
        for k in list(running):
            frame = next(together[k], None)
            if frame is None:
                running.remove(k)
            elif frame.finished:
                drawn[k][frame.family] = pixels(frame.images)
    for one, other in zip(alone, drawn, strict=True):
        assert one.keys() == other.keys() == set(FAMILIES)
        assert all(np.array_equal(one[family], other[family]) for family in FAMILIES)


def test_no_random_state_is_touched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    list(draw(PIPES, replace(EVERY, count=1)))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


class Counted:
    """A pipeline that counts its steps, and waits for leave before each but the first two."""

    def __init__(self, pipe):
        self.pipe, self.family, self.space = pipe, pipe.family, pipe.space
        self.steps, self.leave = 0, threading.Event()

    def num_steps(self):
        return self.pipe.num_steps()

    def preview(self, step):
        return self.pipe.preview(step)

    def __call__(self, prompts, *, callback, **named):
        def counted(step):
            self.steps += 1
            callback(step)
            if self.steps >= 2:
                assert self.leave.wait(20)

        return self.pipe(prompts, callback=counted, **named)


def samplers():
    return [thread for thread in threading.enumerate() if thread.name == "unicfg-demo"]


def test_nobody_waiting_stops_the_sampler():
    slow, never = Counted(PIPES["ar"]), Counted(PIPES["flow"])
    frames = draw({"ar": slow, "flow": never}, Request(CAPTIONS[0], ("ar", "flow")))
    assert next(frames).progress == 2 / 16
    (thread,) = samplers()
    frames.close()
    slow.leave.set()
    thread.join(20)
    assert not thread.is_alive() and slow.steps == 3 and never.steps == 0


def test_no_thread_is_started_before_the_first_frame_is_wanted_and_none_is_left():
    frames = draw(PIPES, replace(EVERY, families=("ar",)))
    assert not samplers()
    frames.close()
    list(draw(PIPES, replace(EVERY, families=("ar",))))
    until = time.monotonic() + 10
    while samplers() and time.monotonic() < until:
        time.sleep(0.01)
    assert not samplers()


class Broken(Counted):
    """A pipeline that fails at its third step."""

    def __init__(self, pipe, error):
        super().__init__(pipe)
        self.error = error

    def __call__(self, prompts, *, callback, **named):
        def broken(step):
            callback(step)
            if step.index == 2:
                raise self.error

        return self.pipe(prompts, callback=broken, **named)


def test_what_fails_says_so_in_its_place_and_the_others_go_on(caplog):
    pipes = PIPES | {
        "masked": Broken(PIPES["masked"], FloatingPointError("the logits are not finite")),
        "flow": Broken(PIPES["flow"], RuntimeError("/home/someone/secret.py, line 3")),
    }
    last = {frame.family: frame for frame in draw(pipes, EVERY) if frame.finished}
    assert last["masked"].failure == "the logits are not finite" and not last["masked"].images
    # what a visitor can do nothing about is for the log
    assert "log" in last["flow"].failure and "secret" not in last["flow"].failure
    assert "secret.py" in caplog.text and "logits are not finite" not in caplog.text
    plain = finished(EVERY)
    for family in ("ar", "diffusion", "hybrid"):
        assert np.array_equal(pixels(last[family].images), plain[family])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "The prompt is None, expected text"),
        ({"prompt": ["a circle"]}, r"The prompt is \['a circle'\], expected text"),
        ({"prompt": ["x" * 1000]}, r"The prompt is \['x+\.\.\.x+'\], expected text"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "x" * (PROMPT_LENGTH + 1)}, "has 301 characters, expected at most 300"),
        ({"prompt": "a \ud800"}, "half a character"),
        ({"families": None}, "families are None, expected a tuple of names"),
        ({"families": "ar"}, "families are 'ar', expected a tuple"),
        ({"families": {"ar": 1}}, "families are {'ar': 1}, expected a tuple"),
        ({"families": ("ar", 5)}, r"families are \('ar', 5\), expected a tuple of names"),
        ({"families": ("ar", ["ar"])}, "expected a tuple of names"),
        ({"families": ()}, "families are none"),
        ({"families": ("ar", "ar")}, "none twice"),
        ({"families": ("gan",)}, "The family is gan, expected one of ar, masked"),
        ({"s": 50.5}, "s is 50.5, expected a number from -20 to 50"),
        ({"s": -21.0}, "s is -21.0"),
        ({"s": float("nan")}, "s is nan"),
        ({"s": None}, "s is None"),
        ({"s": "3"}, "s is '3', expected a number"),
        ({"s": [3.0]}, r"s is \[3.0\], expected a number"),
        ({"start": -0.1}, "start of the interval is -0.1"),
        ({"end": 1.1}, "end of the interval is 1.1"),
        ({"start": 0.7, "end": 0.3}, "starts at 0.7 and ends at 0.3"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"seed": MOST_SEED + 1}, "seed is 4294967296"),
        ({"seed": None}, "seed is None"),
        ({"seed": True}, "seed is True"),
        ({"seed": 3.0}, "seed is 3.0, expected a whole number"),
        ({"seed": {"a": "x" * 1000}}, r"seed is \{'a': 'x+\.\.\.x+'\}, expected"),
        ({"start": "0"}, "start of the interval is '0'"),
        ({"end": None}, "end of the interval is None"),
        ({"count": 0}, "images is 0, expected a whole number from 1 to 4"),
        ({"count": MOST_IMAGES + 1}, "images is 5"),
        ({"count": 1.5}, "images is 1.5"),
        ({"logits": "kl_scale" + " " * MITIGATIONS_LENGTH}, "have 208 characters"),
        ({"logits": None}, "mitigations is None, expected text"),
        ({"denoisers": ["rescale(0.7)"]}, r"mitigations is \['rescale\(0.7\)'\], expected text"),
        ({"denoisers": 5}, "mitigations is 5, expected text"),
        ({"logits": "kl_scael"}, "expected kl_scale"),
        ({"logits": "rescale(0.7)"}, "works on v"),
        ({"denoisers": "kl_scale"}, "works on logits"),
        ({"denoisers": "__import__('os').getcwd()"}, "mitigations"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_drawn(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(PIPES, replace(EVERY, **changes))
    assert not samplers()


wrong = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=3) | st.text(),
    lambda own: st.lists(own, max_size=2) | st.dictionaries(st.text(max_size=2), own, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([own.name for own in fields(Request)]), wrong, min_size=1))
@settings(max_examples=300)
def test_whatever_is_asked_for_is_refused_in_text_or_can_be_shown(changes):
    request = replace(EVERY, **changes)
    try:
        request.check()
    except ValueError as error:
        str(error).encode()  # half a character could not be sent
        assert str(error).endswith(".") and len(str(error)) < 300
    else:
        assert cards.strip([cards.Entry(request, ())])


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "x" * PROMPT_LENGTH},
        {"prompt": "</script> 🐯 \x00"},
        {"s": 50},
        {"s": -20.0},
        {"start": 0.5, "end": 0.5},
        {"seed": MOST_SEED},
        {"count": MOST_IMAGES},
    ],
)
def test_the_limits_themselves_are_drawn(changes):
    request = replace(EVERY, families=("masked",), **changes)
    assert len(finished(request)["masked"]) == request.count


def test_the_mitigations_of_families_that_are_not_drawn_are_not_asked_for():
    assert finished(Request(CAPTIONS[0], ("ar",), denoisers="kl_scale")).keys() == {"ar"}


def test_which_mitigations_fit_is_for_the_pipeline_to_say_and_not_for_its_name():
    pipes = {"tokens": PIPES["ar"], "latents": PIPES["diffusion"]}
    request = Request(CAPTIONS[0], tuple(pipes), logits="kl_scale", denoisers="rescale(0.7)")
    drawn = finished(request, pipes)
    assert drawn.keys() == {"ar", "diffusion"}
    for family, text in (("ar", "kl_scale"), ("diffusion", "rescale(0.7)")):
        guidance = read_guidance("3.0", 3.0, text)
        alone = PIPES[family]([CAPTIONS[0]], seeds=[0], guidance=guidance)
        assert np.array_equal(drawn[family], pixels(alone))
        assert text in code(request, "tiny", PIPES[family])
    for changes in ({"logits": "rescale(0.7)"}, {"denoisers": "kl_scale"}):
        with pytest.raises(ValueError, match="works on"):
            draw(pipes, replace(request, **changes))


def run_code(lines, tmp_path):
    """Run code where the weights "tiny" are a folder; returns what it calls ``images``."""
    held = {}
    exec(compile(lines, str(tmp_path / "call.py"), "exec"), held)
    return pixels(held["images"])


@pytest.mark.parametrize("family", ["ar", "flow"])
def test_the_code_draws_the_same_images(family, tmp_path, monkeypatch):
    PIPES[family].save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    plain = Request(CAPTIONS[0], (family,))
    full = replace(
        plain,
        prompt='a "red"\\ circle\n\u2028 in 3d',
        s=7.5,
        start=0.2,
        end=0.8,
        logits="kl_trust_region(0.3) + kl_scale",
        denoisers="apg(0, inf, -0.5)",
        seed=11,
        count=3,
    )
    for request in (plain, full):
        lines = code(request, "tiny", PIPES[family])
        assert np.array_equal(run_code(lines, tmp_path), finished(request)[family])
    assert code(plain, "tiny", PIPES[family]) == (
        "from models import TextToImage\nfrom unicfg import Guidance\n\nguidance = Guidance(3.0)\n"
        f'pipe = TextToImage.from_pretrained("tiny", family="{family}")\n'
        'prompts = ["a red circle"]\nimages = pipe(prompts, seeds=[0], guidance=guidance)\n'
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@settings(max_examples=200)
def test_a_prompt_in_the_code_is_that_prompt_and_nothing_else(prompt):
    tree = ast.parse(code(Request(prompt, ("ar",)), "shapes", PIPES["ar"]))
    (assigned,) = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "prompts"
    ]
    assert ast.literal_eval(assigned.value) == [prompt] and len(tree.body) == 6


def test_cards_show_hard_pixels_and_text_as_text():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    big = pixels([cards.enlarged(image)])[0]
    assert big.shape == (256, 256, 3)
    assert np.array_equal(big[::64, ::64], pixels([image])[0])
    assert (big[:64, :64] == big[0, 0]).all()
    assert cards.enlarged(Image.new("RGB", (512, 300))).size == (512, 300)
    frames = {1.0: Frame("ar", (image,), 0.5), 3.0: Frame("ar", (), 1.0, True, "<i>NaN</i> & so")}
    shown = cards.card("ar", 1, frames)
    assert "&lt;i&gt;NaN&lt;/i&gt; &amp; so" in shown and "<i>" not in shown
    assert 'value="0.750"' in shown and 'data-finished="0"' in shown
    assert shown.index("s = 1") < shown.index("s = 3") and shown.count("<img") == 1
    entry = cards.Entry(replace(EVERY, prompt='<img src="x" onerror="y">', logits="kl_scale"), ())
    assert "<img" not in cards.strip([entry]) and "kl_scale" in cards.strip([entry])


def test_the_program_can_end_in_the_middle_of_a_drawing():
    script = (
        "import test_demo as own\n"
        "frames = own.draw(own.PIPES, own.replace(own.EVERY, count=4))\nnext(frames)\nprint('begun')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")


def test_drawing_needs_no_gradio_and_the_page_says_what_to_install():
    script = (
        "import sys; sys.modules['gradio'] = None\nimport unicfg.demo.drawing\n"
        "try:\n    import unicfg.demo.page\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'unicfg[demo]'" in done.stdout, done.stderr


async def ask_gate(gate, method, path, *, body=b"", headers=((b"host", b"127.0.0.1:1"),)):
    """Status and body of what a gate, or the application behind it, answers; and how many parts of a body it took."""
    scope = {"type": "http", "method": method, "path": path, "query_string": b"session_hash=a"}
    scope["headers"] = list(headers)
    parts = [body[at : at + 10_000] for at in range(0, len(body), 10_000)] or [b""]
    taken, sent = 0, []

    async def receive():
        nonlocal taken
        taken += 1
        more = taken < len(parts)
        return {"type": "http.request", "body": parts[taken - 1], "more_body": more}

    async def send(message):
        sent.append(message)

    await gate(scope, receive, send)
    status = sent[0]["status"]
    return status, b"".join(own.get("body", b"") for own in sent), taken


async def behind(scope, receive, send):
    """An application that says what has reached it."""
    body = b""
    if scope["method"] == "POST":
        body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body or scope["query_string"]})


def asked(gate, method, path, **named):
    return asyncio.run(ask_gate(gate, method, path, **named))


def a_gate(names=("127.0.0.1",), audience=None):
    from unicfg.demo.gate import Audience, Gate

    return Gate(behind, {0: 2, 3: 0}, audience or Audience(), names)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/config"),
        ("GET", "/theme.css"),
        ("GET", "/assets/index-a_b.C1.js"),
        ("GET", "/static/fonts/a/b@2.woff2"),
        ("GET", "/gradio_api/heartbeat/abc123"),
    ],
)
def test_the_gate_lets_in_what_the_page_asks_for_without_its_question(method, path):
    assert asked(a_gate(), method, path)[:2] == (200, b"")


def test_the_gate_lets_a_listener_in_with_its_session():
    assert asked(a_gate(), "GET", "/gradio_api/queue/data")[:2] == (200, b"session_hash=a")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("OPTIONS", "/"),
        ("GET", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/call/show"),
        ("POST", "/gradio_api/run/show"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/heartbeat/" + "a" * 65),
        ("GET", "/gradio_api/heartbeat/a/b"),
        ("GET", "/static/../page.py"),
        ("GET", "/assets/a/../../b"),
        ("GET", "/assets/a\n"),
        ("GET", "//"),
        ("GET", "/monitoring"),
        ("GET", "/openapi.json"),
        ("POST", "/login"),
    ],
)
def test_the_gate_is_closed_to_all_else(method, path):
    assert asked(a_gate(), method, path)[:2] == (404, b"There is nothing here.\n")


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_the_gate_hands_on_the_bodies_of_the_page(path):
    body = json.dumps({"fn_index": 0, "data": ["x" * 30_000, None]}).encode()
    assert asked(a_gate(), "POST", path, body=body)[:2] == (200, body)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not one of the page's"),
        (b"\xff", 400, "not one of the page's"),
        (b"[]", 400, "not one of the page's"),
        (b"[" * 60_000, 400, "not one of the page's"),
        (b'{"data": []}', 400, "not one of the page's"),
        (b'{"fn_index": 0}', 400, "not one of the page's"),
        (b'{"fn_index": [0], "data": []}', 400, "not one of the page's"),
        (b'{"fn_index": 0, "data": null}', 400, "not one of the page's"),
        (b'{"fn_index": 3, "data": ' + b"1" * 5000 + b"}", 400, "not one of the page's"),
        (b'{"fn_index": -1, "data": []}', 400, "no function -1 of 0 values"),
        (b'{"fn_index": 0, "data": [1]}', 400, "no function 0 of 1 values"),
        (b'{"fn_index": "' + b"x" * 5000 + b'", "data": []}', 400, "no function 'xxxxxxx"),
        (b'"' + b"x" * 65_536, 413, "more than 65536 bytes"),
    ],
)
def test_the_gate_refuses_odd_bodies_in_a_sentence(body, status, message):
    answered, text, _ = asked(a_gate(), "POST", "/gradio_api/queue/join", body=body)
    assert answered == status and message in text.decode() and len(text) < 100


@pytest.mark.parametrize("leaves", [False, True])
def test_who_leaves_while_he_asks_is_not_asked_for_and_who_leaves_later_is_known_to_have_left(
    leaves,
):
    """The first part of the body is already a whole question."""
    body, heard, sent = json.dumps({"fn_index": 3, "data": []}).encode(), [], []
    parts = [{"type": "http.request", "body": body, "more_body": leaves}]

    async def receive():
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def application(scope, receive, send):
        heard.extend([await receive() for _ in range(2)])

    async def send(message):
        sent.append(message)

    gate = a_gate()
    gate.app = application
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gradio_api/queue/join",
        "query_string": b"",
    }
    asyncio.run(gate(scope | {"headers": [(b"host", b"127.0.0.1")]}, receive, send))
    assert [own["type"] for own in heard] == ([] if leaves else ["http.request", "http.disconnect"])
    assert bool(sent) == leaves


def test_the_longest_body_is_read_to_its_end():
    body = json.dumps({"fn_index": 0, "data": ["", ""]}).encode().ljust(65_536)
    assert asked(a_gate(), "POST", "/gradio_api/queue/join", body=body)[0] == 200


def test_the_gate_does_not_read_a_long_body_to_its_end():
    assert asked(a_gate(), "POST", "/gradio_api/queue/join", body=b"x" * 10**6)[2] == 7


HOST = "demo.example.org"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "rebound.example:7860"}, 403),
        ({"host": "127.0.0.1.rebound.example"}, 403),
        ({"host": "127.0.0.1:7860@rebound.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({}, 403),
        ({"host": "127.0.0.1", "origin": "http://other.example"}, 403),
        ({"host": "127.0.0.1", "origin": "null"}, 403),
        ({"host": "127.0.0.1", "origin": ""}, 403),
    ],
)
def test_a_local_page_answers_to_its_own_names_and_pages(headers, status):
    assert asked_as(page_names("127.0.0.1", ()), headers) == status
    assert asked_as(page_names("127.0.0.1", [HOST]), headers) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": HOST}, 200),
        ({"host": HOST, "origin": f"https://{HOST}"}, 200),
        ({"host": "Demo.Example.Org:8443", "origin": f"https://{HOST}:8443"}, 200),
        ({"host": "127.0.0.1:7860", "origin": f"https://{HOST}"}, 200),  # a tunnel keeps the origin
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": HOST, "origin": "https://other.example"}, 403),
        ({"host": "other.example", "origin": f"https://{HOST}"}, 403),
        ({"host": f"{HOST}.other.example"}, 403),
        ({"host": "other.example", "origin": "https://other.example"}, 403),
    ],
)
def test_a_page_behind_a_proxy_answers_to_the_names_that_it_is_given(headers, status):
    for host in ("127.0.0.1", "0.0.0.0", "192.168.1.5"):
        assert asked_as(page_names(host, ["a.example", "DEMO.example.org"]), headers) == status
    assert status == 403 or asked_as(page_names("127.0.0.1", ()), headers) == (
        403 if HOST in str(headers).lower() else 200
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "any.example"}, 200),
        ({"host": "any.example:7860", "origin": "http://any.example:7860"}, 200),
        ({"host": "ANY.example", "origin": "https://any.example"}, 200),
        ({"host": "[fd00::1]:7860", "origin": "http://[fd00::1]:7860"}, 200),
        ({"host": "any.example", "origin": "http://evil.example"}, 403),
        ({"host": "any.example", "origin": "http://any.example.evil.example"}, 403),
        ({"host": "any.example", "origin": "null"}, 403),
        ({"host": "any.example", "origin": ""}, 403),
        ({"host": "", "origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "any.example", "origin": "http://[::1"}, 403),
    ],
)
def test_a_page_for_everyone_still_answers_to_its_own_pages_only(headers, status):
    assert asked_as(page_names("0.0.0.0", ()), headers) == status


def page_names(host, others):
    from unicfg.demo import gate

    return gate.page_names(host, others)


def asked_as(names, headers):
    """The status of a page that has these names, for what it can be asked with GET and with POST."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    body = json.dumps({"fn_index": 3, "data": []}).encode()
    got, text, _ = asked(a_gate(names), "GET", "/", headers=raw)
    posted = asked(a_gate(names), "POST", "/gradio_api/queue/join", headers=raw, body=body)
    assert posted[0] == got and (got == 200 or text == posted[1])
    assert got == 200 or b"unicfg demo --name HOST" in text
    return got


def test_which_hosts_are_local():
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert host in page_names(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.5", "box.example"):
        assert page_names(host, ()) is None
        assert host in page_names(host, [HOST])


@pytest.mark.parametrize(
    "name", ["", "https://a.example", "a.example:80", "a.example/", "*", "a..b"]
)
def test_what_is_no_name_of_a_host_is_refused(name):
    with pytest.raises(ValueError, match=r"expected that of a host, such as demo\.example\.org"):
        page_names("127.0.0.1", [HOST, name])


def test_a_listener_is_let_go_where_the_session_is_unknown_and_all_else_goes_on_to_the_log():
    from starlette.exceptions import HTTPException

    from unicfg.demo.gate import Audience, Gate

    async def broken(scope, receive, send):
        await behind(scope, receive, send)
        raise RuntimeError("response already started") from cause

    for cause in (HTTPException(404), ValueError("a bug"), None):
        audience = Audience()
        gate = Gate(broken, {}, audience, None)
        if isinstance(cause, HTTPException):
            assert asked(gate, "GET", "/gradio_api/queue/data")[0] == 200
        else:
            with pytest.raises(RuntimeError, match="already started"):
                asked(gate, "GET", "/gradio_api/queue/data")
        assert not audience.listens("a")


def test_the_gate_takes_no_websockets():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(a_gate()({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close"}]


def test_the_server_itself_begins_and_ends_through_the_gate():
    passed, gate = [], a_gate()

    async def application(scope, receive, send):
        passed.append((scope, receive, send))

    gate.app = application
    asyncio.run(gate({"type": "lifespan"}, asked, drawer))
    assert passed == [({"type": "lifespan"}, asked, drawer)]


def test_the_gate_says_who_listens_and_who_takes_nothing(monkeypatch):
    from unicfg.demo import gate

    audience, heard, now = gate.Audience(), [], 0.0
    monkeypatch.setattr(gate.time, "monotonic", lambda: now)

    async def stream(scope, receive, send):
        heard.append(audience.listens("a"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        heard.append(audience.listens("a"))

    async def slow(message):
        nonlocal now
        if message["type"] == "http.response.body":
            now += gate.PATIENCE - 1
            heard.append(audience.listens("a"))
            now += 2
            heard.append(audience.listens("a"))

    own = gate.Gate(stream, {}, audience, None)
    scope = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data", "headers": []}
    asyncio.run(own(scope | {"query_string": b"session_hash=a"}, None, slow))
    assert heard == [True, True, False, True]
    assert not audience.listens("a") and not audience.listens(None)


def test_an_audience_can_be_waited_for():
    from unicfg.demo.gate import Audience

    audience, first, second = Audience(), object(), object()
    assert not audience.await_listener("a", 0.01)
    threading.Timer(0.05, audience.note, ("a", first, float("inf"))).start()
    began = time.monotonic()
    assert audience.await_listener("a", 20) and not audience.listens("b")
    assert time.monotonic() - began < 10
    # a page that is opened again is heard before the old connection, which takes nothing any more, has ended
    audience.note("a", first, -float("inf"))
    assert not audience.listens("a")
    audience.note("a", second, float("inf"))
    assert audience.listens("a")
    audience.note("a", first, None)
    assert audience.listens("a")
    audience.note("a", second, None)
    assert not audience.listens("a") and not audience._streams  # nothing is kept of who has left


def drawer(audience):
    """The page's drawing function with one family, and what its outputs are called."""
    from unicfg.demo.page import Results, _drawer

    results = Results("note", {"ar": "card"}, "family", "code", "strip", "earlier")
    return _drawer({"ar": PIPES["ar"]}, "tiny", results, audience)


class Visit:
    session_hash = "a"


VALUES = [CAPTIONS[0], ["ar"], 3.0, 0, 1, "", "", 0, 1, False, "ar", []]


def test_nothing_is_drawn_for_nobody(monkeypatch):
    from unicfg.demo import page
    from unicfg.demo.gate import Audience

    monkeypatch.setattr(page, "GRACE", 0.01)
    updates = list(drawer(Audience())(Visit(), *VALUES))
    assert len(updates) == 2 and "Nobody listened" in updates[-1]["note"]
    assert not samplers()


def test_a_drawing_ends_when_nobody_listens_any_more():
    from unicfg.demo.gate import Audience

    audience, visitor = Audience(), object()
    audience.note("a", visitor, float("inf"))
    updates = drawer(audience)(Visit(), *VALUES)
    assert "drawing" in next(updates)["note"] and "img" in next(updates)["card"]
    audience.note("a", visitor, None)
    # the connection may recover: what is left to say is why there are no more pictures
    (last,) = updates
    assert last.keys() == {"note"} and "The connection was too slow" in last["note"]
    assert 'role="alert"' in last["note"]
    audience.note("a", visitor, float("inf"))
    assert "drawn in" in list(drawer(audience)(Visit(), *VALUES))[-1]["note"]


def heard():
    from unicfg.demo.gate import Audience

    audience = Audience()
    audience.note("a", object(), float("inf"))
    return audience


def test_what_was_asked_for_is_drawn_first_and_what_it_is_compared_with_after():
    values = [*VALUES[:9], True, "ar", []]
    *updates, last = drawer(heard())(Visit(), *values)
    notes = dict.fromkeys(own["note"] for own in updates)
    assert list(notes) == [
        cards.note(text) for text in ("drawing", "drawing ar at s = 3", "drawing ar at s = 1")
    ]
    columns = updates[-1]["card"].split("<figcaption>")
    assert "s = 1<" in columns[1] and "s = 3<" in columns[2]
    pictures = [column.split('src="')[1].split('"')[0] for column in columns[:2]]
    assert pictures[0] != pictures[1]
    (entry,) = last["earlier"]
    drawn = finished(Request(CAPTIONS[0], ("ar",)))["ar"]
    assert np.array_equal(pixels(entry.pictures), drawn)  # that of s = 3, not of s = 1
    values[2] = 1  # there is nothing to compare it with
    assert len(list(drawer(heard())(Visit(), *values))) == len(updates) - PREVIEWS + 1


def test_the_last_drawings_are_kept_newest_first_and_each_once():
    from unicfg.demo.page import EARLIER

    draw_next, earlier = drawer(heard()), []
    for prompt in [*(f"{number} circles " for number in range(EARLIER + 1)), "5 circles"]:
        values = [prompt, ["ar"], 3.0, 0, 1, None, None, 0, 1, False, "ar", earlier]
        earlier = list(draw_next(Visit(), *values))[-1]["earlier"]
    kept = [5, 12, 11, 10, 9, 8, 7, 6, 4, 3, 2, 1]
    assert [entry.request.prompt for entry in earlier] == [f"{number} circles" for number in kept]


def test_a_click_brings_the_settings_of_an_earlier_drawing_back_and_an_odd_one_nothing():
    from types import SimpleNamespace

    from unicfg.demo.page import _settings_of, _speaker

    old, new = (cards.Entry(replace(EVERY, seed=seed), ()) for seed in (1, 2))

    def settings_of(number):
        return _settings_of([new, old], SimpleNamespace(index=number))

    assert settings_of(1) == [CAPTIONS[0], FAMILIES, 3.0, 0.0, 1.0, "", "", 1, 2]
    for odd in (2, -1, "1", None, [0], {}):
        assert CAPTIONS[0] not in settings_of(odd) and len(settings_of(odd)) == 9
    assert _speaker(PIPES, "tiny")("ar", []) != ""  # nothing was drawn: what stands there stays


def test_any_family_can_be_chosen_whatever_was_drawn():
    from unicfg.demo.gate import Audience
    from unicfg.demo.page import _speaker

    audience = Audience()
    audience.note("a", object(), float("inf"))
    last = list(drawer(audience)(Visit(), *VALUES[:-2], "flow", []))[-1]
    # another drawing of the same visitor may wait in the queue, and names a family that this one is without:
    # gradio would refuse it, had this one narrowed the choice
    assert last["family"] == "ar"
    speak = _speaker({name: PIPES[name] for name in ("ar", "flow")}, "tiny")
    assert speak("ar", last["earlier"]) == last["code"]
    assert speak("flow", last["earlier"]) == "# the newest drawing is without flow\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A page that a proxy reaches as ``HOST``: a client, and a function that asks for a drawing and hears the end."""
    import httpx

    weights = tmp_path_factory.mktemp("weights") / "tiny"
    PIPES["ar"].save_pretrained(weights)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = weights.parent / "log.txt"
    serve = [sys.executable, "-u", "-c", "from unicfg.cli import main; main()", "demo"]
    serve += ["--weights", weights, "--port", str(port), "--name", HOST, "--name", "b.example"]
    with (
        log.open("w") as out,
        subprocess.Popen(serve, stdout=out, stderr=out) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/") as client,
    ):
        try:
            until = time.monotonic() + 90
            while "the page is at" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            parts = client.get("config").json()
            (draw,) = [c["id"] for c in parts["components"] if c["props"].get("elem_id") == "draw"]
            (drawing,) = [d["id"] for d in parts["dependencies"] if [draw, "click"] in d["targets"]]

            def ask(values, headers=None):
                session = {"session_hash": "a"}
                body = {"data": values, "fn_index": drawing} | session
                asked = client.post("gradio_api/queue/join", json=body, headers=headers)
                if asked.status_code != 200:
                    return asked.text
                answer = client.get("gradio_api/queue/data", params=session, headers=headers)
                events = [json.loads(line[5:]) for line in answer.text.splitlines() if line]
                (end,) = [own for own in events if own["msg"] == "process_completed"]
                assert end["success"], end
                return html.unescape(end["output"]["data"][0])

            yield client, ask
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()


def test_the_page_as_it_is_served(served):
    client, ask = served
    parts = client.get("config").json()
    assert not any(parts[own] for own in ("show_error", "analytics_enabled", "run_history", "pwa"))
    assert "drawn in" in ask(VALUES)
    assert "drawn in" in ask(VALUES, {"host": HOST, "origin": f"https://{HOST}"})
    assert "is not served as this host" in ask(VALUES, {"origin": "http://evil.example"})
    unknown = client.get("gradio_api/queue/data", params={"session_hash": "b"})
    assert unknown.status_code == 200 and "session_not_found" in unknown.text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, {"a": 1}, "The prompt is {"),
        (1, 5, "The families are 5"),
        (1, [["ar"]], "expected a tuple of names"),
        (1, ["gan"], "The family is gan, expected one of ar"),
        (2, "3", "expected a number from -20 to 50"),
        (3, [], "The start of the interval is []"),
        (4, None, "The end of the interval is None"),
        (5, ["kl_scale"], "The text of the mitigations is ["),
        (7, "x", "expected a whole number"),
        (8, {}, "The number of images is {}"),
        (9, [], "drawn in"),
        (10, {"a": 1}, "drawn in"),
    ],
)
def test_values_of_any_type_get_a_sentence_from_the_page(served, place, value, message):
    text = served[1]([*VALUES[:place], value, *VALUES[place + 1 :]])
    assert message in text and ('role="alert"' in text) == (message != "drawn in")
