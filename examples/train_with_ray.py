"""Train a detector on several machines with Ray Train; the Trainer stays yours.

    python examples/train_with_ray.py DATASET --workers 2 [--gpu] [--epochs 12]

Ray starts one process per worker, on whatever machines its cluster has, and Lightning joins them to one run:
`RayDDPStrategy` and `RayLightningEnvironment` take ranks and addresses from Ray; `prepare_trainer` checks them. Each
worker reads the dataset itself: it must be at the same path on every machine. Needs ``pip install 'ray[train]'``.
"""

import argparse

import lightning.pytorch as pl
from ray.train import ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer

from lightning_convnext_det import DetectionDataModule, FasterRCNNModule


def train(options: dict) -> None:
    """Train in one worker; Ray calls it in each."""
    data = DetectionDataModule(options["root"], batch_size=options["batch_size"], num_workers=options["loaders"])
    network = {"backbone": options["backbone"], "pretrained_backbone": options["pretrained"]}
    model = FasterRCNNModule(num_classes=data.num_classes, class_names=data.class_names, **network)
    trainer = pl.Trainer(
        max_epochs=options["epochs"],
        limit_train_batches=options["batches"],
        accelerator="gpu" if options["gpu"] else "cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        default_root_dir=options["folder"],
        logger=False,
        enable_progress_bar=False,
    )
    prepare_trainer(trainer).fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"rank {trainer.global_rank} of {trainer.world_size}: {trainer.global_step} steps, {metrics}", flush=True)


def main() -> None:
    """Read the command line and start the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="dataset, at the same path on every machine")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batches", type=int, default=None, help="of each epoch (default: all)")
    parser.add_argument("--batch_size", type=int, default=2, help="of each worker")
    parser.add_argument("--loaders", type=int, default=2, help="processes of each worker that read images")
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--random_weights", dest="pretrained", action="store_false")
    parser.add_argument("--folder", default="runs", help="for checkpoints")
    options = parser.parse_args()
    scaling = ScalingConfig(num_workers=options.workers, use_gpu=options.gpu)
    TorchTrainer(train, train_loop_config=vars(options), scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
