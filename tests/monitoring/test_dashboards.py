"""The committed dashboards are what their code makes, and each can be imported as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "modules/monitoring/dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
OPERATIONS = Path(__file__).resolve().parents[2] / "docs/operations.md"
GRID_WIDTH = 24


def test_the_committed_files_are_what_the_code_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FOLDER), str(tmp_path)], check=True, timeout=120)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in DASHBOARDS}
    assert made == committed, "run: ./dev exec python modules/monitoring/dashboards"


def test_there_is_a_dashboard_for_the_fleet_a_host_and_an_instance() -> None:
    assert [path.stem for path in DASHBOARDS] == ["fleet", "host", "instance"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
class TestDashboard:
    def test_panels_lie_within_the_grid_and_on_no_other(self, path: Path) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place.get("x", 0), place.get("x", 0) + place["w"])
                for y in range(place.get("y", 0), place.get("y", 0) + place["h"])
            }
            assert max(x for x, _ in cells) < GRID_WIDTH, panel["title"]
            assert not cells & taken, panel["title"]
            taken |= cells

    def test_panels_have_titles_units_and_the_data_source_that_the_user_chooses(self, path: Path) -> None:
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["title"]
            assert panel["targets"], panel["title"]
            for place in (panel, *panel["targets"]):
                assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            if panel["type"] == "heatmap":
                assert panel["options"]["yAxis"]["unit"], panel["title"]
                assert panel["options"]["tooltip"]["show"], panel["title"]

    def test_every_panel_says_what_it_shows_and_links_to_the_runbook(self, path: Path) -> None:
        anchors = {
            re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
        }
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["description"].endswith("."), panel["title"]
            [link] = panel["links"]
            page, _, anchor = link["url"].partition("#")
            assert page.endswith("/blob/main/docs/operations.md")
            assert anchor in anchors, panel["title"]

    def test_the_page_of_the_dashboards_lists_every_panel(self, path: Path) -> None:
        page = (OPERATIONS.parent / "monitoring.md").read_text()
        for panel in json.loads(path.read_text())["panels"]:
            anchor = panel["links"][0]["url"].partition("#")[2]
            row = f"| {panel['title']} | {panel['description']} | [what to do](operations.md#{anchor}) |"
            assert row in page, "run: ./dev exec python benchmarks/dashboard_pictures.py"

    def test_its_address_is_stable(self, path: Path) -> None:
        document = json.loads(path.read_text())
        assert document["uid"] == f"pascaline-{path.stem}"
        assert document["title"] == f"Pascaline: {path.stem}"
        assert "id" not in document
