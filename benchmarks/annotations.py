"""What does parsing cost? `python benchmarks/annotations.py --work DIR [--annotations 860001]`.

Writes a file of COCO 2017's size (118,287 images, 860,001 annotations with polygons), then reads it in a process of its
own per way: Python's json as a whole, ijson (where installed), our loader, and our loader once the file is parsed.
Gate: the same number of boxes from each. Seconds (of the CPU, and on the wall, which means little on a busy machine)
and peak resident memory, with that of the bare interpreter and numpy beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import rows

from ezsd.vocabulary import COCO_SPLIT

IMAGES = 118_287
PROLOGUE = """
import json, resource, sys, time
from pathlib import Path
import numpy
path, started, started_cpu = Path(sys.argv[1]), time.perf_counter(), time.process_time()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
EPILOGUE = """
wall, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu = time.process_time() - started_cpu
memory = {"peak_mib": peak / 1024, "bare_mib": base / 1024}
print(json.dumps({"boxes": boxes, "cpu_seconds": cpu, "wall_seconds": wall, **memory}))
"""
WAYS = {
    "json": """
document = json.loads(path.read_bytes())
base_ids = {c["id"] for c in document["categories"] if not c["name"].startswith("other")}
boxes = sum(a["category_id"] in base_ids for a in document["annotations"])
""",
    "ijson": """
import ijson
with path.open("rb") as file:
    base_ids = {c["id"] for c in ijson.items(file, "categories.item") if not c["name"].startswith("other")}
with path.open("rb") as file:
    boxes = sum(a["category_id"] in base_ids for a in ijson.items(file, "annotations.item", use_float=True))
""",
    "loader": """
from ezsd.data.annotations import read_raw
from ezsd.vocabulary import COCO_SPLIT
boxes = len(read_raw(path, COCO_SPLIT.names).xywh)
""",
    "loader, parsed before": """
from ezsd.vocabulary import COCO_SPLIT
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
boxes = len(evaluation_annotations(path, COCO_SPLIT).box)
""",
}


def write_file(path: Path, annotations: int) -> None:
    """Random boxes and polygons of COCO's sizes; a thousand different ones, repeated."""
    rng = random.Random(0)
    names = [*COCO_SPLIT.names, *(f"other {k}" for k in range(15))]
    shapes = []
    for _ in range(1000):
        points = [round(rng.uniform(0, 640), 2) for _ in range(rng.choice((12, 20, 30, 44, 60)))]
        box = [round(rng.uniform(0, limit), 2) for limit in (600, 440, 39, 39)]
        box[2:] = [side + 1 for side in box[2:]]
        shapes.append(json.dumps({"segmentation": [points], "area": 99.25, "iscrowd": 0, "bbox": box})[:-1])
    with path.open("w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for k in range(IMAGES):
            address = f"example.org/train2017/{k:012d}.jpg"
            entry = {"license": 3, "file_name": f"{k:012d}.jpg", "coco_url": address, "height": 480, "width": 640}
            file.write(", " * (k > 0) + json.dumps(entry | {"date_captured": "2013-11-14 11:18:45", "id": k * 5 + 9}))
        file.write('], "annotations": [')
        for k in range(annotations):
            ids = f'"image_id": {rng.randrange(IMAGES) * 5 + 9}, "category_id": {rng.randrange(1, 81)}, "id": {k * 7}'
            file.write(", " * (k > 0) + shapes[k % len(shapes)] + ", " + ids + "}")
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def main() -> None:
    """Write, read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--annotations", type=int, default=860_001)
    arguments = parser.parse_args()
    path = arguments.work / f"instances_{arguments.annotations}.json"
    if not path.exists():
        write_file(path, arguments.annotations)
    environment = os.environ | {"EZSD_CACHE_DIR": str(arguments.work / "parsed")}
    results = {}
    # The last way twice: the first run parses and keeps.
    for way in [*WAYS, "loader, parsed before"]:
        command = [sys.executable, "-c", PROLOGUE + WAYS[way] + EPILOGUE, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{way}: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[way] = json.loads(done.stdout)
        print(f"{way:<22} {results[way]['cpu_seconds']:7.1f} s of CPU  {results[way]['peak_mib']:7.0f} MiB")
    counts = {result["boxes"] for result in results.values()}
    assert len(counts) == 1, f"the ways disagree: {results}"
    rows.append("annotations", {"file_mb": path.stat().st_size / 1e6, "annotations": arguments.annotations, **results})


if __name__ == "__main__":
    main()
