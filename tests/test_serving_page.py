"""The page in headless Chromium, by WebDriver's own protocol; skipped where Chromium is not installed."""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from serving import Server

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chrome"), shutil.which("chromedriver")
SHOTS = os.environ.get("STRETTO_SHOTS")  # a folder: screenshots for human eyes are written there
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
--disable-sync --hide-scrollbars""".split()
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A session of chromedriver."""

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self._driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                self._root = f"http://127.0.0.1:{found[1]}"
                break
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={self._profile.name}"]}
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._root += f"/session/{made['sessionId']}"

    def _call(self, verb, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=verb)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url):
        self._call("POST", "/url", {"url": url})

    def size(self, width, height):
        self._call("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        })

    def run(self, script, *args):
        return self._call("POST", "/execute/sync", {"script": f"return {script}", "args": list(args)})

    def keys(self, text):
        active = self._call("GET", "/element/active")[ELEMENT]
        self._call("POST", f"/element/{active}/value", {"text": text})

    def until(self, script, seconds=60):
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return found

    def shot(self, name):
        data = base64.b64decode(self._call("GET", "/screenshot"))
        if SHOTS:
            Path(SHOTS, f"{name}.png").write_bytes(data)
        return data

    def close(self):
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            self._driver.stdout.close()
            self._profile.cleanup()


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server():
    running = Server("--deterministic", "--api-key", "open-sesame")
    yield running
    assert running.stop() == 0


def test_the_page_by_keyboard_alone(browser, server):
    browser.size(1200, 900)
    browser.open(server.url + "/")
    browser.until("!document.getElementById('keyfield').hidden")  # the server asks for a key, so the page does
    browser.run("document.getElementById('key').focus()")
    browser.keys("open-sesame\ue004")
    browser.until("document.querySelectorAll('#m0 option').length > 3")
    assert browser.run("[m0.value, m1.value]") == ["ar", "suffix"]
    browser.run("(document.getElementById('pace').value = '0', document.getElementById('prompt').focus())")
    browser.keys("\ue009\ue007")  # control and enter in the prompt run both
    said = browser.until("(s => s.startsWith('done') && s)(document.getElementById('status').textContent)")
    assert said == "done: both texts are the same"
    texts = browser.run("[...document.querySelectorAll('.out')].map(o => o.textContent)")
    assert texts[0] == texts[1] and '"set_light"' in texts[0]
    counts = browser.run("[...document.querySelectorAll('.counters')].map(c => c.innerText.split('\\n'))")
    assert counts[0][counts[0].index("tokens/forward") + 1] == "1.00"
    spans = browser.run("[...document.querySelectorAll('.lane')].map(l => new Set([...l.querySelectorAll('span')].map(s => s.title)).size)")
    assert spans[0] == browser.run("document.querySelectorAll('.lane')[0].querySelectorAll('.out span').length") >= spans[1]
    browser.shot("wide")


def test_every_control_is_reached_by_tab_and_has_a_name(browser):
    wanted = set(browser.run("[...document.querySelectorAll('input,select,textarea,button:not(:disabled)')].filter(e => e.offsetParent).map(e => e.id)"))
    unnamed = browser.run("[...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).map(e => e.id)")
    browser.run("document.getElementById('prompt').focus()")
    reached = set()
    for _ in range(24):
        reached.add(browser.run("document.activeElement.id"))
        browser.keys("\ue004")
    assert wanted <= reached and not unnamed


def test_stop_ends_both_streams(browser, server):
    browser.run("(pace.value = '250', example.value = '2', example.onchange(), go.click())")
    browser.until("document.querySelectorAll('.out span').length > 2")
    browser.run("document.getElementById('stop').click()")
    browser.until("document.getElementById('status').textContent === 'stopped'")
    end = time.monotonic() + 10
    while server.get("/health")[2]["running"]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_refusal_is_shown(browser):
    browser.run("(pace.value = '0', document.getElementById('length').value = '5000', ask.noValidate = true, go.click())")
    assert "context" in browser.until("document.querySelector('.notes .error')?.textContent")


def test_on_a_phone_nothing_overflows(browser):
    browser.size(375, 800)
    browser.run("(pace.value = '0', document.getElementById('length').value = '96', go.click())")
    browser.until("document.getElementById('status').textContent.startsWith('done')")
    assert browser.run("document.documentElement.scrollWidth") <= 375
    tops = browser.run("[...document.querySelectorAll('.lane')].map(l => l.getBoundingClientRect().top)")
    small = browser.run("[...document.querySelectorAll('button,select,input,textarea')].filter(e => e.offsetParent && e.offsetHeight < 40).map(e => e.id)")
    assert tops[1] > tops[0] and not small
    browser.shot("phone-top")
    browser.run("document.getElementById('lanes').scrollIntoView()")
    browser.shot("phone-lanes")


def test_threads_run_side_by_side_and_join(browser, server):
    browser.size(1200, 1000)
    browser.run("document.getElementById('tab-threads').focus()")
    browser.keys("\ue007")
    assert browser.run("[weave.hidden, ask.hidden, lanes[0].offsetParent === null]") == [False, True, True]
    browser.run("document.getElementById('starts').focus()")
    browser.run("weave.requestSubmit()")
    assert browser.until("(s => s !== 'running' && s)(document.getElementById('weavestatus').textContent)") == "done"
    texts = browser.run("[...document.querySelectorAll('.strand .out')].map(o => o.textContent)")
    assert [json.loads(t[: t.index("}}") + 2]) for t in texts] == [
        {"name": "set_light", "arguments": {"room": room, "color": "blue", "level": 40}}
        for room in ("kitchen", "cellar", "attic")
    ]
    assert browser.run("document.getElementById('joined').textContent") == "".join(t + "\n" for t in texts)
    browser.shot("threads")
    browser.run("(each.value = '400', until.value = '', starts.value = 'a\\nb', weave.requestSubmit())")
    browser.until("document.querySelectorAll('.strand .out span').length > 4")
    browser.run("document.getElementById('weavestop').click()")
    browser.until("['stopped', 'done'].includes(document.getElementById('weavestatus').textContent)")
    end = time.monotonic() + 10
    while (stats := server.get("/health")[2])["running"] or stats["sessions"]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_threads_on_a_phone(browser):
    browser.size(375, 800)
    assert browser.run("document.documentElement.scrollWidth") <= 375
    unnamed = browser.run("[...document.querySelectorAll('#weave input,#weave select,#weave textarea')].filter(e => !e.labels.length).map(e => e.id)")
    small = browser.run("[...document.querySelectorAll('button,select,input,textarea')].filter(e => e.offsetParent && e.offsetHeight < 40).map(e => e.id)")
    assert not unnamed and not small
    browser.shot("threads-phone")
