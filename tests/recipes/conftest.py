"""Lets tests import what stands in the folder of recipes, which is not installed."""

import sys

from project import ROOT

sys.path.append(str(ROOT))
