"""Pages that are one file: a template with its style and script, and the data that the script reads."""

import json
import re
from pathlib import Path


def fill(template: Path, data: dict, **places: str) -> str:
    """The template with `{{data}}` as JSON, and for each other `{{name}}` the HTML given under it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    places["data"] = text.replace("<", "\\u003c")  # nothing in it can end the script element
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], template.read_text(encoding="utf-8"))
