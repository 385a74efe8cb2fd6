"""Twenty visitors at once for two minutes, as impatient and as forgetful as people are, at a server of its own."""

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import CAPTIONS, pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

VISITORS = 20
SECONDS = 120
FAMILIES = ["ar", "masked", "flow"]
SERVE = (
    "import sys; from unicfg.demo.page import launch; launch(sys.argv[1], port=int(sys.argv[2]))"
)
ODD = ["", "\x00\x1b[31m", "</script>", "🐯" * 50, "x" * 301, "\u202e", "a\n\nb"]
FULL = r"Queue is full\. Max size is \d+ and size is \d+\."  # the page says that it is busy
MITIGATIONS = ["", "", "kl_scale", "kl_trust_region(0.3)", "kl_scael", "project_logits"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address, process and log of a page."""
    weights = tmp_path_factory.mktemp("weights") / "tiny"
    for family in FAMILIES:
        pipeline(family=family).save_pretrained(weights)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = weights.parent / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVE, str(weights), str(port)], stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 120
            while "the page is at" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/", process, log
        finally:
            process.kill()
            process.wait()


def memory(process):
    """Megabytes that a process holds."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (size,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return size / 1024


class Story:
    """What all visitors lived through."""

    def __init__(self):
        self.counts, self.seconds, self.wrong = Counter(), [], []
        self.lock = threading.Lock()

    def add(self, what, seconds=None, wrong=None):
        with self.lock:
            self.counts[what] += 1
            if seconds is not None:
                self.seconds.append(seconds)
            if wrong is not None:
                self.wrong.append(wrong)


class Visitor:
    """One of them: asks, waits or leaves, and asks again until the time is up."""

    def __init__(self, number, address, drawing, story):
        import httpx

        self.rng, self.drawing, self.story = random.Random(number), drawing, story
        self.client = httpx.Client(base_url=address, timeout=httpx.Timeout(120))

    def visit_until(self, until):
        while time.monotonic() < until:
            session, began = uuid.uuid4().hex, time.monotonic()
            # the impatient click many times
            clicks = self.rng.choice([1, 1, 1, 1, 1, 8])
            events = [self.ask(session, self.wish()) for _ in range(clicks)]
            events = {event for event in events if event is not None}
            if not events:
                time.sleep(self.rng.uniform(0.5, 2))  # the queue is full
            elif self.rng.random() < 0.1:
                self.story.add("left before listening")
            else:
                leaves_after = self.rng.choice([None, None, None, self.rng.randrange(1, 12)])
                self.listen(session, events, leaves_after, began)

    def wish(self):
        """Values of the controls, odd ones among them."""
        rng = self.rng
        start, end = sorted([rng.random(), rng.random()]) if rng.random() < 0.3 else (0, 1)
        prompt = rng.choice(ODD if rng.random() < 0.2 else CAPTIONS)
        families = rng.sample(FAMILIES, rng.randint(0, len(FAMILIES)))
        s = rng.choice([0, 1, 3, rng.uniform(-5, 20)])
        seed, count = rng.randrange(2**32), rng.randint(1, 4)
        data = [prompt, families, s, start, end, rng.choice(MITIGATIONS), "", seed, count]
        return [*data, rng.random() < 0.5, "ar", None]

    def ask(self, session, data):
        """The drawing's name, or None where the queue is full."""
        asked = {"data": data, "fn_index": self.drawing, "session_hash": session}
        answer = self.client.post("gradio_api/queue/join", json=asked)
        self.story.add("asked")
        if answer.status_code == 503 and re.fullmatch(FULL, answer.json()["detail"]):
            self.story.add("queue full")
            return None
        if answer.status_code != 200:
            self.story.add("error", wrong=(answer.status_code, answer.text, data))
            return None
        return answer.json()["event_id"]

    def listen(self, session, events, leaves_after, began):
        """Hear of all drawings that were asked for, or leave after some messages."""
        pictured, messages = set(), 0
        path, named = "gradio_api/queue/data", {"session_hash": session}
        with self.client.stream("GET", path, params=named) as answer:
            if answer.status_code != 200:
                self.story.add("error", wrong=(answer.status_code, session))
                return
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                heard, messages = json.loads(line[5:]), messages + 1
                if leaves_after is not None and messages > leaves_after:
                    self.story.add("left halfway")
                    return
                event = heard.get("event_id")
                if heard["msg"] == "estimation":
                    self.story.add("queue place")
                if "data:image/png" in line:
                    pictured.add(event)
                if heard["msg"] == "process_completed":
                    events.discard(event)
                    self.end(heard, event in pictured, time.monotonic() - began)
                elif heard["msg"] == "unexpected_error":
                    self.story.add("error", wrong=heard)
                if heard["msg"] == "close_stream" or not events:
                    break
        for event in events:
            self.story.add("error", wrong=f"no word of {event} any more")

    def end(self, heard, is_pictured, seconds):
        text = json.dumps(heard["output"])
        if not heard["success"]:
            self.story.add("error", wrong=heard)
        elif is_pictured and "drawn in" in text:
            self.story.add("drawn", seconds)
        elif 'role=\\"alert\\"' in text:
            self.story.add("refused in a sentence")
        else:
            self.story.add("error", wrong=heard)


def test_twenty_visitors_for_two_minutes(server, record_property):
    import httpx

    address, process, log = server
    config = httpx.get(address + "config").json()
    (button,) = [own["id"] for own in config["components"] if own["props"].get("elem_id") == "draw"]
    (drawing,) = [
        own["id"] for own in config["dependencies"] if [button, "click"] in own["targets"]
    ]
    story, before, sizes = Story(), memory(process), []
    visitors = [Visitor(number, address, drawing, story) for number in range(VISITORS)]
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(VISITORS) as pool:
        visits = [pool.submit(visitor.visit_until, until) for visitor in visitors]
        while not all(visit.done() for visit in visits):
            sizes.append(memory(process))
            time.sleep(5)
        for visit in visits:
            visit.result()
    counts, seconds = story.counts, sorted(story.seconds)
    assert not story.wrong, story.wrong[:3]
    assert counts["drawn"] >= VISITORS and counts["queue full"] > 0 and counts["queue place"] > 0
    assert counts["left halfway"] > 0 and counts["left before listening"] > 0
    assert "Traceback" not in log.read_text()
    # the second minute takes no more than the first has taken
    half = len(sizes) // 2
    assert max(sizes[half:]) < max(sizes[:half]) + 100
    assert process.poll() is None
    # and the next visitor, who asks once and waits, gets his pictures, and not after all of those who have left
    last, began = Story(), time.monotonic()
    patient = Visitor(VISITORS, address, drawing, last)
    session, wish = (
        uuid.uuid4().hex,
        [CAPTIONS[0], FAMILIES, 3, 0, 1, "", "", 0, 1, True, "ar", None],
    )
    while (event := patient.ask(session, wish)) is None:
        assert time.monotonic() - began < 90
        time.sleep(0.5)
    patient.listen(session, {event}, None, began)
    assert not last.wrong and last.counts["drawn"] == 1
    assert time.monotonic() - began < 90
    middle, late = (seconds[int(share * len(seconds))] for share in (0.5, 0.95))
    record_property(
        "measured",
        f"{counts['drawn']} of {counts['asked']} drawn, half within {middle:.0f} s, 95 % within {late:.0f} s; "
        f"{before:.0f} to {max(sizes):.0f} MB; the next visitor waited {last.seconds[0]:.0f} s",
    )
