"""Where the project lies."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SCRIPTS = ROOT / "tests" / "scripts"
