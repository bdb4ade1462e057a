"""The picture of the agent's page in README.md and docs/operations.md: a real agent and browser, a simulated Tesla P4.

    ./dev exec python benchmarks/page_picture.py     writes docs/pictures/page.png

The engine is the fake one of the tests, which says that a 7B model in Q4_K_M is loaded; the model's file has zero
weights. Needs Debian's package chromium.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment, write_scenario  # noqa: E402
from PIL import Image  # noqa: E402
from support.browser import MISSING, browser, program  # noqa: E402
from support.instance import FAKE_ENGINE, running  # noqa: E402
from support.models import SHAPES, write_gguf  # noqa: E402

if TYPE_CHECKING:
    from support.browser import Tab
    from support.instance import Instance

PICTURE = ROOT / "docs/pictures/page.png"
MOST_BYTES = 150_000
LOAD_SECONDS = 75.0
"""Time under load, for the curves."""
QUESTION = "Why does a Tesla P4 need a fan in the chassis?"
ANSWER = (
    "A Tesla P4 has a heat sink and no fan of its own. It relies on the air that the server's fans push through the "
    "slots. In a desktop case nothing does, so the card reaches its slowdown temperature within minutes and lowers its "
    "clocks."
)
FREE = {
    "= 8053063680 76349440 2071986176 5904728064": "= 8053063680 76349440 7871986176 104728064",
    "= 8053063680 2071986176 5981077504": "= 8053063680 7871986176 181077504",
}
"""The demo's card with a model loaded -> without."""


def main() -> None:
    """Write the picture."""
    if program() is None:
        sys.exit(f"page_picture.py: {MISSING}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_gguf(folder / "emily.Q4_K_M.gguf", SHAPES["mistral-7b"], "Q4_K_M", sparse=True)
        scenario, demo = folder / "p4.nvml", DEMO_SCENARIO.read_text()
        free = demo
        for loaded, empty in FREE.items():
            free = free.replace(loaded, empty)
        write_scenario(scenario, free)
        environment = fake_nvml_environment(scenario, base={}) | {"CUDA_VISIBLE_DEVICES": "0"}
        settings = {"card": "tesla-p4", "device": "cuda", "served_model_name": "emily"}
        faults = "weights_gib=3.98 kv_bytes_per_token=131072 decode_tokens_per_second=16 prefill_tokens_per_second=300"
        (folder / "instance").mkdir()
        with (
            running(
                folder / "instance",
                model=model,
                engine_executable=FAKE_ENGINE,
                environment=environment,
                faults=faults,
                **settings,
            ) as instance,
            browser(folder / "browser") as chromium,
        ):
            instance.wait_for_state("ready", seconds=300)
            write_scenario(scenario, demo)
            page = chromium.open(f"http://127.0.0.1:{instance.settings['agent_port']}/", width=1280, height=1040)
            make_load(instance)
            ask(page, instance)
            page.screenshot(PICTURE, whole=False)
    shrink(PICTURE)
    size = PICTURE.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"page_picture.py: the picture has {size} bytes, must have at most {MOST_BYTES}")
    print(f"{PICTURE}: {size} bytes")


def shrink(picture: Path) -> None:
    """Keep 128 colours: the page has few."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def make_load(instance: Instance) -> None:
    """Send requests of several lengths, two or three at a time, and let two go on."""
    end = time.monotonic() + LOAD_SECONDS

    def client(number: int) -> None:
        while time.monotonic() < end + 30 * (number < 2):
            # The last ones are cut off when the instance ends.
            with contextlib.suppress(OSError):
                instance.complete("word " * (60 + 97 * number), max_tokens=60 + 40 * number)
            time.sleep(1 + number)

    for number in range(3):
        threading.Thread(target=client, args=(number,), daemon=True).start()
    time.sleep(LOAD_SECONDS)


def ask(page: Tab, instance: Instance) -> None:
    """Ask the model through the page."""
    instance.fault(answer=ANSWER)
    page.run(f"document.querySelector('#tokens').value = {len(ANSWER.split())}")
    page.run(f"document.querySelector('#question').value = {QUESTION!r}")
    page.run("document.querySelector('#form').requestSubmit()")
    page.wait("document.querySelector('.measured')")


if __name__ == "__main__":
    main()
