"""Write the dashboards as JSON beside this file: ./dev exec python modules/monitoring/dashboards [FOLDER]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fleet import fleet
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from host import host
from instance import instance

DASHBOARDS = {"fleet": fleet, "host": host, "instance": instance}


def write_dashboards(folder: Path) -> None:
    """Write one JSON file a dashboard, the same bytes for the same code."""
    for name, build in DASHBOARDS.items():
        text = json.dumps(build().build(), cls=JSONEncoder, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    write_dashboards(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
