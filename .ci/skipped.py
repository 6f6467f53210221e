"""Prints the tests that were skipped in every run that had them, and why.

python skipped.py FILE...    of pytest --junitxml
"""

import sys
from xml.etree import ElementTree

ran, reasons = set(), {}
for path in sys.argv[1:]:
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is None:
            ran.add(name)
        else:
            reasons.setdefault(name, skipped.get("message"))
for name in sorted(reasons.keys() - ran):
    print(f"{name}: {reasons[name]}")
