"""``python -m lightning_convnext_det`` is ``convnext-det``."""

from lightning_convnext_det.cli.main import main

raise SystemExit(main())
