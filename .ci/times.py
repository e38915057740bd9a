"""Seconds that each test file took, from what `pytest --junitxml=FILE` wrote, as a Markdown table.

    python .ci/times.py before.xml after.xml

has one column of seconds and tests for each file of the command line, in which tests that were
skipped are not counted.
"""

import collections
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def times(path):
    """`{test file: (seconds, tests)}`."""
    found = collections.defaultdict(lambda: (0.0, 0))
    for case in ElementTree.parse(path).iter("testcase"):
        # tests.export.test_doors.TestClass: up to the module's name.
        parts = case.get("classname").split(".")
        last = next(i for i, part in enumerate(parts) if part.startswith("test_"))
        name = "/".join(parts[: last + 1]) + ".py"
        seconds, tests = found[name]
        ran = case.find("skipped") is None
        found[name] = (seconds + float(case.get("time")), tests + ran)
    return found


def main(paths):
    columns = [times(path) for path in paths]
    names = set().union(*columns)
    total = {name: max(column.get(name, (0.0, 0))[0] for column in columns) for name in names}
    heads = [head for path in paths for head in (f"{pathlib.Path(path).stem}, s", "tests")]
    print("| file |", " | ".join(heads), "|")
    print("| --- |" + " ---: | ---: |" * len(paths))
    for name in sorted(names, key=lambda name: -total[name]):
        cells = [column.get(name, (0.0, 0)) for column in columns]
        print(f"| {name} |", " | ".join(f"{s:.1f} | {n}" for s, n in cells), "|")
    sums = [[sum(part) for part in zip(*column.values(), strict=True)] for column in columns]
    print("| all |", " | ".join(f"{s:.1f} | {n}" for s, n in sums), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
