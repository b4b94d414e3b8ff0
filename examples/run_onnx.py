"""Find objects in an image with an exported ONNX file: needs numpy, Pillow and onnxruntime, nothing else.

python run_onnx.py MODEL.onnx IMAGE [SCORE]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(session, image, least_score):
    """Return (name, score, box) of each object; boxes are x1, y1, x2, y2 in pixels of the upright image."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[session.get_inputs()[0].shape[1]]  # channels of the detector
    pixels = np.atleast_3d(ImageOps.exif_transpose(image).convert(mode))  # [H, W, C]
    batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])  # uint8 [1, C, H, W]
    boxes, scores, labels, count = (x[0] for x in session.run(None, {"images": batch}))
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    return [(names[labels[i]], float(scores[i]), boxes[i]) for i in range(count) if scores[i] >= least_score]


if __name__ == "__main__":
    path, photo, *rest = sys.argv[1:]
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with Image.open(photo) as opened:
        for name, score, box in detect(runtime, opened, float(rest[0]) if rest else 0.3):
            print(f"{name} {score:.3f} at {' '.join(f'{x:.1f}' for x in box)}")
