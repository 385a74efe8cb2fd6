"""The page in a real browser, served by a process of its own as ``unicfg demo`` serves it."""

import base64
import html
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tiny import CAPTIONS, pipeline

from unicfg import Guidance

# gradio, httpx, which comes with it, and playwright are imported where they are needed: without the marker none is
pytestmark = pytest.mark.browser

FAMILIES = ["ar", "masked", "flow"]
# who starts the tests in the background of a shell has them, and what they start, ignore the interrupt that ends the page
SERVE = """
import signal, sys
from unicfg.demo.page import launch
signal.signal(signal.SIGINT, signal.default_int_handler)
launch(sys.argv[1], port=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def pipes():
    return {family: pipeline(family=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def server(pipes, tmp_path_factory):
    """Address, folder of weights and log of a page."""
    weights = tmp_path_factory.mktemp("weights") / "tiny"
    for pipe in pipes.values():
        pipe.save_pretrained(weights)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = weights.parent / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVE, str(weights), str(port)], stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 90
            while "the page is at" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            server = f"http://127.0.0.1:{port}/", weights, log
            yield server
            for number in range(5):
                join_queue(server, number)
            process.send_signal(signal.SIGINT)  # in the middle of a drawing, with others waiting
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("found neither chromium nor chromium-browser: these tests need one of them")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page that has drawn for the first time; it fails where anything is asked of another host, or breaks."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.on("request", lambda asked: wrong.append(asked.url) if is_abroad(asked, server) else None)
    page.on("response", lambda got: wrong.append(got.url) if got.status >= 400 else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    opened(page, server)
    yield page
    context.close()
    assert not wrong


def is_abroad(asked, server):
    return not asked.url.startswith((server[0], "data:", "blob:"))


def opened(page, server):
    page.goto(server[0])
    type_prompt(page, CAPTIONS[0])
    page.click("#draw")
    wait_until_drawn(page)
    return page


def wait_until_drawn(page):
    page.wait_for_function(
        "document.querySelector('#note')?.innerText.startsWith('drawn in') && "
        "[...document.querySelectorAll('.family')].every(card => card.dataset.finished === '1')",
        timeout=60_000,
    )


def wait_for_a_drawing(page, act):
    """Do something, and wait for the drawing that follows."""
    page.evaluate("document.querySelector('#note .note').innerText = 'not yet'")
    act()
    wait_until_drawn(page)


def sources(page, family):
    return page.locator(f".family[data-family={family}] img").evaluate_all(
        "images => images.map(image => image.src)"
    )


def shown(page, family):
    """The family's pictures as (32, 32, 3) or so: each pixel once."""
    return [small(source) for source in sources(page, family)]


def small(source, side=16):
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.width >= 256 and image.width % side == 0
        pixels = np.asarray(image.convert("RGB"))
    factor = pixels.shape[0] // side
    kept = pixels[::factor, ::factor]
    assert np.array_equal(kept.repeat(factor, 0).repeat(factor, 1), pixels)  # hard pixels
    return kept


def drawn(pipe, prompt, s, seed=0):
    return np.asarray(pipe([prompt], seeds=[seed], guidance=Guidance(s))[0])


def type_prompt(page, text):
    page.fill("#prompt textarea", text)


def move_s_to(page, s):
    """Drag the slider's knob with the mouse."""
    knob = page.locator("#s input[type=range]")
    box = knob.bounding_box()
    left, width, middle = box["x"] + 8, box["width"] - 16, box["y"] + box["height"] / 2
    now = float(knob.input_value())
    page.mouse.move(left + width * (now + 5) / 25, middle)
    page.mouse.down()
    page.mouse.move(left + width * (s + 5) / 25, middle, steps=3)
    page.mouse.up()


def current_s(page):
    return float(page.locator("#s input[type=range]").input_value())


def test_a_typed_prompt_is_drawn_and_moving_s_draws_another_picture(page, pipes):
    type_prompt(page, CAPTIONS[2])
    wait_for_a_drawing(page, lambda: page.click("#draw"))
    before = {family: shown(page, family) for family in FAMILIES}
    for family, pipe in pipes.items():
        expected = [drawn(pipe, CAPTIONS[2], s) for s in (1.0, 3.0)]
        assert np.array_equal(before[family], expected)
    wait_for_a_drawing(page, lambda: move_s_to(page, 12))
    s = current_s(page)
    assert 10 < s < 14
    for family, pipe in pipes.items():
        unguided, guided = shown(page, family)
        assert np.array_equal(unguided, before[family][0])
        assert np.array_equal(guided, drawn(pipe, CAPTIONS[2], s))
    assert not np.array_equal(before["ar"][1], shown(page, "ar")[1])
    assert f"s = {s:g}" in page.inner_text(".family[data-family=ar]")


def test_pictures_appear_as_they_are_made(page):
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => {
            for (const image of document.querySelectorAll(".family[data-family=ar] img")) window.seen.add(image.src);
        }).observe(document.querySelector(".cards"), {childList: true, subtree: true, attributes: true});
    }""")
    type_prompt(page, CAPTIONS[2])
    wait_for_a_drawing(page, lambda: page.press("#prompt textarea", "Enter"))
    assert len(page.evaluate("[...window.seen]")) >= 5
    assert set(sources(page, "ar")) <= set(page.evaluate("[...window.seen]"))


def test_the_code_is_the_call_that_draws_the_picture(page, server, tmp_path):
    type_prompt(page, CAPTIONS[1])
    wait_for_a_drawing(page, lambda: page.click("#draw"))
    page.locator("#as-code button").first.click()
    for family in ("ar", "flow"):
        page.locator("#code-family label", has_text=family).click()
        page.wait_for_function(
            f"document.querySelector('#code .cm-content').innerText.includes('family=\"{family}\"')"
        )
        lines = page.locator("#code .cm-content").inner_text()
        held = {}
        exec(lines, held)
        assert str(server[1]) in lines
        assert np.array_equal(np.asarray(held["images"][0]), shown(page, family)[1])


def test_a_click_on_an_earlier_drawing_brings_it_back(page):
    first = {family: sources(page, family) for family in FAMILIES}
    type_prompt(page, "<b>two</b> green stars")
    wait_for_a_drawing(page, lambda: page.click("#new-seed"))
    assert page.input_value("#seed input") != "0"
    # what a visitor types is text
    assert page.locator("#earlier button b").first.inner_text() == "<b>two</b> green stars"
    entry = page.locator("#earlier button", has_text=CAPTIONS[0])
    assert "s = 3, seed 0" in entry.inner_text()
    wait_for_a_drawing(page, entry.click)
    assert page.input_value("#prompt textarea") == CAPTIONS[0]
    assert page.input_value("#seed input") == "0"
    assert {family: sources(page, family) for family in FAMILIES} == first
    # it is the newest again, and not there twice
    names = page.locator("#earlier button b").all_inner_texts()
    assert names[0] == CAPTIONS[0] and len(names) == len(set(names)) == 2


def test_earlier_drawings_are_those_of_one_visitor(browser, page, server):
    type_prompt(page, "my secret tiger")
    wait_for_a_drawing(page, lambda: page.click("#draw"))
    other = browser.new_context()
    assert "secret" not in opened(other.new_page(), server).content()
    other.close()


def test_chosen_families_and_s_alone(page, pipes):
    wait_for_a_drawing(page, lambda: page.uncheck("#beside input"))
    wait_for_a_drawing(page, lambda: page.locator("#families label", has_text="masked").click())
    cards = page.locator(".family:visible").evaluate_all("all => all.map(c => c.dataset.family)")
    assert cards == ["ar", "flow"]
    assert len(sources(page, "ar")) == 1


def test_what_cannot_be_drawn_is_told_in_a_sentence(page, server):
    for prompt, message in (("   ", "The prompt is empty"), (None, "expected kl_scale")):
        if prompt is None:
            type_prompt(page, CAPTIONS[0])
            page.locator("#more button").first.click()
            page.fill("#logits input", "kl_scael")
            page.press("#logits input", "Enter")
        else:
            type_prompt(page, prompt)
            page.click("#draw")
        page.wait_for_function(
            f"document.querySelector('#note [role=alert]')?.innerText.includes({json.dumps(message)})"
        )
    assert "Traceback" not in page.content() and ".py" not in page.inner_text("#note")
    assert "Traceback" not in server[2].read_text()
    # and the page goes on
    page.fill("#logits input", "kl_scale")
    wait_for_a_drawing(page, lambda: page.press("#logits input", "Enter"))


def test_two_visitors_at_once(browser, page, server, pipes):
    context = browser.new_context()
    other = opened(context.new_page(), server)
    for own, prompt in ((page, CAPTIONS[0]), (other, CAPTIONS[3])):
        type_prompt(own, prompt)
        own.evaluate("document.querySelector('#note .note').innerText = 'not yet'")
    page.click("#draw")
    other.click("#draw")
    for own, prompt in ((page, CAPTIONS[0]), (other, CAPTIONS[3])):
        wait_until_drawn(own)
        for family, pipe in pipes.items():
            assert np.array_equal(shown(own, family)[1], drawn(pipe, prompt, 3.0))
    context.close()


def test_a_visitor_who_leaves_does_not_hold_up_the_others(browser, page, server):
    for _ in range(2):
        context = browser.new_context()
        leaving = opened(context.new_page(), server)
        leaving.click("#draw")
        leaving.wait_for_function("document.querySelector('#note').innerText.startsWith('drawing')")
        context.close()
    wait_for_a_drawing(page, lambda: page.click("#new-seed"))
    assert "Traceback" not in server[2].read_text()


def test_a_narrow_screen_has_nothing_beside_the_page(browser, server):
    context = browser.new_context(viewport={"width": 420, "height": 800})
    page = opened(context.new_page(), server)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    widths = page.locator(".family img").evaluate_all("all => all.map(i => i.clientWidth)")
    assert len(widths) == 6 and min(widths) > 100
    context.close()


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "file=/etc/passwd",
        "gradio_api/file/etc/passwd",
        "gradio_api/file%3D/etc/passwd",
        "gradio_api//file=/etc/passwd",
        "gradio_api/file=http://example.org/",
        "gradio_api/proxy=http://example.org/",
        "gradio_api/upload_progress?upload_id=x",
        "gradio_api/runs",
        "gradio_api/deep_link?session_hash=x",
    ],
)
def test_the_ways_to_files_are_closed(server, path):
    # this 404 is ours; gradio itself would say 403, and fetch what is on a public host
    assert raw(server, f"GET /{path} HTTP/1.1") == (404, "There is nothing here.\n")


@pytest.mark.parametrize(
    "path",
    [
        "static/../../../../../../etc/passwd",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "theme.css/../../etc/passwd",
        "monitoring",
    ],
)
def test_no_other_way_leads_to_files(server, path):
    status, body = raw(server, f"GET /{path} HTTP/1.1")
    assert status in (403, 404) and "root:" not in body


def raw(server, line, content=""):
    """Status and body of a request that no client has tidied."""
    host, port = server[0].removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port)), 20) as link:
        head = f"{line}\r\nHost: {host}:{port}\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        link.sendall((head + content).encode())
        answer = b"".join(iter(lambda: link.recv(65536), b"")).decode(errors="replace")
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


def test_no_file_is_taken(server):
    assert raw(server, "POST /gradio_api/upload HTTP/1.1", "x" * 100)[0] == 404


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address")
def test_it_listens_on_one_local_address_and_no_other(server):
    port = int(server[0].strip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):  # 0.0.0.0 would answer here too
        socket.create_connection(("127.0.0.2", port), 5)


def join_queue(server, number, changes=()):
    """Ask for a drawing as the page does, or with other values in places; returns the session to hear of it."""
    import httpx

    config = httpx.get(server[0] + "config").json()
    (button,) = [own["id"] for own in config["components"] if own["props"].get("elem_id") == "draw"]
    (drawing,) = [
        own["id"] for own in config["dependencies"] if [button, "click"] in own["targets"]
    ]
    session = uuid.uuid4().hex
    data = [f"prompt {number}", FAMILIES, 3.0, 0, 1, "", "", number, 1, False, "ar", None]
    for place, value in dict(changes).items():
        data[place] = value
    asked = {"data": data, "fn_index": drawing, "session_hash": session}
    httpx.post(server[0] + "gradio_api/queue/join", json=asked).raise_for_status()
    return session


def visit(server, number, changes=()):
    """All that a visitor hears of a drawing."""
    import httpx

    session, heard = join_queue(server, number, changes), []
    address, timeout = server[0] + "gradio_api/queue/data", httpx.Timeout(120)
    with httpx.stream("GET", address, params={"session_hash": session}, timeout=timeout) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                heard.append(json.loads(line[5:]))
                if heard[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return heard


def test_twenty_visitors_at_once_get_pictures_or_a_place_in_the_queue(server):
    with ThreadPoolExecutor(20) as pool:
        stories = list(pool.map(lambda number: visit(server, number), range(20)))
    places = set()
    for number, heard in enumerate(stories):
        assert heard[-1]["msg"] == "process_completed" and heard[-1]["success"], heard[-1]
        places |= {own["rank"] for own in heard if own["msg"] == "estimation"}
        assert "data:image/png" in json.dumps(heard)
        assert f"prompt {number}" in json.dumps(heard)
    assert max(places) >= 10  # they did wait for each other
    assert "Traceback" not in server[2].read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: None}, "The prompt is None, expected text."),
        ({1: {}}, "The families are {}, expected a tuple of names."),
        ({1: ""}, "expected a tuple of names."),
        ({5: ["kl_scale"]}, "mitigations is ['kl_scale'], expected text."),
        ({6: {"a": 1}}, "mitigations is {'a': 1}, expected text."),
        ({7: None}, "The seed is None, expected a whole number"),
        ({8: 1.5}, "The number of images is 1.5, expected a whole number"),
    ],
)
def test_whatever_is_posted_is_refused_in_a_sentence(server, changes, message):
    heard = visit(server, 0, changes)[-1]
    assert heard["msg"] == "process_completed" and heard["success"], heard
    assert message in html.unescape(json.dumps(heard))
    assert "Traceback" not in server[2].read_text()


@pytest.mark.parametrize(
    ("families", "message"),
    [([], "families is \\[\\]"), (["ar", "ar"], "none twice"), (["gan"], "family is 'gan'")],
)
def test_families_that_cannot_be_offered_are_refused(families, message):
    from unicfg.demo.page import launch

    with pytest.raises(ValueError, match=message):
        launch("shapes", families=families)
