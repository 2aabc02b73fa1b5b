"""Average precision and recall of base, novel and all classes, by COCO's rules and by LVIS's; recall of proposals.

pycocotools and the official lvis package are the truth: the figures here are theirs, found faster, and tests compare
them number by number. Importing this package loads no torch; `ezsd.metrics.recall`, about proposals, does.

*Generalised*: detections scored against all classes at once; evaluate them with `names=None`. Where the caller has the
detector look for some names, evaluate with these, as `names=split.novel`. Restricting `names` for generalised
detections does not make them those of a search for the novel classes *alone*: the classes have competed for every box.
"""

from ezsd.metrics.average_precision import ClassScores, GroupScores
from ezsd.metrics.evaluation import (
    COCO_LIMITS,
    LVIS_LIMITS,
    Evaluation,
    evaluate,
    evaluate_at,
    limits_of,
)
from ezsd.metrics.ground_truth import Truth, read_truth, read_truth_table, truth_of, with_masks
from ezsd.metrics.limits import Limit
from ezsd.metrics.named import Named
from ezsd.metrics.results import Results, read_results

__all__ = [
    "COCO_LIMITS",
    "LVIS_LIMITS",
    "ClassScores",
    "Evaluation",
    "GroupScores",
    "Limit",
    "Named",
    "Results",
    "Truth",
    "evaluate",
    "evaluate_at",
    "limits_of",
    "read_results",
    "read_truth",
    "read_truth_table",
    "truth_of",
    "with_masks",
]
