"""Errors that a user can mend, with their exit statuses, and the list of all codes.

Every message is one line that names the file and the remedy; most begin with a stable code such as ``[LCD-D101]``. The
command line shows the message alone for these, and the traceback for all others, which are defects.
"""

CODES: dict[str, str] = {
    # data: annotation files
    "LCD-D000": "an annotation file cannot be used, for a reason without a code of its own",
    "LCD-D001": "a JSON file is not COCO's object of images, annotations and categories",
    "LCD-D002": "a COCO record is malformed",
    "LCD-D003": "an image id is used twice",
    "LCD-D004": "a file is not JSON, or cannot be read",
    "LCD-D005": "an annotation in XML, or a list of such files, is malformed or cannot be read",
    "LCD-D006": "a line of a YOLO label file is malformed",
    "LCD-D008": "class names or categories are missing, malformed or used twice",
    "LCD-D010": "a synthetic dataset or demo would overwrite a folder",
    # data: boxes and labels
    "LCD-D101": "a box has no area",
    "LCD-D102": "a box is inverted",
    "LCD-D103": "a box is not finite",
    "LCD-D104": "a box lies outside its image",
    "LCD-D105": "a box reaches out of its image",
    "LCD-D106": "a box is below 0.01 pixels inside its image",
    "LCD-D107": "a record repeats an earlier one",
    "LCD-D108": "boxes look like corners where COCO expects width and height",
    "LCD-D109": "no image of a split has a box",
    "LCD-D110": "a label or category is not among the classes",
    "LCD-D112": "the boxes and labels of a target have wrong shapes",
    "LCD-D113": "boxes look relative where the format expects pixels",
    "LCD-D114": "a COCO annotation has the flag ignore",
    "LCD-D116": "COCO annotations have no area; width x height is taken",
    "LCD-D117": "a COCO annotation belongs to no image",
    "LCD-D118": "an XML file names another image than its own name says",
    "LCD-D119": "a listed image has no XML file",
    "LCD-D120": "classes differ between splits, from a checkpoint's, or from the names given",
    "LCD-D121": "images without an XML file are left out",
    "LCD-D122": "a folder or list of images that a layout names is missing",
    "LCD-D123": "boxes are taken from outlines, rotated boxes or lines with key points",
    "LCD-D124": "images have no label file",
    "LCD-D125": "image files are equal byte by byte",
    "LCD-D126": "splits share images",
    "LCD-D127": "a file is listed several times",
    "LCD-D128": "objects of a split are of classes that training has no object of",
    "LCD-D129": "a transform changes the size of an image and leaves its boxes",
    # data: splits
    "LCD-D130": "no annotated images are given",
    "LCD-D131": "a split is missing",
    "LCD-D132": "a folder of images is given without annotations",
    "LCD-D133": "too few images to hold one out for validation",
    "LCD-D134": "training images have no boxes to learn from",
    "LCD-D135": "a class to select is unknown or named twice",
    "LCD-D140": "a folder of images for classification is missing, empty or unlike its classes",
    # data: datasets of the user's own
    "LCD-D160": "an item of an own dataset is not an image and a target, or a dataset is empty",
    "LCD-D161": "the classes of own datasets are not named",
    "LCD-D162": "images of one batch differ in channels or dtype",
    # data: what exporters write otherwise
    "LCD-D150": "COCO values of another type are read as they are meant",
    "LCD-D151": "COCO image ids are text or too large, and are numbered anew",
    "LCD-D152": "categories of one name are joined, or a root category is left out",
    "LCD-D153": "file names are read as those of files that exist",
    "LCD-D154": "boxes of VOC are counted from 0",
    "LCD-D156": "YOLO lines may be outlines or boxes with key points",
    "LCD-D157": "label files have no image",
    "LCD-D158": "images share a label file",
    "LCD-D159": "class names differ in case or blanks only",
    # data: images
    "LCD-I001": "a file is not an image that can be read",
    "LCD-I002": "an image is damaged",
    "LCD-I003": "an image is missing or cannot be opened",
    "LCD-I010": "an image has 16 bits and is scaled to 8",
    "LCD-I011": "pixels are not colours",
    "LCD-I012": "an image is named like another format",
    "LCD-I013": "transparency is dropped",
    "LCD-I014": "an image has several frames; the first is used",
    "LCD-I020": "an image has another size than annotated",
    "LCD-I021": "an image is too narrow",
    "LCD-I022": "an image is too small",
    "LCD-I023": "an image has too many pixels",
    "LCD-I024": "an image has an EXIF orientation and no annotated size",
    "LCD-I025": "an annotated size fits the upright and the stored image",
    "LCD-I026": "an image has an EXIF orientation, and boxes are taken to refer to one frame",
    "LCD-I027": "16-bit values lie outside of the range given",
    "LCD-I030": "float pixels are out of range",
    "LCD-I031": "pixels are not finite",
    "LCD-I032": "an image in memory has a wrong shape or type",
    "LCD-I040": "a file is not a video that can be read, or is damaged",
    "LCD-I041": "a video ends before a frame",
    # data: layouts, paths, loading
    "LCD-L001": "a folder is missing or empty",
    "LCD-L002": "a folder has no known layout",
    "LCD-L003": "a folder has several layouts",
    "LCD-L004": "a split has no images that can be used",
    "LCD-P001": "images to predict on are not given or not found",
    "LCD-P002": "no image to predict on can be read",
    "LCD-P003": "files of kinds that are not read are passed over in prediction",
    "LCD-P004": "videos are to be read, and PyAV is not installed",
    "LCD-R001": "shared memory is too small for the workers",
    "LCD-S001": "a file name leads out of the dataset",
    # checkpoints and weights
    "LCD-C001": "a callback's state is not in a checkpoint",
    "LCD-K001": "a file is not a checkpoint of the kind asked for",
    "LCD-K002": "a checkpoint cannot be written",
    "LCD-K003": "a checkpoint is damaged",
    "LCD-K004": "the address of a checkpoint cannot be reached",
    "LCD-K010": "a weight file is of no known origin",
    "LCD-K011": "a weight file does not fit a detector here",
    "LCD-K012": "a weight file cannot be read",
    "LCD-K013": "a checkpoint holds a classifier instead of a detector, or the other way round",
    "LCD-K014": "a checkpoint does not fit the network",
    "LCD-K015": "a checkpoint does not hold the network that it describes",
    "LCD-K016": "a checkpoint was written by a subclass with a network of its own",
    "LCD-K017": "a checkpoint has other classes, and the heads begin anew",
    "LCD-K018": "tensors of a checkpoint are missing or left over",
    "LCD-K019": "a checkpoint would hold an object that cannot be read again",
    "LCD-K020": "only the detector of a subclass's checkpoint is read",
    "LCD-K022": "a checkpoint of an ensemble has other classes or channels than the others",
    "LCD-S010": "a checkpoint's path is an address",
    "LCD-S011": "a checkpoint would be read unsafely",
    "LCD-W001": "pretrained weights are not in the cache and cannot be fetched",
    "LCD-W002": "timm has no pretrained weights of that name",
    "LCD-W003": "a file of backbone weights cannot be read",
    "LCD-W004": "a file of backbone weights does not fit the backbone",
    # training and evaluation
    "LCD-C020": "nothing logs the metric that the best checkpoint goes by",
    "LCD-E001": "mAP is undefined",
    "LCD-E002": "an image has more objects than detections that count",
    "LCD-E010": "predictions are not finite",
    "LCD-M201": "images have more objects than the detector can match",
    "LCD-N001": "a loss or an output is not finite",
    "LCD-N002": "a weight is not finite",
    # export
    "LCD-X001": "an exported file finds other objects than the detector",
    "LCD-X002": "a detector cannot be exported as asked",
    "LCD-X003": "a package that exports need is not installed",
}
"""Meaning of every code that starts an error, a warning or a problem of a dataset, by room."""


class UserError(Exception):
    """A mistake in what a user has given; its message says how to mend it."""

    exit_status = 2


class ArgumentError(UserError, ValueError):
    """An argument or a combination of arguments cannot be used."""


class DataError(UserError, ValueError):
    """A dataset, an annotation file or an image cannot be used as it is."""

    exit_status = 3


class DivergenceError(UserError, FloatingPointError):
    """A loss or a weight is not finite."""

    exit_status = 4


class WeightsError(UserError, RuntimeError):
    """Pretrained weights cannot be fetched, read or fitted to the network."""

    exit_status = 5


class CheckpointError(UserError, ValueError):
    """A checkpoint is damaged, foreign, or does not fit the data it is used on."""

    exit_status = 6


class ExportError(UserError, RuntimeError):
    """An exported file does not compute what the detector computes."""

    exit_status = 7


def first_line(error: Exception) -> str:
    """The message of an error, on one line of at most 160 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
