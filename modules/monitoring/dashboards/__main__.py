"""Write the dashboards as JSON beside this file: ./dev exec python modules/monitoring/dashboards [FOLDER]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fleet import fleet
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard, DashboardLink, DashboardLinkType
from host import host
from instance import instance
from notes import NOTES, RUNBOOK, Note

DASHBOARDS = {"fleet": fleet, "host": host, "instance": instance}


def write_dashboards(folder: Path) -> None:
    """Write one JSON file a dashboard, the same bytes for the same code."""
    for name, build in DASHBOARDS.items():
        made = build().build()
        annotate(made, NOTES[name])
        text = json.dumps(made, cls=JSONEncoder, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")


def annotate(made: Dashboard, notes: dict[str, Note]) -> None:
    """Give every panel its description and its link to the runbook. Raises KeyError if a panel has no note."""
    for panel in made.panels or []:
        note = notes[panel.title]
        panel.description = note.text
        link = DashboardLink(title="Runbook", type_val=DashboardLinkType.LINK, url=f"{RUNBOOK}#{note.section}")
        link.target_blank = True
        panel.links = [link]


if __name__ == "__main__":
    write_dashboards(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
