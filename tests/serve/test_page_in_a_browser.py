"""The agent's page as a person sees it: a real browser, a real agent, the fake engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.browser import MISSING, browser, program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.browser import Browser, Tab
    from support.instance import Instance

    Serve = Callable[..., Instance]

pytestmark = [
    pytest.mark.slow("starts a browser"),
    pytest.mark.skipif(program() is None, reason=MISSING),
]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m\u202egnp\u202c <b>bold</b>\n"
LEAST_CONTRAST = 4.5
"""WCAG 2, level AA, for text of any size."""
CONTRASTS = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((each) => each / 255)
      .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!texts.length || !element.checkVisibility() || element.disabled) continue;
    const [light, dark] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a);
    found.push([texts[0].data.trim().slice(0, 40), (light + 0.05) / (dark + 0.05)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


def address(instance: Instance) -> str:
    return f"http://127.0.0.1:{instance.settings['agent_port']}/"


def ask(page: Tab, text: str) -> None:
    page.run(f"document.querySelector('#question').value = {json.dumps(text)}")
    page.run("document.querySelector('#form').requestSubmit()")


def state(page: Tab, name: str) -> None:
    page.wait(f"document.documentElement.dataset.state == '{name}'")


def check_widths_and_colours(page: Tab) -> None:
    for width in (360, 768, 1920):
        page.resize(width, 900)
        overflow = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"at {width} pixels {overflow} are beyond the window"
    for dark in (False, True):
        page.dark(dark)
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > 40
        assert [each for each in contrasts if each[1] < LEAST_CONTRAST] == []


def test_from_the_start_over_a_question_to_the_end(serve: Serve, chromium: Browser) -> None:
    instance = serve(served_model_name="emily", faults="start_seconds=4 decode_tokens_per_second=200")
    instance.wait_for_state("starting")
    page = chromium.open(address(instance))
    page.wait("document.querySelector('[data-mark=runs]')")
    assert "the engine reads the weights" in page.text()
    state(page, "ready")
    assert page.run("document.title") == "emily · ready"
    assert "tok/s" in page.text()
    assert "the engine reads the weights" not in page.text()

    # What a model says is text, whatever it says.
    instance.fault(answer=HOSTILE)
    page.run("document.querySelector('#tokens').value = 12")
    ask(page, "<i>Say</i> something evil")
    page.wait("document.querySelector('.measured')")
    answer = page.run("document.querySelector('.said.assistant .text').textContent")
    assert answer.startswith(
        "<img src=x onerror=alert(1)><script>alert(2)</script>\u241b[31m<U+202E>gnp<U+202C> <b>bold</b>"
    )
    assert page.run("document.querySelectorAll('#talk :is(img, script, b, i)').length") == 0
    assert "12 tokens · " in page.run("document.querySelector('.measured').textContent")
    assert page.run("document.querySelector('.said.user .text').textContent") == "<i>Say</i> something evil"
    curl = page.run("document.querySelector('#curl').textContent")
    assert '"content":"<i>Say</i> something evil"' in curl
    assert instance.api_url in curl

    # An answer can be stopped, and the conversation goes on.
    instance.fault(answer="slow", decode_tokens_per_second=10)
    page.run("document.querySelector('#tokens').value = 1500")
    ask(page, "And now?")
    page.wait("document.querySelectorAll('.said.assistant .text')[1]?.textContent.includes('slow')")
    state(page, "busy")
    page.run("document.querySelector('#stop').click()")
    page.wait("document.querySelectorAll('.measured')[1]?.textContent.endsWith('stopped')")
    state(page, "ready")

    page.run("document.querySelector('#code').open = true")
    check_widths_and_colours(page)
    assert page.troubles() == []
    assert {each.removeprefix(address(instance)) for each in page.requests() if not each.startswith("data:")} == {
        "", "page.css", "page.js", "events", "chat",
    }  # fmt: skip

    # It shows the end, and then that nobody answers any more.
    assert instance.stop() == 0
    state(page, "stopped")
    page.wait("!document.querySelector('#lost').hidden")
    assert "The agent does not answer since" in page.text()
    check_widths_and_colours(page)


def test_a_start_that_fails_says_why(serve: Serve, chromium: Browser) -> None:
    instance = serve(faults="start_seconds=4 load_error=out-of-memory")
    instance.wait_for_state("starting")
    page = chromium.open(address(instance), dark=True)
    state(page, "starting")
    state(page, "failed")
    assert "not enough memory on the device" in page.run("document.querySelector('.reason').innerText")
    assert page.run("document.querySelector('#runbook').href").endswith("/operations.md#instancerestartloop")
    assert page.run("document.querySelector('#send').disabled")


def test_the_key_stays_in_the_tab(serve: Serve, chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame-open")
    instance = serve(api_key_file=tmp_path / "key")
    instance.wait_for_state("ready")
    page = chromium.open(address(instance))
    page.wait("!document.querySelector('#key-row').hidden")
    ask(page, "Hello")
    page.wait("document.querySelector('.error')?.textContent.startsWith('401: the API key is missing or wrong')")
    page.run("document.querySelector('#key').value = 'sesame-open'")
    ask(page, "Hello")
    page.wait("document.querySelector('.measured')")
    assert "sesame" not in page.run("document.documentElement.outerHTML + document.cookie")
    assert page.run("localStorage.length + sessionStorage.length") == 0
    assert "$API_KEY" in page.run("document.querySelector('#curl').textContent")


def test_it_is_readable_without_scripts(serve: Serve, chromium: Browser) -> None:
    instance = serve(served_model_name="emily")
    instance.wait_for_state("ready")
    page = chromium.open(address(instance), scripts=False)
    text = page.text()
    for part in (
        "emily",
        "ready",
        "a generation succeeded",
        "KV cache",
        "planned of",
        "What happened",
        "needs JavaScript",
    ):
        assert part in text


def test_a_model_that_writes_no_answers_shows_how_programs_ask_it(serve: Serve, chromium: Browser) -> None:
    instance = serve(served_model_name="emily")
    instance.wait_for_state("ready")
    page = chromium.open(address(instance))
    page.wait("shown")
    for role, path in (("embed", "embeddings"), ("rerank", "rerank")):
        # The next snapshot, a second later, shows the instance as it is again.
        words, hidden, curl, python = page.run(
            f"show({{...shown, api: {{...shown.api, kind: '{role}', key: true}}}}),"
            "[one('#role').textContent, one('#form').hidden, one('#curl').textContent, one('#python').textContent]"
        )
        assert "it writes no answers" in words
        assert hidden
        assert f"curl -N {instance.api_url}/v1/{path}" in curl
        assert '"model":"emily"' in curl
        compile(python, role, "exec")
        assert "emily" in python
        assert 'os.environ["API_KEY"]' in python
    page.wait("!document.querySelector('#form').hidden")
    assert page.troubles() == []
