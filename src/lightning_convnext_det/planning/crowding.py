"""Numbers of detections, proposals and samples, and the NMS threshold, by the objects per image and their overlap."""

import math

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine

COCO_DETECTIONS = 100
DETECTIONS = {"rcnn": 100, "detr": 100, "dino": 300}  # the detectors' own
QUERIES = {"detr": 300, "dino": 900}
HEADROOM = 1.25  # test images may have more objects than any of training, and some detections are wrong
CROWDED = 0.02  # share of objects that the default NMS would drop from which its threshold is raised


def plan_crowding(draft: Draft, fingerprint: Fingerprint, machine: Machine, kind: str) -> None:
    """Choose limits that the fullest image does not reach."""
    fullest = int(fingerprint.objects_per_image.highest)
    needed = 100 * math.ceil(HEADROOM * fullest / 100)
    if needed > DETECTIONS[kind]:
        kept = int(draft.choose("model.detections_per_image", needed, f"up to {fullest} objects in an image"))
    else:
        kept = int(draft.get("model.detections_per_image", DETECTIONS[kind]))
    if (counted := min(kept, needed) if kind == "dino" else kept) > COCO_DETECTIONS:
        draft.choose("model.max_detections", counted, "the metrics count as many; COCO's rule is 100")
    if kind in QUERIES:
        _plan_queries(draft, fullest, QUERIES[kind])
        return
    _plan_proposals(draft, fingerprint, machine, kept)
    crowded, extreme = fingerprint.crowded, fingerprint.overlap.p99
    if crowded > CROWDED:
        threshold = min(0.7, max(0.55, math.ceil(20 * extreme) / 20))
        reason = f"{crowded:.1%} of the objects overlap another of their class by more than 0.5, which NMS would drop"
        draft.choose("model.nms_threshold", threshold, reason)


def _plan_queries(draft: Draft, fullest: int, default: int) -> None:
    wanted = 100 * math.ceil(2 * fullest / 100)
    if wanted > default:
        queries = int(draft.choose("model.num_queries", wanted, f"twice the {fullest} objects of the fullest image"))
    else:
        queries = int(draft.get("model.num_queries", default))
    if queries < fullest:
        draft.warn(f"an image has {fullest} objects, more than the {queries} queries: the others are not learned")


def _plan_proposals(draft: Draft, fingerprint: Fingerprint, machine: Machine, kept: int) -> None:
    usual = fingerprint.objects_per_image.p90
    # a quarter of the samples are objects: one and a half for each object of a full image
    samples = 2 ** math.ceil(math.log2(max(1.0, 6 * usual)))
    samples = min(1024, max(samples, 128 if machine.is_cpu else 512))
    if samples != 512:
        reason = f"nine of ten images have at most {usual:.0f} objects"
        draft.choose("model.box_batch_size_per_image", samples, reason)
    many = max(1000, 2 * kept)
    if machine.is_cpu and kept <= COCO_DETECTIONS:
        reason = "no accelerator: fewer proposals, as in configs/laptop.yaml"
        draft.choose("model.rpn_pre_nms_top_n", [500, 1000], reason)
        draft.choose("model.rpn_post_nms_top_n", [300, 1000], reason)
    elif many > 1000:
        reason = f"two proposals for each of {kept} detections"
        draft.choose("model.rpn_pre_nms_top_n", [max(2000, many), many], reason)
        draft.choose("model.rpn_post_nms_top_n", [max(2000, many), many], reason)
