"""The scripts of ``images/`` and ``manifests/`` as modules."""

import importlib.util
import sys

from tests.support.checkout import ROOT


def load(name, folder="images"):
    """The module of a script, fresh, so that a test may change its paths."""
    place = ROOT / folder
    spec = importlib.util.spec_from_file_location(name, place / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # they import each other by file name, as scripts do
    sys.path.insert(0, str(place))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(place))
    return module
