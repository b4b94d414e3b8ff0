"""Losses of DINO (arXiv:2203.03605): set prediction of queries and chosen proposals, and denoising."""

import torch
from torch import Tensor

from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions, SetCriterion
from lightning_convnext_det.models.deformable_detr.denoising import denoising_targets


class DINOCriterion(SetCriterion):
    """Set prediction loss with the classes of proposals, and the losses of denoising queries.

    Arguments are those of `SetCriterion`. Checked against detrex: its generalised IoU adds 1e-6 to areas in 0..1 of the
    image, which counts for boxes of a few pixels.
    """

    proposals_have_classes = True
    giou_eps = 1e-6  # detrex/layers/box_ops.py

    def forward(
        self,
        decoder: Predictions,
        objects: Objects,
        proposals: Predictions | None = None,
        denoising: Predictions | None = None,
        groups: int = 1,
    ) -> dict[str, Tensor]:
        """Compute the weighted losses.

        Args:
            decoder: predictions of the decoder layers.
            objects: the ground truth.
            proposals: the chosen proposals of the encoder, as one layer.
            denoising: predictions of the decoder layers for the denoising queries; none if the detector has none.
            groups: groups of denoising queries.

        Returns:
            As `SetCriterion` does, and the losses of the denoising queries with suffix ``_denoising``, which are also
            divided by the number of groups.

        Raises:
            DivergenceError: if a logit or box is not finite.
        """
        losses, num_boxes = self.match_and_compare(decoder, objects, proposals)
        if denoising is not None:
            with torch.autocast(decoder.logits.device.type, enabled=False):
                denoising = self.trained(denoising)
                repeated, pairs = denoising_targets(objects, groups, len(denoising.logits))
                losses.update(self.compare(denoising, repeated, pairs, num_boxes * groups, "_denoising"))
        return losses

    def proposal_objects(self, objects: Objects) -> Objects:
        """The ground truth of the proposals, which have all classes."""
        return objects
