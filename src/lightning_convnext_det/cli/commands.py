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
# the trainer's arguments that are this package's own; types and defaults are in cli/run_options.py and cli/inference.py
FLAGS = {
    "nms": "NMS: hard, soft or none (default: as the model or its checkpoint has it)",
    "start_from": "fit: start from the network and the weights of this checkpoint; its classes may be others",
    "plan": "fit: choose what is not given by the data and the machine: resolution, anchors, batch, schedule ...",
    "time": "fit: wanted length of the training, as 30m or 1h30m",
    "early_stopping": "fit: stop after so many validations without a better metric (default: never)",
    "ema": "fit: average the weights over the steps; validation, checkpoints and prediction use the average",
    "lr_find": "fit: measure the learning rate before the training, by up to 100 steps at growing rates",
    "batch_size_find": "fit: find the largest batch that the accelerator's memory holds, before the training",
    "log_images": "fit: draw so many validation images with ground truth and detections at each validation, into the "
    "log folder and to loggers that take images; 0 for none",
    "report": "fit: write report.html of the best checkpoint",
    "tiles": "find objects in windows of this side in pixels, and in the whole image; metrics are of whole images. In "
    "fit: for its validations, and as the size of data.train_transforms=tiles (default: no windows)",
    "tile_overlap": "share of a window that the next one covers",
    "tile_merge": "box of an object that several windows see: nmm joins its parts, nms takes one, wbf their weighted "
    "mean",
    "tta": "validate, test, predict: fuse the detections of several views of each image, e.g. flip,scales=0.8:1.0:1.25 "
    "(default: one view)",
    "ensemble": "validate, test, predict: fuse the detections with those of these checkpoints, separated by commas",
}
SPLITS = ("train", "val", "test")
DATA_HELP = "--data.root DIR names the dataset; further arguments of the data are those of convnext-det fit --data.help"
EXIT_STATUS = (
    "exit status: 0 done, 2 usage or configuration, 3 data, 4 divergence, 5 weights unavailable, 6 checkpoint, "
    "7 an exported file differs, 130 interrupted, 143 terminated"
)
DESCRIPTION = f"Object detection on any timm backbone with PyTorch Lightning. {EXIT_STATUS}"
