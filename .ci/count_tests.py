"""Sum the JUnit files of a folder into one line; fail if a test failed or none passed.

python3 .ci/count_tests.py reports
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

counts: Counter[str] = Counter()
for report in Path(sys.argv[1]).glob("*.xml"):
    for suite in ElementTree.parse(report).iter("testsuite"):
        counts.update({key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")})

failed = counts["failures"] + counts["errors"]
passed = counts["tests"] - failed - counts["skipped"]
print(f"{passed} passed, {failed} failed, {counts['skipped']} skipped")
sys.exit(failed > 0 or passed == 0)
