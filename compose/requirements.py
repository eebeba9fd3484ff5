"""Print what pyproject.toml asks for: python requirements.py [EXTRA...]; no extra is the core."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name])]))
