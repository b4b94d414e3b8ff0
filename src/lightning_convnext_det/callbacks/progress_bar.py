"""Lightning's progress bar for trainings whose length is in steps."""

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """``RichProgressBar`` without a last epoch where there is none: for ``max_epochs=-1`` Lightning's shows "8/-2"."""

    def _get_train_description(self, current_epoch: int) -> str:
        text: str = super()._get_train_description(current_epoch)
        return text.replace("/-2", "   ")  # as wide as before
