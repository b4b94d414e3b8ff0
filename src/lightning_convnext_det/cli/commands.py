"""Names and descriptions of the commands, and how the command line ends; imports no library."""

TRAINER = {
    "fit": "train a detector or a classifier",
    "validate": "compute the metrics of the validation split",
    "test": "compute the metrics of the test split",
    "predict": "find objects in images, write predictions.json and drawn images",
}
TOOLS = {
    "check": "list every invalid annotation of a dataset",
    "plan": "print what fit would set by itself for a dataset, and why",
    "models": "print size, cost and published accuracy of backbones and detectors",
    "import-weights": "convert third-party weights to a checkpoint",
    "export": "write a detector as ONNX, torch.export, OpenVINO or weights, and compare the file with it",
    "export-backbone": "save a detector's backbone as weights for timm",
    "thresholds": "choose the score threshold of each class on a split and store it in the checkpoint",
    "compare": "tell whether two detectors differ by more than the chance of the images",
    "report": "show what a detector does on a split: one HTML page",
    "demo": "train a detector on synthetic images and draw what it finds",
}
EXIT_STATUS = (
    "exit status: 0 done, 2 usage or configuration, 3 data, 4 divergence, 5 weights unavailable, 6 checkpoint, "
    "7 an exported file differs, 130 interrupted, 143 terminated"
)
DESCRIPTION = f"Object detection on any timm backbone with PyTorch Lightning. {EXIT_STATUS}"
